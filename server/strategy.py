"""The strategy: ATM's round as Flower's message API runs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from logging import INFO, WARNING

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from atm_fl import codecs, vectors
from atm_fl.errors import RunError
from atm_fl.loop import Round
from atm_fl.party import Update
from atm_fl.runs import Run


class Atm(Strategy):
    """Send the base, fold the task vectors into the merge as they come, move the base, write the checkpoint.

    The base is evaluated by the clients before they tune it, so that a round is one exchange; one evaluate round closes
    the run. Flower counts rounds from 1 in every process; ours go on from the run's checkpoint.

    nodes: node id → task, in the order of the setting `tasks`.
    """

    def __init__(self, run: Run, nodes: dict[int, str]) -> None:
        self.run = run
        self.nodes = nodes
        self._digest = ""

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
        """The current base as it travels."""
        return ArrayRecord({name: Array(array) for name, array in codecs.encode(self.run.base).items()})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._broadcast(arrays, "train", self.run.rounds_done + 1)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        current, failures = Round(self.run), self._unheard()
        down = 4 * self.run.layout.size
        for task, reply in self._successes(replies, failures):
            try:
                update, up = self._update(reply, bool(self.run.settings.part_taken(task, current.number)))
            except (KeyError, TypeError, ValueError) as error:
                failures[task] = f"refused: {error}"
                continue
            del reply
            current.add(task, update, bytes_up=up, bytes_down=down)
        self._enforce(failures, f"round {current.number}")
        current.close(failures)
        return self.arrays(), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if self.run.rounds_done < self.run.settings.rounds:
            return []
        return self._broadcast(arrays, "evaluate", self.run.rounds_done)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        if self.run.rounds_done < self.run.settings.rounds:
            return None
        failures = self._unheard()
        for task, reply in self._successes(replies, failures):
            try:
                self.run.record("evaluation", self.run.rounds_done, task=task, **_metrics(reply, "evaluation"))
            except KeyError as error:
                failures[task] = f"refused: {error}"
        self._enforce(failures, "the final evaluation")
        return None

    def _broadcast(self, arrays: ArrayRecord, kind: str, round_number: int) -> list[Message]:
        self._digest = vectors.digest(self.run.base)
        info = ConfigRecord(
            {"round": round_number, "codec": codecs.FP32, "layout": self.run.layout.digest, "base": self._digest}
        )
        content = {"arrays": arrays, "info": info}
        return [Message(RecordDict(content), node, kind, group_id=str(round_number)) for node in self.nodes]  # type: ignore[arg-type]

    def _unheard(self) -> dict[str, str]:
        """Every task with the reason that counts until its reply is taken in."""
        silent = f"no reply within {self.run.settings.round_timeout:g} s"
        here = self.nodes.values()
        return {task: silent if task in here else "no party at the roll call" for task in self.run.settings.party_names}

    def _update(self, reply: Message, takes_part: bool) -> tuple[Update, int]:
        """A train reply's update, and its bytes. The reply's arrays are freed."""
        if not takes_part:
            return Update(None, _metrics(reply, "evaluation"), {}), 0
        arrays = reply.content.array_records["arrays"]
        size = sum(len(array.data) for array in arrays.values())
        codec = str(reply.content.config_records["info"]["codec"])
        # Flower's messages are reference cycles: without `pop` their bytes would wait for the garbage collector.
        decoded = {name: arrays.pop(name).numpy() for name in list(arrays)}
        vector = codecs.decode(decoded, codec, self.run.layout.size)
        return Update(vector, _metrics(reply, "evaluation"), _metrics(reply, "tuning")), size

    def _successes(self, replies: Iterable[Message], failures: dict[str, str]) -> Iterator[tuple[str, Message]]:
        """(task, reply) of the replies that belong; the others' reasons go into `failures`."""
        for reply in replies:
            task = self.nodes[reply.metadata.src_node_id]
            if reply.has_error():
                failures[task] = reply.error.reason or f"error {reply.error.code}"
                continue
            found = dict(reply.content.config_records.get("info", {}))
            expected = {"task": task, "layout": self.run.layout.digest, "base": self._digest}
            wrong = [
                f"{key} {found.get(key)!r}, not {value!r}" for key, value in expected.items() if found.get(key) != value
            ]
            if wrong:
                failures[task] = f"refused: {'; '.join(wrong)}"
            else:
                del failures[task]
                yield task, reply

    def _enforce(self, failures: dict[str, str], when: str) -> None:
        """RunError, naming tasks and reasons, if the failures are more than the policy allows."""
        if not failures:
            return
        settings, every = self.run.settings, len(self.run.settings.party_names)
        told = "; ".join(f"{task}: {reason}" for task, reason in failures.items())
        succeeded = every - len(failures)
        if succeeded < settings.needed:
            raise RunError(f"{when}: {succeeded} of {every} clients succeeded, {settings.needed} needed. {told}")
        log(WARNING, "%s goes on without %s", when, told)
        self.run.record("warning", self.run.rounds_done, text=f"{when} goes on without {told}")


def _metrics(reply: Message, prefix: str) -> dict[str, float]:
    """The reply's numbers whose names start with `prefix` and a dot."""
    metrics = reply.content.metric_records["metrics"]
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in metrics.items() if name.startswith(start)}  # type: ignore[misc]
