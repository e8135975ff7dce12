"""What a setting protects and what it costs: accuracy, ε and what attacks find, in one table and one page.

A row is a run's settings. Its accuracy and cost are measured by a contest of these rows (see contest.py), with which
folders are shared; then, on the contest's first seed:

reconstruction   the images behind the task vectors of parties that have a few each (attacks/scenario.py), by the row's
                 own tuning, codec and noise. Under a target ε the noise is what the run took for the attacked task.
membership       one task's party among the row's own rounds (attacks/membership.py)
poisoning        the row's run with malicious parties (attacks/poisoning.py)

The file has a table of values for each attack; a row may have its own, which go before, or `false`: not measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure
from safetensors.torch import load_file

from atm_fl.attacks import membership, poisoning
from atm_fl.attacks.measurement import FOUND
from atm_fl.attacks.scenario import Scenario
from atm_fl.errors import SettingError
from atm_fl.experiments import contest, reconstruction
from atm_fl.files import atomic_write
from atm_fl.runs import pages
from atm_fl.runs.claims import claim, holds
from atm_fl.runs.metrics import read_metrics
from atm_fl.settings import Settings
from atm_fl.tables import markdown

ATTACKS = ("reconstruction", "membership", "poisoning")
HEAD = ["setting", "seeds", "mean %", "worst %", "ε", "PSNR", "of the mean image", "SSIM", "LPIPS"]
HEAD += ["TPR local", "TPR merged", "backdoor", "clean", "MB", "s"]
CAPTION = (
    "Test accuracy: mean ± deviation over the seeds, and the worst task's. ε: the largest of any party, of the whole "
    "run. PSNR in dB, SSIM and LPIPS of the images that the attack finds, beside the PSNR of the task's mean image, "
    "which needs no vector. TPR: members that the better of LiRA and RMIA finds at 1 % false alarms after the last "
    "round, in the party's local model and in the merged one; guessing finds 1 %. Backdoor: stamped images of the "
    "attackers' tasks that are taken for their target; clean: how many are without an attack. MB: of the whole run, "
    "all parties, both ways; s: of tuning, evaluating and merging, one after the other."
)
Values = dict[str, Any]


@dataclass(frozen=True)
class PrivacyStudy:
    """A study's configuration: see configs/privacy.toml."""

    runs: contest.Contest
    attacks: dict[str, dict[str, Values | None]]
    """By attack and row: its values, None where it is not measured."""

    @classmethod
    def of(cls, values: dict[str, Any]) -> PrivacyStudy:
        """The study of a file's values. TypeError or KeyError for a wrong key, SettingError for a wrong setting."""
        common = {attack: values.pop(attack) for attack in ATTACKS}
        rows: dict[str, Values] = {}
        attacks: dict[str, dict[str, Values | None]] = {attack: {} for attack in ATTACKS}
        for name, row in values["rows"].items():
            rows[name] = {key: value for key, value in row.items() if key not in ATTACKS}
            if {"kind", "tune", "report", "select"} & set(row):
                raise SettingError(f"row {name!r}: it takes settings and {', '.join(ATTACKS)}")
            for attack in ATTACKS:
                attack_values = row.get(attack, {})
                attacks[attack][name] = None if attack_values is False else common[attack] | attack_values
        study = cls(contest.Contest.of(values | {"rows": rows}), attacks)
        for row in study.runs.rows:
            for unit in study.leaks(row):
                try:
                    unit.check()
                except SettingError as error:
                    raise SettingError(f"row {row.name!r}, {unit.attack}: {error}") from error
        return study

    def leaks(self, row: contest.ContestRow) -> list[AttackUnit]:
        """What is to be measured of a row beside its accuracy."""
        units = ((attack, self.attacks[attack][row.name]) for attack in ATTACKS)
        return [AttackUnit(self, row, attack, values) for attack, values in units if values is not None]


