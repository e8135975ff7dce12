"""A strategy in the place of Flower's `FedAvg`: it merges task vectors, in any app of the message API."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from torch import Tensor

from atm_fl.errors import RunError, SettingError, printable
from atm_fl.files import atomic_write
from atm_fl.flower.entries import AVERAGED, Entries
from atm_fl.flower.mods import WIRE, Wire
from atm_fl.merging import MERGES, Merge, make_merge, options
from atm_fl.merging.kinds import Streaming
from atm_fl.merging.linear import Mean
from atm_fl.merging.server_optimizer import SERVER_OPTIMIZERS, ServerOptimizer
from atm_fl.options import read_choice
from atm_fl.runs.checkpoints import load_checkpoint, save_checkpoint
from atm_fl.seeds import derive_seed
from atm_fl.server import boundary
from atm_fl.server.fetch import Bound
from atm_fl.server.grid import StreamingGrid
from atm_fl.vectors.blocks import empty, parts
from atm_fl.vectors.finite import check_finite
from atm_fl.vectors.mapped import MappedVectors
from atm_fl.vectors.model_files import checkpoints
from atm_fl.vectors.npy import read_arrays

BESIDE = 64 * 2**20
"""Bytes that a reply may have beyond twice the weights that were sent, of arrays that the app sends beside them."""
ClientScaling = Callable[[int, MetricRecord], float]
"""(node id, the metrics of its reply) → the factor on its task vector."""
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class TaskVectorStrategy(FedAvg):
    """`FedAvg` with a merge of task vectors in the place of the average.

    As with `FedAvg`, clients get and return weights in an ArrayRecord, with the number of their examples in a
    MetricRecord. A task vector is what a client returned minus what it was sent; entries.py says what becomes of
    whole numbers and of running statistics. The next weights are the sent ones plus the server optimizer's step for
    the merged vector.

    `merge="mean"` weighs by examples and, without anything else that touches the vectors, is computed as `FedAvg` does:
    a model of float32 ends with the same bits, if replies come in the order in which nodes were asked, as ours are
    summed. Merges that are means weigh by examples too; all others count each client once, as their papers do.

    One reply at a time is in memory, over a network none larger than twice the weights and 64 MiB; vectors wait in a
    temporary file for the merge to read them block by block.

    All arguments of `FedAvg`, and by name:

    merge, server_optimizer: as the settings, "ties:density=0.1,scaling=1.5", "adam:learning-rate=0.001".
    client_scaling: (node id, metrics of its reply) → the factor on that client's vector.
    averaged: patterns of the names of entries that are averaged whatever the merge.
    codec: of clients with `mods=[encoded(codec)]`; "": they return weights.
    on_failure: "abort" ends the run with a RunError at the first client that fails, in training or evaluation; "skip"
        goes on while `min_successful` (0: one) succeed. Both name the client and the reason.
    checkpoint_dir: a folder for a checkpoint after every round, of which `keep_checkpoints` stay (0: all). If it holds
        some, the run goes on after the last whole one, `initial_arrays` are only looked at for types, and finished
        rounds send nothing; a run ends with the same weights as an unbroken one.
    seed: of merges that draw random numbers.

    SettingError, before any client is asked, if an argument cannot work, or if another strategy wraps this one.
    """

    def __init__(
        self,
        *fedavg: Any,
        merge: str = "mean",
        server_optimizer: str = "none",
        client_scaling: ClientScaling | None = None,
        averaged: Sequence[str] = AVERAGED,
        codec: str = "",
        on_failure: str = "abort",
        min_successful: int = 0,
        checkpoint_dir: str | Path | None = None,
        keep_checkpoints: int = 2,
        seed: int = 0,
        **more: Any,
    ) -> None:
        super().__init__(*fedavg, **more)
        self._merge = read_choice("merge", merge, MERGES.offering(options))
        self._optimizer_choice = read_choice("server_optimizer", server_optimizer, SERVER_OPTIMIZERS)
        self._optimizer = self._make_optimizer()
        self._wire = Wire(codec) if codec else None
        if on_failure not in ("abort", "skip"):
            raise SettingError(f"on_failure={on_failure!r}: it is 'abort' or 'skip'")
        if min_successful and on_failure == "abort":
            raise SettingError(f"min_successful={min_successful} needs on_failure='skip'")
        if min_successful < 0 or keep_checkpoints < 0:
            raise SettingError(f"{min_successful=}, {keep_checkpoints=}: neither may be below 0")
        if isinstance(averaged, str):
            raise SettingError(f"averaged={averaged!r}: it must be a list of patterns, as [{averaged!r}]")
        self._client_scaling, self._averaged = client_scaling, tuple(averaged)
        self._on_failure, self._min_successful = on_failure, min_successful
        self._folder, self._keep, self._seed = Path(checkpoint_dir) if checkpoint_dir else None, keep_checkpoints, seed
        self._exact = (self._merge.name, self._merge.values) == (Mean.name, {}) and not (
            self._optimizer_choice.name != "none" or self._optimizer_choice.values or self._client_scaling or self._wire
        )
        """Whether the mean is that of the weights, as FedAvg computes it."""
        self._running = False
        self._done = 0
        """Rounds that were done when this process began."""
        self._entries: Entries
        self._sent: ArrayRecord
        self._base: Tensor
        """What was sent in this round, [n + b]."""
        self._asked: list[int] = []
        """The nodes that the last messages went to."""
        self._names: dict[int, str] = {}
        self._timeout = math.inf

    # ------------------------------------------------------------------------------------------------- Flower's methods

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """As `FedAvg.start`, from the checkpoint if there is one. Its Result has what this process measured."""
        self._entries = Entries.of(initial_arrays, self._averaged)
        if self._wire:
            self._wire.check(self._entries)
        self._merge_of(1)  # options that only show with the layout
        self._done, self._optimizer = 0, self._make_optimizer()
        self._sent = self._continued(initial_arrays, num_rounds)
        self._timeout, self._running = timeout, True
        try:
            return super().start(
                StreamingGrid(grid, _bound(initial_arrays)),
                self._sent,
                num_rounds,
                timeout,
                train_config,
                evaluate_config,
                evaluate_fn and self._of_rounds_to_come(evaluate_fn),
            )
        finally:
            self._running = False

    def summary(self) -> None:
        self._check_running()
        super().summary()
        log(
            INFO,
            "\t└──> Task vectors: merge %s | server optimizer %s | codec %s | on failure %s",
            self._merge,
            self._optimizer_choice,
            self._wire.name if self._wire else "none",
            self._on_failure,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._check_running()
        self._asked = []
        if server_round <= self._done:
            log(INFO, "configure_train: round %s is in %s", server_round, self._folder)
            return []
        messages = self._noted(super().configure_train(server_round, arrays, config, grid), grid)
        if messages:
            self._merge_of(server_round).check_count(len(messages))
            self._sent, self._base = arrays, self._entries.flat(arrays)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        if not self._asked:
            return (self._sent if server_round == self._done else None), None
        contents: dict[int, RecordDict] = {}
        spill = MappedVectors(self._folder)

        def keep(node: int, content: RecordDict) -> None:
            numbers = self._numbers(content)
            spill.add(str(node), self._vector(node, content, numbers))
            contents[node] = _without_arrays(content)

        nodes = self._taken_in(replies, keep, f"round {server_round}")
        weights = {str(node): float(self._numbers(contents[node])[self.weighted_by_key]) for node in nodes}  # type: ignore[arg-type]
        spilled = spill.vectors()
        vector = self._next({name: spilled[name] for name in weights}, weights, server_round)
        spill.close()
        try:
            self._sent = self._entries.record(vector, self._sent)
        except ValueError as error:
            raise RunError(f"round {server_round}: the merged weights hold {error}") from None
        if self._folder:
            words = torch.tensor(random.getstate()[1], dtype=torch.int64)
            state = {**self._optimizer.state, "random": words}
            save_checkpoint(self._folder, server_round, vector, self._entries.layout, state, self._keep)
        return self._sent, self._averages([contents[node] for node in nodes], self.train_metrics_aggr_fn)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._asked = []
        if server_round < self._done:
            return []
        return self._noted(super().configure_evaluate(server_round, arrays, config, grid), grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        if not self._asked:
            return None
        contents: dict[int, RecordDict] = {}

        def keep(node: int, content: RecordDict) -> None:
            self._numbers(content)
            contents[node] = _without_arrays(content)

        nodes = self._taken_in(replies, keep, f"the evaluation of round {server_round}")
        return self._averages([contents[node] for node in nodes], self.evaluate_metrics_aggr_fn)

    def initialize_parameters(self, *_: object) -> None:
        """SettingError: what asks for this is a workflow of Flower's older API, as of SecAgg+."""
        raise SettingError(
            "TaskVectorStrategy is of Flower's message API, and a workflow of the older one (DefaultWorkflow, SecAgg+) "
            "wants a strategy of flwr.server; the SecAgg mods hide single vectors, which most merges need. A run of "
            "atm-fl has secure aggregation: docs/privacy.md"
        )

    # ----------------------------------------------------------------------------------------------------- what is sent

    def _check_running(self) -> None:
        """SettingError if somebody else's `start` calls: a wrapper's."""
        if not self._running:
            raise SettingError(
                "TaskVectorStrategy runs by its own start() and cannot be wrapped by another strategy. Flower's "
                "DifferentialPrivacy… wrappers add the noise that an average needs, to weights whose checkpoint is "
                "written already: wrap FedAvg, or use a run of atm-fl, whose DP knows the merge (docs/privacy.md)"
            )

    def _noted(self, messages: Iterable[Message], grid: Grid) -> list[Message]:
        """The messages, once it is noted whom they go to."""
        sent = list(messages)
        self._asked = [message.metadata.dst_node_id for message in sent]
        self._names |= {node.node_id: node.name for node in grid.get_nodes() if node.name}
        return sent

    def _named(self, node: int) -> str:
        name = self._names.get(node)
        return f"{printable(name, 80)} (node {node})" if name else f"node {node}"

    # -------------------------------------------------------------------------------------------------- what comes back

    def _taken_in(self, replies: Iterable[Message], keep: Callable[[int, RecordDict], None], when: str) -> list[int]:
        """Give each reply to `keep`, and free its arrays; the nodes it took, in the order in which they were asked.

        A reply that `keep` refuses with a ValueError, an error and silence are failures. RunError, naming them, if they
        are more than `on_failure` allows.
        """
        failures = dict.fromkeys(self._asked, f"no reply within {self._timeout:g} s")
        waiting = set(self._asked)
        for reply in replies:
            node = reply.metadata.src_node_id
            if node not in waiting:
                log(WARNING, "%s: a reply of node %s, which nobody waits for, is passed over", when, node)
                continue
            waiting.discard(node)
            try:
                if reply.has_error():
                    failures[node] = boundary.reason(reply)
                else:
                    keep(node, reply.content)
                    del failures[node]
            except ValueError as error:
                failures[node] = f"refused: {error}"
            finally:
                boundary.forget(reply)
        succeeded = len(self._asked) - len(failures)
        log(INFO, "%s: %s results and %s failures", when, succeeded, len(failures))
        needed = len(self._asked) if self._on_failure == "abort" else min(self._min_successful or 1, len(self._asked))
        told = "; ".join(f"{self._named(node)}: {reason}" for node, reason in failures.items())
        if succeeded < needed:
            fix = "" if self._on_failure == "skip" else "; on_failure='skip' goes on without"
            raise RunError(f"{when}: {succeeded} of {len(self._asked)} clients succeeded, {needed} needed{fix}. {told}")
        if failures:
            log(WARNING, "%s goes on without %s", when, told)
        return [node for node in self._asked if node not in failures]

    def _numbers(self, content: RecordDict) -> MetricRecord:
        """The metrics of a reply. ValueError if they are not one record with a weight above 0."""
        records = list(content.metric_records.values())
        if len(records) != 1:
            raise ValueError(f"{len(records)} MetricRecords, where one is wanted")
        weight = records[0].get(self.weighted_by_key)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ValueError(f"{self.weighted_by_key} {boundary.shown(weight)}, not a number above 0 that weighs it")
        return records[0]

    def _vector(self, node: int, content: RecordDict, numbers: MetricRecord) -> Tensor:
        """What a reply adds to the merge: the task vector (the weights, if those are averaged), and the averaged
        entries, [n + b]. ValueError if the reply is malformed."""
        records = list(content.array_records.values())
        if len(records) != 1:
            raise ValueError(f"{len(records)} ArrayRecords, where one is wanted")
        said, size = content.config_records.get(WIRE), self._entries.merged.size
        if self._wire:
            vector = self._decoded(records[0], said)
        elif said is not None:
            codec = boundary.shown(said.get("codec"))
            raise ValueError(f"encoded by {codec}; TaskVectorStrategy(codec={codec}) decodes it")
        else:
            vector = self._entries.flat(records[0], taken=True)
            if not self._exact:
                vector[:size] -= self._base[:size]
        if self._client_scaling:
            vector[:size] *= self._factor(node, numbers)
        check_finite(vector)
        return vector

    def _decoded(self, record: ArrayRecord, said: ConfigRecord | None) -> Tensor:
        assert self._wire
        expected = self._wire.about(self._entries)
        if said is None or dict(said) != expected:
            told = "not encoded" if said is None else f"encoded as {printable(str(dict(said)), 200)}, not {expected}"
            raise ValueError(f"{told}; its ClientApp needs mods=[encoded({self._wire.name!r})], with the same averaged")
        contents = {name: record.pop(name).data for name in list(record)}
        return self._wire.decode(read_arrays(contents, self._entries.layout.size), self._entries)

    def _factor(self, node: int, numbers: MetricRecord) -> float:
        assert self._client_scaling
        try:
            factor = float(self._client_scaling(node, numbers))
        except (ArithmeticError, LookupError, TypeError) as error:
            raise ValueError(f"client_scaling: {type(error).__name__}: {printable(str(error), 80)}") from None
        if not math.isfinite(factor):
            raise ValueError(f"client_scaling: {factor}, not a finite factor")
        return factor

    # ----------------------------------------------------------------------------------------------- what is made of it

    def _next(self, vectors: dict[str, Tensor], weights: dict[str, float], number: int) -> Tensor:
        """The next weights [n + b] of what the clients added, with their numbers of examples."""
        if self._exact:
            return fedavg_mean(list(vectors.values()), list(weights.values()))
        size, merge = self._entries.merged.size, self._merge_of(number)
        weighs = isinstance(merge, Streaming) and merge.average
        merged = merge.combine({name: vector[:size] for name, vector in vectors.items()}, weights if weighs else None)
        buffers = [vector[size:] for vector in vectors.values()]
        moved = self._base[:size] + self._optimizer.step(merged, number)
        return torch.cat([moved, fedavg_mean(buffers, list(weights.values()))])

    def _merge_of(self, number: int) -> Merge:
        seed = derive_seed(self._seed, "merge", number)
        return make_merge(self._merge.name, self._entries.merged, seed=seed, **self._merge.values)

    def _make_optimizer(self) -> ServerOptimizer:
        return ServerOptimizer(self._optimizer_choice.name, **self._optimizer_choice.values)

    def _averages(
        self, contents: list[RecordDict], average: Callable[[list[RecordDict], str], MetricRecord]
    ) -> MetricRecord:
        """The clients' metrics as `average` has it. FedAvg's own cannot do with other keys than the first client's: it
        gets those that all have alike."""
        if average is aggregate_metricrecords:
            records = [self._numbers(content) for content in contents]
            shared = {key: _kind(value) for key, value in records[0].items()}
            for record in records[1:]:
                shared = {key: kind for key, kind in shared.items() if key in record and _kind(record[key]) == kind}
            if dropped := sorted({printable(key, 80) for record in records for key in record} - shared.keys()):
                log(WARNING, "metrics that not all clients have alike are left out: %s", ", ".join(dropped[:8]))
            contents = [
                RecordDict({"metrics": MetricRecord({key: record[key] for key in shared})}) for record in records
            ]
        return average(contents, self.weighted_by_key)

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def _continued(self, initial: ArrayRecord, num_rounds: int) -> ArrayRecord:
        """The arrays of the last whole checkpoint, whose state is taken up; `initial` if there is none."""
        if self._folder is None:
            return initial
        self._claim(self._folder)
        if not checkpoints(self._folder):
            return initial
        done, vector, state = load_checkpoint(self._folder, self._entries.layout, lambda text: log(WARNING, "%s", text))
        if done > num_rounds:
            raise SettingError(
                f"num_rounds={num_rounds}: checkpoint_dir={str(self._folder)!r} holds {done} rounds; raise it, or name "
                "another folder"
            )
        random.setstate((3, tuple(state.pop("random").tolist()), None))
        self._done, self._optimizer.state = done, state
        log(INFO, "Round %s of %s is done; going on from %s", done, num_rounds, self._folder)
        return self._entries.record(vector, initial)

    def _claim(self, folder: Path) -> None:
        """Write what decides the weights into the folder. SettingError if a run of something else is in it."""
        decides = {
            "merge": str(self._merge),
            "server_optimizer": str(self._optimizer_choice),
            "client_scaling": self._client_scaling is not None,
            "averaged": list(self._averaged),
            "codec": self._wire.name if self._wire else "",
            "weighted_by_key": self.weighted_by_key,
            "seed": self._seed,
        }
        path = folder / "strategy.json"
        if path.exists():
            held = json.loads(path.read_text())
            for key, value in decides.items():
                if held.get(key) != value:
                    raise SettingError(
                        f"{key}={value!r}: checkpoint_dir={str(folder)!r} holds a run with {held.get(key)!r}; name "
                        "another folder"
                    )
            return
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(decides, indent=1))

    def _of_rounds_to_come(self, evaluate_fn: EvaluateFn) -> EvaluateFn:
        """The app's evaluation, without the rounds before the checkpoint."""
        return lambda number, arrays: evaluate_fn(number, arrays) if number >= self._done else None


def fedavg_mean(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ (wᵢ / Σw) vᵢ of vectors [n], in their dtype and order, with the very operations of Flower's FedAvg."""
    factors = [weight / sum(weights) for weight in weights]
    mean = empty(len(vectors[0]), vectors[0])
    for chunk in parts(len(mean)):
        total = vectors[0][chunk].numpy() * factors[0]
        for vector, factor in zip(vectors[1:], factors[1:], strict=True):
            total += vector[chunk].numpy() * factor
        mean[chunk] = torch.from_numpy(total)
    return mean


def _bound(sent: ArrayRecord) -> Bound:
    """What a reply to these arrays may hold: twice as much, and what else an app sends."""
    return Bound.of(2 * sum(len(array.data) for array in sent.values()) + BESIDE, 2 * len(sent))


def _without_arrays(content: RecordDict) -> RecordDict:
    return RecordDict({name: record for name, record in content.items() if not isinstance(record, ArrayRecord)})


def _kind(value: object) -> int:
    """The length of a list; 0 of a number."""
    return len(value) + 1 if isinstance(value, list) else 0
