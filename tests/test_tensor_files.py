"""Files of vectors, as safetensors itself reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from atm_fl.files import atomic_write
from atm_fl.vectors.tensor_files import save_vectors


def test_safetensors_reads_what_was_saved(tmp_path: Path) -> None:
    tensors = {"one": torch.randn(3, 5), "ö": torch.randn(0, 4), "scalar": torch.tensor(2.5), "last": torch.randn(7)}
    path = tmp_path / "x.safetensors"
    save_vectors(path, tensors, {"round": "3", "text": 'a "quoted" one'})
    actual = load_file(str(path))
    assert list(actual) == list(tensors)
    assert all(torch.equal(actual[name], tensor) for name, tensor in tensors.items())
    with safe_open(str(path), "pt") as file:
        assert file.metadata() == {"round": "3", "text": 'a "quoted" one'}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # so that float32 is aligned in a mapped file


@pytest.mark.parametrize("flush", [True, False])
def test_a_failure_leaves_the_old_file(tmp_path: Path, flush: bool) -> None:
    path = tmp_path / "x.safetensors"
    save_vectors(path, {"a": torch.ones(2)}, {})

    def broken() -> None:
        with atomic_write(path, flush) as temporary:
            temporary.write_bytes(b"half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        broken()
    assert torch.equal(load_file(str(path))["a"], torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