@dataclass(frozen=True)
class AttackUnit:
    """One attack on one row, on the contest's first seed."""

    study: PrivacyStudy
    row: contest.ContestRow
    attack: str
    values: Values

    @property
    def run(self) -> contest.ContestUnit:
        """The row's run of the first seed."""
        return contest.ContestUnit(self.study.runs, self.row, self.study.runs.seeds[0])

    @property
    def folder(self) -> Path:
        """Where the attack's files are."""
        return self.study.runs.reports / self.attack / self.run.folder.name

    def check(self) -> None:
        """SettingError if the attack cannot be run as its values say."""
        if self.attack == "reconstruction":
            Scenario.parse(self._scenario(0.0))
        elif self.attack == "membership":
            if missing := {"task", "members", "models"} - set(self._part("task", "members", "models")[0]):
                raise SettingError(f"{', '.join(sorted(missing))} must be said")
        else:
            poisoning.check(self._part("attack", "attackers")[1], self.values["attack"], self._attackers)

    def attack_and_keep(self) -> None:
        """Run it, or what is left of it. SettingError if the folder holds what was measured with other values."""
        if self.attack == "reconstruction":
            reconstruction.run_unit(self.pictured())
            return
        claim(self._about, self._decides(), "delete it")
        if self.attack == "membership":
            values, settings = self._part("task", "members", "models")
            leaks = membership.study(settings, values["task"], self.folder, values["members"], values["models"], _quiet)
            membership.write(leaks, self.folder)
        else:
            values, settings = self._part("attack", "attackers")
            poisoning.studies(
                settings, ["none", values["attack"]], [settings.merge], self._attackers, self.folder, _quiet
            )

    def result(self) -> Any:
        """What was measured, None if it was not yet or with other values: as the attack's own module returns it."""
        if self.attack == "reconstruction":
            return self.pictured().result() if self._noise() is not None else None
        if not self._same():
            return None
        if self.attack == "membership":
            path = self.folder / "result.json"
            return json.loads(path.read_text())["rows"] if path.exists() else None
        merge, attacks = self.run.parse().merge, ("none", self.values["attack"])
        results = [poisoning.result_in(poisoning.place_of(self.folder, attack, merge)) for attack in attacks]
        return results if None not in results else None

    def pictured(self) -> reconstruction.ReconstructionUnit:
        """Of reconstruction: the row of that study, with its pictures."""
        return reconstruction.ReconstructionUnit(
            self.folder.parent, self.folder.name, self._scenario(self._noise() or 0.0)
        )

    def _scenario(self, noise: float) -> Values:
        """The scenario's values: the row's settings, but for what a vector alone does not have, and the attack's."""
        settings = {**self.study.runs.settings, **self.row.settings}
        if settings.get("dp-epsilon"):
            settings |= {"dp-epsilon": 0.0, "dp-noise": noise or 1.0}  # 1 is checked as well as what the run will say
        return settings | self.values | {"seed": self.study.runs.seeds[0]}

    def _noise(self) -> float | None:
        """The noise multiplier by which the run kept its target ε for the attacked task; None before it has run."""
        if not self.run.parse().dp_epsilon:
            return 0.0
        task = Settings.parse({"tasks": self.values["tasks"]}).party_names[0]
        return next((line["noise"] for line in _tuning(self.run) if line["task"] == task), None)

    def _part(self, *keys: str) -> tuple[Values, Settings]:
        """Those of the attack's own values that are there, and the settings of the run that it attacks."""
        settings = self.run.parse().as_config() | {"test-every": 0}
        settings |= {key: value for key, value in self.values.items() if key not in keys}
        return {key: self.values[key] for key in keys if key in self.values}, Settings.parse(settings)

    @property
    def _about(self) -> Path:
        """What decides the attack's results, of those that find no place for it themselves."""
        return self.folder / "values.json"

    def _decides(self) -> Values:
        values, settings = self._part("task", "members", "models", "attack", "attackers")
        return {"attack": values, "rounds": settings.rounds, "settings": settings.decisive()}

    def _same(self) -> bool:
        return holds(self._about, self._decides())

    @property
    def _attackers(self) -> list[str]:
        return [name.strip() for name in str(self.values["attackers"]).split(",")]

    def __str__(self) -> str:
        return f"{self.row.name}, {self.attack}"


