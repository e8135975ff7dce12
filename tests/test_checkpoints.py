"""Models as people have them: what can be merged is, as an oracle does it; what cannot is named for what it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from atm_fl import cli
from atm_fl.errors import SettingError
from atm_fl.merging import checkpoint_files, make_merge, merges
from atm_fl.merging.checkpoint_files import merge_files, prepare
from atm_fl.merging.checkpoint_lora import open_checkpoint
from atm_fl.merging.recipes import read_recipe
from atm_fl.merging.scaling import depths, factors, read_factors
from atm_fl.vectors import Layout, blocks


def tensors(seed: int) -> dict[str, Tensor]:
    """Four tensors of a small language model."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"embed_tokens.weight": (10, 4), "layers.0.w": (4, 4), "layers.1.w": (4, 4), "norm.weight": (4,)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def write(path: Path, state: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    return path


def merge(base: Path, files: list[Path], out: Path, *arguments: Any, **more: Any) -> list[str]:
    """What was said."""
    said: list[str] = []
    merge_files(base, files, out, *arguments, warn=said.append, **more)
    return said


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.safetensors", tensors(0))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / f"{name}.safetensors", tensors(seed)) for seed, name in enumerate("ab", 1)]


def average(name: str) -> Tensor:
    return (tensors(1)[name] + tensors(2)[name]) / 2


# What a file is


