"""Neighbour graphs of secure aggregation: with whom a party masks, and how many of these must help to unmask.

Bell, Bonawitz, Gascón, Lepoint and Raykova 2020, "Secure single-server aggregation with (poly)logarithmic overhead"
(CCS '20, doi:10.1145/3372297.3417885). All parties stand on a circle in the order of a hash of the round's roster, the
keys that were announced. A party masks with the K/2 before it and the K/2 behind it (a Harary graph), and its secrets
are shared among these and itself: its neighbourhood, of K + 1. Who knows the roster knows the circle; who may choose a
part of the roster can try others, `TRIES` of them.

How many shares, s, join a secret decides what a server can do that also chooses who drops out, and when, and tells
parties different things. Everybody who helps has seen the same set signed by a threshold t of the n parties, and who
helps is in it: that is sure with fewer than 2 t − n in league with the server. With more, parties that are told
different sets reveal each other's secrets, and it can have single vectors, with neighbours or without. With m = K/2:

- A seed comes off only if s of its neighbourhood help. So of a neighbourhood K + 1 − s honest parties at most can be
  left out, and a gap of m on the circle has w = s − m − 1 corrupt parties in it at least.
- The sum of some of the honest parties alone shows only if no masks lead from these to the others, which takes two
  such gaps. Both secrets of one party show only to s of its neighbourhood, itself and corrupt ones: w on either side.
- A party that was told another roster, or other parties, than those that help takes K + 1 − s once more: it wants s
  of its neighbourhood to be there before it masks. Then 2w + 1 corrupt ones are left in its neighbourhood.

So all that can go wrong takes two disjoint stretches of m with 2w corrupt parties in them; `disconnection` bounds the
probability, and `shares_needed` is the least s for which it is below `FAILURE` after so many `TRIES`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from math import exp, lgamma

CORRUPT = 3
"""One party in so many may be in league with the server."""
TRIES = 2.0**40
"""Rosters that these can try in a round, however often its keys are exchanged."""
FAILURE = 2.0**-20
"""The probability of a round in which they find one that serves them."""


def digest_of(session: str, roster: Mapping[str, bytes]) -> str:
    """What the keys that a round's parties announced are told by, 64 hexadecimal digits."""
    return sha256(json.dumps([session, sorted((name, key.hex()) for name, key in roster.items())]).encode()).hexdigest()


@lru_cache(maxsize=2)
def circle(parties: tuple[str, ...], roster: str) -> tuple[str, ...]:
    """The parties in the order that the roster of this digest has them in. Who announced nothing has a place too."""
    return tuple(sorted(parties, key=lambda name: sha256(f"{roster} {name}".encode()).digest()))


def neighbourhood(name: str, parties: tuple[str, ...], neighbours: int, roster: str) -> frozenset[str]:
    """A party and its neighbours, as many as said; 0: all."""
    if not neighbours:
        return frozenset(parties)
    order, half = circle(parties, roster), neighbours // 2
    place = order.index(name)
    return frozenset(order[(place + step) % len(order)] for step in range(-half, half + 1))


def among(session: str, neighbours: int, roster: str, parties: Collection[str]) -> str:
    """The session as masks and signatures are bound to it: with neighbours, of this roster and these parties alone."""
    return digest_of(f"{session} {roster}", dict.fromkeys(parties, b"")) if neighbours else session


def disconnection(parties: int, neighbours: int, needed: int, corrupt: int) -> float:
    """An upper bound, for one roster, of the probability that so many corrupt parties stand where they learn too much.

    That is, that of two disjoint stretches of m = K/2 places 2w or more are theirs, w = s − m − 1. There are
    n (n − K + 1) / 2 pairs of such stretches; how many of K places are corrupt is hypergeometric.
    """
    honest = parties - corrupt
    least = max(2 * (needed - neighbours // 2 - 1), neighbours - honest)
    tail = (
        _ln_choose(neighbours, count) + _ln_choose(parties - neighbours, corrupt - count) - _ln_choose(parties, corrupt)
        for count in range(least, min(neighbours, corrupt) + 1)
    )
    return min(1.0, parties * (parties - neighbours + 1) / 2 * sum(map(exp, tail)))


def _ln_choose(count: int, chosen: int) -> float:
    return lgamma(count + 1) - lgamma(chosen + 1) - lgamma(count - chosen + 1)


@lru_cache(maxsize=64)
def shares_needed(parties: int, neighbours: int, threshold: int) -> int:
    """s, the fewest shares of a neighbourhood that may join; without neighbours the threshold, of all.

    Corrupt are one in `CORRUPT`, or as many as the threshold guards against, if these are more. ValueError if these
    are too many for so few neighbours.
    """
    if not neighbours:
        return threshold
    corrupt = max(parties // CORRUPT, 2 * threshold - parties - 1)
    for needed in range(neighbours // 2 + 2, neighbours + 2):
        if disconnection(parties, neighbours, needed, corrupt) * TRIES <= FAILURE:
            return needed
    raise ValueError(f"too few for {parties} parties, of whom {corrupt} may be in league with the server")


def least_neighbours(parties: int, threshold: int) -> int:
    """The fewest neighbours for which `shares_needed` has an answer; 0: there are none."""
    for neighbours in range(2, parties, 2):
        with suppress(ValueError):
            shares_needed(parties, neighbours, threshold)
            return neighbours
    return 0
