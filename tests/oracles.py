"""The merges once more: straight from the papers' equations, in float64 NumPy, without regard to speed or memory.

Each function takes the task vectors by name (float64 [n]) and the options of the merge of that name, all given.
`ORACLES` holds them by the merge's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

import numpy as np
import torch
from scipy.optimize import minimize

from atm_fl.merging import make_merge
from atm_fl.seeds import derive_seed
from atm_fl.vectors import Layout

Array = np.ndarray
Vectors = Mapping[str, Array]

ORACLES: dict[str, Callable[..., Array]] = {}

NOISE = 1e-7
"""Singular values below this part of the largest count as zero, and so do their vectors."""


def oracle(name: str) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    def register(function: Callable[..., Array]) -> Callable[..., Array]:
        ORACLES[name] = function
        return function

    return register


def places(fraction: float, size: int) -> Fraction:
    """fraction · size for the decimal number that the user wrote: 0.29 · 100 is 29."""
    return Fraction(str(fraction)) * size


def top(values: Array, density: float) -> Array:
    """Where the ⌊density · n⌋ (at least one) largest magnitudes are, with all that equal the smallest of them."""
    if values.size == 0:
        return np.zeros(0, bool)
    count = max(1, math.floor(places(density, values.size)))
    return np.abs(values) >= np.sort(np.abs(values))[-count]


def entries(layout: Layout, vector: Array) -> list[Array]:
    """The vector's entries in their shapes."""
    parts = np.split(vector, np.cumsum(layout.sizes)[:-1])
    return [piece.reshape(shape) for piece, shape in zip(parts, layout.shapes, strict=True)]


def by_entry(layout: Layout, vector: Array, change: Callable[[Array], Array]) -> Array:
    """The vector with each of its entries, flat, changed by itself."""
    return np.concatenate([change(piece.ravel()) for piece in entries(layout, vector)])


def average(vectors: Vectors, weights: Mapping[str, float]) -> Array:
    return sum(weights[task] * vector for task, vector in vectors.items()) / sum(weights.values())


def dare_mask(layout: Layout, seed: int, task: str, density: float) -> Array:
    """What DARE keeps of a task's vector; the draw is ours, the rest of the method is not."""
    ones = {task: torch.ones(layout.size)}
    return make_merge("dare", layout, seed=seed, density=density).combine(ones).numpy() > 0


def dropped(layout: Layout, seed: int, vectors: Vectors, density: float) -> Vectors:
    probability = round(density * 65536) / 65536
    return {task: dare_mask(layout, seed, task, density) * v / probability for task, v in vectors.items()}


def elect(stack: Array) -> Array:
    """Steps 2 and 3 of TIES on vectors [T, n]: the sign of the sum (0 elects +), the mean of what has that sign."""
    result = np.zeros(stack.shape[1])
    for element, values in enumerate(stack.T):
        sign = 1 if math.fsum(values) >= 0 else -1
        agreeing = [value for value in values if value * sign > 0]
        result[element] = sum(agreeing) / len(agreeing) if agreeing else 0
    return result


# --- means and sums


@oracle("mean")
def mean(vectors: Vectors, layout: Layout, seed: int, weights: Mapping[str, float], scaling: float) -> Array:
    return scaling * average(vectors, weights)


@oracle("task-arithmetic")
def task_arithmetic(vectors: Vectors, layout: Layout, seed: int, weights: Mapping[str, float], scaling: float) -> Array:
    return scaling * sum(weights[task] * vector for task, vector in vectors.items())


@oracle("clipped-mean")
def clipped_mean(
    vectors: Vectors, layout: Layout, seed: int, weights: Mapping[str, float], scaling: float, max_norm: float
) -> Array:
    norms = {task: np.linalg.norm(vector) for task, vector in vectors.items()}
    clipped = {task: v if norms[task] == 0 else v * min(1, max_norm / norms[task]) for task, v in vectors.items()}
    return scaling * average(clipped, weights)