def test_a_file_of_which_most_names_match_nothing_is_refused(base: Path, tmp_path: Path, out: Path) -> None:
    partly = {name if name == "norm.weight" else f"module.{name}": each for name, each in tensors(1).items()}
    with pytest.raises(SettingError, match=r"3 of its 4 names are not in the base.*without the prefix 'module\.'"):
        merge(base, [write(tmp_path / "a.safetensors", partly)], out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234\n",
            "git-lfs pointer, not the file of 1234",
        ),
        (b"GGUF\x03\0\0\0" + bytes(64), "GGUF file, whose numbers are quantized"),
        (b"<!DOCTYPE html><html>not found</html>", "a web page"),
        (b"\x10\x27\0\0\0\0\0\0" + b'{"a": {"dtype"', "cut short: it ends within its header"),
        (b"PK\x03\x04" + bytes(200), "damaged, cut short"),
        (b"", "is not a safetensors file"),
    ],
)
def test_what_is_no_model_is_named_for_what_it_is(
    content: bytes, words: str, base: Path, tmp_path: Path, out: Path
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(SettingError, match=words):
        merge(base, [path], out)


def test_a_short_download_is_told_with_its_bytes(base: Path, files: list[Path], out: Path) -> None:
    size = files[0].stat().st_size
    files[0].write_bytes(files[0].read_bytes()[:-5])
    with pytest.raises(SettingError, match=f"cut short: {size - 5} of {size} bytes"):
        merge(base, files, out)


def test_quantized_models_are_refused_by_name(base: Path, tmp_path: Path, out: Path) -> None:
    state = tensors(1) | {"layers.0.w": tensors(1)["layers.0.w"].to(torch.float8_e4m3fn)}
    with pytest.raises(SettingError, match=r"layers\.0\.w is quantized \(fp8, F8_E4M3\)"):
        merge(base, [write(tmp_path / "a.safetensors", state)], out)
    folder = tmp_path / "model"
    write(folder / "model.safetensors", tensors(1))
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    with pytest.raises(SettingError, match="quantization_config"):
        merge(base, [folder], out)


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("this code ran",)


def test_files_of_torch_save_are_read_without_running_code(
    base: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.save(tensors(1), tmp_path / "a.pt")
    torch.save({"state_dict": tensors(2), "epoch": 3}, tmp_path / "b.ckpt")
    merge(base, [tmp_path / "a.pt", tmp_path / "b.ckpt"], out)
    for name, tensor in load_file(out).items():
        torch.testing.assert_close(tensor, average(name))
    torch.save({"state_dict": tensors(1), "more": Harmful()}, tmp_path / "c.pt")
    with pytest.raises(SettingError, match=r"c\.pt cannot be read as weights alone"):
        merge(base, [tmp_path / "c.pt"], out)
    assert "ran" not in capsys.readouterr().out
    torch.save({"epoch": 3}, tmp_path / "d.pt")
    with pytest.raises(SettingError, match="no state dict; it has epoch"):
        merge(base, [tmp_path / "d.pt"], out)


# Which tensors


def test_an_alias_of_the_base_follows_its_partner(tmp_path: Path, out: Path) -> None:
    def with_head(seed: int) -> dict[str, Tensor]:
        return tensors(seed) | {"lm_head.weight": tensors(seed)["embed_tokens.weight"].clone()}

    base = write(tmp_path / "base.safetensors", with_head(0))
    files = [write(tmp_path / "a.safetensors", tensors(1)), write(tmp_path / "b.safetensors", with_head(2))]
    said = merge(base, files, out)
    assert len(said) == 1
    assert "1 tied" in said[0]
    written = load_file(out)
    torch.testing.assert_close(written["embed_tokens.weight"], average("embed_tokens.weight"))
    assert torch.equal(written["lm_head.weight"], written["embed_tokens.weight"])


def test_a_config_ties_words_under_whichever_name_they_are_stored(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write(base / "model.safetensors", tensors(0))
    (base / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    renamed = tensors(1)
    renamed["lm_head.weight"] = renamed.pop("embed_tokens.weight")
    merge(base, [write(tmp_path / "a.safetensors", renamed)], tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(written["embed_tokens.weight"], tensors(1)["embed_tokens.weight"])


def test_tensors_are_chosen_by_patterns(base: Path, files: list[Path], out: Path, tmp_path: Path) -> None:
    save_file(tensors(1) | {"norm.weight": torch.ones(7)}, files[0])
    with pytest.raises(SettingError, match=r"norm\.weight has the shape \[7\], in the base \[4\].*--exclude"):
        merge(base, files, out)
    assert merge(base, files, out, exclude=["norm.*", "layers.1.*"]) == []
    written = load_file(out)
    for name in ("norm.weight", "layers.1.w"):
        assert torch.equal(written[name], tensors(0)[name])
    torch.testing.assert_close(written["layers.0.w"], average("layers.0.w"))
    merge(base, files, out, only=["layers.1.*"])
    written = load_file(out)
    torch.testing.assert_close(written["layers.1.w"], average("layers.1.w"))
    assert torch.equal(written["layers.0.w"], tensors(0)["layers.0.w"])
    for key in ("only", "exclude"):
        with pytest.raises(SettingError, match=f"{key}='heads' matches no entry"):
            merge(base, files, out, **{key: ["heads"]})


def test_rows_that_all_have_are_merged_if_asked(base: Path, files: list[Path], out: Path) -> None:
    longer = torch.cat([tensors(1)["embed_tokens.weight"], torch.ones(2, 4)])
    save_file(tensors(1) | {"embed_tokens.weight": longer}, files[0])
    save_file(tensors(2) | {"embed_tokens.weight": tensors(2)["embed_tokens.weight"][:8].clone()}, files[1])
    with pytest.raises(SettingError, match="--rows common"):
        merge(base, files, out)
    said = merge(base, files, out, rows="common")
    assert said == ["embed_tokens.weight: its first 8 of 10 rows are merged, which all have; the others are the base's"]
    written = load_file(out)["embed_tokens.weight"]
    torch.testing.assert_close(written[:8], average("embed_tokens.weight")[:8])
    assert torch.equal(written[8:], tensors(0)["embed_tokens.weight"][8:])


def test_classifiers_of_different_classes_are_not_averaged(tmp_path: Path, out: Path) -> None:
    base = write(tmp_path / "base.safetensors", tensors(0) | {"classifier.weight": torch.zeros(3, 4)})
    folders = []
    for seed, classes in enumerate(("cat", "car"), 1):
        folder = tmp_path / classes
        write(folder / "model.safetensors", tensors(seed) | {"classifier.weight": torch.randn(3, 4)})
        (folder / "config.json").write_text(json.dumps({"id2label": {"0": classes}}))
        folders.append(folder)
    with pytest.raises(SettingError, match=r"classifier\.weight are classifiers of .*--exclude classifier\.\*"):
        merge(base, folders, out)
    assert merge(base, folders, out, exclude=["classifier.*"]) == []
    (folders[0] / "config.json").unlink()
    assert merge(base, folders, out) == [
        "classifier.weight are merged: if they classify for different tasks, leave them out with --exclude"
    ]


@pytest.mark.parametrize("method", sorted(merges()))
def test_what_differs_nowhere_is_copied_whatever_it_holds(method: str, tmp_path: Path, out: Path) -> None:
    mask = torch.full((6, 6), -torch.inf).triu(1)
    odd = torch.tensor([torch.nan, -0.0, torch.inf, 5e-324], dtype=torch.float64).float()
    base = write(tmp_path / "base.safetensors", tensors(0) | {"mask": mask, "odd": odd})
    files = [write(tmp_path / f"{n}.safetensors", tensors(n) | {"mask": mask, "odd": odd}) for n in range(1, 6)]
    merge(base, files, out, method)
    written = load_file(out)
    assert torch.equal(written["mask"], mask)
    assert torch.equal(written["odd"].view(torch.int32), odd.view(torch.int32))


# Folders and shards


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and two models tuned from it, as transformers writes them, the base in shards."""
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    for number, name in enumerate(("base", "a", "b")):
        torch.manual_seed(number)
        model = LlamaForCausalLM(config)
        model.save_pretrained(folder / name, max_shard_size="20KB" if name == "base" else "1GB")
    (folder / "base" / "tokenizer.json").write_text("{}")
    (folder / "base" / "pytorch_model.bin").write_bytes(b"other weights")
    return folder / "base", [folder / "a", folder / "b"]


def test_shards_are_merged_into_shards_that_transformers_loads(llama: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, files = llama
    out = tmp_path / "merged"
    merge(base, files, out)
    shards = sorted(path.name for path in base.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*shards, "config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"]
    )
    for name in ("model.safetensors.index.json", "config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    states = [LlamaForCausalLM.from_pretrained(path).state_dict() for path in (out, *files)]
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, (states[1][name] + states[2][name]) / 2)
    with pytest.raises(SettingError, match="is there already"):
        merge(base, files, out)
    single = tmp_path / "one.safetensors"
    merge(base / "model.safetensors.index.json", files, single)
    together: dict[str, Tensor] = {}
    for shard in shards:
        together |= load_file(out / shard)
    assert all(torch.equal(tensor, together[name]) for name, tensor in load_file(single).items())


def test_a_lacking_shard_is_named(llama: tuple[Path, list[Path]], tmp_path: Path, out: Path) -> None:
    base, files = llama
    index = tmp_path / "damaged" / "model.safetensors.index.json"
    index.parent.mkdir()
    index.write_text((base / index.name).read_text())
    with pytest.raises(SettingError, match=r"model-00001-of-\d+\.safetensors is not a file"):
        merge(index.parent, files, out)
    index.write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    with pytest.raises(SettingError, match="not beside it"):
        merge(index.parent, files, out)


def test_an_output_folder_inside_an_input_is_refused(llama: tuple[Path, list[Path]]) -> None:
    base, files = llama
    for target in (base, base / "merged", files[0]):
        with pytest.raises(SettingError, match="inputs are never altered"):
            merge(base, files, target)


# Adapters


class Nested(nn.Module):
    """An embedding, a linear layer, a convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.linear = nn.Embedding(12, 8), nn.Linear(8, 6)
        self.conv, self.score = nn.Conv2d(3, 5, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.linear(self.words(x)))


def nested_base() -> nn.Module:
    torch.manual_seed(0)
    return Nested()


def gpt_base() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=2, n_head=2))


ADAPTERS = {
    "plain": (nested_base, {"target_modules": ["linear"]}),
    "rslora": (nested_base, {"target_modules": ["linear"], "use_rslora": True}),
    "embedding, convolution, bias, a head of its own": (
        nested_base,
        {"target_modules": ["linear", "words", "conv"], "modules_to_save": ["score"], "bias": "lora_only"},
    ),
    "patterns": (
        nested_base,
        {"target_modules": ["linear", "words"], "alpha_pattern": {"linear": 5}, "rank_pattern": {"words": 2}},
    ),
    "stored transposed": (gpt_base, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_merged_by_their_dense_difference_as_peft_makes_it(kind: str, tmp_path: Path, out: Path) -> None:
    make, settings = ADAPTERS[kind]
    mine = make().state_dict()
    base = write(tmp_path / "base.safetensors", {n: t.clone() for n, t in mine.items() if n != "lm_head.weight"})
    folders, dense = [], []
    for number in range(2):
        model = get_peft_model(make(), LoraConfig(r=4 - number, lora_alpha=7, **settings))  # type: ignore[arg-type]
        random = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=random)
        model.save_pretrained(tmp_path / str(number), save_embedding_layers=False)
        folders.append(tmp_path / str(number))
        dense.append(model.merge_and_unload().state_dict())
    said = merge(base, folders, out)
    assert [line for line in said if "classify" not in line] == []
    for name, tensor in load_file(out).items():
        torch.testing.assert_close(tensor, (dense[0][name] + dense[1][name]) / 2, rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(tensor, mine[name]) for name, tensor in load_file(out).items())


@pytest.mark.parametrize(("make", "modules", "flipped"), [(nested_base, ["linear"], False), (gpt_base, ["c_fc"], True)])
def test_a_merge_written_as_an_adapter_is_the_merge(
    make: Any, modules: list[str], flipped: bool, tmp_path: Path, out: Path
) -> None:
    mine = make().state_dict()
    base = write(tmp_path / "base.safetensors", {n: t.clone() for n, t in mine.items() if n != "lm_head.weight"})
    folders = []
    for number in range(2):
        model = get_peft_model(make(), LoraConfig(r=2, target_modules=modules, fan_in_fan_out=flipped))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / str(number))
        folders.append(tmp_path / str(number))
    merge(base, folders, out)
    said = merge(base, folders, tmp_path / "adapter", to="adapter", rank=4)
    assert "but for 0.00% of their norm" in said[-1]
    loaded = PeftModel.from_pretrained(make(), str(tmp_path / "adapter")).merge_and_unload().state_dict()
    for name, tensor in load_file(out).items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-4, atol=1e-5)
    less = merge(base, folders, tmp_path / "less", to="adapter", rank=1)
    assert 0.01 < float(less[-1].rpartition("for ")[2].partition("%")[0]) / 100 < 1


def test_an_adapter_holds_matrices_only(base: Path, files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"embed_tokens\.weight \[10, 4\] changes.*--exclude"):
        merge(base, files, tmp_path / "adapter", to="adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_that_does_not_fit_is_named(base: Path, tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "a"
    model = get_peft_model(nested_base(), LoraConfig(r=2, target_modules=["linear"]))
    model.save_pretrained(folder)
    with pytest.raises(SettingError, match=r"adapter of another model: linear\.weight are not in"):
        merge(base, [folder], out)
    with pytest.raises(SettingError, match="is a LoRA adapter: the base is the model"):
        merge(folder, [base], out)
    (folder / "adapter_config.json").rename(tmp_path / "config")
    with pytest.raises(SettingError, match="without its adapter_config.json"):
        merge(base, [folder / "adapter_model.safetensors"], out)
    for changed, words in {"use_dora": "DoRA", "peft_type": "IA3"}.items():
        settings = json.loads((tmp_path / "config").read_text())
        settings[changed] = "IA3" if changed == "peft_type" else True
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(SettingError, match=f"{words} adapter"):
            merge(base, [folder], out)


# Half precision in memory


@pytest.mark.parametrize("method", sorted(merges()))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_merged_in_float32_and_rounded_once(method: str, dtype: torch.dtype) -> None:
    layout = Layout(("w", "b"), ((6, 7), (5,)))
    random = torch.Generator().manual_seed(3)
    vectors = {name: torch.randn(layout.size, generator=random).to(dtype) for name in "abcde"}
    wide = make_merge(method, layout).combine({name: vector.float() for name, vector in vectors.items()})
    assert torch.equal(make_merge(method, layout).combine(vectors), wide.to(dtype))
    one_by_one = make_merge(method, layout)
    for name, vector in vectors.items():
        one_by_one.add(name, vector)
    torch.testing.assert_close(one_by_one.result(), wide.to(dtype), rtol=1e-2, atol=1e-3)


# Factors, progress, recipes


def test_names_with_commas_and_equals_signs_have_factors() -> None:
    assert read_factors("task-scaling", "a=1, \"b,c=d\"=2, 'e=f'=.5e1".replace(".5e1", "0.5e1")) == {
        "a": 1,
        "b,c=d": 2,
        "e=f": 5,
    }
    for wrong in ("a", "a=b=1", "=1", '"a=1', "a=1,,b=2"):
        with pytest.raises(SettingError, match="not of the form name=value"):
            read_factors("task-scaling", wrong)


def test_a_file_whose_name_has_a_comma_gets_its_factor(base: Path, files: list[Path], out: Path) -> None:
    odd = files[0].rename(files[0].with_name("lr=1e-3,wd=0.safetensors"))
    merge(base, [odd], out, task_scaling=read_factors("task-scaling", '"lr=1e-3,wd=0"=0'))
    assert torch.equal(load_file(out)["layers.0.w"], tensors(0)["layers.0.w"])


def test_gradients_go_from_the_first_layer_to_the_last() -> None:
    names = ["embed.weight", "layers.0.w", "layers.1.w", "layers.2.w", "norm.weight"]
    assert list(depths(names).values()) == [0, 0, 0.5, 1, 1]
    assert factors(names, [0.0, 1.0], "x") == [0, 0, 0.5, 1, 1]
    assert factors(names, {"layers.*": [2.0, 0.0, 4.0], "norm*": 3}, "x") == [1, 2, 0, 4, 3]
    for wrong in ([], "much", [1, float("nan")], True):
        with pytest.raises(SettingError, match="must be a finite number"):
            factors(names, wrong, "x")  # type: ignore[arg-type]


def test_progress_weighs_tensors_by_their_work(tmp_path: Path, out: Path) -> None:
    """A matrix of 300 x 300 takes a decomposition, a vector of as many elements an addition."""
    paths = []
    for seed in range(3):
        torch.manual_seed(seed)
        state = {"matrix": torch.randn(300, 300), **{f"v{n}": torch.randn(9000) for n in range(10)}}
        paths.append(write(tmp_path / f"{seed}.safetensors", state))
    shares: list[float] = []
    merge(paths[0], paths[1:], out, "tsv-m", progress=lambda stage, share: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert any(0.9 < share < 1 for share in shares[:2])  # the matrix comes first, and is most of the work
    shares.clear()
    merge(paths[0], paths[1:], out, "mean", progress=lambda stage, share: shares.append(share))
    assert any(0.4 < share < 0.6 for share in shares)


def test_a_recipe_does_what_the_calls_do(base: Path, files: list[Path], tmp_path: Path, out: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        """
        out = "merged.safetensors"
        [[step]]
        name = "first"
        base = "base.safetensors"
        models = ["a.safetensors", { path = "b.safetensors", weight = { "layers.*" = [0.0, 2.0] } }]
        method = "task-arithmetic"
        options = { scaling = 0.5 }
        [[step]]
        name = "second"
        base = "base.safetensors"
        models = ["first", "b.safetensors"]
        layer-scaling = { "norm.*" = 0.0 }
        exclude = ["embed*"]
        """
    )
    recipe = read_recipe(tmp_path / "recipe.toml")
    assert recipe.out == tmp_path / "merged.safetensors"
    recipe.run(out, lambda stage, share: None, lambda text: None)
    written, base_state, a, b = load_file(out), tensors(0), tensors(1), tensors(2)
    for name, weight in {"layers.0.w": 0.0, "layers.1.w": 2.0}.items():
        first = base_state[name] + 0.5 * ((a[name] - base_state[name]) + weight * (b[name] - base_state[name]))
        torch.testing.assert_close(written[name], (first + b[name]) / 2)
    for name in ("norm.weight", "embed_tokens.weight"):
        assert torch.equal(written[name], base_state[name])
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    lines = [line for plan in recipe.plans(lambda text: None) for line in plan.lines()]
    assert "layers.1.w F32 [4, 4]: task-arithmetic of a, b x 2" in lines
    assert "norm.weight F32 [4]: mean of first, b, then x 0".replace("first", "base") in lines
    assert "embed_tokens.weight F32 [10, 4]: as in the base (--exclude embed*)" in lines


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("methd = 'mean'", "the key 'methd' is unknown; did you mean 'method'"),
        ("base = 'base.safetensors'", "a step needs models, a list"),
        ("base = 'x'\nmodels = [{ file = 'a' }]", "neither a path"),
        ("base = 'x'\nmodels = ['a']\nseed = 'one'", "seed='one' must be a int"),
        ("base = 3 = 4", "cannot be read"),
    ],
)
def test_a_wrong_recipe_names_the_key(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(SettingError, match=words):
        read_recipe(path)


HEAD = (
    "base_model: base.safetensors\nmodels:\n- model: a.safetensors\n  parameters: {weight: 3}\n- model: b.safetensors\n"
)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        # (base, a, b): what mergekit's documentation says that each method computes
        ("merge_method: linear\n" + HEAD.replace("base_model: base.safetensors\n", ""), (0, 0.75, 0.25)),
        ("merge_method: task_arithmetic\n" + HEAD + "parameters: {lambda: 0.5}\n", (-1, 1.5, 0.5)),
        ("merge_method: task_arithmetic\n" + HEAD + "parameters: {normalize: true}\n", (0, 0.75, 0.25)),
        ("merge_method: dare_linear\ndtype: bfloat16\n" + HEAD + "parameters: {density: 1.0}\n", (-3, 3, 1)),
        ("merge_method: breadcrumbs\n" + HEAD + "parameters: {density: 1.0, gamma: 0.0}\n", (-3, 3, 1)),
    ],
)
def test_mergekits_yaml_means_the_same(
    text: str, weights: tuple[float, ...], base: Path, files: list[Path], tmp_path: Path, out: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    read_recipe(tmp_path / "recipe.yaml").run(out, lambda stage, share: None, lambda text: None)
    for name, tensor in load_file(out).items():
        states = [tensors(seed)[name] for seed in range(3)]
        expected = sum(weight * state for weight, state in zip(weights, states, strict=True))
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("merge_method: slerp\n" + HEAD, "merge_method='slerp': read are linear"),
        ("merge_method: ties\n" + HEAD, "ties weighs all models alike here"),
        ("merge_method: linear\nslices: []\n" + HEAD, "'slices' has no counterpart"),
        ("merge_method: task_arithmetic\ntokenizer_source: union\n" + HEAD, "the output has the base's tokenizer"),
        ("merge_method: task_arithmetic\nparameters: {epsilon: 1}\n" + HEAD, "'epsilon' of task_arithmetic"),
    ],
)
def test_what_mergekit_means_otherwise_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(SettingError, match=words):
        read_recipe(tmp_path / "recipe.yaml")


