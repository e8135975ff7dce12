"""The server's side of secure aggregation over a Grid: it passes keys and sealed shares on, and unmasks the sum."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from logging import WARNING

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from atm_fl.privacy.secure_aggregation import session_of, unmask
from atm_fl.runs import Run
from server import boundary


class SecureExchange:
    """One round's messages beside the one that asks for the vectors; see atm_fl/privacy/secure_aggregation.py.

    nodes: node id → client of the parties at the roll call. deadline: of the round, on the monotonic clock.
    """

    def __init__(self, run: Run, grid: Grid, nodes: Mapping[int, str], round_number: int, deadline: float) -> None:
        self._run, self._grid, self._round, self._deadline = run, grid, round_number, deadline
        self._nodes = {task: node for node, task in nodes.items()}
        self._keys: dict[str, bytes] = {}
        self.sealed: dict[str, dict[str, bytes]] = {}
        """By task that is in so far: what the others sealed for it, by sender."""
        self.failures: dict[str, str] = {}
        """Tasks that dropped out, with the reason."""
        self.seconds = 0.0
        """Spent here so far."""

    def advertise(self) -> None:
        """Collect the parties' public keys."""
        for task, record in self._ask("keys", {task: {} for task in self._nodes}, lambda task: {"keys"}):
            self._keys[task] = record["keys"]

    def share(self) -> None:
        """Hand the keys out, and collect the sealed shares of everyone's secrets."""
        every = set(self._keys)
        sent = {task: {"keys": self._keys} for task in self._keys}
        found = dict(self._ask("shares", sent, lambda task: every - {task}))
        self.sealed = {task: {other: found[other][task] for other in found if other != task} for task in found}

    def unmask(self, words: np.ndarray, summed: list[str]) -> str:
        """Take the masks off the sum of `summed`, in place. Returns who did not help; RunError if too few did."""
        settings = self._run.settings
        failures, self.failures = self.failures, {}
        sent = {task: {"summed": {"tasks": summed}} for task in summed}
        revealed = dict(self._ask("unmask", sent, lambda task: set(self.sealed)))
        silent, self.failures = self.failures, failures
        begin, keys = time.perf_counter(), {task: self._keys[task] for task in self.sealed}
        unmask(words, self._session, settings.party_names, settings.threshold, keys, summed, revealed)
        self.seconds += time.perf_counter() - begin
        return "; ".join(f"{task}: {reason}" for task, reason in silent.items())

    @property
    def _session(self) -> str:
        return session_of(self._run.id, self._round)

    def _ask(
        self,
        what: str,
        contents: Mapping[str, Mapping[str, Mapping]],
        names: Callable[[str], Collection[str]],
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Send each task its records and yield (task, the record `what` of its reply); failures are noted.

        names: which entries the record of a task must have.
        """
        begin, timeout = time.perf_counter(), max(0.0, self._deadline - time.monotonic())
        info = ConfigRecord({"run": self._run.id, "round": self._round})
        messages = [
            Message(
                RecordDict({"info": info, **{name: ConfigRecord(dict(record)) for name, record in records.items()}}),
                self._nodes[task],
                f"query.{what}",
                group_id=str(self._round),
            )
            for task, records in contents.items()
        ]
        tasks = {node: task for task, node in self._nodes.items()}
        self.failures |= dict.fromkeys(contents, f"no {what} within {self._run.settings.round_timeout:g} s")
        for reply in self._grid.send_and_receive(messages, timeout=timeout):
            task = tasks[reply.metadata.src_node_id]
            if reply.has_error():
                self.failures[task] = boundary.reason(reply)
                continue
            try:
                record = boundary.secrets(reply, what, names(task))
            except boundary.Refused as error:
                self.failures[task] = f"refused: {error}"
            else:
                del self.failures[task]
                yield task, record
        self.seconds += time.perf_counter() - begin
        for task in contents:
            if task in self.failures:
                log(WARNING, "%s dropped out at %s: %s", task, what, self.failures[task])
