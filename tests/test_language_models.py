"""Causal language models: what they say of a text's class is transformers' own, and a run of them is as any other."""

from __future__ import annotations

import csv
import io
import re
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import call, in_process
from safetensors.torch import load_file
from test_text_models import settings as settings_of_texts
from test_texts import ROWS, write
from torch import Tensor, nn

from atm_fl import models
from atm_fl.errors import SettingError
from atm_fl.experiments.joint import run_joint
from atm_fl.exports import Predictor, export
from atm_fl.federation.client import Party
from atm_fl.federation.loop import run_loop
from atm_fl.models.flops import operations
from atm_fl.privacy.dp_sgd import record_gradients
from atm_fl.settings import Settings
from atm_fl.tasks.texts import appended, token_table, tokenise

transformers = pytest.importorskip("transformers")
WORDS = "<unk> <s> </s> a text about cats dogs the th , . good bad This is new text".split()
LEARNING = {"rounds": 3, "local-epochs": 8.0, "learning-rate": 3e-3}
TEXTS = ["a text about cats", "dogs", "the cats, the dogs, a text about the text"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random models as transformers saves them, each with a tokenizer of a dozen words.

    A Llama, whose tokenizer marks beginnings, and a GPT-2, whose first layer's weights are its last's too.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing

    words = list(dict.fromkeys(WORDS))
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    gpt2 = transformers.GPT2Config(
        vocab_size=len(words), n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.2
    )
    made = {"llama": transformers.LlamaForCausalLM(llama), "gpt2": transformers.GPT2LMHeadModel(gpt2)}
    places = {}
    for name, model in made.items():
        places[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(places[name])
        tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = BertPreTokenizer()
        if name == "llama":
            tokenizer.post_processor = TemplateProcessing(
                single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
            )
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        ).save_pretrained(places[name])
    return places


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATM_FL_CACHE", str(tmp_path / "cache"))


def settings(folder: Path, tmp_path: Path, **more: Any) -> Settings:
    """The federation of the tests of encoders, with a language model that answers."""
    return settings_of_texts(folder, tmp_path, **{"model": "causal-lm/tiny", "head": "answers", **more})


def theirs(folder: Path, tokens: list[int], answer: list[int]) -> float:
    """log P(answer | tokens) by transformers, of one row without padding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        told = model(torch.tensor([[*tokens, *answer]])).logits[0].log_softmax(-1)
    return sum(float(told[len(tokens) + place - 1, token]) for place, token in enumerate(answer))


def unpadded(row: Tensor) -> list[int]:
    return [token - 1 for token in row.tolist() if token]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logits_and_loss_are_transformers_log_probabilities(name: str, folders: dict[str, Path]) -> None:
    model = models.load_backbone("causal-lm/tiny", str(folders[name]))
    sentences = [["This is new."], ["This is the cats, the dogs."], ["This is a."]]
    source = models.HeadSource(model, None, ("new", "pets", "a"), sentences, "", "", 5, 0)  # type: ignore[arg-type]
    head = models.HEADS["answers"](source)
    assert isinstance(head, models.Answers)
    words = list(dict.fromkeys(WORDS))
    assert [words[token] for token in unpadded(head.prompt)] == ["This", "is"]
    assert [words[token] for token in unpadded(head.answers[0])] == ["new", ".", "</s>"]
    texts = tokenise(TEXTS, model.tokenizer)
    assert [words[row[0]] for row in map(unpadded, texts)] == [
        "<s>" if name == "llama" else row.split()[0] for row in TEXTS
    ]
    expected = torch.tensor(
        [
            [theirs(folders[name], unpadded(row) + unpadded(head.prompt), unpadded(answer)) for answer in head.answers]
            for row in texts
        ]
    )
    with torch.inference_mode():
        torch.testing.assert_close(head.logits(model, texts), expected, atol=1e-4, rtol=1e-4)
        labels = torch.tensor([2, 0, 1])
        right = expected[torch.arange(3), labels]
        torch.testing.assert_close(head.loss(model, texts, labels), -right.mean(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(head.loss(model, texts, labels, "sum"), -right.sum(), atol=1e-4, rtol=1e-4)
        # It says no class but an answer: the loss is no cross-entropy over three of them.
        assert head.loss(model, texts, labels) > torch.tensor(3.0).log() * 1.5
    again = models.restored(head.state())
    assert torch.equal(again.prompt, head.prompt)  # type: ignore[attr-defined]
    assert torch.equal(again.answers, head.answers)  # type: ignore[attr-defined]


def test_what_follows_a_text_follows_its_last_token() -> None:
    texts, more = torch.tensor([[3, 4, 0], [0, 0, 0], [5, 6, 7]]), torch.tensor([[1, 2], [1, 0], [8, 9]])
    wanted = [[3, 4, 1, 2, 0], [1, 0, 0, 0, 0], [5, 6, 7, 8, 9]]
    assert appended(texts, more).tolist() == wanted


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_run_learns_to_answer_and_is_the_same_over_flower(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    plain = run_loop(settings(folders[name], tmp_path, **LEARNING))
    other = in_process(settings(folders[name], tmp_path, **LEARNING, **{"run-dir": str(tmp_path / "flower")}))
    assert torch.equal(plain.base, other.base)
    for task in plain.settings.task_names:
        party = Party(plain.settings, task)
        first = party.evaluate(party.model.pretrained, ("test",))["test"]
        last = party.evaluate(plain.base, ("test",))["test"]
        assert last > 0.9 > 0.75 > first, (task, first, last)


@pytest.mark.parametrize(
    "more",
    [
        {"trainable": "lora", "codec-up": "low-rank:rank=8"},
        {"trainable": "last-1", "merge": "tsv-m"},
        {"private": "last-1", "trainable": "last-2"},
        {"secure-aggregation": True, "proportion": 0.0},
        {"gradient-checkpointing": True, "accumulate": 2},
        {"precision": "bf16", "keep-optimizer": True},
        {"privacy": "dp-sgd", "dp-noise": 1.0},
        {"privacy": "dp-sgd", "dp-noise": 1.0, "trainable": "lora"},
        {"split": "validation", "alignment": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_a_run_of_encoders_can_do_one_of_language_models_can(
    name: str, more: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    if "secure-aggregation" in more:
        more = more | {"tasks": ",".join([*settings(folders[name], tmp_path).task_names, str(tmp_path / "a.csv")])}
        write(tmp_path / "a.csv", ROWS)
    run = run_loop(settings(folders[name], tmp_path, rounds=1, **more))
    assert bool(run.base.isfinite().all())
    moved = run.base != Party(run.settings, run.settings.task_names[0]).model.pretrained
    assert moved.float().mean() > 0.3


def test_lora_is_of_the_blocks_matrices_and_what_travels_has_its_rank(folders: dict[str, Path], tmp_path: Path) -> None:
    run = settings(folders["llama"], tmp_path, trainable="lora", **{"lora-rank": 2})
    party = Party(run, run.task_names[0])
    layout = party.model.layout
    assert {name.split(".")[-2] for name in layout.names} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    }
    update = party.train(party.model.pretrained, 1)
    assert update.arrays is not None
    vector = party.settings.uplink.decode(update.arrays, layout)
    assert {int(torch.linalg.matrix_rank(entry, rtol=1e-4)) for entry in layout.views(vector).values()} == {2}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dp_sgd_takes_each_text_s_own_gradient(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    run = settings(folders[name], tmp_path, privacy="dp-sgd", **{"dp-noise": 1.0})
    party = Party(run, run.task_names[0])
    model = party.model
    model.load(model.pretrained)
    # One of two texts is longer: of a record alone what fills it up must not count.
    texts = torch.tensor([[2, 5, 6, 7, 8], [4, 9, 0, 0, 0]], dtype=torch.int32)
    labels = torch.tensor([0, 1])
    together = record_gradients(model.module, party.head, model.layout, model.shared, texts, labels)
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        assert model.flat.grad is not None
        model.flat.grad.zero_()
        party.head.loss(model.module, text[None, : int((text > 0).sum())], label[None]).backward()
        torch.testing.assert_close(together[row], model.flat.grad, atol=1e-5, rtol=1e-4)


def test_the_guides_configuration_runs(folders: dict[str, Path], tmp_path: Path) -> None:
    guide = (Path(__file__).parents[1] / "docs" / "tutorials" / "own-model.md").read_text()
    (text,) = re.findall(r"```toml\n(# smollm.toml\n.*?)```", guide, re.DOTALL)
    written = tomllib.loads(text)
    assert Settings.parse(written).head == "answers"
    tiny = settings(folders["llama"], tmp_path).as_config()
    run = run_loop(
        Settings.parse(written | {key: tiny[key] for key in ("weights", "tasks", "run-dir")} | {"rounds": 1})
    )
    assert bool(run.base.isfinite().all())
    model = models.load_backbone("causal-lm/tiny", str(folders["llama"]))
    forward, both = operations(model, *model.example())
    assert both > 2 * forward > 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_joint_training_tunes_one_model_on_all_answers(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    run = settings(folders[name], tmp_path, **LEARNING | {"rounds": 16, "local-epochs": 1.0})
    for party in run_joint(run):
        assert party.rightly["test"].float().mean() > 0.9


def test_what_a_language_model_is_no_head_for_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    for head in ("prototypes", "linear-probe"):
        with pytest.raises(SettingError, match=f"head='{head}': model='causal-lm/tiny' gives answers and no features"):
            run_loop(settings(folders["llama"], tmp_path, head=head))
    with pytest.raises(SettingError, match="head='answers': .* gives features and no answers; choose another head, or"):
        run_loop(settings(folders["llama"], tmp_path, model="transformers/tiny"))
    with pytest.raises(SettingError, match="shots=3: it needs head='prototypes'"):
        settings(folders["llama"], tmp_path, shots=3)
    with pytest.raises(SettingError, match="'digits' is of images, which the model does not read"):
        run_loop(settings(folders["llama"], tmp_path, tasks="digits"))


def test_classes_that_the_model_cannot_tell_apart_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [(text, label.replace("dogs", "hamsters").replace("cats", "snakes")) for text, label in ROWS]
    with pytest.raises(SettingError, match="tokens of class 'hamsters' begin those of 'snakes'.*other words"):
        run_loop(settings(folders["llama"], tmp_path, tasks=str(write(tmp_path / "odd.csv", rows))))


def test_what_is_no_language_model_or_reads_too_little_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    bert = transformers.BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=1)
    transformers.BertModel(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(SettingError, match="model='causal-lm/bert' is no causal language model, but a BertLMHeadModel"):
        models.load_backbone("causal-lm/bert", str(tmp_path / "bert"))
    model = models.load_backbone("causal-lm/tiny", str(folders["gpt2"]))
    with pytest.raises(SettingError, match="reads 128 tokens at most, which are to be 64 of a text and 101 of a class"):
        model.answers(["cats " * 100])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_transformers_loads_the_export_and_predict_answers_as_the_party_does(
    name: str,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = run_loop(settings(folders[name], tmp_path, rounds=1, trainable="lora"))
    party = Party(run.settings, run.settings.task_names[1])
    party.model.load(run.base)
    texts = ["good the 7th text", "a text about bad dogs"]
    inputs = tokenise(texts, party.model.module.tokenizer)
    with torch.inference_mode():
        wanted = party.head.logits(party.model.module, inputs).softmax(-1)
    export(run.directory, "transformers", tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = transformers.AutoModelForCausalLM.from_pretrained(folders[name])
    assert loaded.config.architectures == before.config.architectures
    state = {f"lm.{key}": value for key, value in loaded.state_dict().items()}
    for key, value in run.layout.views(run.base).items():
        assert torch.equal(state[key], value)
        assert not torch.equal(state[key], before.state_dict()[key.removeprefix("lm.")])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    said = tokenizer(["a text about"], return_tensors="pt", add_special_tokens=False)
    assert loaded.generate(**said, max_new_tokens=3, do_sample=False, pad_token_id=2).shape[1] > 3
    assert "AutoModelForCausalLM" in (tmp_path / "out" / "README.md").read_text()

    arguments = ["--text", texts[0], "--text", texts[1], "--task", "moods.jsonl"]
    assert call(monkeypatch, "predict", str(tmp_path / "out"), *arguments) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["text"] for row in rows] == [texts[0]] * 2 + [texts[1]] * 2
    for place, row in enumerate(rows):
        expected = float(wanted[place // 2, ["bad", "good"].index(row["class"])])
        assert float(row["probability"]) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(SettingError, match="picture.png: the model reads texts and no pictures; give --text"):
        Predictor(tmp_path / "out")(["picture.png"])
    with pytest.raises(SettingError, match="to='timm': model='causal-lm/tiny' reads texts; choose transformers"):
        export(run.directory, "timm", tmp_path / "timm")
    vector = export(run.directory, "task-vector", tmp_path / "vector").folder / "task_vector.safetensors"
    differences = load_file(vector)
    for key, value in loaded.state_dict().items():
        if key in differences:  # a weight that is another's too is there once
            assert torch.equal(differences[key], value - before.state_dict()[key])
    assert len(differences) >= len(run.layout.names)


def test_an_export_starts_the_next_run(folders: dict[str, Path], tmp_path: Path) -> None:
    run = run_loop(settings(folders["llama"], tmp_path, rounds=1))
    out = export(run.directory, "transformers", tmp_path / "out").folder
    again = settings(out, tmp_path, rounds=1, **{"run-dir": str(tmp_path / "again")})
    assert torch.equal(Party(again, again.task_names[0]).model.pretrained, run.base)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    key = "bytes"

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()[:64]) for text in texts]


class Own(nn.Module):
    """Anyone's language model, of no library: it says the next byte by the one before it and the text's first."""

    image_size = 0

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = Bytes()
        self.first, self.last, self.out = nn.Embedding(257, 32), nn.Embedding(257, 32), nn.Linear(32, 257)

    def answers(self, sentences: Sequence[str]) -> Tensor:
        return torch.from_numpy(token_table([f"\n{each}\0" for each in sentences], self.tokenizer))

    def forward(self, texts: Tensor, answers: Tensor) -> Tensor:
        both, begin = appended(texts, answers), (texts > 0).sum(1, keepdim=True)
        place = torch.arange(both.shape[1])
        told = (
            self.out(self.first(both[:, :1]) * self.last(both))
            .log_softmax(-1)[:, :-1]
            .gather(2, both[:, 1:, None].long())[..., 0]
        )
        return torch.where((place[1:] >= begin) & (both[:, 1:] > 0), told, 0.0).sum(1)


def test_a_language_model_of_ones_own_is_tuned_by_its_own_loss(tmp_path: Path) -> None:
    models.backbone("own_lm")(Own)
    try:
        more = {"rounds": 2, "learning-rate": 0.03, "local-epochs": 3.0, "proportion": 0.0}
        run = settings(Path(), tmp_path, model="own_lm", weights="pretrained", **more)
        private = replace(run, run_dir=str(tmp_path / "private"), privacy="dp-sgd", dp_noise=0.01)
        for done in (run_loop(run), run_loop(private)):
            party = Party(run, run.task_names[1])
            assert isinstance(party.head, models.Answers)
            first, last = (party.evaluate(base, ("test",))["test"] for base in (party.model.pretrained, done.base))
            assert last > 0.9 > first
        with pytest.raises(SettingError, match="model='own_lm' is a module of your own, which no library loads"):
            export(run.run_dir, "safetensors", tmp_path / "out")
    finally:
        models.BACKBONES.pop("own_lm")
