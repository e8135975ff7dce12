"""Secure aggregation: the server learns the sum of the parties' task vectors, and no single one.

The protocol of Bonawitz et al. 2017, "Practical secure aggregation for privacy-preserving machine learning" (CCS '17,
doi:10.1145/3133956.3133982), Figure 4 with what it adds against a server that lies: signed keys, and signatures on what
is unmasked. Each round of a run, with fresh keys:

    keys      party u draws two X25519 key pairs, for masks and for sealing, and a seed b_u; it publishes the public
              keys and a hash of b_u, signed with its long-term key                                    U₁ answered
    shares    u splits b_u and its mask key among those of U₁ whose keys it accepts (Shamir, any t join);
              each share is sealed to its holder, and the server passes it on
    confirm   u opens the shares that were sealed for it, and says whose opened                        U₂ stayed
    vectors   u sends  y_u = x_u + PRG(b_u) + Σ_{u<v} PRG(s_uv) − Σ_{v<u} PRG(s_uv)   over v in U₂     U₃ answered
    sign      u signs U₃ and the public keys of U₂, once
    unmask    u sees the signatures of t parties on just that, and reveals, of every v in U₂ whose share it has, its
              share of b_v if v is in U₃, and else of v's mask key

s_uv comes of u's mask key and v's, so that pairs cancel in Σ y; the server joins the shares, and takes PRG(b_v) off for
those who are in the sum and what does not cancel for those who went missing. At least t must answer every time.

x_u is the vector in whole steps of a `Ring`, modulo 2³², where sums are exact: the order of the parties, the masks and
who dropped out leave no trace in the bits. PRG is ChaCha20, keys go through HKDF-SHA256, shares are sealed with
ChaCha20-Poly1305; all three, X25519 and Ed25519 are those of `cryptography`.

Signatures protect a party that holds the others' long-term public keys (`Identity.trusted`). Then a server that swaps
keys or invents parties gets no vector, and one that tells parties different U₃ gets no shares, as long as fewer than
2t − n parties are in league with it (an honest one signs one set, and two sets need t signatures each). A party that
trusts nobody's key believes the server's; then only the rule t > n/2 guards against different U₃: each party answers
once, with one kind of share of each other, and t of both kinds would take 2t answers.

With neighbours (atm_fl/neighbours.py) v runs over the neighbours of u alone, who hold its shares with u itself, and as
many of these join as that file says. s_uv and the signatures are then bound to all keys of U₁ and to U₂, so that masks
of parties that were told different ones do not cancel. Whose vectors are summed is still signed by t of all.

A party whose keys or shares are bad is out by name and the round goes on, and no party can put out another by its
word: the server checks what it can see, and counts whom the parties accept for the rest (`refused_keys`, `unshared`). A
wrong share among those that are revealed is found by the hash or the public key of what it is to join to, and left
out. Who dealt shares that open but do not join shows only then (`UnjoinedShares`): its mask stays on the sum, which is
given up, and the round is done again without it, with fresh keys and seeds.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from dataclasses import dataclass, field, fields
from hashlib import sha256

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from atm_fl.errors import RunError
from atm_fl.neighbours import among, digest_of, neighbourhood, shares_needed
from atm_fl.privacy import shamir
from atm_fl.privacy.identity import SIGNATURE_BYTES, Identity
from atm_fl.vectors.blocks import BLOCK, parts
from atm_fl.vectors.ring import WORD

KEY_BYTES = 32
PUBLIC_BYTES = 3 * KEY_BYTES
"""A mask key, a sealing key and the hash of a seed; a signature follows."""
PAIR_BYTES = 2 * shamir.SHARE_BYTES
"""Shares of a mask key and of a seed."""
NONCE_BYTES, TAG_BYTES = 12, 16
SEALED_BYTES = NONCE_BYTES + PAIR_BYTES + TAG_BYTES


def add_mask(words: np.ndarray, seed: bytes, sign: int = 1) -> None:
    """Add, or with sign −1 subtract, the ChaCha20 stream of a seed (32 bytes) to words [n]: one block at a time."""
    stream = Cipher(algorithms.ChaCha20(seed, bytes(16)), None).encryptor()
    zeros, drawn = bytes(BLOCK * WORD.itemsize), bytearray(BLOCK * WORD.itemsize)
    change = np.add if sign > 0 else np.subtract
    for chunk in parts(len(words)):
        block = words[chunk]
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


def _commitment(seed: bytes) -> bytes:
    """What a seed can be told by, and not be found from."""
    return sha256(b"atm-fl secure aggregation seed" + seed).digest()


def check_keys(published: bytes) -> None:
    """ValueError if this is not what `Member.advertise` returns, as far as shows without knowing whose it is."""
    if len(published) != PUBLIC_BYTES + SIGNATURE_BYTES:
        raise ValueError(f"keys of {len(published)} bytes, not {PUBLIC_BYTES + SIGNATURE_BYTES}")
    for key in (published[:KEY_BYTES], published[KEY_BYTES : 2 * KEY_BYTES]):
        try:
            X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(key))
        except ValueError as error:  # a point of low order, zero among them, agrees on the same with everyone
            raise ValueError("keys that no secret can be agreed on with") from error


def public_keys(published: bytes) -> set[bytes]:
    """The public keys in what was published, whatever each is for."""
    return {published[:KEY_BYTES], published[KEY_BYTES : 2 * KEY_BYTES]}


def check_new(published: bytes, before: Set[bytes]) -> None:
    """ValueError if one of these keys is among the public keys of `before`.

    Who came first has them: nobody but the server sees another's keys before all are in.
    """
    if public_keys(published) & before:
        raise ValueError("keys that another has too")


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
    identity: Identity = field(default_factory=Identity, repr=False)
    neighbours: int = 0
    """With how many others it masks; 0: with all."""
    stage: str = "made"
    mask_key: bytes = field(default_factory=_fresh, repr=False)
    seal_key: bytes = field(default_factory=_fresh, repr=False)
    seed: bytes = field(default_factory=lambda: os.urandom(KEY_BYTES), repr=False)
    """b_u."""
    roster: str = field(default="", repr=False)
    """The digest of what U₁ published."""
    keys: dict[str, bytes] = field(default_factory=dict, repr=False)
    """What was published and is accepted, of U₁ and then of U₂."""
    near: list[str] = field(default_factory=list, repr=False)
    """Its neighbourhood, as far as it accepts their keys."""
    held: dict[str, bytes] = field(default_factory=dict, repr=False)
    """Its shares of the secrets of U₂, its own too."""
    summed: list[str] = field(default_factory=list, repr=False)
    """U₃ as it signed it, sorted."""

    @property
    def needed(self) -> int:
        """Shares that join a secret."""
        return shares_needed(len(self.parties), self.neighbours, self.threshold)

    def advertise(self) -> bytes:
        """Its public keys, of masks and of sealing, the hash of its seed and its signature, 160 bytes."""
        self._step("made", "advertised")
        trusted = self.identity.trusted
        if unknown := [name for name in self.parties if trusted and name not in trusted]:
            raise self._refusal(f"a run with {', '.join(unknown)}, whom this party's trusted-parties does not name")
        if trusted and trusted.get(self.name) != self.identity.public:
            raise RunError(f"{self.name}: trusted-parties has another key of {self.name} than this party's own")
        return self._published()

    def share(self, keys: Mapping[str, bytes]) -> dict[str, bytes]:
        """Given what U₁ published: for each neighbour whose keys it accepts the shares of its secrets, sealed."""
        self._step("advertised", "shared")
        self._check(keys, self.parties, "keys")
        if keys[self.name] != self._published():
            raise self._refusal("another key as its own")
        self.roster = digest_of(self.session, keys)
        near = neighbourhood(self.name, self.parties, self.neighbours, self.roster)
        others = {name: key for name, key in keys.items() if name != self.name and name in near}
        holders = Counter(key for published in keys.values() for key in public_keys(published))
        wrong = {name: reason for name, key in others.items() if (reason := self._wrong(name, key, holders))}
        self.keys = {name: key for name, key in keys.items() if name not in wrong}
        self.near = [name for name in self.keys if name in near]
        if len(self.near) < self.needed:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in wrong.items())
            raise self._refusal(f"good keys of {len(self.near)} parties, {self.needed} are needed ({reasons})")
        numbers = {name: self.parties.index(name) + 1 for name in self.near}
        of_key, of_seed = (shamir.split(secret, numbers.values(), self.needed) for secret in (self.mask_key, self.seed))
        pairs = {name: of_key[number] + of_seed[number] for name, number in numbers.items()}
        self.held = {self.name: pairs.pop(self.name)}
        return {name: self._seal(name, pair) for name, pair in pairs.items()}

    def open(self, sealed: Mapping[str, bytes]) -> list[str]:
        """Given what the others sealed for it: of whom it has the shares now, itself too."""
        self._step("shared", "opened")
        self._check([self.name, *sealed], self.near, "shares", self.needed)
        for name, content in sealed.items():
            if name != self.name and (pair := self._opened(name, content)):
                self.held[name] = pair
        if len(self.held) < self.needed:
            raise self._refusal(f"shares of which those of {len(self.held)} parties open; {self.needed} are needed")
        return list(self.held)

    def mask(self, words: np.ndarray, parties: Collection[str]) -> None:
        """Given U₂: mask its words [n] in place. They may then be sent."""
        self._step("opened", "masked")
        self._check(parties, self.keys, "parties")
        self._check([name for name in self.near if name in parties], self.near, "a neighbourhood", self.needed)
        self.keys = {name: self.keys[name] for name in self.parties if name in parties}
        self.held = {name: self.held[name] for name in self.keys if name in self.held}
        add_mask(words, self.seed)
        key = X25519PrivateKey.from_private_bytes(self.mask_key)
        bound = self._among()
        for other in self.keys.keys() & set(self.near) - {self.name}:
            seed = _pair_seed(key, self.keys[other][:KEY_BYTES], bound, self.name, other)
            add_mask(words, seed, _sign(self.name, other))

    def agree(self, summed: Collection[str]) -> bytes:
        """Given U₃, whose vectors are in the sum: its signature on it and on the keys of U₂, 64 bytes."""
        self._step("masked", "agreed")
        self._check(summed, self.keys, "vectors")
        self.summed = sorted(set(summed))
        return self.identity.sign("sum", *self._of_sum())

    def reveal(self, summed: Collection[str], signatures: Mapping[str, bytes]) -> dict[str, bytes]:
        """Given U₃ again and who signed it: its shares of the seeds of those, and of the others' mask keys.

        A party that trusts nobody's key cannot tell a signature, and takes it that the set is what the server says.
        """
        self._step("agreed", "revealed")
        if set(summed) != set(self.summed):
            raise self._refusal(f"vectors of {', '.join(summed)}, where it had signed {', '.join(self.summed)}")
        if self.identity.trusted:
            of_sum = self._of_sum()
            signers = [
                name for name in self.summed if self.identity.signed(name, signatures.get(name, b""), "sum", *of_sum)
            ]
            if len(signers) < self.threshold:
                raise self._refusal(
                    f"signatures of {len(signers)} parties on the same vectors and keys; {self.threshold} are needed"
                )
        half = shamir.SHARE_BYTES
        return {name: pair[half:] if name in self.summed else pair[:half] for name, pair in self.held.items()}

    def dump(self) -> str:
        """All of it, secrets too but for the long-term key, as text."""
        content = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "identity"}
        return json.dumps(content, default=bytes.hex)

    @classmethod
    def load(cls, text: str, identity: Identity) -> Member:
        """What was dumped."""
        stored = json.loads(text)
        for name in ("mask_key", "seal_key", "seed"):
            stored[name] = bytes.fromhex(stored[name])
        for name in ("keys", "held"):
            stored[name] = {other: bytes.fromhex(value) for other, value in stored[name].items()}
        return cls(**stored | {"parties": tuple(stored["parties"]), "identity": identity})

    def _published(self) -> bytes:
        public = _public(self.mask_key) + _public(self.seal_key) + _commitment(self.seed)
        return public + self.identity.sign(*self._of_keys(self.name, public))

    def _of_keys(self, name: str, public: bytes) -> tuple[object, ...]:
        """What a signature of keys is on: with parties, threshold and neighbours, on which all have to agree."""
        number = (self.neighbours,) if self.neighbours else ()
        return "keys", self.session, self.parties, self.threshold, *number, name, public.hex()

    def _among(self) -> str:
        """Given U₂: what pairs' masks and the signature of the sum are bound to."""
        return among(self.session, self.neighbours, self.roster, self.keys)

    def _of_sum(self) -> tuple[object, ...]:
        """What a signature of the sum is on. The keys, its own new ones among them, make it of this time alone."""
        return self._among(), self.summed, {name: self.keys[name].hex() for name in sorted(self.keys)}

    def _wrong(self, name: str, published: bytes, holders: Mapping[bytes, int]) -> str:
        """Why what `name` published is not accepted, "" if it is. holders: how many have published each public key."""
        try:
            check_keys(published)
        except ValueError as error:
            return str(error)
        public, signature = published[:PUBLIC_BYTES], published[PUBLIC_BYTES:]
        if any(holders[key] > 1 for key in public_keys(published)):
            return "keys that another has too"
        if self.identity.trusted and not self.identity.signed(name, signature, *self._of_keys(name, public)):
            return "keys that are not signed by the one it trusts"
        return ""

    def _step(self, before: str, after: str) -> None:
        if self.stage != before:
            raise self._refusal(f"a step out of turn: the party's last one was {self.stage!r}, not {before!r}")
        self.stage = after

    def _check(self, names: Collection[str], those: Collection[str], what: str, needed: int = 0) -> None:
        """Refuse `names` if they are too few, lack this party, or are not all among those of the step before.

        needed: how many must be there; 0: the threshold.
        """
        if self.name not in names or not set(names) <= set(those):
            raise self._refusal(f"{what} of {', '.join(names)}, who are not among {', '.join(those)} with {self.name}")
        if len(set(names)) < (needed or self.threshold):
            raise self._refusal(f"{what} of {len(set(names))} parties; {needed or self.threshold} are needed")

    def _refusal(self, what: str) -> RunError:
        return RunError(f"{self.name}: secure aggregation of {self.session}: refused: the server sent {what}")

    def _sealer(self, sender: str, recipient: str) -> ChaCha20Poly1305:
        other = self.keys[recipient if sender == self.name else sender][KEY_BYTES : 2 * KEY_BYTES]
        key = X25519PrivateKey.from_private_bytes(self.seal_key)
        return ChaCha20Poly1305(_derived(key, other, "seal", self.session, sender, recipient))

    def _seal(self, recipient: str, content: bytes) -> bytes:
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._sealer(self.name, recipient).encrypt(nonce, content, None)

    def _opened(self, sender: str, sealed: bytes) -> bytes | None:
        """What `sender` sealed for it; None if it did not, or it is no pair of shares."""
        try:
            pair = self._sealer(sender, self.name).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], None)
        except (InvalidTag, ValueError):
            return None
        return pair if len(pair) == PAIR_BYTES else None


