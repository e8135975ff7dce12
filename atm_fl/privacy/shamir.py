"""Shamir's secret sharing (Shamir 1979, "How to share a secret"): any t of n shares give the secret, fewer say nothing.

The secret is f(0) of a polynomial f of degree t − 1 over the integers modulo the prime 2⁵²¹ − 1, whose other
coefficients are drawn uniformly; the share of holder x is f(x).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Set
from functools import lru_cache
from itertools import chain, combinations

PRIME = 2**521 - 1
SECRET_BYTES = 32
SHARE_BYTES = 66
TRIES = 10_000
"""Sets of shares that are tried for one secret, at most: some seconds."""


def split(secret: bytes, holders: Iterable[int], threshold: int) -> dict[int, bytes]:
    """A share of `secret` (32 bytes) for each of `holders` (numbers from 1); any `threshold` of them join.

    ValueError if that cannot be.
    """
    wanted = set(holders)
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= len(wanted) or min(wanted) < 1:
        raise ValueError(f"{len(secret)} bytes cannot be split among {sorted(wanted)} with threshold {threshold}")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {holder: _value(coefficients, holder).to_bytes(SHARE_BYTES, "big") for holder in wanted}


def _value(coefficients: list[int], x: int) -> int:
    total = 0
    for coefficient in reversed(coefficients):
        total = (total * x + coefficient) % PRIME
    return total


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret that `shares` (holder → share, as many as the threshold or more) are of: Lagrange's f(0).

    ValueError if they are no shares of one secret, as far as that shows.
    """
    if any(len(share) != SHARE_BYTES for share in shares.values()):
        raise ValueError(f"shares that are not {SHARE_BYTES} bytes")
    factors = _lagrange(tuple(shares))
    total = sum(int.from_bytes(share, "big") * factor for share, factor in zip(shares.values(), factors, strict=True))
    total %= PRIME
    if total >= 256**SECRET_BYTES:
        raise ValueError("shares that do not fit together")
    return total.to_bytes(SECRET_BYTES, "big")


@lru_cache(maxsize=64)
def _lagrange(holders: tuple[int, ...]) -> tuple[int, ...]:
    """What each holder's share counts for in f(0). A round's secrets, as many as holders, mostly have the same."""
    factors = []
    for x in holders:
        above, below = 1, 1
        for other in holders:
            if other != x:
                above, below = above * other % PRIME, below * (other - x) % PRIME
        factors.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(factors)


def join_right(
    shares: Mapping[int, bytes], threshold: int, right: Callable[[bytes], bool], suspects: Set[int] = frozenset()
) -> tuple[bytes, set[int]]:
    """(the secret, holders of wrong shares) where some of `shares` may be wrong, if `right` knows the secret.

    It is tried without those of `suspects`, then with as few as can be left out. ValueError if no `threshold` of them
    join to it, or none of the first `TRIES` sets does.
    """
    most = len(shares) - threshold
    suspected = [tuple(suspects & shares.keys())] if len(suspects & shares.keys()) <= most else []
    left_out = (without for count in range(most + 1) for without in combinations(shares, count))
    for tries, without in enumerate(chain(suspected, left_out)):
        if tries == TRIES:
            raise ValueError(f"none of {TRIES} sets of its shares joins")
        try:
            secret = join({holder: share for holder, share in shares.items() if holder not in without})
        except ValueError:
            continue
        if right(secret):
            return secret, set(without)
    raise ValueError(f"no {threshold} of {len(shares)} shares join")
