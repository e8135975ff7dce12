"""`atm-fl attack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atm_fl.cli.study import run_study
from atm_fl.cli.terminal import Config, Jobs, OnlyReport, Override, app, read_config, say
from atm_fl.errors import RunError

attack = typer.Typer(no_args_is_help=True, help="Attack what parties send, and measure it: docs/attacks.md.")
app.add_typer(attack, name="attack")


@attack.command()
def reconstruct(
    config: Annotated[Path, typer.Argument(help="a TOML file of scenarios, as configs/reconstruction.toml")],
    jobs: Jobs = None,
    only_report: OnlyReport = False,
) -> None:
    """Look for the images behind task vectors; print what is found under each setting, and write the pictures."""
    from atm_fl.experiments import reconstruction

    run_study(config, reconstruction, jobs, only_report)


@attack.command()
def membership(
    config: Config,
    folder: Annotated[Path, typer.Option(help="where models' answers, table and curves are kept; it resumes there")],
    override: Override = None,
    task: Annotated[str, typer.Option(help="the attacked party's, an embedded one")] = "mnist",
    members: Annotated[
        int, typer.Option(min=50, help="images it tunes on; as many are asked of that it does not")
    ] = 1000,
    count: Annotated[int, typer.Option("--models", help="runs to follow, each attacked with the rest")] = 16,
) -> None:
    """Was this image among those a party tuned on? Loss threshold, LiRA and RMIA on every round's models."""
    from atm_fl.attacks import membership as attacks

    leaks = attacks.study(read_config(config, override or []), task, folder, members, count, say)
    say(attacks.write(leaks, folder))


@attack.command()
def audit(
    config: Config,
    override: Override = None,
    task: Annotated[str, typer.Option(help="whose records the canaries are among")] = "mnist",
    canaries: Annotated[int, typer.Option(help="images with a wrong label, each put in by a coin")] = 500,
    guesses: Annotated[int, typer.Option(help="coins that the auditor guesses")] = 100,
) -> None:
    """Is the claimed ε of DP-SGD true? Whether noise is ever repeated, and a lower bound by canaries.

    The bound is taken as it runs, and with the noise secretly off. Exits with 1 if releases share noise.
    """
    from atm_fl.attacks.audit import CONFIDENCE, SHARED, audit, shared_noise

    settings = read_config(config, override or [])
    distances = shared_noise(settings, task)
    shown = ", ".join(f"{change} {distance:.3f}" for change, distance in distances.items())
    say(f"one round's two releases, in units of two independent noises, by what was done to one record: {shown}")
    repeated = distances.pop("repeated")
    if repeated or min(distances.values()) < SHARED:
        raise RunError("the noise of one release is in another: their difference tells of single records")
    for silent in (False, True):
        outcome = audit(settings, task, canaries, guesses, silent)
        say(
            f"noise {'off' if silent else 'on'}: claimed ε {outcome.claimed:.3f}, true ε at least {outcome.bound:.3f} "
            f"({CONFIDENCE:.0%}; {outcome.correct} of {outcome.guesses} guesses right, {canaries} canaries)"
        )


@attack.command()
def poison(
    config: Config,
    folder: Annotated[Path, typer.Option(help="where the runs go; finished ones are not run again")],
    override: Override = None,
    attacks: Annotated[
        str, typer.Option(help="with commas between, as none,scale:strength=4: docs/attacks.md")
    ] = "none,sign-flip",
    attackers: Annotated[str, typer.Option(help="tasks whose parties attack")] = "mnist,digits",
    merge: Annotated[list[str] | None, typer.Option(help="a defence, as multi-krum:f=2; as often as needed")] = None,
) -> None:
    """What do malicious parties do to honest tasks, and what do robust merges do about it, and to honest tasks?"""
    from atm_fl.attacks import poisoning

    chosen, named = ([item.strip() for item in text.split(",")] for text in (attacks, attackers))
    results = poisoning.studies(read_config(config, override or []), chosen, merge or ["mean"], named, folder, say)
    text = poisoning.table(results)
    (folder / "table.md").write_text(text + "\n")
    say(text)
