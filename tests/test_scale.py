"""Many parties: what grows with them, and what does not."""

from __future__ import annotations

import cProfile
import json
import resource
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_folder
from federation import in_process
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from atm_fl.clients import app as client
from atm_fl.clients.kept import LEAST, KeptParties
from atm_fl.federation.aggregation import COMPARED, by_task
from atm_fl.federation.bounds import too_long
from atm_fl.federation.loop import run_loop
from atm_fl.merging import make_merge, merges_of_sum
from atm_fl.runs.metrics import Followed, read_metrics
from atm_fl.settings import Settings
from atm_fl.tasks import Split
from atm_fl.vectors import Layout
from atm_fl.vectors.mapped import MappedVectors
from atm_fl.vectors.ring import Ring


@pytest.fixture
def many(config: dict[str, Any], tmp_path: Path) -> Any:
    """Settings of a round of so many parties, all with the same pictures: of two tasks, or each of its own."""
    data = make_folder(tmp_path / "pictures", 0, classes=2, images=3)

    def make(count: int, run: str, of_their_own: bool = False) -> Settings:
        places = []
        for number in range(count):
            name = f"task{number}" if of_their_own else ("red", "green")[number % 2]
            place = tmp_path / f"{count}" / f"{number}" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.is_symlink():
                place.symlink_to(data)
            places.append(str(place))
        return Settings.parse(
            {**config, "tasks": ",".join(places), "rounds": 1, "metric-sinks": "", "run-dir": str(tmp_path / run)}
        )

    return make


def test_the_work_of_a_party_does_not_grow_with_the_number_of_parties(many: Any) -> None:
    """By calls, which are the same on every machine: 155 of 300 seconds of 96 parties were the settings' checks."""

    def calls(count: int, run: str) -> float:
        settings, profile = many(count, run), cProfile.Profile()
        client._parties.clear()
        profile.runcall(in_process, settings)
        assert len(client._parties) == count  # each was made once
        return sum(entry.callcount for entry in profile.getstats()) / count

    calls(4, "imports")
    assert calls(80, "many") < 1.1 * calls(8, "few")


def party_of(images: int) -> Any:
    """What is kept of a party, with so many bytes of pictures in each split."""
    split = Split(torch.zeros(images, dtype=torch.uint8), torch.zeros(1))
    return SimpleNamespace(data=SimpleNamespace(split=lambda name: split))


def test_the_parties_that_were_asked_for_last_are_kept_as_far_as_their_data_have_room() -> None:
    made: list[int] = []
    kept = KeptParties(lambda number: made.append(number) or party_of(LEAST), most=3 * 3 * LEAST)  # type: ignore[func-returns-value]
    first = [kept(number) for number in (0, 1, 2)]
    assert [kept(number) for number in (0, 1, 2)] == first
    kept(0)
    kept(3)
    assert (len(kept), made) == (3, [0, 1, 2, 3])
    kept(0)
    assert made == [0, 1, 2, 3]
    kept(1)
    assert made == [0, 1, 2, 3, 1]
    large = KeptParties(lambda number: party_of(100 * LEAST), most=LEAST)
    assert large(0) is large(0)
    large(1)
    assert len(large) == 1


def test_small_parties_have_a_size_too() -> None:
    kept = KeptParties(lambda number: party_of(0), most=10 * LEAST)
    for number in range(50):
        kept(number)
    assert len(kept) == 10


