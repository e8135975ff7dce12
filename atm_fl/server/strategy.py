"""The strategy: ATM's round as Flower's message API runs it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from logging import INFO, WARNING

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from atm_fl import codecs
from atm_fl.errors import RunError
from atm_fl.federation.client import evaluated_splits
from atm_fl.federation.server_round import ServerRound
from atm_fl.privacy.secure_aggregation import UnjoinedShares
from atm_fl.runs.membership import AWAY, BACK, JOINED
from atm_fl.runs.run import Run
from atm_fl.server import boundary
from atm_fl.server.grid import LOST, await_return
from atm_fl.server.roll_call import Newcomers
from atm_fl.server.secure import SecureExchange

WHOLE = codecs.Fp32()
"""The codec of a whole base."""


class RunIsOver(Exception):
    """The setting `patience` has ended the run, whose last evaluation is done, before the last round Flower counts."""


class AtmStrategy(Strategy):
    """Send the base, fold the task vectors into the merge as they come, move the base, write the checkpoint.

    The base is evaluated by the clients before they tune it, so that a round is one exchange; one evaluate round closes
    the run. Flower counts rounds from 1 in every process; ours go on from the run's checkpoint.

    Unless `codec-down` is fp32, a message carries the step to the base from the one before; the first of a process,
    which has no step, only says which base it is. A client that lacks it says so and is sent it within the same round.
    So is, once, one whose ClientApp or SuperNode died, then too, if it is back within `node-timeout`: it answers with
    what it would have.

    Under secure aggregation keys and shares are exchanged before, and the sum is unmasked when the vectors are in. If
    it stays masked, since a client dealt shares that do not join, the round is done again without that client.

    Who is not online when a round of an open run begins, or was lost in it and stayed away, has left, which is no
    failure; it is in the run again when it is back. Who has come since takes part from then on.

    nodes: node id → client (`Settings.party_names`), in the order of the setting `tasks`. One that has nothing to do in
    a round, neither to tune nor to evaluate, is sent nothing. newcomers: of an open run.
    """

    def __init__(self, run: Run, nodes: dict[int, str], newcomers: Newcomers | None = None) -> None:
        self.run = run
        self.nodes = nodes
        self._newcomers = newcomers
        self._digest = "" if run.downlink.delta is None else run.digest
        """Of the base that was sent last."""
        self._sent: tuple[Grid, str, int]
        """Where, as which kind of message and in which round."""
        self._deadline = 0.0
        """When the round's replies are to be here, on the monotonic clock."""
        self._gone: set[int] = set()
        """Nodes that did not come back; nobody waits for them again before they answer."""
        self._asked: set[str] = set()
        """Clients that asked for the whole base in this round."""
        self._exchange: SecureExchange | None = None
        """Of this round, under secure aggregation."""
        self._excluded: dict[str, str] = {}
        """Clients without which this round is done again, with the reason."""

    def summary(self) -> None:
        settings = self.run.settings
        log(
            INFO,
            "\t└──> merge %s, scaling %s, tasks %s",
            settings.merge,
            settings.scaling or "its own",
            ", ".join(self.nodes.values()),
        )

    def arrays(self) -> ArrayRecord:
        """What travels so that clients know the current base: the base itself or the step to it."""
        delta = self.run.downlink.delta
        return _record(WHOLE.encode(self.run.base, self.run.base_layout) if delta is None else delta)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if self.run.over:
            raise RunIsOver
        self._meet(grid)
        return self._broadcast(grid, arrays, "train", self.run.rounds_done + 1)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        current, failures = self._taken_in(replies, ServerRound(self.run))
        seconds = 0.0
        while self._exchange and (unjoined := self._unmasked(current)):
            seconds += self._exchange.seconds
            current, failures = self._repeated(current, self._excluded | unjoined)
        costs = {"seconds_secure": seconds + self._exchange.seconds} if self._exchange else {}
        current.close(failures, costs)
        return self.arrays(), None

    def _taken_in(self, replies: Iterable[Message], current: ServerRound) -> tuple[ServerRound, dict[str, str]]:
        """The round with all vectors that belong in it, and who failed; RunError if the policy does not allow that."""
        failures, exchange = self._unheard(), self._exchange
        failures |= exchange.failures if exchange else {}
        takers = self._takers(current.number)
        splits = evaluated_splits(self.run.settings, current.number - 1)
        for client, reply in self._successes(replies, failures):
            try:
                update = boundary.update(reply, self.run.base_layout.size, client in takers, splits)
                boundary.forget(reply)
                current.add(client, update, self._bytes_down(client))
            except ValueError as error:
                failures[client] = f"refused: {error}"
            finally:
                boundary.forget(reply)
        failures |= self._out_of_proportion(current)
        self._enforce(failures, takers, f"round {current.number}")
        return current, failures

    def _unmasked(self, current: ServerRound) -> dict[str, str]:
        """Take the masks off the round's sum. Returns whose shares do not join, with the reason: then it is masked."""
        assert self._exchange
        try:
            silent = self._exchange.unmask(current.vectors.words, current.vectors.clients)
        except UnjoinedShares as error:
            return {client: f"refused: its shares do not join: {why}" for client, why in error.reasons.items()}
        if silent:
            self._warn(f"round {current.number}: its sum was unmasked without {silent}")
        current.check_sum()
        return {}

    def _repeated(self, current: ServerRound, excluded: dict[str, str]) -> tuple[ServerRound, dict[str, str]]:
        """Do the round again without the `excluded`, with fresh keys; what it measured is not recorded twice."""
        when = f"round {current.number}"
        self._enough(excluded, self._takers(current.number), when)
        self._warn(f"{when} is given up, its sum still masked, and done again without {_told(excluded)}")
        self._excluded, grid = excluded, self._sent[0]
        self._deadline = time.monotonic() + self.run.settings.round_timeout
        clients = self._exchanged(grid, current.number)
        # They have the base: where steps travel, which one it is says enough.
        arrays = self.arrays() if self.run.downlink.delta is None else _record({})
        messages = self._messages(
            self._nodes_of(clients), arrays, "" if self.run.downlink.delta is None else self._digest
        )
        replies = grid.send_and_receive(messages, timeout=max(0.0, self._deadline - time.monotonic()))
        return self._taken_in(replies, ServerRound(self.run, recorded=current.recorded))

    def _nodes_of(self, clients: Iterable[str]) -> list[int]:
        return [node for node, client in self.nodes.items() if client in clients]

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if not self.run.over:
            return []
        self._meet(grid)
        return self._broadcast(grid, arrays, "evaluate", self.run.rounds_done)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        if not self.run.over:
            return None
        failures, accuracies = self._unheard(), {}
        for client, reply in self._successes(replies, failures):
            try:
                metrics = boundary.accuracies(reply) | {"bytes_down": self._bytes_down(client)}
                self.run.record("evaluation", self.run.rounds_done, task=client, **metrics)
                accuracies[client] = metrics
            except boundary.Refused as error:
                failures[client] = f"refused: {error}"
            finally:
                boundary.forget(reply)
        self._enforce(failures, self._due(), "the final evaluation")
        return _flower_metrics(accuracies)

    def _meet(self, grid: Grid) -> None:
        """In an open run: take in who has come, and note who has left and who is back."""
        if self._newcomers is None:
            return
        for client, node in ({} if self.run.over else self._newcomers.arrived(self.run, self.nodes)).items():
            self.nodes = {other: name for other, name in self.nodes.items() if name != client} | {node: client}
            if client not in self.run.settings.party_names:
                self.run.member(client, JOINED)
        online = set(grid.get_node_ids())
        self._gone -= online
        here = {client for node, client in self.nodes.items() if node in online}
        for client in self.run.settings.party_names:
            if (client in here) == (client in self.run.membership.away):
                self.run.member(client, BACK if client in here else AWAY)

    def _broadcast(self, grid: Grid, arrays: ArrayRecord, kind: str, round_number: int) -> list[Message]:
        before = "" if self.run.downlink.delta is None else self._digest
        self._digest, self._sent, self._asked = self.run.digest, (grid, kind, round_number), set()
        self._deadline = time.monotonic() + self.run.settings.round_timeout
        due, self._exchange, self._excluded = self._due(), None, {}
        if kind == "train" and self.run.settings.secure_aggregation:
            due = self._exchanged(grid, round_number)
        return self._messages(self._nodes_of(due), arrays, before)

    def _exchanged(self, grid: Grid, round_number: int) -> list[str]:
        """Exchange keys and shares; the clients that are still there. RunError if they are too few."""
        exchange = SecureExchange(self.run, grid, self.nodes, round_number, self._deadline, self._excluded)
        self._exchange = exchange
        absent = {client: reason for client, reason in self._unheard().items() if client not in self.nodes.values()}
        for step in (exchange.advertise, exchange.share, exchange.confirm):
            step()
            self._enough(absent | exchange.failures, self._takers(round_number), f"round {round_number}")
        return exchange.clients

    def _takers(self, round_number: int) -> list[str]:
        """The clients that take part in a round."""
        settings = self.run.settings
        return [client for client, task in settings.task_of.items() if settings.part_taken(task, round_number)]

    def _due(self) -> list[str]:
        """The clients that have something to do with the message that was sent last."""
        settings, (_, kind, round_number) = self.run.settings, self._sent
        everyone = kind == "evaluate" or evaluated_splits(settings, round_number - 1)
        due = settings.party_names if everyone else self._takers(round_number)
        return [client for client in due if client not in self.run.membership.away]

    def _messages(self, nodes: Iterable[int], arrays: ArrayRecord, before: str = "") -> list[Message]:
        """One message to each of `nodes`; `before` is the digest of the base that a step starts from."""
        settings, (_, kind, round_number) = self.run.settings, self._sent
        info = {"round": round_number, "run": self.run.id, "codec": settings.codec_down if before else WHOLE.name}
        info |= {"layout": self.run.base_layout.digest, "base": self._digest, "from": before}
        messages = []
        for node in nodes:
            content = RecordDict({"arrays": arrays, "info": ConfigRecord(info)})  # type: ignore[arg-type]
            if self._exchange:
                content["parties"] = ConfigRecord({"clients": self._exchange.clients})
            messages.append(Message(content, node, kind, group_id=str(round_number)))
        return messages

    def _answers(self, replies: Iterable[Message]) -> Iterator[Message]:
        """The replies; clients that ask for the whole base or were lost are sent it when all others' are here.

        Each may ask once and be lost once, in either order: a client may be lost while it is sent what it asked for.
        """
        asked: set[int] = set()
        returned: set[int] = set()
        while True:
            asking: list[int] = []
            lost: dict[int, Message] = {}
            for reply in replies:
                node = reply.metadata.src_node_id
                if reply.has_error() and reply.error.code in LOST and node not in self._gone | returned:
                    log(WARNING, "%s was lost: %s", self.nodes[node], boundary.reason(reply))
                    lost[node] = reply
                elif reply.has_error() or not _needs_base(reply) or node in asked:
                    self._gone -= set() if reply.has_error() else {node}
                    yield reply
                else:
                    asking.append(node)
                    boundary.forget(reply)
                    log(INFO, "%s asks for the whole base", self.nodes[node])
            online = self._return_of(set(lost))
            for node in lost.keys() - online:
                yield lost[node]
            asked |= {*asking, *online}
            returned |= {*online}
            if not (due := [*asking, *online]):
                return
            self._asked |= {self.nodes[node] for node in due}
            whole = _record(WHOLE.encode(self.run.base, self.run.base_layout))
            left = max(0.0, self._deadline - time.monotonic())
            replies = self._sent[0].send_and_receive(self._messages(due, whole), timeout=left)

    def _return_of(self, lost: set[int]) -> list[int]:
        """Wait `node-timeout` at most for the nodes `lost`; those that are online then. The others are gone."""
        if not lost:
            return []
        until = min(self._deadline, time.monotonic() + self.run.settings.node_timeout)
        online = await_return(self._sent[0], lost, until)
        self._gone |= lost - online
        for node in online:
            log(INFO, "%s is asked again", self.nodes[node])
        return sorted(online)

    def _bytes_down(self, client: str) -> int:
        """Bytes that were sent to a client in this round."""
        return self.run.bytes_down + (self.run.base.nbytes if client in self._asked else 0)

    def _unheard(self) -> dict[str, str]:
        """Every client that is due with the reason that counts until its reply is taken in."""
        silent = f"no reply within {self.run.settings.round_timeout:g} s"
        here = self.nodes.values()
        return {client: silent if client in here else "no party at the roll call" for client in self._due()}

    def _successes(self, replies: Iterable[Message], failures: dict[str, str]) -> Iterator[tuple[str, Message]]:
        """(client, reply) of the replies that belong; the others' reasons go into `failures`."""
        codec = self.run.settings.uplink_name
        expected = {"codec": codec, "layout": self.run.base_layout.digest, "base": self._digest, "needs-base": False}
        for reply in self._answers(replies):
            client = self.nodes[reply.metadata.src_node_id]
            if reply.has_error() and self._newcomers and reply.metadata.src_node_id in self._gone:
                del failures[client]
                self.run.member(client, AWAY)
                continue
            if reply.has_error():
                failures[client] = boundary.reason(reply)
                continue
            try:
                boundary.check_info(reply, {"task": self.run.settings.task_of[client], **expected})
            except boundary.Refused as error:
                failures[client] = f"refused: {error}"
                boundary.forget(reply)
            else:
                del failures[client]
                yield client, reply

    def _enforce(self, failures: dict[str, str], counted: list[str], when: str) -> None:
        """RunError, naming clients and reasons, if the failures are more than the policy allows; a warning if not.

        counted: the clients of which `min-successful` must succeed.
        """
        self._enough(failures, counted, when)
        if failures:
            self._warn(f"{when} goes on without {_told(failures)}")

    def _enough(self, failures: dict[str, str], counted: list[str], when: str) -> None:
        settings = self.run.settings
        needed, every = settings.needed, len(settings.party_names)
        if failures and (settings.on_failure == "abort" or needed == every):  # whoever fails, be it in an evaluation
            counted = self._due()
            needed = max(needed, len(counted))
        absent = failures | dict.fromkeys(sorted(self.run.membership.away), "it has left")
        succeeded = len(counted) - len(absent.keys() & counted)
        if not (settings.is_open and self._sent[1] == "train"):
            needed = min(needed, len(counted))
        if succeeded < needed:
            of = f"{succeeded} of {len(counted)} clients succeeded, {needed} needed"
            raise RunError(f"{when}: {of}. {_told(absent)}")

    def _out_of_proportion(self, current: ServerRound) -> dict[str, str]:
        """Leave vectors out of the round whose norms are out of proportion: client → the figures."""
        reasons = current.out_of_proportion()
        for client, reason in reasons.items():
            current.vectors.drop(client)
            log(WARNING, "round %s: %s: refused: %s", current.number, client, reason)
        return {client: f"refused: {reason}" for client, reason in reasons.items()}

    def _warn(self, text: str) -> None:
        log(WARNING, "%s", text)
        self.run.record("warning", self.run.rounds_done, text=text)


def _flower_metrics(accuracies: dict[str, dict[str, float]]) -> MetricRecord:
    """The final accuracies as Flower's users find them: SPLIT.CLIENT, and SPLIT.mean over the clients."""
    metrics: dict[str, float] = {}
    for split in ("validation", "test"):
        values = {client: float(of_client[split]) for client, of_client in accuracies.items() if split in of_client}
        metrics |= {f"{split}.{client}": value for client, value in values.items()}
        if values:
            metrics[f"{split}.mean"] = sum(values.values()) / len(values)
    return MetricRecord(metrics)  # type: ignore[arg-type]


def _told(failures: dict[str, str]) -> str:
    return "; ".join(f"{client}: {reason}" for client, reason in failures.items())


def _record(arrays: codecs.Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def _needs_base(reply: Message) -> bool:
    """Whether a client asks for the whole base; what is malformed is refused later."""
    try:
        return bool(boundary.info(reply)["needs-base"])
    except boundary.Refused:
        return False
