"""Images out of a task vector.

- `closed-form`: the patch embedding of a ViT is linear, so with δₚ = ∂L/∂(embedding of patch p) its gradient is
  Σₚ δₚ xₚᵀ; the position embedding is added to it, so its gradient *is* δ. The patches xₚ are the least-squares
  solution of that equation. Exact for one image, whatever its label, head and number of SGD steps; no search, no prior.
- `dlg`: Deep Leakage from Gradients (Zhu 2019, arXiv:1906.08935): L-BFGS on images whose gradient is the vector's, in
  the L2 norm. With labels found in the vector it is iDLG (Zhao 2020, arXiv:2001.02610).
- `inverting`: Inverting Gradients (Geiping 2020, arXiv:2003.14053): the cosine of the images' gradient and the vector,
  here entry by entry, plus total variation, by Adam on the signs of the gradient, pixels held within 0..1.
- `simulation`: as `inverting`, with the vector of the simulated local steps (simulation.py) in the gradient's place.

`breaching` has most of these for gradients; its last release is of 2022, and it knows no task vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from atm_fl.attacks.labels import recovered_labels
from atm_fl.attacks.scenario import Observation
from atm_fl.attacks.simulation import simulated_vector
from atm_fl.errors import SettingError
from atm_fl.models import Head
from atm_fl.seeds import derive_seed

PATCHES = ("vit.patch_embed.proj.weight", "vit.conv1.weight")
POSITIONS = ("vit.pos_embed", "vit.positional_embedding")
"""The two embeddings' entries in timm's and open_clip's ViTs."""
SOFTNESS = 1.0
"""Of the simulated AdamW: see `simulated_vector`."""
HEAD_RATE = 0.01
"""Adam's learning rate for a head that is searched for."""


class NoEquation(SettingError):
    """The vector does not hold what an attack wants."""


@dataclass(frozen=True)
class Reconstruction:
    """Images float32 [k, 3, s, s] in 0..1, in no particular order, and how far their vector is from the one received.

    prior: what the same search gives without the vector; None where there is no search.
    """

    images: Tensor
    distance: float
    prior: Tensor | None


def reconstruct(seen: Observation, number: int = 0) -> Reconstruction:
    """The images behind a vector, by the scenario's attack. number: of the victim, for the random starts.

    NoEquation if the vector does not hold what the attack wants.
    """
    scenario = seen.scenario
    if scenario.attack == "closed-form":
        return Reconstruction(closed_form(seen), 0.0, None)
    labels = seen.labels
    if labels is None:
        # Without the head a label is only the number of a direction, and directions are searched for.
        classes = len(seen.head.bias)
        labels = recovered_labels(seen) if scenario.head_known else torch.arange(scenario.images) % classes
    search = dlg if scenario.attack == "dlg" else signed_descent
    guesses = []
    for restart in range(scenario.restarts):
        random = torch.Generator().manual_seed(derive_seed(scenario.settings.seed, "start", number, restart))
        size = seen.model.image_size
        start = torch.rand(scenario.images, 3, size, size, generator=random)
        guesses.append(Reconstruction(*search(seen, start, labels), search(seen, start, None)[0]))
    return min(guesses, key=lambda one: one.distance)