# -------------------------------------------------------------------------------------------------------- the server


def refused_keys(
    accepted: Mapping[str, Collection[str]], most: int, near: Mapping[str, Collection[str]] | None = None
) -> dict[str, str]:
    """Given whose keys each party accepts, and that at most `most` are bad: who is out, and why.

    near: each party's neighbourhood, of which alone it judges, and of which at most `most` are bad; None: of all.

    All were sent the same keys. So bad ones are refused by every good party, who are more than `most`; where fewer
    refuse, it is they who cannot stay, since masks need both: for their trust, which is another than the others', or
    for their word, which is false.
    """
    near = near or dict.fromkeys(accepted, accepted)
    by = {name: [o for o in accepted if o in near[name] and name not in accepted[o] and o != name] for name in accepted}
    out = {name: f"refused by {', '.join(ones)}" for name, ones in by.items() if len(ones) > most}
    for name, held in accepted.items():
        others = [o for o in accepted if o in near[name] and o != name and o not in held and o not in out]
        if name not in out and others:
            out[name] = f"it refuses {', '.join(others)}"
    return out


def unshared(opened: Mapping[str, Collection[str]], threshold: int) -> dict[str, str]:
    """Given whose shares each party has opened: who is out since fewer than `threshold` have a share of it, and why.

    A share that one party lacks is none lost: any `threshold` of them join. So who says that another's did not open
    harms nobody.
    """
    out: dict[str, str] = {}
    while True:
        left = [name for name in opened if name not in out]
        holders = {name: sum(name in opened[one] for one in left) for name in left}
        few = {name: count for name, count in holders.items() if count < threshold}
        if not few:
            return out
        out |= {name: f"its shares opened at {count} parties, {threshold} are needed" for name, count in few.items()}


