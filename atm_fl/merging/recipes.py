"""Recipes: a merge of files, or several in a row, written down. Ours is TOML; mergekit's YAML is read where it means
the same here.

    base = "base"                     # paths are relative to the recipe's folder
    out = "merged"
    method = "ties"
    options = { density = 0.3 }
    layer-scaling = { "*.mlp.*" = 1.5, "*" = [0.2, 1.0] }       # several: a gradient from the first layer to the last
    exclude = ["classifier.*"]
    models = ["a", { path = "b", weight = 0.5 }, { path = "c", weight = { "*.attn.*" = 2.0 } }]

Or `[[step]]`, several times, each with a `name` besides these; a later step's base or model may be an earlier one's
name. The last one's result is written to `out`.
"""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from atm_fl.errors import SettingError, did_you_mean
from atm_fl.merging.checkpoint_files import Merged, Progress, Ready, merge_files, prepare, task_names

KEYS = ("base", "models", "method", "options", "layer-scaling", "seed", "only", "exclude", "rows", "to", "rank")
"""The keys of a step, beside `name`."""


@dataclass(frozen=True)
class Step:
    """One merge. base, models: paths, or names of earlier steps; more: `merge_files`' other arguments."""

    name: str
    base: str | Path
    models: list[str | Path]
    weights: list[Any]
    more: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """Merges in their order; out: where the last one's result goes, if the recipe says so."""

    steps: list[Step]
    out: Path | None

    def run(self, out: Path, progress: Progress, warn: Callable[[str], object]) -> Merged:
        """Do it. Results of all steps but the last are rounded to their base's dtype, and are gone at the end."""
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".atm-fl-", dir=out.parent) as folder:
            results: dict[str | Path, Path] = {}
            for number, step in enumerate(self.steps):
                last = number == len(self.steps) - 1
                start = results.get(step.base, Path(step.base))
                models = [results.get(each, Path(each)) for each in step.models]
                name = step.name if start.is_dir() else f"{step.name}.safetensors"
                target = out if last else Path(folder) / name

                def share(stage: str, done: float, number: int = number, step: Step = step) -> None:
                    text = f"{step.name}: {stage}" if len(self.steps) > 1 else stage
                    progress(text, (number + done) / len(self.steps))

                merged = merge_files(start, models, target, progress=share, warn=warn, **_arguments(step, models))
                results[step.name] = target
        return merged

    def plans(self, warn: Callable[[str], object]) -> list[Ready]:
        """Each step, checked and not computed; the result of an earlier one is taken to be like its base."""
        like: dict[str | Path, Path] = {}
        plans = []
        for step in self.steps:
            base = like.get(step.base, Path(step.base))
            models = [like.get(each, Path(each)) for each in step.models]
            arguments = {key: value for key, value in _arguments(step, models).items() if key not in ("to", "rank")}
            plans.append(prepare(base, models, warn=warn, **arguments))
            like[step.name] = base
        return plans


def _arguments(step: Step, models: list[Path]) -> dict[str, Any]:
    pairs = zip(task_names(models), step.weights, strict=True)
    return step.more | {"task_scaling": {task: weight for task, weight in pairs if weight != 1}}


def read_recipe(path: Path) -> Recipe:
    """A recipe, TOML or mergekit's YAML by its ending. SettingError, which names the key, if it cannot work."""
    try:
        text = path.read_text()
        content = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise SettingError(f"{path} is no recipe: it has no keys")
    if path.suffix != ".toml":
        return Recipe([_from_mergekit(path, content)], None)
    tables = content.pop("step", None)
    out = content.pop("out", None)
    if tables is None:
        tables = [{"name": "merge", **content}]
    elif content:
        raise SettingError(f"{path}: {next(iter(content))!r} belongs into a [[step]], beside which there is only out")
    names: list[str] = []
    steps = []
    for table in tables:
        steps.append(_step(path, table, names))
        names.append(steps[-1].name)
    if not steps:
        raise SettingError(f"{path} has no step")
    return Recipe(steps, path.parent / out if out else None)


def _step(path: Path, table: Mapping[str, Any], earlier: list[str]) -> Step:
    """A step from its table."""
    for key in table:
        if key not in (*KEYS, "name"):
            raise SettingError(f"{path}: the key {key!r} is unknown{did_you_mean(key, KEYS)}")
    needed: dict[str, type] = {"name": str, "base": str, "models": list}
    for key, kind in needed.items():
        if not isinstance(table.get(key), kind) or not table[key]:
            raise SettingError(f"{path}: a step needs {key}, a {'list' if kind is list else 'text'}")
    kinds: dict[str, type] = {"options": dict, "layer-scaling": dict, "only": list, "exclude": list}
    kinds |= {"method": str, "seed": int, "rank": int}
    for key, kind in kinds.items():
        if key in table and not isinstance(table[key], kind):
            raise SettingError(f"{path}: {key}={table[key]!r} must be a {kind.__name__}")
    name = table["name"]
    if name in earlier or Path(name).name != name:
        raise SettingError(f"{path}: name={name!r} is taken, or is no plain name")

    def place(text: str) -> str | Path:
        return text if text in earlier else path.parent / text

    models: list[str | Path] = []
    weights: list[Any] = []
    for item in table["models"]:
        model = {"path": item} if isinstance(item, str) else item
        if not isinstance(model, dict) or not isinstance(model.get("path"), str) or set(model) - {"path", "weight"}:
            raise SettingError(f"{path}: models: {item!r} is neither a path nor {{ path = …, weight = … }}")
        models.append(place(model["path"]))
        weights.append(model.get("weight", 1))
    more = {key.replace("-", "_"): table[key] for key in KEYS[2:] if key in table and key != "options"}
    chosen = {key.replace("-", "_"): value for key, value in table.get("options", {}).items()}
    return Step(name, place(table["base"]), models, weights, more | {"chosen": chosen})


