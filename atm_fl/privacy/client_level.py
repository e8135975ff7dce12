"""Client-level DP: what the merged vectors tell of any one party as a whole (DP-FedAvg, McMahan et al. 2018).

Each task vector is scaled down to the norm C, and the sum gets Gaussian noise of deviation σ C (arXiv:1710.06963,
Algorithm 1, with all parties in every round and their number public): Σ τₜ min(1, C / ‖τₜ‖) + σ C · N(0, I). The merge,
which is of the sum alone, and all that comes after it see no more than that, and so cost nothing. Neighbours are two
federations of which one party's vectors are zero in one. Against those who see the models only: the server adds the
noise, and knows the sum without it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from atm_fl import tasks, vectors
from atm_fl.privacy import noise
from atm_fl.privacy.accounting import Spent, epsilon
from atm_fl.privacy.noise import derive_key, keyed_generator, party_secret
from atm_fl.transforms import Context, Transform
from atm_fl.vectors.blocks import l2_norm


@dataclass
class Clip(Transform):
    """Each task vector is scaled down to at most `norm`."""

    norm: float

    def client(self, vector: Tensor, context: Context) -> Tensor:
        """Under secure aggregation, where the ring's rounding comes after: to the norm less all that it can add."""
        rounding = context.settings.ring.step / 2 * len(vector) ** 0.5
        return scale_down(vector, max(0.0, self.norm - rounding))

    def server(self, vector: Tensor, context: Context) -> Tensor:
        return scale_down(vector, self.norm)


@dataclass
class Noise(Transform):
    """Gaussian noise of `multiplier` · `norm` on the sum.

    The round's number `epsilon` is the run's ε so far, at `dp-delta`.

    It is drawn by a secret of the server, and from the sum itself: the same sum gets the same noise and says
    nothing new when a round is done again; another sum gets another noise, which cannot be subtracted.
    """

    multiplier: float
    norm: float

    def total(self, scaled: Tensor, factor: float, context: Context) -> Tensor:
        settings, round_number = context.settings, context.round_number
        secret = party_secret(tasks.cache_dir())
        key = derive_key(secret, "client-level", settings.decisive(), round_number, vectors.digest(scaled))
        noise.add_noise(scaled, abs(factor) * self.multiplier * self.norm, keyed_generator(key))
        context.numbers["epsilon"] = epsilon([Spent(1.0, self.multiplier, round_number)], settings.dp_delta)
        return scaled


def scale_down(vector: Tensor, norm: float) -> Tensor:
    """A vector [n] scaled down to at most `norm`, in place."""
    length = l2_norm(vector)
    return vector.mul_(norm / length) if length > norm else vector