def test_more_vectors_are_mapped_than_a_process_may_have_files() -> None:
    spill, count = MappedVectors(), 300
    for number in range(count):
        spill.add(f"{number}", torch.full((5,), float(number)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        vectors = spill.vectors()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    spill.close()
    assert [float(vector.mean()) for vector in vectors.values()] == list(range(count))


def test_a_map_may_be_larger_than_the_memory() -> None:
    """A sparse file of 4 TiB, of which two elements are looked at."""
    spill = MappedVectors()
    spill.add("first", torch.tensor([1.0]))
    hole = 2**40 - 1
    spill._file.seek(4 * hole, 1)
    spill._parts["hole"] = (spill._parts["first"][0], hole)
    spill.add("last", torch.tensor([2.0]))
    vectors = spill.vectors()
    assert (float(vectors["first"]), float(vectors["last"]), float(vectors["hole"][hole // 2])) == (1.0, 2.0, 0.0)
    spill.close()


def test_means_of_a_task_s_clients_are_the_same_from_a_file(settings: Settings) -> None:
    held = replace(settings, tasks="./a/red,./blue,./b/red,./c/red,./b/green,./a/green")
    random = torch.Generator().manual_seed(0)
    vectors = {name: torch.randn(700_000, generator=random) for name in held.party_names}
    images = {name: float(3 + place) for place, name in enumerate(held.party_names)}
    here, spilled = by_task(vectors, images, held), by_task(vectors, images, held, MappedVectors())
    assert list(here) == list(spilled) == ["red", "blue", "green"]
    assert all(torch.equal(here[task], spilled[task]) for task in here)
    weighted = sum(images[name] * vectors[name].double() for name in ("red", "red.2", "red.3"))
    expected = weighted / sum(images[name] for name in ("red", "red.2", "red.3"))
    assert torch.allclose(here["red"].double(), expected, rtol=1e-6)
    one = by_task({"blue": vectors["blue"]}, images, held, MappedVectors())
    assert list(one) == ["blue"]


def test_cosines_of_many_tasks_are_those_of_some(many: Any) -> None:
    few = run_loop(many(3, "few", of_their_own=True)).directory
    (line,) = (line for line in read_metrics(few) if line["kind"] == "merge")
    assert "cosines_of" not in line
    assert len(line["cosines"]) == 3
    directory = run_loop(many(COMPARED + 6, "run", of_their_own=True)).directory
    (line,) = (line for line in read_metrics(directory) if line["kind"] == "merge")
    assert len(line["tasks"]) == COMPARED + 6
    assert len(line["cosines"]) == len(line["cosines"][0]) == len(set(line["cosines_of"])) == COMPARED
    assert set(line["cosines_of"]) < set(line["tasks"])


@settings_of_hypothesis(max_examples=60)
@given(st.lists(st.floats(0, 10, width=16), min_size=1, max_size=9), st.floats(0, 3, width=16))
def test_a_vector_is_measured_by_the_median_of_the_others(norms: list[float], past: float) -> None:
    named, base, factor = {f"{place}": norm for place, norm in enumerate(norms)}, 0.5, 2.0
    expected = set()
    for name, norm in named.items():
        others = [other for another, other in named.items() if another != name]
        usual = max(past, median(others) if others else 0.0) or base
        expected |= {name} if norm > max(factor * usual, base) else set()
    assert too_long(named, past, base, factor).keys() == expected


def test_a_file_of_metrics_is_followed_line_by_line(tmp_path: Path) -> None:
    path, followed = tmp_path / "metrics.jsonl", Followed(tmp_path)
    lines = [json.dumps({"kind": "warning", "round": number, "text": "ü"}) + "\n" for number in range(5)]

    def seen() -> list[int]:
        return [line["round"] for line in followed.lines]

    path.write_text("".join(lines[:2]) + lines[2][:9])
    assert (followed.look(), seen()) == (True, [0, 1])
    assert not followed.look()
    with path.open("a") as file:
        file.write(lines[2][9:] + "no line\n" + lines[3])
    assert (followed.look(), seen()) == (True, [0, 1, 2, 3])
    other = tmp_path / "other"
    other.write_text(lines[4])
    other.replace(path)
    assert (followed.look(), seen()) == (True, [4])


@pytest.mark.parametrize("name", merges_of_sum())
def test_a_merge_of_the_sum_may_be_made_in_a_tree(name: str) -> None:
    """To the same bits where vectors are whole numbers, whose sums are exact; within rounding where they are floats."""
    layout, random = Layout(("matrix", "bias"), ((6, 4), (5,))), torch.Generator().manual_seed(0)
    vectors = [torch.randn(layout.size, generator=random) / 10 for _ in range(10)]
    merge, ring = make_merge(name, layout), Ring(1.0, len(vectors))
    words = [ring.encode(vector) for vector in vectors]
    groups = [words[:3], words[3:4], words[4:9], words[9:]]
    sums = [np.sum(group, axis=0, dtype=words[0].dtype) for group in groups]
    sums = [sums[0] + sums[2], sums[3] + sums[1]]  # a second level, in another order
    factor = merge.sum_factor(len(vectors))
    flat, tree = (
        merge.from_sum(ring.decode(np.sum(parts, axis=0, dtype=words[0].dtype), factor), len(vectors))
        for parts in (words, sums)
    )
    assert torch.equal(flat, tree)
    of_floats = torch.stack([torch.stack(vectors[:5]).sum(0), torch.stack(vectors[5:]).sum(0)]).sum(0)
    together = make_merge(name, layout).combine({f"{place}": vector for place, vector in enumerate(vectors)})
    assert torch.allclose(merge.from_sum(of_floats * factor, len(vectors)), together, rtol=1e-4, atol=1e-6)
