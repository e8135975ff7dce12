"""The server's side of secure aggregation over a Grid: it passes keys and sealed shares on, and unmasks the sum."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from logging import WARNING
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from atm_fl.errors import RunError
from atm_fl.neighbours import digest_of, neighbourhood, shares_needed
from atm_fl.privacy.secure_aggregation import (
    SEALED_BYTES,
    UnjoinedShares,
    check_keys,
    check_new,
    public_keys,
    refused_keys,
    session_of,
    unmask,
    unshared,
)
from atm_fl.runs.run import Run
from atm_fl.server import boundary


class SecureExchange:
    """One round's messages beside the one that asks for the vectors; see atm_fl/privacy/secure_aggregation.py.

    nodes: node id → client of the parties at the roll call. deadline: of the round, on the monotonic clock. excluded:
    clients that take no part, with the reason.
    """

    def __init__(
        self,
        run: Run,
        grid: Grid,
        nodes: Mapping[int, str],
        round_number: int,
        deadline: float,
        excluded: Mapping[str, str],
    ) -> None:
        self._run, self._grid, self._round, self._deadline = run, grid, round_number, deadline
        self._nodes = {client: node for node, client in nodes.items() if client not in excluded}
        settings = run.settings
        self._needed = shares_needed(len(settings.party_names), settings.secure_neighbours, settings.threshold)
        """Shares that join a secret."""
        self._keys: dict[str, bytes] = {}
        self._roster = ""
        """Their digest."""
        self._near: dict[str, frozenset[str]] = {}
        """Each party's neighbourhood."""
        self._sealed: dict[str, dict[str, bytes]] = {}
        """By sender: what it sealed, by recipient."""
        self._opened: dict[str, set[str]] = {}
        """By holder: of whom it has shares."""
        self.clients: list[str] = []
        """Those that mask their vectors for each other."""
        self.failures = dict(excluded)
        """Clients that dropped out, with the reason."""
        self.seconds = 0.0
        """Spent here so far."""

    def advertise(self) -> None:
        """Collect the parties' public keys; what no party could use is not passed on."""
        seen: set[bytes] = set()
        for client, record in self._ask("keys", {client: {} for client in self._nodes}):
            try:
                check_keys(key := _content(record, "keys", bytes))
                check_new(key, seen)
                self._keys[client] = key
                seen |= public_keys(key)
            except ValueError as error:
                self._drop(client, str(error))

    def share(self) -> None:
        """Hand the keys out, and collect the sealed shares of everyone's secrets."""
        settings = self._run.settings
        names, neighbours = settings.party_names, settings.secure_neighbours
        self._roster = digest_of(self._session, self._keys)
        self._near = {client: neighbourhood(client, names, neighbours, self._roster) for client in self._keys}
        for client, record in self._ask("shares", {client: {"keys": self._keys} for client in self._keys}):
            near = self._near[client] & self._keys.keys()
            sealed = {
                other: value
                for other, value in record.items()
                if other in near and isinstance(value, bytes) and len(value) == SEALED_BYTES
            }
            if len(sealed) == len(record):
                self._sealed[client] = sealed
            else:
                self._drop(client, f"{len(record) - len(sealed)} of its shares are none")
        most_bad = (neighbours + 1 if neighbours else len(names)) - self._needed
        for client, why in refused_keys(self._sealed, most_bad, self._near).items():
            self._drop(client, f"keys {why}" if why.startswith("refused") else f"{why}: their keys")

    def confirm(self) -> None:
        """Pass the sealed shares on, and hear whose open."""
        here = [client for client in self._sealed if client not in self.failures]
        sent = {
            client: {"sealed": {one: self._sealed[one][client] for one in here if one != client and one in near}}
            for client, near in self._near.items()
            if client in here
        }
        for client, record in self._ask("confirm", sent):
            try:
                opened = _content(record, "opened", list)
                self._opened[client] = {other for other in opened if other in here and other in self._near[client]}
            except ValueError as error:
                self._drop(client, str(error))
        for client, why in unshared(self._opened, self._needed).items():
            self._drop(client, why)
        there = self._opened.keys() - self.failures.keys()
        self.clients = [client for client in self._run.settings.party_names if client in there]

    def unmask(self, words: np.ndarray, summed: list[str]) -> str:
        """Take the masks off the sum of `summed`, in place. Returns who did not help.

        RunError if too few did, UnjoinedShares if a client's secret does not come out of its shares; then nothing is
        changed.
        """
        settings, failures, self.failures = self._run.settings, self.failures, {}
        what: dict[str, dict[str, Any]] = {"summed": {"clients": summed}}
        signatures, revealed = {}, {}
        for client, record in self._ask("sign", dict.fromkeys(summed, what)):
            try:
                signatures[client] = _content(record, "signature", bytes)
            except ValueError as error:
                self._drop(client, str(error))
        for client, record in self._ask("unmask", {client: what | {"signatures": signatures} for client in signatures}):
            held = self._opened[client].intersection(self.clients)
            if set(record) == held and all(isinstance(share, bytes) for share in record.values()):
                revealed[client] = record
            else:
                self._drop(client, "not the shares that it was asked for")
        silent, self.failures = self.failures, failures
        begin, keys = time.perf_counter(), {client: self._keys[client] for client in self.clients}
        try:
            wrong = unmask(
                words,
                self._session,
                settings.party_names,
                settings.threshold,
                keys,
                summed,
                revealed,
                settings.secure_neighbours,
                self._roster,
            )
        except UnjoinedShares:
            raise
        except RunError as error:
            raise RunError(
                "; ".join([str(error), *(f"{client}: {reason}" for client, reason in silent.items())])
            ) from error
        silent |= dict.fromkeys(sorted(wrong), "refused: it revealed wrong shares")
        self.seconds += time.perf_counter() - begin
        return "; ".join(f"{client}: {reason}" for client, reason in silent.items())

    @property
    def _session(self) -> str:
        return session_of(self._run.id, self._round)

    def _drop(self, client: str, why: str) -> None:
        self.failures[client] = f"refused: {why}"

    def _ask(self, what: str, contents: Mapping[str, Mapping[str, Mapping]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Send each client its records and yield (client, the record `what` of its reply); failures are noted."""
        begin, timeout = time.perf_counter(), max(0.0, self._deadline - time.monotonic())
        info = ConfigRecord({"run": self._run.id, "round": self._round})
        messages = [
            Message(
                RecordDict({"info": info, **{name: ConfigRecord(dict(record)) for name, record in records.items()}}),
                self._nodes[client],
                f"query.{what}",
                group_id=str(self._round),
            )
            for client, records in contents.items()
        ]
        clients = {node: client for client, node in self._nodes.items()}
        self.failures |= dict.fromkeys(contents, f"no {what} within {self._run.settings.round_timeout:g} s")
        for reply in self._grid.send_and_receive(messages, timeout=timeout):
            client = clients[reply.metadata.src_node_id]
            if reply.has_error():
                self.failures[client] = boundary.reason(reply)
                continue
            try:
                record = boundary.secrets(reply, what, len(self._nodes))
            except boundary.Refused as error:
                self.failures[client] = f"refused: {error}"
            else:
                del self.failures[client]
                yield client, record
            finally:
                boundary.forget(reply)
        self.seconds += time.perf_counter() - begin
        for client in contents:
            if client in self.failures:
                log(WARNING, "%s dropped out at %s: %s", client, what, self.failures[client])


def _content(record: Mapping[str, Any], name: str, kind: type) -> Any:
    """What a party's record has as `name`. ValueError if it is not of its kind."""
    if not isinstance(value := record.get(name), kind):
        raise ValueError(f"{name} of {type(value).__name__}, not {kind.__name__}")
    return value
