"""What secure aggregation costs: bytes and seconds of one round, one client dropping out before its vector arrives.

    python benchmarks/secure_aggregation.py [--elements 86192640] [--clients 4] [--threads 1]

No network: members and server run one after another in this process, on vectors of plain noise. Beside it
the same sum of float32 vectors. Seconds are this process's CPU time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from atm_fl.privacy.secure_aggregation import Member, unmask
from atm_fl.runs.run import processor
from atm_fl.vectors.ring import WORD, Ring

Result = TypeVar("Result")
SECONDS: dict[str, list[float]] = {}


def timed(what: str, work: Callable[[], Result]) -> Result:
    """Do `work` and note its CPU seconds under `what`."""
    begin = time.process_time()
    result = work()
    SECONDS.setdefault(what, []).append(time.process_time() - begin)
    return result


def made_up(elements: int, seed: int) -> torch.Tensor:
    """A client's vector."""
    return torch.randn(elements, generator=torch.Generator().manual_seed(seed)).mul_(1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=86_192_640)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = tuple(f"client{number}" for number in range(args.clients))
    threshold, session, ring = args.clients // 2 + 1, "round 1 of run benchmark", Ring(1.0, args.clients)

    members = {name: Member(name, session, names, threshold) for name in names}
    keys = {name: timed("client: keys", member.advertise) for name, member in members.items()}
    sealed = {
        name: timed("client: shares", lambda member=member: member.share(keys))  # type: ignore[misc]
        for name, member in members.items()
    }
    for name, member in members.items():
        mine = {other: sealed[other][name] for other in names if other != name}
        timed("client: shares", lambda member=member, mine=mine: member.open(mine))  # type: ignore[misc]
    total, summed = np.zeros(args.elements, WORD), list(names[:-1])
    plain = torch.zeros(args.elements)
    for number, name in enumerate(names):
        vector = made_up(args.elements, number)
        words = timed("client: quantise", lambda vector=vector: ring.encode(vector))  # type: ignore[misc]
        timed("client: mask", lambda name=name, words=words: members[name].mask(words, names))  # type: ignore[misc]
        if name in summed:
            timed("server: add a vector", lambda words=words: np.add(total, words, out=total))  # type: ignore[misc]
            timed("plain server: add a vector", lambda vector=vector: plain.add_(vector))  # type: ignore[misc]
    signed = {name: timed("client: unmask", lambda name=name: members[name].agree(summed)) for name in summed}  # type: ignore[misc]
    revealed = {
        name: timed("client: unmask", lambda name=name: members[name].reveal(summed, signed))  # type: ignore[misc]
        for name in summed
    }
    timed("server: unmask", lambda: unmask(total, session, names, threshold, keys, summed, revealed))
    result = timed("server: decode", lambda: ring.decode(total))

    pair = len(sealed[names[0]][names[1]])
    others, share = args.clients - 1, len(next(iter(revealed[names[0]].values())))
    key, signature = len(keys[names[0]]), len(signed[names[0]])
    up = key + others * pair + words.nbytes + signature + args.clients * share
    down = args.clients * key + others * pair + len(signed) * signature  # without the base, which travels anyway
    print(f"{processor()}, {args.threads} threads, {args.elements:,} elements, {args.clients} clients, 1 drops out")
    print("| | CPU seconds (mean) | times a round |\n|---|---|---|")
    for what, seconds in SECONDS.items():
        print(f"| {what} | {np.mean(seconds):.4f} | {len(seconds)} |")
    print(f"bytes up from a client: {up:,} (a plain vector: {4 * args.elements:,}); down beside the base: {down:,}")
    print(f"largest difference to the plain sum {float((result - plain).abs().max()):.3g}, step {ring.step:.3g}")


if __name__ == "__main__":
    main()
