"""A model card, made from the run alone: what the model is, how good, under which licences, and what it has cost."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from atm_fl import tasks
from atm_fl.errors import printable
from atm_fl.exports.formats import Format
from atm_fl.models import Backbone, Clip, LanguageModel, TextModel
from atm_fl.runs.report import Record
from atm_fl.settings import defaults
from atm_fl.tables import markdown

NOT_SHOWN = ("run-dir", "resume", "resume-from", "tasks", "metric-sinks")


def card(
    record: Record,
    number: int,
    name: str,
    format: Format,
    model: Backbone | TextModel,
    classes: Mapping[str, Sequence[str]],
    owner: str = "",
) -> str:
    """README.md of an export of the model after round `number`. classes: of the heads that are in it, by client.

    owner: the client whose private entries are in it; "" for none.
    """
    settings = record.settings
    return "\n".join(
        [
            "---",
            f"library_name: {format.library}",
            "license: other",
            "license_name: see-the-data",
            f"pipeline_tag: {_pipeline(model)}",
            "tags: [atm-fl, federated-learning, model-merging, task-vectors]",
            "---",
            f"# {_plain(name)}",
            "",
            f"One shared model of {len(record.tasks)} tasks, made by alternating tuning and merging (ATM, "
            f"[arXiv:2411.03055](https://arxiv.org/abs/2411.03055)) with atm-fl: after {number} of "
            f"{settings['rounds']} rounds each party had tuned it on its own data and sent its difference alone.",
            "",
            "```python",
            format.loads.replace("FOLDER", _plain(name)),
            "```",
            "",
            *_heads(name, model, classes),
            "## Base",
            "",
            f"`{_plain(settings['model'])}` with weights `{_plain(settings['weights'])}`, started from "
            f"`{_plain(settings['start'])}`; tuned: `{_plain(settings['trainable'])}`.",
            "",
            *_private(settings.get("private", ""), owner),
            "## Accuracy",
            "",
            *_accuracies(record, number),
            "",
            "## Data",
            "",
            markdown(("task", "source", "licence"), [_data(task) for task in _names(settings)]),
            "",
            "The weights are made from this data; what its licences ask for is for whoever uses them to heed.",
            "",
            "## Privacy",
            "",
            *(_privacy(record, owner)),
            "",
            "## How it was made",
            "",
            f"Merge `{_plain(settings['merge'])}`. Settings other than the defaults:",
            "",
            markdown(("setting", "value"), [(key, _plain(value)) for key, value in _changed(settings)]),
            "",
            "Versions: " + ", ".join(f"{key} {_plain(value)}" for key, value in record.config["versions"].items())
            + f". Run {_plain(record.config['run'])}.",
            "",
        ]
    )  # fmt: skip


def _plain(text: object) -> str:
    """A text of the run as plain words in Markdown, in a table's cell too: marks of Markdown and HTML are escaped."""
    shown = printable(str(text))
    return shown if re.fullmatch(r"[\w ./:=,+-]*", shown) else re.sub(r"([\\`*_\[\]<>|#!])", r"\\\1", shown)


def _names(settings: Mapping[str, object]) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in str(settings["tasks"]).split(",")))


def _data(task: str) -> tuple[str, str, str]:
    if task.startswith(tasks.HUB):
        return _plain(tasks.called(task)), f"the Hugging Face hub, {_plain(task)}", "see the data set's page"
    if "/" in task or task not in tasks.TASKS:
        return _plain(task.rstrip("/").rpartition("/")[2]), "a party's own folder", "not known to the run"
    entry = tasks.find(task)
    return _plain(task), _plain(entry.source), _plain(entry.licence)


def _accuracies(record: Record, number: int) -> Iterable[str]:
    """Before the first round and after this one, on every split that was measured."""
    rows = []
    splits = [split for split in ("validation", "test") if any(number in s for s in _series(record, split).values())]
    for task in record.tasks:
        cells = [_percent(_series(record, split)[task].get(when)) for split in splits for when in (0, number)]
        rows.append((_plain(task), *cells))
    means = [_percent(record.means(split).get(when), 1) for split in splits for when in (0, number)]
    if not splits:
        return ["Not measured after this round."]
    head = ("task", *(f"{split} %, {when}" for split in splits for when in ("start", f"round {number}")))
    return [markdown(head, [*rows, ("mean", *means)]), "", "Each party measured it on its own split with its own head."]


def _series(record: Record, split: str) -> dict[str, dict[int, float]]:
    return record.by_task("evaluation", split)


def _percent(value: float | None, factor: float = 100) -> str:
    return "–" if value is None else f"{factor * value:.1f}"


def _private(private: str, owner: str) -> Iterable[str]:
    if not private:
        return []
    whose = f"{_plain(owner)}'s own, which it has sent to nobody" if owner else "the pretrained model's"
    return [f"Each party has entries of its own, `{_plain(private)}`; in this model they are {whose}.", ""]


def _privacy(record: Record, owner: str) -> Iterable[str]:
    spent = record.epsilon_texts()
    if not spent:
        return ["No differential privacy: the weights may tell of single records of the data."]
    own = f" It does not cover the entries that are {_plain(owner)}'s own." if owner else ""
    return [f"Spent by the whole run: ε {_plain(text)}.{own}" for text in spent]


def _changed(settings: Mapping[str, object]) -> list[tuple[str, object]]:
    return [
        (key, value) for key, value in settings.items() if key not in NOT_SHOWN and defaults().get(key, value) != value
    ]


def _what(model: Backbone | TextModel) -> str:
    if isinstance(model, LanguageModel):
        return "the tokens of a prompt and of each class's answer, whose probabilities behind a text are compared"
    return (
        "logits = scale · normalised features · weightᵀ + bias, made of its party's data (of a head that has sentences "
        "in place of a weight, their features are it)"
    )


def _pipeline(model: Backbone | TextModel) -> str:
    """What Hugging Face's hub calls the kind of model."""
    if isinstance(model, Clip):
        return "zero-shot-image-classification"
    if isinstance(model, LanguageModel):
        return "text-generation"
    return "feature-extraction" if isinstance(model, TextModel) else "image-feature-extraction"


def _heads(name: str, model: Backbone | TextModel, classes: Mapping[str, Sequence[str]]) -> Iterable[str]:
    if not classes:
        return []
    rows = [(_plain(task), _plain(", ".join(names))) for task, names in classes.items()]
    given = 'texts=["…"]' if isinstance(model, TextModel) else '["picture.png"]'
    return [
        "## Classes",
        "",
        markdown(("task", "classes"), rows),
        "",
        f"`heads.safetensors` has a head for each task: {_what(model)}. atm-fl applies them:",
        "",
        "```python",
        "import atm_fl",
        "",
        f'classify = atm_fl.predictor("{_plain(name)}")',
        f'classify({given}, task="{_plain(next(iter(classes)))}")',
        "```",
        "",
    ]
