"""The server's side of one round, without any transport."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from typing import Any

from atm_fl.codecs import size_of
from atm_fl.errors import RunError
from atm_fl.federation.aggregation import SecureSumAggregator, TaskVectorAggregator
from atm_fl.federation.bounds import too_long
from atm_fl.federation.client import Update
from atm_fl.merging.scaling import scale_layers
from atm_fl.models.buffers import check_buffers
from atm_fl.runs.run import Run
from atm_fl.vectors.blocks import l2_norm


class ServerRound:
    """The server's side of one round, without any transport: take in updates, then merge and move the base."""

    def __init__(self, run: Run, recorded: Collection[str] = ()) -> None:
        """recorded: clients whose lines of this round are in metrics.jsonl already, of a time that was given up."""
        self.run = run
        self.recorded = set(recorded)
        self.number = run.rounds_done + 1
        self.vectors: Any = SecureSumAggregator(run) if run.settings.secure_aggregation else TaskVectorAggregator(run)
        self._begin = time.perf_counter()

    def add(self, client: str, update: Update, bytes_down: int) -> None:
        """Decode a party's vector and keep it, and record what the party measured. Its arrays may be changed.

        client: its name (`Settings.party_names`). bytes_down: what it was sent. ValueError, before anything is
        recorded, for arrays that are no vector or images that are no weight.
        """
        if update.arrays is None:
            if update.evaluation:
                self.run.record("evaluation", self.number - 1, task=client, **update.evaluation, bytes_down=bytes_down)
            return
        begin = time.perf_counter()
        held, images = self.run.settings.task_of[client], update.tuning.get("images", 0)
        if self.run.settings.client_tasks.count(held) > 1 and not 0 < images < math.inf:
            raise ValueError(f"images {images!r}, not the positive number that weighs it within {held}")
        bytes_up = size_of(update.arrays)
        decoded = self.vectors.decode(client, update.arrays)
        costs = {"seconds_decode": time.perf_counter() - begin}
        costs |= {"bytes_up": bytes_up, "bytes_down": bytes_down}
        if client not in self.recorded:
            self._record(client, update, costs)
        self.vectors.add(client, decoded, images)

    def _record(self, client: str, update: Update, costs: dict[str, float]) -> None:
        self.recorded.add(client)
        tuning, settings = update.tuning, self.run.settings
        if self.number == settings.participations.get(settings.task_of[client], (1, 0))[0]:
            # Who joined an open run does not know that this is its first round, before which nothing could be lost.
            tuning = {name: value for name, value in tuning.items() if not name.endswith("_lost")}
        if update.evaluation:
            self.run.record("evaluation", self.number - 1, task=client, **update.evaluation)
        self.run.record("tuning", self.number, task=client, **tuning, **costs)
        budget, spent = self.run.settings.dp_epsilon, update.tuning.get("epsilon", 0.0)
        if budget and spent > budget:
            self.run.record("warning", self.number, text=f"{client}: its ε is {spent:.3f}, over dp-epsilon={budget:g}")

    def out_of_proportion(self) -> dict[str, str]:
        """The clients whose vectors are too long, with the figures; none if the vectors are added up unseen."""
        factor = self.run.settings.proportion
        if not factor or isinstance(self.vectors, SecureSumAggregator):
            return {}
        parameters, buffers = self._norms()
        reasons = too_long(self.vectors.norms, self.run.usual_norm, parameters, factor)
        too_large = too_long(self.vectors.buffer_norms, 0.0, buffers, factor)
        return {client: f"of its buffers {reason}" for client, reason in too_large.items()} | reasons

    def _norms(self) -> tuple[float, float]:
        """‖·‖ of the base's entries that are tuned, and of its shared buffers."""
        size = self.run.layout.size
        return l2_norm(self.run.base[:size]), l2_norm(self.run.base[size:])

    def check_sum(self) -> None:
        """RunError if an unmasked sum, of which no single vector is known, is out of proportion."""
        factor, count = self.run.settings.proportion, len(self.vectors.clients)
        norms, (parameters, _) = {"the mean": self.vectors.mean_norm()}, self._norms()
        refused = f"round {self.number}: the sum of {count} vectors is refused, whoever spoiled it: "
        if factor and (reason := too_long(norms, self.run.usual_norm, parameters, factor)):
            raise RunError(refused + reason["the mean"])
        if (buffers := self.vectors.buffers()) is not None:
            try:
                check_buffers(buffers, self.run.shared_buffers)
            except ValueError as error:
                raise RunError(f"{refused}{error}") from error

    def close(self, failures: dict[str, str] | None = None, costs: dict[str, float] | None = None) -> None:
        """Merge, move the base, write the checkpoint and the round's line, with `costs` in it."""
        settings = self.run.settings
        buffers = self.vectors.buffers()
        merged, beside = self.vectors.merge()
        merged = scale_layers(merged, self.run.layout, settings.layer_scalings)
        beside |= {"seconds": time.perf_counter() - self._begin, "failures": failures or {}, **(costs or {})}
        self.run.usual_norm = max(self.run.usual_norm, beside.get("usual_norm", 0.0))
        self.run.record("merge", self.number, norm=float(merged.norm()), **beside)
        self.run.advance(merged, buffers)