IGNORED = ("int8_mask", "dtype", "out_dtype", "lazy_unpickle", "chat_template")
"""Keys of mergekit's that say how it computes or stores, not what; the result has the base's dtype here."""


def _from_mergekit(path: Path, content: dict[str, Any]) -> Step:
    """A step from mergekit's YAML. SettingError for what means something else here, or nothing."""

    def refuse(what: str) -> SettingError:
        return SettingError(f"{path}: {what}")

    known = ("merge_method", "base_model", "models", "parameters", "name", "tokenizer_source", *IGNORED)
    if unknown := [key for key in content if key not in known]:
        raise refuse(f"{unknown[0]!r} has no counterpart here (of mergekit's, models of one shape can be merged)")
    if content.get("tokenizer_source") not in (None, "base"):
        raise refuse("tokenizer_source: the output has the base's tokenizer; remove it or write base")
    shared = dict(content.get("parameters") or {})
    method, base = content.get("merge_method"), content.get("base_model")
    methods = ("linear", "task_arithmetic", "ties", "dare_linear", "breadcrumbs", "model_stock")
    if method not in methods:
        raise refuse(f"merge_method={method!r}: read are {', '.join(methods)}")
    models, weights, tables = [], [], []
    for item in content.get("models") or []:
        if not isinstance(item, dict) or not isinstance(item.get("model"), str):
            raise refuse(f"models: {item!r} has no model")
        parameters = shared | (item.get("parameters") or {})
        if item["model"] == base and method != "linear":
            continue  # mergekit's examples list the base without parameters
        models.append(path.parent / item["model"])
        weights.append(parameters.pop("weight", 1.0))
        tables.append(parameters)
    if not models or (base is None and method != "linear"):
        raise refuse("it needs models and a base_model")

    def one(key: str, default: Any) -> Any:
        """A parameter that all models have alike."""
        values = [table.get(key, default) for table in tables]
        if any(value != values[0] for value in values) or not isinstance(values[0], (int, float)):
            raise refuse(f"{key}={values}: it must be one number for all models here")
        return values[0]

    keys = {
        "linear": {"normalize"},
        "task_arithmetic": {"normalize", "lambda"},
        "ties": {"normalize", "lambda", "density"},
        "dare_linear": {"normalize", "lambda", "density", "rescale"},
        "breadcrumbs": {"normalize", "lambda", "density", "gamma"},
        "model_stock": {"filter_wise"},
    }[method]
    for table in tables:
        if unknown := [key for key in table if key not in keys | {*IGNORED}]:
            raise refuse(f"{unknown[0]!r} of {method} has no counterpart here")
    numbers = [weight for weight in weights if isinstance(weight, (int, float)) and not isinstance(weight, bool)]
    plain, total = len(numbers) == len(weights), sum(numbers)
    normalize = one("normalize", method in ("linear", "ties"))
    if method in ("linear", "task_arithmetic", "dare_linear", "breadcrumbs") and normalize:
        if not plain or total == 0:
            raise refuse("normalize: weights must be numbers whose sum is not 0")
        weights = [weight / total for weight in numbers]
    elif method == "linear":
        raise refuse("normalize=false: a sum of models that is no mean is no merge on a base")
    if method in ("ties", "model_stock") and (not plain or any(weight != numbers[0] for weight in numbers)):
        raise refuse(f"weight={weights}: {method} weighs all models alike here")
    weights = [_weight(path, weight) for weight in weights]
    strength = one("lambda", 1.0)
    if method == "linear":
        # Σ wᵢ mᵢ / Σ wᵢ = m₀ + Σ wᵢ (mᵢ − m₀) / Σ wᵢ
        first, *models = models
        step = Step("merge", first, [*models], weights[1:], {"method": "task-arithmetic", "chosen": {"scaling": 1.0}})
        if not models:
            raise refuse("linear needs two models")
        return step
    chosen: dict[str, Any] = {"scaling": strength}
    name = method.replace("_", "-")
    if method == "ties":
        if not normalize:
            raise refuse("normalize=false: ties averages what agrees here")
        chosen["density"] = one("density", 1.0)
        weights = [1.0] * len(weights)
    elif method == "dare_linear":
        if not one("rescale", True):
            raise refuse("rescale=false: dare rescales here")
        name, chosen = "dare", {"scaling": strength * len(models), "density": one("density", 1.0)}
    elif method == "breadcrumbs":
        density, gamma = one("density", 0.9), one("gamma", 0.01)
        chosen |= {"beta": max(0.0, 1 - density - gamma), "gamma": 1 - gamma}
    elif method == "model_stock":
        if one("filter_wise", False):
            raise refuse("filter_wise: model-stock takes whole entries here")
        weights, chosen = [1.0] * len(weights), {}
    return Step("merge", path.parent / str(base), [*models], weights, {"method": name, "chosen": chosen})


def _weight(path: Path, weight: Any) -> Any:
    """mergekit's number, gradient or list of filters, as a factor or factors by pattern."""
    if not isinstance(weight, list) or not any(isinstance(item, dict) for item in weight):
        return weight
    table: dict[str, Any] = {}
    for item in weight:
        if not isinstance(item, dict) or "value" not in item or set(item) - {"filter", "value"}:
            raise SettingError(f"{path}: weight={weight!r}: {item!r} is not a filter with a value")
        text = item.get("filter")
        table["*" if text in (None, "*") else f"*{text}*"] = item["value"]
    return table
