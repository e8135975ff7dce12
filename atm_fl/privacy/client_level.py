"""Client-level DP: what the merged vectors tell of any one party as a whole (DP-FedAvg, McMahan et al. 2018).

Each task vector is scaled down to the norm C, and the sum gets Gaussian noise of deviation σ C (arXiv:1710.06963,
Algorithm 1, with all parties in every round and their number public): Σ τₜ min(1, C / ‖τₜ‖) + σ C · N(0, I). The merge,
which is of the sum alone, and all that comes after it see no more than that, and so cost nothing. Neighbours are two
federations of which one party's vectors are zero in one. Against those who see the models only: the server adds the
noise, and knows the sum without it.
"""

from __future__ import annotations

from torch import Tensor

from atm_fl import tasks, vectors
from atm_fl.privacy import noise
from atm_fl.privacy.accounting import Spent, epsilon
from atm_fl.privacy.noise import derive_key, keyed_generator, party_secret
from atm_fl.settings import Settings
from atm_fl.vectors.blocks import l2_norm


def clip(vector: Tensor, norm: float) -> None:
    """Scale a vector [n] down to at most `norm`, in place."""
    length = l2_norm(vector)
    if length > norm:
        vector.mul_(norm / length)


def add_noise(scaled: Tensor, factor: float, settings: Settings, round_number: int) -> float:
    """Noise for `scaled`, float32 [n], which is `factor` times the sum, in place. Returns ε of the run at `dp-delta`.

    It is drawn by a secret of the server, and from the sum itself: the same sum gets the same noise and says
    nothing new when a round is done again; another sum gets another noise, which cannot be subtracted.
    """
    secret = party_secret(tasks.cache_dir())
    key = derive_key(secret, "client-level", settings.decisive(), round_number, vectors.digest(scaled))
    deviation = abs(factor) * settings.dp_client_noise * settings.dp_client_clip
    noise.add_noise(scaled, deviation, keyed_generator(key))
    return epsilon([Spent(1.0, settings.dp_client_noise, round_number)], settings.dp_delta)
