"""The parties that one process keeps between messages.

A SuperNode's process has one. In a simulation a process has many, and making one means to decode its pictures again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from torch import Tensor

from atm_fl.federation.client import Party
from atm_fl.tasks import SPLITS

MOST = 2**30
"""Bytes of data that are kept: 170 parties of 2,000 pictures of 32 px, or some thousand small ones."""
LEAST = 2**16
"""Bytes that a party counts for however small its data: its settings, head and account."""


class KeptParties:
    """Parties by what they were made of; those that were not asked for longest go when their data exceed `most` bytes.

    The one that was asked for last stays, whatever its size.
    """

    def __init__(self, make: Callable[..., Party], most: int = MOST) -> None:
        self._make, self._most = make, most
        self._parties: OrderedDict[tuple[Hashable, ...], tuple[Party, int]] = OrderedDict()
        self._size = 0

    def __call__(self, *made_of: Hashable) -> Party:
        """The party of these arguments of `make`: a kept one, or a new one."""
        if made_of in self._parties:
            self._parties.move_to_end(made_of)
            return self._parties[made_of][0]
        party = self._make(*made_of)
        self._parties[made_of] = party, size_of(party)
        self._size += size_of(party)
        while self._size > self._most and len(self._parties) > 1:
            self._size -= self._parties.popitem(last=False)[1][1]
        return party

    def __len__(self) -> int:
        return len(self._parties)

    def clear(self) -> None:
        """Keep none of them."""
        self._parties.clear()
        self._size = 0


def size_of(party: Party) -> int:
    """Bytes that a party's data take; pictures that stay in their files take none."""
    images = [party.data.split(name).images for name in SPLITS]
    return max(LEAST, sum(batch.nbytes for batch in images if isinstance(batch, Tensor)))