@oracle("magnitude")
def magnitude(
    vectors: Vectors, layout: Layout, seed: int, weights: Mapping[str, float], scaling: float, density: float
) -> Array:
    pruned = {task: by_entry(layout, v, lambda piece: piece * top(piece, density)) for task, v in vectors.items()}
    return scaling * average(pruned, weights)


@oracle("breadcrumbs")
def breadcrumbs(
    vectors: Vectors, layout: Layout, seed: int, weights: Mapping[str, float], scaling: float, beta: float, gamma: float
) -> Array:
    def crumbs(piece: Array) -> Array:
        if piece.size == 0:
            return piece
        ordered = np.sort(np.abs(piece))
        last = max(0, math.ceil(places(gamma, piece.size)) - 1)
        first = min(math.floor(places(beta, piece.size)), last)
        return piece * ((np.abs(piece) >= ordered[first]) & (np.abs(piece) <= ordered[last]))

    return scaling * sum(weights[task] * by_entry(layout, v, crumbs) for task, v in vectors.items())


@oracle("dare")
def dare(
    vectors: Vectors, layout: Layout, seed: int, weights: Mapping[str, float], scaling: float, density: float
) -> Array:
    return scaling * average(dropped(layout, seed, vectors, density), weights)


# --- signs


@oracle("ties")
def ties(vectors: Vectors, layout: Layout, seed: int, scaling: float, density: float) -> Array:
    return scaling * elect(np.stack([vector * top(vector, density) for vector in vectors.values()]))


@oracle("dare-ties")
def dare_ties(vectors: Vectors, layout: Layout, seed: int, scaling: float, density: float) -> Array:
    return scaling * elect(np.stack(list(dropped(layout, seed, vectors, density).values())))


@oracle("consensus")
def consensus(vectors: Vectors, layout: Layout, seed: int, scaling: float, threshold: float, agreement: int) -> Array:
    total = sum(vectors.values())
    needed = sum((np.abs(v) >= threshold * np.abs(total - v)).astype(int) for v in vectors.values())
    return scaling * total * (needed >= agreement)


# --- robust


@oracle("median")
def median(vectors: Vectors, layout: Layout, seed: int, scaling: float) -> Array:
    ordered, count = np.sort(np.stack(list(vectors.values())), axis=0), len(vectors)
    middle = ordered[count // 2] if count % 2 else (ordered[count // 2 - 1] + ordered[count // 2]) / 2
    return scaling * middle


@oracle("trimmed-mean")
def trimmed_mean(vectors: Vectors, layout: Layout, seed: int, scaling: float, trim: float) -> Array:
    out = math.floor(places(trim, len(vectors)))
    return scaling * np.sort(np.stack(list(vectors.values())), axis=0)[out : len(vectors) - out].mean(0)


def distances(point: Array, stack: Array) -> float:
    """The sum of the distances that the geometric median minimises."""
    return float(np.linalg.norm(stack - point, axis=1).sum())


@oracle("geometric-median")
def geometric_median(vectors: Vectors, layout: Layout, seed: int, scaling: float, smoothing: float) -> Array:
    stack = np.stack(list(vectors.values()))
    size = np.linalg.norm(stack, axis=1).mean()
    if size == 0:
        return stack[0]
    stack = stack / size

    def objective(point: Array) -> tuple[float, Array]:
        gaps = point - stack
        lengths = np.sqrt((gaps**2).sum(1) + 1e-20)
        return lengths.sum(), (gaps / lengths[:, None]).sum(0)

    solution = minimize(objective, stack.mean(0), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10}).x
    # It may be one of the vectors, where the objective has a kink and a gradient method no luck.
    return scaling * size * min([solution, *stack], key=lambda point: distances(point, stack))


@oracle("multi-krum")
def multi_krum(vectors: Vectors, layout: Layout, seed: int, scaling: float, f: int) -> Array:
    count, scores = len(vectors), {}
    for task, vector in vectors.items():
        others = sorted(float(((vector - vectors[other]) ** 2).sum()) for other in vectors if other != task)
        scores[task] = sum(others[: count - f - 2])
    chosen = sorted(vectors, key=lambda task: (scores[task], task))[: count - f]
    return scaling * sum(vectors[task] for task in chosen) / len(chosen)