def _quiet(line: str) -> None:
    """What attacks have to say is said by the study."""


def phases(study: PrivacyStudy) -> Iterator[list[contest.ContestUnit] | list[AttackUnit]]:
    """All runs; then all attacks, of which some need a run's noise."""
    yield from contest.phases(study.runs)
    yield [leak for row in study.runs.rows for leak in study.leaks(row)]


def run_unit(unit: contest.ContestUnit | AttackUnit) -> str:
    """Do one unit, or what is left of it."""
    if isinstance(unit, contest.ContestUnit):
        return contest.run_unit(unit)
    if unit.result() is None:
        unit.attack_and_keep()
    return str(unit)


# --------------------------------------------------------------------------------------------------------- the results


@dataclass(frozen=True)
class Line:
    """What is known of a row; None where it was not measured."""

    name: str
    means: list[float]
    """Test accuracy %, mean over the tasks, by seed."""
    worst: float | None
    """The worst task's, mean over the seeds."""
    epsilon: float | None
    cost: tuple[float, float] | None
    """Bytes and seconds of a run, mean over the seeds."""
    images: dict[str, Any] | None
    members: list[dict[str, Any]] | None
    poisoned: list[dict[str, Any]] | None

    @property
    def found(self) -> dict[str, Any] | None:
        """How near the images are that were found; None also if there were none."""
        return self.images[FOUND] if self.images else None

    @property
    def psnr(self) -> float | None:
        """Of the images that were found, dB."""
        return self.found["psnr"] if self.found else None

    @property
    def members_found(self) -> float | None:
        """%, in the local model of the last round; None under secure aggregation, which shows none."""
        return 100 * rates[-1][1] if (rates := self.rates("local")) else None

    @property
    def backdoor(self) -> float | None:
        """How often the trigger works, %."""
        return 100 * self.poisoned[1]["trigger"] if self.poisoned else None

    def rates(self, model: str) -> list[tuple[int, float]]:
        """By round, the part of the members that the better attack finds in "local" or "merged" models."""
        best: dict[int, float] = {}
        for row in self.members or ():
            if row["model"] == model and row["attack"] != "loss":
                rate = row["leak"]["tpr"]["0.01"]
                best[row["round"]] = max(rate, best.get(row["round"], 0.0))
        return sorted(best.items())

    def cells(self) -> list[str]:
        """As the table has it."""
        mean = "–" if not self.means else f"{fmean(self.means):.1f}"
        if len(self.means) > 1:
            mean += f" ± {stdev(self.means):.1f}"
        measured, images = self.found, self.images
        likeness = [pages.told((measured or {}).get(name)) for name in ("ssim", "lpips")]
        cells = [self.name, str(len(self.means)), mean, pages.told(self.worst, ".1f"), pages.told(self.epsilon)]
        cells.append(
            f"{measured['psnr']:.1f} ± {measured['psnr_error']:.1f}" if measured else "none" if images else "–"
        )
        cells += [f"{images['mean image']['psnr']:.1f}" if images else "–", *likeness]
        last = [rates[-1][1] if (rates := self.rates(model)) else None for model in ("local", "merged")]
        cells += [pages.told(rate, ".1%") for rate in last]
        cells += [pages.told(run["trigger"], ".0%") for run in reversed(self.poisoned)] if self.poisoned else ["–", "–"]
        return cells + ([f"{self.cost[0] / 1e6:,.0f}", f"{self.cost[1]:,.0f}"] if self.cost else ["–", "–"])


def lines(study: PrivacyStudy) -> list[Line]:
    """What is known of every row."""
    rows = {row["name"]: row for row in contest.results(study.runs)["rows"]}
    return [_line(study, row, list(rows[row.name]["seeds"].values())) for row in study.runs.rows]