def test_mergekits_filters_and_gradients_are_factors(base: Path, files: list[Path], tmp_path: Path) -> None:
    weight = "[{filter: norm, value: 0.5}, {value: [0, 1]}]"
    (tmp_path / "recipe.yaml").write_text("merge_method: task_arithmetic\n" + HEAD.replace("3}", weight + "}"))
    (plan,) = read_recipe(tmp_path / "recipe.yaml").plans(lambda text: None)
    assert dict(zip(plan.plan.layout.names, plan.factors[0], strict=True)) == {
        "embed_tokens.weight": 0,
        "layers.0.w": 0,
        "layers.1.w": 1,
        "norm.weight": 0.5,
    }


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of `atm-fl merge` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["atm-fl", "merge", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_the_command_chooses_tensors_and_shows_it_dry(
    base: Path, files: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--base", base, "--exclude", "norm.*", "--exclude", "embed*", *files]
    assert call(monkeypatch, *arguments, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "layers.0.w F32 [4, 4]: mean of a, b" in lines
    assert len(lines) == 4
    assert not out.exists()
    assert call(monkeypatch, *arguments, "--out", out) == 0
    written = load_file(out)
    assert torch.equal(written["norm.weight"], tensors(0)["norm.weight"])
    torch.testing.assert_close(written["layers.0.w"], average("layers.0.w"))
    assert call(monkeypatch, *arguments) == 2
    assert "--out is missing" in capsys.readouterr().err


def test_the_command_takes_a_recipe_and_nothing_beside_it(
    base: Path, files: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe = base.parent / "recipe.toml"
    recipe.write_text("base = 'base.safetensors'\nmodels = ['a.safetensors', 'b.safetensors']\nout = 'x.safetensors'")
    assert call(monkeypatch, recipe, "--dry-run") == 0
    assert "norm.weight F32 [4]: mean of a, b" in capsys.readouterr().out
    assert call(monkeypatch, recipe) == 0
    torch.testing.assert_close(load_file(base.parent / "x.safetensors")["norm.weight"], average("norm.weight"))
    assert call(monkeypatch, recipe, "--out", out) == 0
    assert out.exists()
    for beside in (["--seed", "3"], ["--density", "0.5"], [files[0]], ["--to", "adapter"]):
        assert call(monkeypatch, recipe, *beside) == 2
        assert "remove" in capsys.readouterr().err


def test_entries_too_large_for_memory_are_merged_from_a_file(
    base: Path, files: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(base, files, out, "iso-c")
    monkeypatch.setattr(checkpoint_files, "IN_MEMORY", 0)
    monkeypatch.setattr(blocks, "BLOCK", 7)
    other = out.with_name("other.safetensors")
    merge(base, files, other, "iso-c")
    assert all(torch.equal(tensor, load_file(other)[name]) for name, tensor in load_file(out).items())


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "magnitude", "geometric-median", "clipped-mean"])
def test_files_of_few_magnitudes_merge_as_vectors_do_however_long(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Differences of bfloat16 numbers take few values, so that a quantile is shared by many elements."""
    state = {"a": torch.ones(400, 30), "b": torch.ones(3000), "c": torch.randn(5000)}
    tuned = [
        {name: (tensor + torch.randint(-9, 9, tensor.shape) * 2**-7).bfloat16() for name, tensor in state.items()}
        for _ in range(3)
    ]
    start = {name: tensor.bfloat16() for name, tensor in state.items()}
    base = write(tmp_path / "base.safetensors", start)
    files = [write(tmp_path / f"{n}.safetensors", each) for n, each in enumerate(tuned)]
    names = list(open_checkpoint(base).entries)
    layout = Layout(tuple(names), tuple(tuple(start[name].shape) for name in names))
    vectors = {
        str(n): torch.cat([(each[name].float() - start[name].float()).reshape(-1) for name in names])
        for n, each in enumerate(tuned)
    }
    merged = layout.views(make_merge(method, layout).combine(vectors))
    for number, (short, long) in enumerate([(blocks.SHORT, blocks.LONG), (0, blocks.LONG), (0, 0)]):
        monkeypatch.setattr(blocks, "SHORT", short)
        monkeypatch.setattr(blocks, "LONG", long)
        out = tmp_path / f"out{number}.safetensors"
        merge(base, files, out, method)
        for name, tensor in load_file(out).items():
            expected = (start[name].float() + merged[name]).bfloat16()
            torch.testing.assert_close(tensor, expected, rtol=1e-2, atol=1e-5)
            assert float((tensor != expected).float().mean()) < 0.001


def test_order_statistics_are_exact_by_whichever_way() -> None:
    random = torch.Generator().manual_seed(0)
    for vector in (
        torch.randn(5000, generator=random),
        torch.randint(-5, 5, (5000,), generator=random) / 8,
        torch.zeros(5000),
    ):
        ordered = vector.abs().sort().values
        ranks = [0, 17, 2500, 4990, 4999]
        assert blocks._by_bits(vector, ranks) == [float(ordered[rank]) for rank in ranks]
        (actual,) = blocks._bracketed([vector], ranks)
        assert actual is None or actual == [float(ordered[rank]) for rank in ranks]
    assert blocks._bracketed([torch.randint(-5, 5, (50000,), generator=random) / 8], [40000]) != [None]


def test_a_dry_run_reads_no_more_than_it_says(base: Path, files: list[Path], out: Path) -> None:
    ready = prepare(base, files, "ties", task_scaling={"a": 0.5}, only=["layers.*"])
    assert "layers.0.w F32 [4, 4]: ties of a x 0.5, b" in ready.lines()
    assert "norm.weight F32 [4]: as in the base (not among --only)" in ready.lines()
    assert len(ready.lines()) == len(open_checkpoint(base).entries)
    assert not out.exists()