# --- gradient surgery


@oracle("pcgrad")
def pcgrad(vectors: Vectors, layout: Layout, seed: int, scaling: float) -> Array:
    total = np.zeros(layout.size)
    for task, vector in vectors.items():
        others = sorted(other for other in vectors if other != task)
        np.random.default_rng(derive_seed(seed, "pcgrad", task)).shuffle(others)
        gradient = vector.copy()
        for other in others:
            conflict = gradient @ vectors[other]
            if conflict < 0:
                gradient -= conflict / (vectors[other] @ vectors[other]) * vectors[other]
        total += gradient
    return scaling * total / len(vectors)


@oracle("cagrad")
def cagrad(vectors: Vectors, layout: Layout, seed: int, scaling: float, c: float) -> Array:
    """The primal problem instead of the dual: max over d of minₜ ⟨τₜ, d⟩ with ‖d − g₀‖ ≤ c ‖g₀‖."""
    stack = np.stack(list(vectors.values()))
    size = np.linalg.norm(stack, axis=1).mean()
    centre = stack.mean(0)
    if size == 0 or c == 0:
        return scaling * centre
    basis, coordinates = np.linalg.qr(stack.T / size)
    middle = coordinates.mean(1)
    square = (c * np.linalg.norm(middle)) ** 2
    limits = [
        {"type": "ineq", "fun": lambda x: coordinates.T @ x[:-1] - x[-1]},
        {"type": "ineq", "fun": lambda x: square - ((x[:-1] - middle) ** 2).sum()},
    ]
    start = np.append(middle, (coordinates.T @ middle).min())
    solution = minimize(
        lambda x: -x[-1],
        start,
        jac=lambda x: np.append(np.zeros(len(middle)), -1.0),
        method="SLSQP",
        constraints=limits,
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return scaling * size * (basis @ solution.x[:-1]) / (1 + c**2)


# --- entries and elements weighed


@oracle("model-stock")
def model_stock(vectors: Vectors, layout: Layout, seed: int, scaling: float) -> Array:
    count, merged = len(vectors), []
    for tensors in zip(*(entries(layout, vector) for vector in vectors.values()), strict=True):
        flat = [tensor.ravel() for tensor in tensors]
        cosines = []
        for i in range(count):
            for j in range(i):
                norms = np.linalg.norm(flat[i]) * np.linalg.norm(flat[j])
                cosines.append(flat[i] @ flat[j] / norms if norms else 0.0)
        cosine = np.mean(cosines)
        ratio = count * cosine / (1 + (count - 1) * cosine) if cosine > 0 else 0.0
        merged.append(ratio * sum(flat) / count)
    return scaling * np.concatenate(merged)


@oracle("pcb")
def pcb(vectors: Vectors, layout: Layout, seed: int, scaling: float, density: float) -> Array:
    def normed_softmax(values: Array, factor: float) -> Array:
        span = values.max() - values.min()
        powers = np.exp(factor * (values - values.min()) / (span or 1))
        return powers / powers.sum()

    stack = np.stack(list(vectors.values()))
    # Norm makes the size of each vector immaterial.
    unit = stack / np.maximum(np.abs(stack).max(1, keepdims=True), np.finfo(float).tiny)
    betas = []
    for row in unit:
        intra = normed_softmax(row * row, len(stack))
        inter = sum(normed_softmax(row * other, 1) for other in unit)
        beta = intra * inter
        betas.append(beta * top(beta, density))
    weight = sum(betas)
    return scaling * (np.stack(betas) * stack).sum(0) / np.where(weight > 0, weight, 1)


# --- singular values


def svd(matrix: Array, rank: int, largest: float | None = None) -> tuple[Array, Array, Array]:
    """U [m, r], σ [r], V [n, r] of the leading components; those below NOISE of the largest are 0."""
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    real = values > NOISE * (values[0] if largest is None else largest)
    return (u * real)[:, :rank], (values * real)[:rank], (vt.T * real)[:, :rank]


def polar(columns: Array) -> Array:
    """UVᵀ of the SVD, the nearest matrix with orthonormal columns; where the columns are dependent, on their span."""
    u, values, vt = np.linalg.svd(columns, full_matrices=False)
    real = values > NOISE * values[0]
    return u[:, real] @ vt[real]


def by_matrix(vectors: Vectors, layout: Layout, split_qkv: bool, merge: Callable[[list[Array]], Array]) -> Array:
    """Matrices are merged by `merge`, all other entries averaged."""
    merged = []
    named = zip(layout.names, *(entries(layout, vector) for vector in vectors.values()), strict=True)
    for name, *tensors in named:
        if tensors[0].ndim != 2 or tensors[0].size == 0:
            merged.append(sum(tensors) / len(tensors))
        elif split_qkv and name.endswith("qkv.weight"):
            thirds = [np.split(tensor, 3) for tensor in tensors]
            merged.append(np.concatenate([merge(list(piece)) for piece in zip(*thirds, strict=True)]))
        else:
            merged.append(merge(tensors))
    return np.concatenate([tensor.ravel() for tensor in merged])


@oracle("tsv-m")
def tsv_m(
    vectors: Vectors, layout: Layout, seed: int, scaling: float, split_qkv: bool, precision: str = "exact"
) -> Array:
    def merge(matrices: list[Array]) -> Array:
        rank = min(matrices[0].shape) // len(matrices)
        if rank == 0:
            return np.zeros_like(matrices[0])
        parts = [svd(matrix, rank) for matrix in matrices]
        u, values, v = (np.concatenate(piece, axis=-1) for piece in zip(*parts, strict=True))
        return polar(u) @ np.diag(values) @ polar(v).T

    return scaling * by_matrix(vectors, layout, split_qkv, merge)


@oracle("iso-c")
def iso_c(
    vectors: Vectors, layout: Layout, seed: int, scaling: float, split_qkv: bool, precision: str = "exact"
) -> Array:
    def merge(matrices: list[Array]) -> Array:
        total = sum(matrices)
        u, values, v = svd(total, min(total.shape))
        return values.mean() * u @ v.T

    return scaling * by_matrix(vectors, layout, split_qkv, merge)


@oracle("iso-cts")
def iso_cts(vectors: Vectors, layout: Layout, seed: int, scaling: float, split_qkv: bool, common: float) -> Array:
    def merge(matrices: list[Array]) -> Array:
        count, rank = len(matrices), min(matrices[0].shape)
        own_rank = round((rank - int(rank * common)) / count)
        u, values, v = svd(sum(matrices), rank - own_rank * count)
        parts = []
        for matrix in matrices:
            rest = matrix - u @ u.T @ matrix
            # What is left of a matrix within the common directions is rounding, not a direction.
            parts.append(svd(rest, own_rank, np.linalg.norm(matrix, 2)))
        parts.append((u, values, v))
        u, values, v = (np.concatenate(piece, axis=-1) for piece in zip(*parts, strict=True))
        return values.mean() * polar(u) @ polar(v).T

    return scaling * by_matrix(vectors, layout, split_qkv, merge)


@oracle("wudi")
def wudi(vectors: Vectors, layout: Layout, seed: int, scaling: float, split_qkv: bool, pull: float) -> Array:
    """As a least-squares problem in all tasks' own rows, without a Gram matrix."""

    def merge(matrices: list[Array]) -> Array:
        told = [matrix / np.linalg.norm(matrix) for matrix in matrices if matrix.any()]
        columns = matrices[0].shape[1]
        weight = pull * len(told) / columns or 1.0
        inputs = np.concatenate([*told, weight**0.5 * np.eye(columns)])
        outputs = [unit @ matrix.T for unit, matrix in zip(told, (m for m in matrices if m.any()), strict=True)]
        outputs.append(weight**0.5 * sum(matrices).T)
        return np.linalg.lstsq(inputs, np.concatenate(outputs), rcond=None)[0].T

    return scaling * by_matrix(vectors, layout, split_qkv, merge)