class UnjoinedShares(RunError):
    """A sum stays masked, since the shares of some parties' secrets do not join; reasons: of each of these, why."""

    def __init__(self, session: str, reasons: dict[str, str]) -> None:
        message = "; ".join(f"the shares of {name}'s secret do not join: {why}" for name, why in reasons.items())
        super().__init__(f"secure aggregation of {session}: {message}")
        self.reasons = reasons


def unmask(
    total: np.ndarray,
    session: str,
    parties: tuple[str, ...],
    threshold: int,
    keys: Mapping[str, bytes],
    summed: Collection[str],
    revealed: Mapping[str, Mapping[str, bytes]],
    neighbours: int = 0,
    roster: str = "",
) -> set[str]:
    """Take the masks off a sum of masked words [n], in place. Returns the holders that revealed a wrong share.

    keys: what U₂ published; summed: U₃; revealed: by holder, what `Member.reveal` returned; roster: the digest of what
    U₁ published, with neighbours. RunError if fewer than `threshold` answered; UnjoinedShares, naming all dealers whose
    shares do not join, if too few are right or are left. Nothing is changed then.
    """
    if len(revealed) < threshold:
        raise RunError(
            f"secure aggregation of {session}: {len(revealed)} of {len(summed)} parties helped to unmask the sum, "
            f"{threshold} needed"
        )
    wrong: set[str] = set()
    needed = shares_needed(len(parties), neighbours, threshold)
    bound = among(session, neighbours, roster, keys)
    unjoined: dict[str, str] = {}

    def near(name: str) -> frozenset[str]:
        return neighbourhood(name, parties, neighbours, roster)

    masks = list(_left_over(bound, parties, needed, keys, summed, revealed, near, wrong, unjoined))
    if unjoined:
        raise UnjoinedShares(session, unjoined)
    for seed, sign in masks:
        add_mask(total, seed, -sign)
    return wrong


