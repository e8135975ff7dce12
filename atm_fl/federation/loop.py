"""ATM as a plain loop: no Flower, no processes, no network. The reference that the other runtimes must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path

from atm_fl.errors import RunError, SettingError
from atm_fl.federation.client import Party, Update, parties_of
from atm_fl.federation.server_round import ServerRound
from atm_fl.runs.directory import told_if_full
from atm_fl.runs.report import write_report
from atm_fl.runs.run import Run
from atm_fl.settings import Settings, check_closed, defaults, kebab

OF_FLOWER = (
    *("on_failure", "node_timeout", "round_timeout", "max_update_norm"),
    *("secure_threshold", "secure_neighbours"),
)
"""Settings without effect in a plain loop, which has one process and no messages: nobody is late or fails alone."""


def check_plain(settings: Settings) -> None:
    """SettingError if a setting is not at its default that a plain loop has no use for."""
    for name in OF_FLOWER:
        value = getattr(settings, name)
        if value != defaults()[kebab(name)]:
            raise SettingError(f"{kebab(name)}={value!r}: it has no effect with --runtime plain; leave it out")


def play_round(run: Run, updates: Iterable[tuple[str, Update]]) -> None:
    """One round of a run from its clients' updates, by client, which may be made as they are asked for.

    RunError if a vector, or an unmasked sum, is out of proportion.
    """
    current = ServerRound(run)
    for client, update in updates:
        current.add(client, update, run.bytes_down)
    if run.settings.secure_aggregation:
        current.check_sum()
    elif reasons := current.out_of_proportion():
        refused = "; ".join(f"{client}: refused: {reason}" for client, reason in reasons.items())
        raise RunError(f"round {current.number}: {refused}")
    current.close()


def run_loop(
    settings: Settings, parties: Sequence[Party] | None = None, after_round: Callable[[Run], bool] = lambda run: False
) -> Run:
    """Run the settings to their end in this process and write the report. Returns the finished run.

    parties: those of the settings by default; an experiment may hand over others, in whatever order they are to act.
    after_round: is called after each round; the run ends when it returns True.
    """
    check_closed(settings)
    with told_if_full(Path(settings.run_dir)), closing(Run(settings)) as run:
        parties = parties or parties_of(settings)
        stopped = False
        while not (run.over or stopped):
            number = run.rounds_done + 1
            play_round(run, ((party.client, party.train(run.base, number, run.id)) for party in parties))
            stopped = after_round(run)
        if stopped and run.rounds_done < settings.rounds:
            run.record("stop", run.rounds_done, text="a callback ended it")
        for party in parties:
            context = party.context(run.rounds_done + 1, run.id)
            accuracies = party.evaluate(run.base, ("validation", "test"), context, end=True)
            run.record("evaluation", run.rounds_done, task=party.client, **accuracies, bytes_down=run.bytes_down)
    write_report(run.directory)
    return run
