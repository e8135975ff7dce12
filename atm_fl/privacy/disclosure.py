"""What a party that tunes with DP-SGD tells beside its vector, and why it may. Nothing else is sent."""

from __future__ import annotations

DISCLOSED = {
    "epsilon": "ε of the run so far: of σ, the sampling rate and the steps alone",
    "epsilon_rdp": "the same by Rényi DP",
    "noise": "σ: follows from the settings and the number of records, which counts as known",
    "steps": "follows from the settings and the number of records",
    "images": "the expected number of images, not the drawn one: follows from the settings and the number of records",
    "norm": "of the noised vector, which is sent anyway",
    "validation": "accuracy on records that are not tuned on, with the pretrained values of private entries; they are "
    "not covered by ε",
    "test": "accuracy on records that are not tuned on, with the pretrained values of private entries; they are not "
    "covered by ε",
    "residual_lost": "whether a file of the party was lost",
    "optimizer_lost": "whether a file of the party was lost",
    "private_lost": "whether a file of the party was lost",
    "tuned_from_lost": "whether a file of the party was lost",
    "seconds_evaluate": "time on validation and test records",
    "seconds_encode": "time on the noised vector",
    "seconds_receive": "time on the base",
}
"""Number → why. Not there: the loss, the drawn number of images, and the seconds of tuning, which depend on it."""


def disclosed(numbers: dict[str, float]) -> dict[str, float]:
    """Those of `numbers` that a private party may send."""
    return {name: value for name, value in numbers.items() if name in DISCLOSED}