def _left_over(
    bound: str,
    parties: tuple[str, ...],
    needed: int,
    keys: Mapping[str, bytes],
    summed: Collection[str],
    revealed: Mapping[str, Mapping[str, bytes]],
    near: Callable[[str], frozenset[str]],
    wrong: set[str],
    unjoined: dict[str, str],
) -> Iterator[tuple[bytes, int]]:
    """(seed, sign) of every mask that is in the sum of `summed` and does not cancel.

    `wrong` gets bad holders, and `unjoined` those whose secret does not come out, with the reason.
    """
    numbers, in_sum = {holder: parties.index(holder) + 1 for holder in revealed}, frozenset(summed)
    for name, published in keys.items():

        def right(secret: bytes, published: bytes = published, there: bool = name in summed) -> bool:
            mask_key, seed = published[:KEY_BYTES], published[2 * KEY_BYTES : PUBLIC_BYTES]
            return _commitment(secret) == seed if there else _public(secret) == mask_key

        shares = {numbers[holder]: by_dealer[name] for holder, by_dealer in revealed.items() if name in by_dealer}
        if len(shares) < needed:
            unjoined[name] = f"of those who have them {len(shares)} are left, {needed} are needed"
            continue
        try:
            secret, bad = shamir.join_right(shares, needed, right, {numbers[holder] for holder in wrong})
        except ValueError as error:
            unjoined[name] = f"{error}. {name} dealt, or too many revealed, wrong ones"
            continue
        wrong |= {holder for holder, number in numbers.items() if number in bad}
        if name in summed:
            yield secret, 1
            continue
        key = X25519PrivateKey.from_private_bytes(secret)
        for other in near(name) & in_sum:
            yield _pair_seed(key, keys[other][:KEY_BYTES], bound, name, other), _sign(other, name)