def closed_form(seen: Observation) -> Tensor:
    """One image per party: the least-squares patches of the two embeddings' gradients, float32 [k, 3, s, s].

    Of several images it finds a mixture, k times the same. NoEquation if one of the embeddings is not in the vector.
    """
    entries = seen.layout.views(seen.gradient.double())
    weight = next((entries[name] for name in PATCHES if name in entries), None)
    positions = next((entries[name] for name in POSITIONS if name in entries), None)
    if weight is None or positions is None:
        raise NoEquation(
            f"attack='closed-form': with trainable={seen.scenario.settings.trainable!r} the vector does not hold the "
            "patch and the position embedding; choose another attack"
        )
    patch, size = weight.shape[-1], seen.model.image_size
    count = (size // patch) ** 2
    delta = positions.reshape(-1, weight.shape[0])[-count:]  # what comes before belongs to the class token
    patches = torch.linalg.lstsq(delta.T, weight.flatten(1), driver="gelsd").solution
    image = functional.fold(patches.T[None], size, kernel_size=patch, stride=patch).float()
    return seen.model.denormalise(image).nan_to_num(0.5).clamp(0, 1).expand(seen.scenario.images, -1, -1, -1)


def gradient_of(seen: Observation, head: Head, pixels: Tensor, labels: Tensor) -> Tensor:
    """∇L at the base of these images [k, 3, s, s] and labels [k], float32 [n], clipped as the party clips its own.

    Differentiable by images and head. (DP-SGD clips image by image: of several images it is not quite this.)
    """
    settings = seen.scenario.settings
    flat = seen.base.clone().requires_grad_()
    loss = functional.cross_entropy(head(seen.features(flat, pixels)), labels)
    (gradient,) = torch.autograd.grad(loss, flat, create_graph=True)
    bound = settings.dp_clip if settings.dp_sgd else settings.clip_norm or math.inf
    return gradient * (bound / gradient.norm()).clamp_max(1.0)


def dlg(seen: Observation, start: Tensor, labels: Tensor | None) -> tuple[Tensor, float]:
    """(images, squared distance of their gradient over the vector's own); without labels the start, as it has no prior.

    min over x of ‖∇L(x) − g‖² / ‖g‖².
    """
    if labels is None:
        return start, 1.0
    scenario, wanted = seen.scenario, seen.gradient
    head = _own(seen.head)
    pixels = start.clone().requires_grad_()
    variables = [pixels] if scenario.head_known else [pixels, head.weight.requires_grad_()]
    search = torch.optim.LBFGS(
        variables, max_iter=scenario.iterations, history_size=50, line_search_fn="strong_wolfe",
        tolerance_grad=0, tolerance_change=0,
    )  # fmt: skip

    def objective() -> Tensor:
        search.zero_grad()
        distance = (gradient_of(seen, head, pixels, labels) - wanted).square().sum() / wanted.square().sum()
        distance.backward()
        return distance

    with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention have no second derivative
        search.step(objective)
        return pixels.detach().nan_to_num(0.5).clamp(0, 1), float(objective())


def signed_descent(seen: Observation, start: Tensor, labels: Tensor | None) -> tuple[Tensor, float]:
    """(images, 1 − mean cosine of what they would send and the vector); without labels by the prior alone.

    min over x in [0, 1] of the mean over entries of 1 − cos(predicted(x), vector), + smoothness · TV(x). By entries, as
    the layout knows them: the few behind the last block have the largest gradients, and tell least of the pixels.
    """
    scenario = seen.scenario
    head = _own(seen.head)
    pixels = start.clone().requires_grad_()
    search = torch.optim.Adam([pixels], scenario.step_size)
    if not scenario.head_known:
        search.add_param_group({"params": [head.weight.requires_grad_()], "lr": HEAD_RATE})
    plan = torch.optim.lr_scheduler.MultiStepLR(
        search, [scenario.iterations * eighths // 8 for eighths in (3, 5, 7)], 0.1
    )

    def distance(labels: Tensor) -> Tensor:
        if scenario.attack == "simulation":
            predicted, wanted = simulated_vector(seen, head, pixels, labels, SOFTNESS), seen.vector
        else:
            predicted, wanted = gradient_of(seen, head, pixels, labels), seen.gradient
        pairs = zip(seen.layout.views(predicted).values(), seen.layout.views(wanted).values(), strict=True)
        return torch.stack([1 - functional.cosine_similarity(a.flatten(), b.flatten(), 0) for a, b in pairs]).mean()

    with sdpa_kernel(SDPBackend.MATH):
        for _ in range(scenario.iterations):
            search.zero_grad()
            objective = scenario.smoothness * total_variation(pixels)
            if labels is not None:
                objective = objective + distance(labels)
            objective.backward()
            assert pixels.grad is not None
            pixels.grad.sign_()
            search.step()
            plan.step()
            pixels.data.clamp_(0, 1)
        return pixels.detach(), 1.0 if labels is None else float(distance(labels).detach())


def total_variation(pixels: Tensor) -> Tensor:
    """Mean magnitude of the differences of neighbouring pixels, of images [k, 3, h, w]."""
    return pixels.diff(dim=-1).abs().mean() + pixels.diff(dim=-2).abs().mean()


def _own(head: Head) -> Head:
    return Head(head.weight.clone(), head.bias, head.scale)
