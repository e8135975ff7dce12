"""Secure aggregation: the server learns the sum of the parties' task vectors, and no single one.

The protocol of Bonawitz et al. 2017, "Practical secure aggregation for privacy-preserving machine learning" (CCS '17,
doi:10.1145/3133956.3133982), Figure 4, as it is for a server that is curious but follows the protocol. Each round of a
run, with fresh keys:

    keys      party u draws two X25519 key pairs, for masks and for sealing, and publishes them        U₁ answered
    shares    u draws a seed b_u, and splits b_u and its mask key among U₁ (Shamir, any t join);
              each share is sealed to its holder, and the server passes it on                          U₂ answered
    vectors   u sends  y_u = x_u + PRG(b_u) + Σ_{u<v} PRG(s_uv) − Σ_{v<u} PRG(s_uv)   over v in U₂     U₃ answered
    unmask    each u in U₃ reveals, of every v in U₂, its share of b_v if v is in U₃, and else of v's mask key

s_uv comes of u's mask key and v's, so that pairs cancel in Σ y; the server joins the shares, and takes PRG(b_v) off for
those who are in the sum and what does not cancel for those who went missing. At least t must answer every time.

x_u is the vector in whole steps of a `Ring`, modulo 2³², where sums are exact: the order of the parties, the masks and
who dropped out leave no trace in the bits. PRG is ChaCha20, keys go through HKDF-SHA256, shares are sealed with
ChaCha20-Poly1305; all three and X25519 are those of `cryptography`.

What of the paper is left out, signatures on keys (a public-key infrastructure) and the consistency check of U₃, guards
against a server that lies. Against one that tells parties different U₃ the rule t > n/2 guards nonetheless: each party
answers once, with one kind of share of each other, and t of both kinds would take 2 t answers. Nothing guards against a
server that swaps public keys for its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from atm_fl.blocks import BLOCK, parts
from atm_fl.errors import RunError
from atm_fl.privacy import shamir
from atm_fl.privacy.ring import WORD

KEY_BYTES = 32


def add_mask(words: np.ndarray, seed: bytes, sign: int = 1) -> None:
    """Add, or with sign −1 subtract, the ChaCha20 stream of a seed (32 bytes) to words [n]: one block at a time."""
    stream = Cipher(algorithms.ChaCha20(seed, bytes(16)), None).encryptor()
    zeros, drawn = bytes(BLOCK * WORD.itemsize), bytearray(BLOCK * WORD.itemsize)
    change = np.add if sign > 0 else np.subtract
    for part in parts(len(words)):
        block = words[part]
        stream.update_into(memoryview(zeros)[: block.nbytes], drawn)
        change(block, np.frombuffer(drawn, WORD, len(block)), out=block)


# -------------------------------------------------------------------------------------------------------------- keys


def session_of(run: str, round_number: int) -> str:
    """What keys are derived for, and errors name."""
    return f"round {round_number} of run {run}"


def _derived(secret: X25519PrivateKey, public: bytes, *purpose: str) -> bytes:
    """32 bytes that only the two ends of a key agreement know, for one purpose."""
    agreed = secret.exchange(X25519PublicKey.from_public_bytes(public))
    return HKDF(SHA256(), KEY_BYTES, None, json.dumps(["atm-fl secure aggregation", *purpose]).encode()).derive(agreed)


def _pair_seed(secret: X25519PrivateKey, public: bytes, session: str, one: str, other: str) -> bytes:
    """s_uv, the same from either side."""
    return _derived(secret, public, "mask", session, *sorted((one, other)))


def _public(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def _fresh() -> bytes:
    return X25519PrivateKey.generate().private_bytes_raw()


def _sign(one: str, other: str) -> int:
    """The sign with which `one` adds what it has in common with `other`."""
    return 1 if one < other else -1


# --------------------------------------------------------------------------------------------------------- one party


@dataclass
class Member:
    """One party's side of one round, and all its secrets, which it draws when it is made.

    Each step is taken once and in its order. RunError, which says what the server did, if a step is refused; a member
    that refused is to be thrown away. `dump` and `load` carry one over from one message to the next.

    session: the run and round, the same for all; parties: all names, in an order that all know.
    """

    name: str
    session: str
    parties: tuple[str, ...]
    threshold: int
    stage: str = "made"
    mask_key: bytes = field(default_factory=_fresh, repr=False)
    seal_key: bytes = field(default_factory=_fresh, repr=False)
    seed: bytes = field(default_factory=lambda: os.urandom(KEY_BYTES), repr=False)
    """b_u."""
    keys: dict[str, bytes] = field(default_factory=dict, repr=False)
    """Public keys of U₁."""
    kept: bytes = field(default=b"", repr=False)
    """Its shares of its own secrets."""
    sealed: dict[str, bytes] = field(default_factory=dict, repr=False)
    """What it received of the others of U₂."""

    def advertise(self) -> bytes:
        """Its public keys, of masks and of sealing, 64 bytes."""
        self._step("made", "advertised")
        return _public(self.mask_key) + _public(self.seal_key)

    def share(self, keys: Mapping[str, bytes]) -> dict[str, bytes]:
        """Given the keys of U₁: for each of the others the shares of its secrets, sealed."""
        self._step("advertised", "shared")
        self._check(keys, self.parties, "keys")
        if keys[self.name] != _public(self.mask_key) + _public(self.seal_key):
            raise self._refusal("another key as its own")
        if any(len(key) != 2 * KEY_BYTES for key in keys.values()) or len(set(keys.values())) < len(keys):
            raise self._refusal("keys that are too short or the same")
        self.keys = dict(keys)
        numbers = {name: self.parties.index(name) + 1 for name in keys}
        of_key, of_seed = (
            shamir.split(secret, numbers.values(), self.threshold) for secret in (self.mask_key, self.seed)
        )
        pairs = {name: of_key[number] + of_seed[number] for name, number in numbers.items()}
        self.kept = pairs.pop(self.name)
        return {name: self._seal(name, pair) for name, pair in pairs.items()}

    def mask(self, words: np.ndarray, sealed: Mapping[str, bytes]) -> None:
        """Given what the others of U₂ sealed for it: mask its words [n] in place. They may then be sent."""
        self._step("shared", "masked")
        self._check([self.name, *sealed], self.keys, "shares")
        self.sealed = dict(sealed)
        add_mask(words, self.seed)
        key = X25519PrivateKey.from_private_bytes(self.mask_key)
        for other in sealed:
            seed = _pair_seed(key, self.keys[other][:KEY_BYTES], self.session, self.name, other)
            add_mask(words, seed, _sign(self.name, other))

    def reveal(self, summed: Collection[str]) -> dict[str, bytes]:
        """Given U₃, whose vectors are in the sum: of each of those its share of the seed, of the others of the key."""
        self._step("masked", "revealed")
        self._check(summed, [self.name, *self.sealed], "vectors")
        pairs = {self.name: self.kept} | {name: self._open(name, pair) for name, pair in self.sealed.items()}
        half = shamir.SHARE_BYTES
        return {name: pair[half:] if name in summed else pair[:half] for name, pair in pairs.items()}

    def dump(self) -> str:
        """All of it, secrets too, as text."""
        return json.dumps(asdict(self), default=bytes.hex)

    @classmethod
    def load(cls, text: str) -> Member:
        """What was dumped."""
        found = json.loads(text)
        for name in ("mask_key", "seal_key", "seed", "kept"):
            found[name] = bytes.fromhex(found[name])
        for name in ("keys", "sealed"):
            found[name] = {other: bytes.fromhex(value) for other, value in found[name].items()}
        return cls(**found | {"parties": tuple(found["parties"])})

    def _step(self, before: str, after: str) -> None:
        if self.stage != before:
            raise self._refusal(f"a step out of turn: the party's last one was {self.stage!r}, not {before!r}")
        self.stage = after

    def _check(self, names: Collection[str], among: Collection[str], what: str) -> None:
        """Refuse `names` if they are too few, lack this party, or are not all among those of the step before."""
        if self.name not in names or not set(names) <= set(among):
            raise self._refusal(f"{what} of {', '.join(names)}, who are not among {', '.join(among)} with {self.name}")
        if len(set(names)) < self.threshold:
            raise self._refusal(f"{what} of {len(set(names))} parties; {self.threshold} are needed")

    def _refusal(self, what: str) -> RunError:
        return RunError(f"{self.name}: secure aggregation of {self.session}: refused: the server sent {what}")

    def _sealer(self, sender: str, recipient: str) -> ChaCha20Poly1305:
        other = self.keys[recipient if sender == self.name else sender][KEY_BYTES:]
        key = X25519PrivateKey.from_private_bytes(self.seal_key)
        return ChaCha20Poly1305(_derived(key, other, "seal", self.session, sender, recipient))

    def _seal(self, recipient: str, content: bytes) -> bytes:
        nonce = os.urandom(12)
        return nonce + self._sealer(self.name, recipient).encrypt(nonce, content, None)

    def _open(self, sender: str, sealed: bytes) -> bytes:
        try:
            return self._sealer(sender, self.name).decrypt(sealed[:12], sealed[12:], None)
        except InvalidTag:
            raise self._refusal(f"shares that {sender} did not seal") from None


# -------------------------------------------------------------------------------------------------------- the server


def unmask(
    total: np.ndarray,
    session: str,
    parties: tuple[str, ...],
    threshold: int,
    keys: Mapping[str, bytes],
    summed: Collection[str],
    revealed: Mapping[str, Mapping[str, bytes]],
) -> None:
    """Take the masks off a sum of masked words [n], in place.

    keys: of U₂; summed: U₃; revealed: by holder, what `Member.reveal` returned. RunError, naming who, if fewer than
    `threshold` answered or shares do not fit.
    """
    if len(revealed) < threshold:
        raise RunError(
            f"secure aggregation of {session}: {len(revealed)} of {len(summed)} parties helped to unmask the sum, "
            f"{threshold} needed"
        )
    for seed, sign in _left_over(session, parties, keys, summed, revealed):
        add_mask(total, seed, -sign)


def _left_over(
    session: str,
    parties: tuple[str, ...],
    keys: Mapping[str, bytes],
    summed: Collection[str],
    revealed: Mapping[str, Mapping[str, bytes]],
) -> Iterator[tuple[bytes, int]]:
    """(seed, sign) of every mask that is in the sum of `summed` and does not cancel."""
    for name in keys:
        try:
            secret = shamir.join({parties.index(holder) + 1: shares[name] for holder, shares in revealed.items()})
            if name not in summed and _public(secret) != keys[name][:KEY_BYTES]:
                raise ValueError("shares that are not of its key")
        except (KeyError, ValueError) as error:
            raise RunError(f"secure aggregation of {session}: the shares of {name} do not join: {error}") from error
        if name in summed:
            yield secret, 1
            continue
        key = X25519PrivateKey.from_private_bytes(secret)
        for other in summed:
            yield _pair_seed(key, keys[other][:KEY_BYTES], session, name, other), _sign(other, name)
