"""One seed for every use of random numbers."""

from __future__ import annotations

import hashlib
import json


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from a run's seed and what the random numbers are for; other parts give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts, default=str).encode()).digest()[:8], "big") >> 1