def _line(study: PrivacyStudy, row: contest.ContestRow, runs: list[dict[str, Any]]) -> Line:
    measured = {leak.attack: leak.result() for leak in study.leaks(row)}
    spent = [
        line["epsilon"]
        for seed in study.runs.seeds
        for line in _tuning(contest.ContestUnit(study.runs, row, seed))
        if "epsilon" in line
    ]
    tasks = runs[0]["test"] if runs else ()
    return Line(
        row.name,
        [100 * fmean(run["test"].values()) for run in runs],
        100 * min(fmean(run["test"][task] for run in runs) for task in tasks) if runs else None,
        max(spent, default=None),
        (fmean(run["bytes"] for run in runs), fmean(run["seconds"] for run in runs)) if runs else None,
        *(measured.get(attack) for attack in ATTACKS),
    )


def _tuning(unit: contest.ContestUnit) -> Iterable[Mapping[str, Any]]:
    if (unit.folder / "metrics.jsonl").exists():
        yield from (line for line in read_metrics(unit.folder) if line["kind"] == "tuning")


def table(study: PrivacyStudy) -> str:
    """What is measured so far, in Markdown; see CAPTION."""
    return markdown(HEAD, (line.cells() for line in lines(study)))


def page(study: PrivacyStudy) -> Path:
    """Write report.html, the table, the frontiers and the images that were found, into the study's folder; its path."""
    all_lines = lines(study)
    parts = ["<h1>Privacy</h1>", pages.table(HEAD, (line.cells() for line in all_lines), CAPTION, "numbers dense")]
    parts.append(
        pages.figure("Accuracy against what leaks; up and to the left is better", partial(_frontiers, all_lines))
    )
    parts.append(pages.figure("Members found at 1 % false alarms, by round", partial(_by_round, all_lines)))
    for row in study.runs.rows:
        for leak in study.leaks(row):
            if leak.attack == "reconstruction" and leak.result() is not None:
                pictures = load_file(str(leak.pictured().pictures))
                parts.append(pages.figure(f"{row.name}: first images", partial(reconstruction.grid, pictures)))
    path = study.runs.reports / "report.html"
    with atomic_write(path) as temporary:
        temporary.write_text(pages.document("Privacy", parts))
    return path


def _frontiers(rows: list[Line]) -> Figure:
    """Mean accuracy against what is leaked: images, membership, control over the attackers' tasks."""
    drawing, across = pages.axes(3, 4.2, share=False)
    titles = {"PSNR of images found, dB": "psnr", "members found, %": "members_found", "backdoor works, %": "backdoor"}
    for axis, (title, leak) in zip(across, titles.items(), strict=True):
        for i, line in enumerate(rows):
            if line.means and (value := getattr(line, leak)) is not None:
                axis.plot([value], [fmean(line.means)], **_mark(i), label=line.name)
        axis.set(xlabel=title)
    across[0].set_ylabel("test accuracy %")
    return _with_legend(drawing)


def _by_round(rows: list[Line]) -> Figure:
    drawing, across = pages.axes(2, 4.2)
    for axis, model in zip(across, ("local", "merged"), strict=True):
        for i, line in enumerate(rows):
            if rates := line.rates(model):
                axis.plot(
                    *zip(*((number, 100 * rate) for number, rate in rates), strict=True), **_mark(i), label=line.name
                )
        axis.axhline(1, color=pages.INK, linestyle=":", lw=1)
        axis.set(title=f"{model} model", xlabel="rounds")
    across[0].set_ylabel("members found, %")
    return _with_legend(drawing)


def _mark(i: int) -> dict[str, Any]:
    return {**pages.line_style(i), "marker": "osD^v"[i // 10 % 5], "markersize": 5}


def _with_legend(drawing: Figure) -> Figure:
    """One legend below for all panels, with each name once."""
    named = {
        name: handle for axis in drawing.axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    drawing.legend(named.values(), named, loc="outside lower center", ncols=4)
    return drawing


read = PrivacyStudy.of
"""A study of the values in a TOML file: see `read_study`."""
