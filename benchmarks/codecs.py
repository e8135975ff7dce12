"""What codecs cost and what they lose: seconds, bytes and error on a made-up task vector.

    python benchmarks/codecs.py [--elements 86192640] [--codecs int8,topk:0.01] [--threads 1] [--repeats 3]

The vector has the layout of open_clip's ViT-B-16 image tower; with fewer --elements, of as many of its first entries as
fit, and one matrix for the rest. Its elements are drawn from a normal distribution with a scale of its own for every
entry: there are no few large elements or singular values that topk and low-rank could keep, as real vectors may have.
Times are medians: decode makes a vector in fresh memory, add adds it to one that is there. The error is the norm of
what was lost over the norm of the vector, in one trip and without error feedback.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import TypeVar

import torch
from merging import image_tower
from torch import Tensor

from atm_fl.codecs import make_codec, size_of
from atm_fl.runs.run import processor
from atm_fl.vectors import Layout

CODECS = "fp32,fp16,bf16,int8,int8-nearest,int4,int4-nearest,ternary,topk:0.1,topk:0.01,low-rank:32,low-rank:8"
Result = TypeVar("Result")


def tower_of(elements: int) -> Layout:
    """A layout of so many elements: the image tower's first entries, the rest in a matrix and what it cannot hold."""
    full = image_tower("full")
    names, shapes, left = [], [], elements
    for name, shape, size in zip(full.names, full.shapes, full.sizes, strict=True):
        if size > left:
            break
        names, shapes, left = [*names, name], [*shapes, shape], left - size
    columns = full.shapes[0][0]
    return Layout((*names, "rest", "tail"), (*shapes, (left // columns, columns), (left % columns,)))


def made_up(layout: Layout) -> Tensor:
    """A vector of elements near 1e-4, float32 [n]."""
    random = torch.Generator().manual_seed(0)
    vector = torch.empty(layout.size)
    for entry in layout.views(vector).values():
        entry.normal_(0, 10 ** float(torch.empty(()).uniform_(-5, -3.5, generator=random)), generator=random)
    return vector


def timed(repeats: int, work: Callable[[], Result]) -> tuple[float, Result]:
    """(Median seconds, the last result) of some calls."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - begin)
    return median(seconds), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=86_192_640)
    parser.add_argument("--codecs", default=CODECS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    layout = tower_of(args.elements)
    vector, base = made_up(layout), torch.zeros(layout.size)
    print(f"{processor()}, {args.threads} threads, {layout.size:,} elements, medians of {args.repeats}")
    print("| codec | encode s | decode s | add s | bytes | of fp32 | error |\n|---|---|---|---|---|---|---|")
    for text in args.codecs.split(","):
        codec = make_codec(text, "--codecs")
        encode, arrays = timed(args.repeats, lambda codec=codec: codec.encode(vector, layout))  # type: ignore[misc]
        decode, arrived = timed(args.repeats, lambda codec=codec, sent=arrays: codec.decode(sent, layout))  # type: ignore[misc]
        size, error = size_of(arrays), float((arrived - vector).norm() / vector.norm())
        add, _ = timed(args.repeats, lambda codec=codec, sent=arrays: codec.add(sent, layout, base))  # type: ignore[misc]
        times = " | ".join(f"{seconds:.3f}" for seconds in (encode, decode, add))
        print(f"| {text} | {times} | {size:,} | {size / vector.nbytes:.2%} | {error:.2%} |")


if __name__ == "__main__":
    main()
