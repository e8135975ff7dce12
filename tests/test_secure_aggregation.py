"""Secure aggregation: the right sum to the last bit, whoever drops out and when, and no single vector at the server."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_folder
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from federation import final, in_process, same, tampered
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.stats import chisquare

from atm_fl import codecs
from atm_fl.cli import run as cli
from atm_fl.clients.app import app as client_app
from atm_fl.errors import RunError, SettingError
from atm_fl.federation import client as party_module
from atm_fl.federation.client_state import ClientState
from atm_fl.federation.loop import run_loop
from atm_fl.privacy import secure_aggregation, shamir
from atm_fl.privacy.identity import Identity, party_key, public_line, read_trusted
from atm_fl.privacy.secure_aggregation import Member, add_mask, check_keys, refused_keys, unmask, unshared
from atm_fl.runs.metrics import read_metrics
from atm_fl.runs.run import Run
from atm_fl.server.app import serve
from atm_fl.server.grid import InProcessGrid
from atm_fl.settings import Settings
from atm_fl.transforms import Context as TransformContext
from atm_fl.transforms.wire import RingWire
from atm_fl.vectors.ring import WORD, Ring

PARTIES = ("a", "b", "c", "d", "e")
SESSION = "round 1 of run x"
PHASES = ("keys", "shares", "confirm", "vectors", "sign", "unmask")


# ------------------------------------------------------------------------------------------------------ shares and ring


@given(st.binary(min_size=32, max_size=32), st.integers(2, 7), st.data())
@hypothesis_settings(max_examples=40, deadline=None)
def test_any_threshold_of_the_shares_join_and_fewer_do_not(secret: bytes, count: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(2, count))
    shares = shamir.split(secret, range(1, count + 1), threshold)
    for chosen in combinations(shares, threshold):
        assert shamir.join({holder: shares[holder] for holder in chosen}) == secret
    fewer = {holder: shares[holder] for holder in list(shares)[: threshold - 1]}
    with pytest.raises(ValueError, match="do not fit together"):  # 2⁻²⁶⁵ of all wrong joins look like a secret
        shamir.join(fewer)
    wrong = shares | {1: shamir.split(secret, (1, 2), 2)[1]}
    with pytest.raises(ValueError, match="do not fit together"):
        shamir.join(wrong)


def test_a_line_through_two_shares_by_hand() -> None:
    """f(x) = s + a x: f(1) and f(3) give s = (3 f(1) − f(3)) / 2."""
    secret = (123456789).to_bytes(32, "big")
    shares = {x: int.from_bytes(share, "big") for x, share in shamir.split(secret, (1, 3), 2).items()}
    assert (3 * shares[1] - shares[3]) * pow(2, -1, shamir.PRIME) % shamir.PRIME == 123456789


def test_fewer_shares_are_uniform_whatever_the_secret() -> None:
    """Two shares of three needed: their leading bytes over many splits, of a secret that is all zeros."""
    leading = [shamir.split(bytes(32), (1, 2, 3), 3)[2][2] for _ in range(4096)]
    assert chisquare(np.bincount(leading, minlength=256)).pvalue > 1e-4


@given(st.integers(1, 9), st.floats(1e-3, 1e3), st.integers(0, 2**32))
@hypothesis_settings(max_examples=40, deadline=None)
def test_the_ring_never_wraps_and_is_off_by_half_a_step(parties: int, reach: float, seed: int) -> None:
    reach = float(np.float32(reach))
    ring, random = Ring(reach, parties), torch.Generator().manual_seed(seed)
    vectors = (torch.rand(parties, 50, generator=random) * 2 - 1) * reach
    vectors[:, 0], vectors[:, 1] = reach, -reach
    total = np.zeros(50, WORD)
    for vector in vectors:
        total += ring.encode(vector)
    bound = parties * ring.step / 2 * 1.001 + 1e-7 * reach * parties  # and float32's own rounding of the result
    assert float((ring.decode(total).double() - vectors.double().sum(0)).abs().max()) <= bound


def test_what_the_ring_cannot_hold_is_said() -> None:
    with pytest.raises(ValueError, match=r"element beyond secure-range=1"):
        Ring(1.0, 3).encode(torch.tensor([0.5, -1.5]))
    with pytest.raises(ValueError, match="not finite"):
        Ring(1.0, 3).encode(torch.tensor([float("nan")]))


def test_a_mask_is_chacha20_and_goes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atm_fl.vectors.blocks.BLOCK", 64)
    monkeypatch.setattr(secure_aggregation, "BLOCK", 64)
    words = np.arange(200, dtype=WORD)
    add_mask(words, bytes(range(32)))
    key = bytes(range(32))
    whole = secure_aggregation.Cipher(secure_aggregation.algorithms.ChaCha20(key, bytes(16)), None).encryptor()
    stream = np.frombuffer(whole.update(bytes(800)), WORD)
    assert np.array_equal(words, np.arange(200, dtype=WORD) + stream)
    add_mask(words, key, -1)
    assert np.array_equal(words, np.arange(200, dtype=WORD))


# --------------------------------------------------------------------------------------------------------- the protocol


def protocol(
    vectors: dict[str, np.ndarray], gone: dict[str, str], threshold: int = 3
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Run one round among `vectors`; gone: phase → names that drop out in it. (The sum, what the server received)."""
    names = tuple(vectors)
    members = {name: Member(name, SESSION, names, threshold) for name in names}

    def there(phase: str, among: Any) -> list[str]:
        return [name for name in among if name not in gone.get(phase, "")]

    def carried(name: str) -> Member:
        """As over the disk."""
        members[name] = Member.load(members[name].dump(), members[name].identity)
        return members[name]

    keys = {name: members[name].advertise() for name in there("keys", names)}
    sealed = {name: carried(name).share(keys) for name in there("shares", keys)}
    opened = [name for name in there("confirm", sealed) if carried(name).open(passed_on(sealed, name))]
    received, total = {}, np.zeros_like(next(iter(vectors.values())))
    for name in there("vectors", opened):
        received[name] = vectors[name].copy()
        carried(name).mask(received[name], opened)
        total += received[name]
    signed = {name: carried(name).agree(list(received)) for name in there("sign", received)}
    revealed = {name: carried(name).reveal(list(received), signed) for name in there("unmask", signed)}
    wrong = unmask(total, SESSION, names, threshold, {name: keys[name] for name in opened}, list(received), revealed)
    assert not wrong
    return total, received


def passed_on(sealed: dict[str, dict[str, bytes]], name: str) -> dict[str, bytes]:
    """What the others sealed for `name`."""
    return {other: sealed[other][name] for other in sealed if other != name}


def made_up(size: int = 1000, names: tuple[str, ...] = PARTIES) -> dict[str, np.ndarray]:
    """Words of vectors as small as task vectors are."""
    random = torch.Generator().manual_seed(0)
    return {name: Ring(1.0, len(names)).encode(torch.randn(size, generator=random) * 1e-3) for name in names}


@pytest.mark.parametrize(
    "gone",
    [
        {},
        *[{phase: name} for phase in PHASES for name in "ace"],
        {"keys": "a", "vectors": "c"},
        {"confirm": "d", "sign": "a"},
        {"shares": "b", "unmask": "e"},
        {"vectors": "ae"},
        {"vectors": "d", "unmask": "b"},
    ],
)
def test_the_sum_is_exact_whoever_drops_out_at_whichever_phase(gone: dict[str, str]) -> None:
    vectors = made_up()
    out = "".join(names for phase, names in gone.items() if phase not in ("sign", "unmask"))
    total, _ = protocol(vectors, gone)
    expected = sum((words for name, words in vectors.items() if name not in out), np.zeros(1000, WORD))
    assert np.array_equal(total, expected)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ({"keys": "abc"}, "refused: the server sent keys of 2 parties; 3 are needed"),
        ({"shares": "abc"}, "refused: the server sent shares of 2 parties; 3 are needed"),
        ({"confirm": "abc"}, "refused: the server sent parties of 2 parties; 3 are needed"),
        ({"vectors": "abc"}, "refused: the server sent vectors of 2 parties; 3 are needed"),
        ({"unmask": "abc"}, "2 of 5 parties helped to unmask the sum, 3 needed"),
    ],
)
def test_below_the_threshold_nothing_is_unmasked(gone: dict[str, str], words: str) -> None:
    with pytest.raises(RunError, match=words):
        protocol(made_up(), gone)


def pinned(threshold: int = 3, names: tuple[str, ...] = PARTIES) -> dict[str, Member]:
    """Members that know each other's long-term keys."""
    keys = {name: Ed25519PrivateKey.generate() for name in names}
    trusted = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
    return {name: Member(name, SESSION, names, threshold, Identity(keys[name], trusted)) for name in names}


def strangers(threshold: int = 3, names: tuple[str, ...] = PARTIES) -> dict[str, Member]:
    """Members that know nobody's key."""
    return {name: Member(name, SESSION, names, threshold) for name in names}


def masked_members(members: dict[str, Member] | None = None) -> dict[str, Member]:
    """Five members that have sent their vectors."""
    members = members or strangers()
    keys = {name: member.advertise() for name, member in members.items()}
    sealed = {name: member.share(keys) for name, member in members.items()}
    for name, member in members.items():
        assert set(member.open(passed_on(sealed, name))) == set(members)
    for member in members.values():
        member.mask(np.zeros(4, WORD), list(members))
    return members


def copied(member: Member) -> Member:
    return Member.load(member.dump(), member.identity)


def test_a_member_signs_one_set_and_reveals_one_kind_of_share_of_each_peer_and_once() -> None:
    member = masked_members()["a"]
    kept = copied(member)
    member.agree(["a", "b", "c"])
    with pytest.raises(RunError, match="a: .*refused: the server sent a step out of turn"):
        copied(member).agree(["a", "b", "c", "d"])
    with pytest.raises(RunError, match="vectors of a, b, c, d, where it had signed a, b, c"):
        copied(member).reveal(["a", "b", "c", "d"], {})
    first = member.reveal(["a", "b", "c"], {})
    with pytest.raises(RunError, match="a: .*refused: the server sent a step out of turn"):
        member.reveal(["a", "b", "c"], {})
    kept.agree(["a", "b", "c", "d"])
    both = kept.reveal(["a", "b", "c", "d"], {})  # what refusing prevents: d's other share
    assert [name for name in PARTIES if first[name] != both[name]] == ["d"]


@pytest.mark.parametrize(
    ("summed", "words"),
    [
        (["a", "b"], "vectors of 2 parties; 3 are needed"),
        (["a", "a", "a"], "vectors of 1 parties; 3 are needed"),
        (["b", "c", "d"], "vectors of b, c, d, who are not among a, b, c, d, e with a"),
        (["a", "b", "x"], "vectors of a, b, x, who are not among"),
    ],
)
def test_a_member_refuses_sets_that_cannot_be(summed: list[str], words: str) -> None:
    with pytest.raises(RunError, match=words):
        masked_members()["a"].agree(summed)


def test_two_vectors_never_get_the_same_masks() -> None:
    member = masked_members()["a"]
    with pytest.raises(RunError, match="step out of turn"):
        member.mask(np.zeros(4, WORD), PARTIES)


BAD_KEYS = {
    "too short": lambda key: key[:63],
    "too long": lambda key: key + b"x",
    "empty": lambda key: b"",
    "all zero": lambda key: bytes(len(key)),
    "a point of low order": lambda key: key[:32] + LOW_ORDER + key[64:],
}
LOW_ORDER = bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800")


def test_swapped_keys_and_shares_are_not_accepted() -> None:
    members = strangers()
    keys = {name: member.advertise() for name, member in members.items()}
    with pytest.raises(RunError, match="another key as its own"):
        copied(members["a"]).share(keys | {"a": keys["b"]})
    assert list(copied(members["a"]).share(keys | {"c": keys["b"]})) == ["d", "e"]  # who has sent it first?
    for bad in BAD_KEYS.values():
        assert list(copied(members["a"]).share(keys | {"c": bad(keys["c"])})) == ["b", "d", "e"]
    with pytest.raises(RunError, match=r"good keys of 2 parties, 3 are needed \(b: keys of 0 bytes, not 160; c: "):
        copied(members["a"]).share(keys | {"b": b"", "c": bytes(160), "d": b""})
    sealed = {name: member.share(keys) for name, member in members.items()}
    to_a = passed_on(sealed, "a") | {"b": sealed["b"]["c"], "d": b"x"}  # b's share for c, and what nobody sealed
    assert members["a"].open(to_a) == ["a", "c", "e"]


@pytest.mark.parametrize("bad", BAD_KEYS)
def test_the_server_knows_a_key_that_no_party_can_use(bad: str) -> None:
    published = strangers()["a"].advertise()
    check_keys(published)
    with pytest.raises(ValueError, match="keys of|keys that no secret"):
        check_keys(BAD_KEYS[bad](published))


@given(st.integers(2, 12), st.data())
@hypothesis_settings(max_examples=200, deadline=None)
def test_bad_parties_put_out_no_good_one(count: int, data: st.DataObject) -> None:
    """Whatever they refuse, and whatever makes the others refuse them, those that stay can do the round."""
    names, threshold = [str(number) for number in range(count)], data.draw(st.integers(count // 2 + 1, count))
    bad = set(names[: data.draw(st.integers(0, count - threshold))])
    refused = {name for name in bad if data.draw(st.booleans())}
    anything = st.sets(st.sampled_from(names))
    keys = {one: data.draw(anything) if one in bad else set(names) - refused for one in names}
    out = refused_keys(keys, count - threshold)
    assert refused <= out.keys() <= bad
    left = [name for name in names if name not in out]
    assert all(other in keys[name] for name in left for other in left if name != other)

    dealt = {one: data.draw(anything) for one in bad}  # whose shares of each bad one open
    opened = {
        one: data.draw(anything) if one in bad else {name for name in names if one in dealt.get(name, names)}
        for one in left
    }
    few = unshared(opened, threshold)
    assert few.keys() <= bad
    stay = [name for name in left if name not in few]
    assert all(sum(name in opened[one] for one in stay) >= threshold for name in stay)


def test_a_party_that_all_refuse_or_that_refuses_another_is_named_and_goes_alone() -> None:
    everyone = dict.fromkeys(PARTIES, PARTIES)
    assert refused_keys(everyone, 2) == {}
    assert refused_keys(everyone | {"b": ["b"]}, 2) == {"b": "it refuses a, c, d, e"}
    without = {name: [other for other in PARTIES if other != "b"] for name in PARTIES}
    assert refused_keys(without | {"b": PARTIES}, 2) == {"b": "refused by a, c, d, e"}
    assert refused_keys(everyone | {"a": ["a", "b", "d", "e"]}, 2) == {"a": "it refuses c"}
    assert refused_keys({"a": "ab", "b": "abc", "c": "abc"}, 1) == {"a": "it refuses c"}
    assert unshared(everyone | {"a": ["a"], "b": []}, 3) == {}
    assert unshared(without | {"b": PARTIES}, 3) == {"b": "its shares opened at 1 parties, 3 are needed"}


# ------------------------------------------------------------------------------------------- wrong shares are left out


def revealed_by(members: dict[str, Member], summed: list[str]) -> dict[str, dict[str, bytes]]:
    signed = {name: members[name].agree(summed) for name in summed}
    return {name: members[name].reveal(summed, signed) for name in summed}


WRONG_SHARES = {
    "random": lambda share: bytes(2) + share[::-1][2:],
    "one bit": lambda share: share[:-1] + bytes([share[-1] ^ 1]),
    "short": lambda share: share[:5],
    "empty": lambda share: b"",
    "beyond the field": lambda share: b"\xff" * 66,
}


@pytest.mark.parametrize("kind", WRONG_SHARES)
@pytest.mark.parametrize("liars", ["b", "bd"])
def test_the_sum_is_unmasked_in_spite_of_wrong_shares_and_who_revealed_them_is_named(kind: str, liars: str) -> None:
    """As long as the threshold's number of right ones is there; one party has dropped out before its vector."""
    names, threshold = (*PARTIES, "f"), 3
    members = strangers(threshold, names)
    keys = {name: member.advertise() for name, member in members.items()}
    sealed = {name: member.share(keys) for name, member in members.items()}
    vectors, total = made_up(names=names), np.zeros(1000, WORD)
    for name, member in members.items():
        member.open(passed_on(sealed, name))
    summed = [name for name in names if name != "c"]
    for name in summed:
        words = vectors[name].copy()
        members[name].mask(words, names)
        total += words
    revealed = revealed_by(members, summed)
    for liar in liars:
        revealed[liar] = {name: WRONG_SHARES[kind](share) for name, share in revealed[liar].items()}
    assert unmask(total, SESSION, names, threshold, keys, summed, revealed) == set(liars)
    assert np.array_equal(total, sum((vectors[name] for name in summed), np.zeros(1000, WORD)))


def test_too_many_wrong_shares_are_told_from_a_lying_server_and_leave_the_sum_as_it_was() -> None:
    members = masked_members(strangers())
    revealed = revealed_by(members, list(PARTIES))
    keys = {name: member.keys[name] for name, member in members.items()}
    for liar in "abc":
        revealed[liar] = {name: bytes(66) for name in PARTIES}
    total = np.arange(4, dtype=WORD)
    with pytest.raises(RunError, match="the shares of a's secret do not join: no 3 of 5 shares join. a dealt, or"):
        unmask(total, SESSION, PARTIES, 3, keys, PARTIES, revealed)
    assert total.tolist() == [0, 1, 2, 3]


def test_a_secret_is_looked_for_among_a_bounded_number_of_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shamir, "TRIES", 50)
    shares = shamir.split(bytes(32), range(1, 31), 10)
    with pytest.raises(ValueError, match="none of 50 sets"):
        shamir.join_right(shares, 10, lambda secret: False)
    shares |= dict.fromkeys((3, 7, 30), bytes(66))
    with pytest.raises(ValueError, match="none of 50 sets"):
        shamir.join_right(shares, 10, lambda secret: secret == bytes(32))
    assert shamir.join_right(shares, 10, lambda secret: secret == bytes(32), {3, 7, 30}) == (bytes(32), {3, 7, 30})


# ----------------------------------------------------------------------------------------------- against a lying server


def stolen(members: dict[str, Member], impostors: dict[str, Member]) -> np.ndarray | None:
    """What a server gets that plays all other parties to `a`, each with a vector of zeros, and follows the protocol."""
    victim, secret = members["a"], made_up()["a"]
    keys = {name: member.advertise() for name, member in impostors.items() if name != "a"} | {"a": victim.advertise()}
    sealed = {"a": victim.share(keys)} | {name: impostors[name].share(keys) for name in impostors if name != "a"}
    for name, member in (impostors | {"a": victim}).items():
        member.open(passed_on(sealed, name))
    words, total = secret.copy(), np.zeros(1000, WORD)
    victim.mask(words, list(impostors))
    assert not np.array_equal(words, secret)
    total += words
    for name, member in impostors.items():
        if name != "a":
            nothing = np.zeros(1000, WORD)
            member.mask(nothing, list(impostors))
            total += nothing
    revealed = revealed_by(impostors | {"a": victim}, list(impostors))
    unmask(total, SESSION, victim.parties, victim.threshold, keys, list(impostors), revealed)
    return total


def test_a_server_that_swaps_all_keys_recovers_a_vector_bit_for_bit_unless_keys_are_pinned() -> None:
    assert np.array_equal(stolen(strangers(), strangers()), made_up()["a"])  # the attack works
    with pytest.raises(RunError, match="good keys of 1 parties, 3 are needed .*b: keys that are not signed by the one"):
        stolen(pinned(), strangers())
    with pytest.raises(RunError, match="good keys of 1 parties, 3 are needed"):
        stolen(pinned(), pinned())  # signed, by keys of the server's own making


def test_a_party_takes_no_part_with_invented_ones() -> None:
    names = ("a", "x", "y")
    identity = pinned()["a"].identity
    victim = Member("a", SESSION, names, 2, identity)
    with pytest.raises(RunError, match="a run with x, y, whom this party's trusted-parties does not name"):
        victim.advertise()


def test_signed_keys_are_of_one_session_one_name_one_set_of_parties_and_one_threshold() -> None:
    """Whatever else the server takes from another exchange in which the same parties signed."""
    members = pinned()
    keys = {name: member.advertise() for name, member in members.items()}
    b = members["b"]
    for session, parties, threshold, name in (
        ("round 2 of run x", PARTIES, 3, "b"),
        ("round 1 of run y", PARTIES, 3, "b"),
        (SESSION, PARTIES[:4], 3, "b"),
        (SESSION, PARTIES[::-1], 3, "b"),
        (SESSION, PARTIES, 4, "b"),
    ):
        other = Member(name, session, parties, threshold, b.identity).advertise()
        assert list(copied(members["a"]).share(keys | {"b": other})) == ["c", "d", "e"]
    assert list(copied(members["a"]).share(keys | {"b": keys["c"], "c": keys["b"]})) == ["d", "e"]
    mixed = keys["b"][:32] + strangers()["b"].advertise()[32:96] + keys["b"][96:]
    assert list(copied(members["a"]).share(keys | {"b": mixed})) == ["c", "d", "e"]
    assert list(copied(members["a"]).share(keys)) == ["b", "c", "d", "e"]


def test_a_party_reveals_nothing_before_the_threshold_signed_the_same_set() -> None:
    """The server tells a, b that c's vector is in, and d, e that it is not, to have both kinds of c's shares."""
    members, with_c, without = masked_members(pinned()), list(PARTIES), ["a", "b", "d", "e"]
    signed = {"a": members["a"].agree(with_c), "b": members["b"].agree(with_c)}
    signed |= {"d": members["d"].agree(without), "e": members["e"].agree(without)}
    with pytest.raises(RunError, match="a: .*signatures of 2 parties on the same vectors and keys; 3 are needed"):
        copied(members["a"]).reveal(with_c, signed)
    with pytest.raises(RunError, match="d: .*signatures of 2 parties"):
        copied(members["d"]).reveal(without, signed)
    signed["e"] = strangers()["e"].identity.sign("sum", *members["a"]._of_sum())  # by another key
    with pytest.raises(RunError, match="signatures of 2 parties"):
        copied(members["a"]).reveal(with_c, signed | {"c": signed["a"], "d": b"", "x": signed["b"]})
    assert copied(members["a"]).reveal(with_c, signed | {"c": members["c"].agree(with_c)})


def test_nobodys_signature_counts_twice() -> None:
    member = masked_members(pinned())["a"]
    twice = ["a", "a", "b", "c"]
    signed = {"a": member.agree(twice)}
    with pytest.raises(RunError, match="signatures of 1 parties on the same vectors"):
        member.reveal(twice, signed)


def test_signatures_of_a_round_that_is_done_again_are_worth_nothing() -> None:
    members = pinned()
    once = masked_members({name: copied(member) for name, member in members.items()})
    signed = {name: member.agree(PARTIES) for name, member in once.items()}
    fresh = {name: Member(name, SESSION, PARTIES, 3, member.identity) for name, member in members.items()}
    again = masked_members(fresh)
    mine = again["a"].agree(PARTIES)
    with pytest.raises(RunError, match="signatures of 1 parties on the same vectors and keys"):
        again["a"].reveal(PARTIES, signed | {"a": mine})


def test_old_keys_of_a_round_that_is_done_again_reveal_nothing() -> None:
    """The server knows a mask key of the first time, when that party dropped out, and passes it on again."""
    first = pinned()
    old = first["b"].advertise()
    members = {name: Member(name, SESSION, PARTIES, 3, member.identity) for name, member in first.items()}
    keys = {name: member.advertise() for name, member in members.items()}
    sealed = {"a": members["a"].share(keys | {"b": old})}  # signed, of this session
    sealed |= {name: members[name].share(keys) for name in PARTIES[1:]}
    assert "b" not in members["a"].open(passed_on(sealed, "a"))
    assert "a" not in members["b"].open(passed_on(sealed, "b"))


def test_a_partys_long_term_key_is_its_own_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATM_FL_CACHE", str(tmp_path))
    line = public_line("red")
    path = tmp_path / "identity" / "red"
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert line == public_line("red") != public_line("green")
    assert list(path.parent.iterdir()) == sorted([path.parent / "green", path], reverse=False)
    trusted = tmp_path / "trusted"
    trusted.write_text(f"# us\n\n{line} a comment\n{public_line('green')}\n")
    actual = read_trusted(trusted)
    assert list(actual) == ["red", "green"]
    assert actual["red"] == party_key("red").public_key().public_bytes_raw()
    path.write_text("no key")
    with pytest.raises(SettingError, match="red is no OpenSSH private key"):
        party_key("red")


def test_a_party_is_told_its_public_key(capsys: pytest.CaptureFixture[str]) -> None:
    cli.identity("red")
    assert capsys.readouterr().out == public_line("red") + "\n"
    for name in ("", "..", "../red"):
        with pytest.raises(SettingError, match="is no party's name"):
            party_key(name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names nobody"),
        ("red ssh-ed25519 AAAA", "red: 'ssh-ed25519 AAAA' is no public key of the form"),
        ("red", "red: '' is no public key"),
        ("red {key}\nred {key}", "names red twice"),
        ("red {key}\ngreen {key}", "green has another client's key"),
        ("red ecdsa-sha2-nistp256 AAAA", "is no public key of the form"),
    ],
)
def test_a_list_of_trusted_parties_that_cannot_be_is_said(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "trusted"
    file.write_text(text.format(key=public_line("red").partition(" ")[2]))
    with pytest.raises(SettingError, match=words):
        read_trusted(file)
    with pytest.raises(SettingError, match="trusted-parties='/nowhere' cannot be read"):
        read_trusted("/nowhere")


def test_sealed_shares_are_for_their_holder_alone() -> None:
    """What the server passes on: neither the shares nor the secrets are in it, and only the holder opens it."""
    members = strangers()
    keys = {name: member.advertise() for name, member in members.items()}
    sealed = {name: member.share(keys) for name, member in members.items()}
    share = members["b"]._opened("a", sealed["a"]["b"])
    assert share
    assert len(share) == 2 * shamir.SHARE_BYTES
    assert share not in sealed["a"]["b"]
    assert members["c"]._opened("a", sealed["a"]["b"]) is None
    for name, member in members.items():
        assert all(secret not in b"".join(sealed[name].values()) for secret in (member.seed, member.mask_key))
        assert repr(member).count("=") == 6  # no secret gets into a log


# ------------------------------------------------------------------------------------------------------- what is leaked


def correlations(received: dict[str, np.ndarray], vectors: dict[str, np.ndarray]) -> np.ndarray:
    """Of each received array, and of each difference of two, with each true vector; words as signed numbers."""
    arrays = list(received.values())
    arrays += [one - other for one, other in combinations(arrays, 2)] + [
        one + other for one, other in combinations(arrays, 2)
    ]
    heard = np.stack([array.view(np.int32).astype(float) for array in arrays])
    true = np.stack([vector.view(np.int32).astype(float) for vector in vectors.values()])
    return np.abs(np.corrcoef(heard, true)[: len(heard), len(heard) :])


def uniform(words: np.ndarray) -> float:
    """The least p-value of chi-squared tests that each of the four bytes of the words is uniform."""
    return min(chisquare(np.bincount(column, minlength=256)).pvalue for column in words.view(np.uint8).reshape(-1, 4).T)


def test_a_single_vector_cannot_be_recovered_from_what_the_server_received(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = made_up(100_000)
    _, received = protocol(vectors, {"vectors": "d"})
    assert correlations(received, vectors).max() < 5.5 / 100_000**0.5  # of 150 normal values of deviation 1/√n
    assert min(uniform(words) for words in received.values()) > 1e-5
    monkeypatch.setattr(secure_aggregation, "add_mask", lambda *_: None)  # the same attack without masks
    _, received = protocol(vectors, {"vectors": "d"})
    assert correlations(received, vectors).max() > 0.999
    assert max(uniform(words) for words in received.values()) < 1e-100


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def four(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run config with four tiny tasks and secure aggregation."""
    monkeypatch.setenv("ATM_FL_CACHE", str(tmp_path / "cache"))
    extra = make_folder(tmp_path / "data" / "grey", 3)
    return config | {"tasks": f"{config['tasks']},{extra}", "secure-aggregation": True}


SKIP = {"on-failure": "skip", "min-successful": 3}


def merged(run: Run) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run.directory) if line["kind"] == "merge"]


def secrets_left(config: dict[str, Any]) -> list[Path]:
    return list(Path(config["run-dir"]).parent.glob("cache/runs/**/secret*"))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"merge": "task-arithmetic", "task-scaling": "red=0.5", "layer-scaling": "*mlp*=1.5"},
        {"codec-down": "int8", "server-optimizer": "momentum"},
        {"merge": "iso-c", "scaling": 2.0, "server-optimizer": "nesterov"},
        {"trainable": "lora"},
        {"dp-client-clip": 0.05},
    ],
)
@pytest.mark.usefixtures("report")
def test_a_secure_run_ends_with_the_bits_of_the_plain_loop(four: dict[str, Any], more: dict[str, Any]) -> None:
    config = four | more
    flower = in_process(Settings.parse({**config, "run-dir": four["run-dir"] + "-flower"}))
    loop = run_loop(Settings.parse({**config, "run-dir": four["run-dir"] + "-loop"}))
    assert same(final(flower.directory), final(loop.directory))
    assert secrets_left(four) == []
    assert [line["tasks"] for line in merged(flower)] == [["red", "green", "blue", "grey"]] * 3
    for line in read_metrics(flower.directory):
        assert not {"norm", "alignment"} & line.keys() or line["kind"] == "merge"
        assert "cosines" not in line
    assert "Cosines" not in (flower.directory / "report.html").read_text()


@pytest.mark.parametrize("merge", ["mean", "task-arithmetic"])
def test_one_round_differs_from_a_plain_one_by_less_than_the_steps(four: dict[str, Any], merge: str) -> None:
    config = four | {"rounds": 1, "merge": merge}
    secure = in_process(Settings.parse({**config, "secure-range": 0.5}))
    plain = in_process(Settings.parse({**config, "secure-aggregation": False, "run-dir": four["run-dir"] + "-plain"}))
    factor = {"mean": 1.0, "task-arithmetic": 0.3 * 4}[merge]
    ring = secure.settings.ring
    assert ring.step == 0.5 / ((2**31 - 1) // 4)
    apart = (secure.base.double() - plain.base.double()).abs()
    rounding = plain.base.double().abs() * 2**-23 + 1e-9  # of the float32 sums and bases themselves
    assert bool((apart <= factor * ring.step / 2 + rounding).all())
    assert not torch.equal(secure.base, plain.base)


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_secure_iso_c_is_plain_iso_c_up_to_the_rings_rounding(four: dict[str, Any], trainable: str) -> None:
    """LoRA's sum has fewer directions than its matrices; the rounding must not be made as strong as what is there."""
    config = four | {"rounds": 1, "merge": "iso-c", "trainable": trainable}
    config |= {"lora-rank": 2} if trainable == "lora" else {}
    secure = in_process(Settings.parse(config))
    plain = in_process(Settings.parse({**config, "secure-aggregation": False, "run-dir": four["run-dir"] + "-plain"}))
    apart, moved = float((secure.base.double() - plain.base.double()).norm()), merged(plain)[0]["norm"]
    assert 0 < apart < 1e-5 * moved
    assert merged(secure)[0]["norm"] == pytest.approx(moved, rel=1e-5)


def test_it_is_the_same_whatever_the_masks(four: dict[str, Any]) -> None:
    runs = [in_process(Settings.parse({**four, "run-dir": four["run-dir"] + name})) for name in "ab"]
    assert same(final(runs[0].directory), final(runs[1].directory))
    assert runs[0].id != runs[1].id  # other sessions, and other keys anyway


def dropping(task: str, kind: str, round_number: int = 1) -> ClientApp:
    """The ClientApp, of which one task's client does its work and then fails to say so, at one phase of one round."""

    def change(message: Message, reply: Message) -> Message:
        if message.content.config_records["info"]["round"] == round_number:
            return Message(Error(2, "the line is dead"), reply_to=message)
        return reply

    return tampered(change, task, kind)


@pytest.mark.parametrize("task", ["red", "grey"])
@pytest.mark.parametrize("kind", ["query.keys", "query.shares", "query.confirm", "train", "query.sign", "query.unmask"])
def test_a_run_survives_a_dropout_at_each_phase(four: dict[str, Any], kind: str, task: str) -> None:
    run = in_process(Settings.parse(four | SKIP | {"rounds": 2, "keep-checkpoints": 0}), dropping(task, kind))
    rest = [name for name in ("red", "green", "blue", "grey") if name != task]
    lines = merged(run)
    late = kind in ("query.sign", "query.unmask")  # its vector was in already
    assert lines[0]["tasks"] == (["red", "green", "blue", "grey"] if late else rest)
    assert lines[1]["tasks"] == ["red", "green", "blue", "grey"]
    assert lines[0]["failures"] == ({} if late else {task: "the line is dead"})
    warned = [line["text"] for line in read_metrics(run.directory) if line["kind"] == "warning"]
    verb = "its sum was unmasked" if late else "goes on"
    assert any(verb in text and f"without {task}: the line is dead" in text for text in warned)
    assert secrets_left(four) == []
    # the same as a plain run of which that client fails the same round
    plain = {**four, **SKIP, "rounds": 1, "secure-aggregation": False, "run-dir": four["run-dir"] + "-plain"}
    other = in_process(Settings.parse(plain), client_app if late else dropping(task, "train"))
    after = load_file(str(run.directory / "checkpoint" / "round-00001.safetensors"))
    for name, expected in final(other.directory).items():
        torch.testing.assert_close(after[name], expected, rtol=2**-22, atol=run.settings.ring.step)


def test_a_round_that_failed_is_done_again_with_fresh_keys(four: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="round 2: 3 of 4 clients succeeded"):
        in_process(Settings.parse(four), dropping("blue", "train", round_number=2))
    resumed = in_process(Settings.parse(four | {"resume": True}))
    unbroken = in_process(Settings.parse(four | {"run-dir": four["run-dir"] + "-unbroken"}))
    assert same(final(resumed.directory), final(unbroken.directory))


@pytest.mark.parametrize("kind", ["query.keys", "query.shares", "query.confirm", "train"])
def test_below_the_policy_a_round_fails_in_one_line(four: dict[str, Any], kind: str) -> None:
    with pytest.raises(RunError) as error:
        in_process(Settings.parse(four), dropping("blue", kind))
    assert str(error.value) == "round 1: 3 of 4 clients succeeded, 4 needed. blue: the line is dead"


def test_too_few_to_unmask_fail_the_round_in_one_line(four: dict[str, Any]) -> None:
    class Dead(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            silent = context.node_config["partition-id"] < 2 and message.metadata.message_type == "query.unmask"
            return Message(Error(2, "dead"), reply_to=message) if silent else client_app(message, context)

    words = "secure aggregation of round 1 of run .*: 2 of 4 parties helped .*, 3 needed; red: dead; green: dead"
    with pytest.raises(RunError, match=words):
        in_process(Settings.parse(four), Dead())


def test_a_client_whose_reply_is_refused_is_out_of_the_sum(four: dict[str, Any]) -> None:
    def change(message: Message, reply: Message) -> Message:
        reply.content.config_records["info"]["base"] = "0"
        return reply

    run = in_process(Settings.parse(four | SKIP), tampered(change, "green"))
    assert [line["tasks"] for line in merged(run)] == [["red", "blue", "grey"]] * 3


class Listening(ClientApp):
    """The ClientApp, of which everything is written down that reaches the server: its log."""

    def __init__(self) -> None:
        super().__init__()
        self.words: dict[str, np.ndarray] = {}
        self.bytes: list[bytes] = []

    def __call__(self, message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        for record in reply.content.config_records.values():
            self.bytes += [value for value in record.values() if isinstance(value, bytes)]
        if "arrays" in reply.content.array_records:
            task = str(reply.content.config_records["info"]["task"])
            self.words[task] = reply.content.array_records["arrays"]["words"].numpy().copy()
        return reply


def test_no_single_vector_of_a_run_is_in_what_the_server_received(
    four: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    true: dict[str, np.ndarray] = {}
    encode = RingWire.encode

    def noted(wire: RingWire, vector: torch.Tensor, context: TransformContext) -> dict[str, np.ndarray]:
        arrays = encode(wire, vector, context)
        true[context.task] = arrays["words"].copy()  # they are masked in place
        return arrays

    monkeypatch.setattr(RingWire, "encode", noted)
    settings, log = Settings.parse(four | {"rounds": 1, "model": "vit_micro"}), Listening()
    in_process(settings, log)
    assert len(log.words) == len(true) == 4
    size = len(true["red"])
    assert size > 100_000
    assert correlations(log.words, true).max() < 5.5 / size**0.5
    assert min(uniform(actual) for actual in log.words.values()) > 1e-5
    assert sum(log.words.values(), np.zeros(size, WORD)).tolist() != sum(true.values(), np.zeros(size, WORD)).tolist()
    # 4 signatures, 4 · 4 opened shares, 4 keys with hash and signature and 4 · 3 sealed shares are all the rest
    assert 3 * 32 + 64 == 12 + 2 * 66 + 16 == 160
    assert Counter(len(actual) for actual in log.bytes) == {64: 4, 66: 16, 160: 4 + 12}

    monkeypatch.setattr(secure_aggregation, "add_mask", lambda *_: None)
    bare = Listening()
    in_process(Settings.parse({**settings.as_config(), "run-dir": four["run-dir"] + "-bare"}), bare)
    assert correlations(bare.words, true).max() > 0.999


def test_secrets_are_the_partys_own_and_asked_for_twice_they_are_gone(four: dict[str, Any]) -> None:
    """Between the phases they lie on the party's disk, not in the Context; a second unmasking is refused."""
    modes, contexts, refused = set(), [], []

    class Curious(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            reply = client_app(message, context)
            info = message.content.config_records["info"]
            if message.metadata.message_type not in ("query", "query.unmask", "evaluate"):
                task = str(reply.content.config_records["info"]["task"])
                modes.add((ClientState(str(info["run"]), task).folder / "secret.json").stat().st_mode & 0o777)
            if message.metadata.message_type == "query.unmask":
                message.content.config_records["summed"]["clients"] = ["red", "green", "blue"]
                refused.append(client_app(message, context).error.reason)
            contexts.append(len(context.state))
            return reply

    in_process(Settings.parse(four | {"rounds": 1}), Curious())
    assert modes == {0o600}
    assert set(contexts) == {0}
    assert len(refused) == 4
    assert all("no secrets here, or they were used already" in reason for reason in refused)
    assert secrets_left(four) == []


def test_a_client_sends_no_vector_unmasked(four: dict[str, Any]) -> None:
    """A server that leaves the parties out of its message gets an error."""

    class Bare(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            message.content.pop("parties", None)
            return client_app(message, context)

    with pytest.raises(RunError, match="round 1: 0 of 4 clients succeeded, 4 needed. red: .*parties"):
        in_process(Settings.parse(four), Bare())


class Broken(ClientApp):
    """The ClientApp, of which one client's record of one phase is changed on its way to the server."""

    def __init__(self, kind: str, task: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        super().__init__()
        self.kind, self.task, self.change = kind, task, change

    def __call__(self, message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type != f"query.{self.kind}" or reply.has_error():
            return reply
        if str(reply.content.config_records["info"]["task"]) == self.task:
            reply.content[self.kind] = ConfigRecord(self.change(dict(reply.content.config_records[self.kind])))
        return reply


def test_who_publishes_anothers_keys_puts_out_nobody(four: dict[str, Any]) -> None:
    """It cannot know them before the server has them: the second to come has copied."""

    class Copying(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            reply = client_app(message, context)
            if message.metadata.message_type == "query.keys":
                if context.node_config["partition-id"] == 3:
                    reply.content["keys"] = self.seen
                else:
                    self.seen = copy.deepcopy(reply.content.config_records["keys"])
            return reply

    run = in_process(Settings.parse(four | SKIP | {"rounds": 1}), Copying())
    (line,) = merged(run)
    assert line["tasks"] == ["red", "green", "blue"]
    assert line["failures"] == {"grey": "refused: keys that another has too"}


def others(change: Callable[[bytes], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda record: {name: change(value) for name, value in record.items()}


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda record: {other: value for other, value in record.items() if other != name}


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("keys", lambda record: {"keys": record["keys"][:63]}, "refused: keys of 63 bytes, not 160"),
        ("keys", lambda record: {"keys": bytes(160)}, "refused: keys that no secret can be agreed on with"),
        ("keys", lambda record: {"keys": "a string"}, "refused: keys of str, not bytes"),
        ("keys", lambda record: {}, "refused: keys of NoneType, not bytes"),
        ("shares", others(lambda share: share[:-1]), "refused: 3 of its shares are none"),
        ("shares", others(lambda share: "a string"), "refused: 3 of its shares are none"),
        ("shares", lambda record: record | {"nobody": bytes(160)}, "refused: 1 of its shares are none"),
        ("shares", lambda record: {}, "refused: it refuses red, green, blue: their keys"),
        ("shares", others(lambda share: share[::-1]), "refused: its shares opened at 1 parties, 3 are needed"),
        ("shares", without("red"), "refused: it refuses red: their keys"),
        ("confirm", lambda record: {"opened": "red"}, "refused: opened of str, not list"),
    ],
)
def test_a_client_with_bad_keys_or_shares_is_out_by_name_and_the_round_goes_on(
    four: dict[str, Any], kind: str, change: Any, words: str
) -> None:
    run = in_process(Settings.parse(four | SKIP | {"rounds": 1}), Broken(kind, "grey", change))
    (line,) = merged(run)
    assert (line["tasks"], line["failures"]) == (["red", "green", "blue"], {"grey": words})
    if kind == "keys":
        return  # the others never heard of it
    plain = {**four, **SKIP, "rounds": 1, "secure-aggregation": False, "run-dir": four["run-dir"] + "-plain"}
    other = in_process(Settings.parse(plain), dropping("grey", "train"))
    for name, expected in final(other.directory).items():
        torch.testing.assert_close(final(run.directory)[name], expected, rtol=2**-22, atol=run.settings.ring.step)


@pytest.mark.parametrize("opened", [[], ["grey"], ["green", "blue", "grey"], ["red", "red", "nobody"], [3]])
def test_who_says_that_shares_did_not_open_puts_out_nobody(four: dict[str, Any], opened: list[Any]) -> None:
    run = in_process(
        Settings.parse(four | SKIP | {"rounds": 1}), Broken("confirm", "grey", lambda record: {"opened": opened})
    )
    (line,) = merged(run)
    assert (line["tasks"], line["failures"]) == (["red", "green", "blue", "grey"], {})
    plain = {**four, "rounds": 1, "secure-aggregation": False, "run-dir": four["run-dir"] + "-plain"}
    for name, expected in final(in_process(Settings.parse(plain)).directory).items():
        torch.testing.assert_close(final(run.directory)[name], expected, rtol=2**-22, atol=run.settings.ring.step)


def deals_nonsense(*tasks: str, gone: bool = False) -> ClientApp:
    """The ClientApp, of which these tasks' clients seal shares that open and join to nothing; `gone`: and then die."""

    class Dealing(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            held = Settings.parse(context.run_config).party_names[int(context.node_config["partition-id"])]
            if held not in tasks:
                return client_app(message, context)
            if gone and message.metadata.message_type == "train":
                return Message(Error(2, "the line is dead"), reply_to=message)
            with pytest.MonkeyPatch.context() as patch:
                if message.metadata.message_type == "query.shares":
                    patch.setattr(
                        shamir, "split", lambda secret, holders, t: {n: b"\0" + os.urandom(65) for n in holders}
                    )
                return client_app(message, context)

    return Dealing()


@pytest.mark.parametrize("more", [{}, {"codec-down": "int8"}, {"privacy": "dp-sgd", "dp-noise": 1.0}])
@pytest.mark.parametrize("gone", [False, True])
def test_who_deals_shares_that_do_not_join_is_out_by_name_and_the_round_is_done_again_without_it(
    four: dict[str, Any], gone: bool, more: dict[str, Any]
) -> None:
    """With its vector in the sum (its seed does not join) and without (its mask key does not)."""
    config = four | SKIP | {"rounds": 2} | more
    run = in_process(Settings.parse(config), deals_nonsense("grey", gone=gone))
    assert [line["tasks"] for line in merged(run)] == [["red", "green", "blue"]] * 2
    for number, line in enumerate(merged(run), 1):
        assert line["failures"]["grey"].startswith("refused: its shares do not join: no 3 of ")
        warned = [actual["text"] for actual in read_metrics(run.directory) if actual["kind"] == "warning"]
        message = f"round {number} is given up, its sum still masked, and done again without grey: refused: its shares"
        assert sum(text.startswith(message) for text in warned) == 1
    tuned = Counter((line["round"], line["task"]) for line in read_metrics(run.directory) if line["kind"] == "tuning")
    assert set(tuned.values()) == {1}
    assert {(number, task) for number in (1, 2) for task in ("red", "green", "blue")} <= tuned.keys()
    assert secrets_left(four) == []
    if "privacy" in more:
        return  # another run has other noise
    # as a run from whose rounds it was missing from the first step on
    absent = {"run-dir": four["run-dir"] + "-absent"}
    other = in_process(Settings.parse(config | absent), never("grey"))
    assert same(final(run.directory), final(other.directory))


def never(task: str) -> ClientApp:
    """The ClientApp, of which one task's client publishes no keys, ever."""
    return tampered(lambda message, _: Message(Error(2, "dead"), reply_to=message), task, "query.keys")


def test_a_round_that_is_done_again_has_fresh_secrets_and_the_first_sum_stays_masked(
    four: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all that the server was told, the sum that was given up is uniform; the dealer's own seed is missing."""
    published: list[bytes] = []
    sums: list[np.ndarray] = []
    joined: list[dict[str, dict[str, bytes]]] = []
    take_off = secure_aggregation.unmask

    def watched(
        total: np.ndarray,
        session: str,
        parties: Any,
        threshold: int,
        keys: Any,
        summed: Any,
        revealed: Any,
        *graph: Any,
    ) -> Any:
        published.extend(keys.values())
        for name in summed:  # what a server can do that goes on where ours gives up
            shares = {parties.index(holder) + 1: actual[name] for holder, actual in revealed.items()}
            with suppress(ValueError):
                add_mask(copy := total.copy() if not sums else sums[-1], shamir.join(shares), -1)
                sums[:] = [copy]
        joined.append(revealed)
        return take_off(total, session, parties, threshold, keys, summed, revealed, *graph)

    monkeypatch.setattr("atm_fl.server.secure.unmask", watched)
    settings = Settings.parse(four | SKIP | {"rounds": 1, "model": "vit_micro"})

    class Once(Exception):
        pass

    def stop(*_: Any) -> Any:
        raise Once

    with monkeypatch.context() as patch:
        patch.setattr("atm_fl.server.strategy.AtmStrategy._repeated", stop)
        with pytest.raises(Once):
            in_process(settings, deals_nonsense("grey"))
    assert len(joined) == 1
    assert uniform(sums[0]) > 1e-5
    first = list(published)
    in_process(Settings.parse({**settings.as_config(), "run-dir": four["run-dir"] + "-2"}), deals_nonsense("grey"))
    assert len(published) == len(first) + 4 + 3
    parts = [key[place : place + 32] for key in published for place in (0, 32, 64)]
    assert len(set(parts)) == len(parts)


@pytest.mark.parametrize("dealers", [("grey",), ("blue", "grey")])
def test_dealers_of_such_shares_end_a_round_by_name_where_the_policy_does_not_allow_it(
    four: dict[str, Any], dealers: tuple[str, ...]
) -> None:
    settings = Settings.parse(four | (SKIP if len(dealers) > 1 else {}))
    words = f"round 1: {4 - len(dealers)} of 4 clients succeeded, {settings.needed} needed. {dealers[0]}: refused: its "
    with pytest.raises(RunError, match=words) as error:
        in_process(settings, deals_nonsense(*dealers))
    assert all(f"{dealer}: refused: its shares do not join" in str(error.value) for dealer in dealers)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("unmask", others(lambda share: share[::-1]), "grey: refused: it revealed wrong shares"),
        ("unmask", others(lambda share: "a string"), "grey: refused: not the shares that it was asked for"),
        ("unmask", lambda record: {}, "grey: refused: not the shares that it was asked for"),
        ("sign", lambda record: {"signature": 5}, "grey: refused: signature of int, not bytes"),
        ("sign", lambda record: {"signature": b"x"}, ""),  # for the parties to judge
    ],
)
def test_a_client_that_helps_wrongly_to_unmask_is_named_and_its_vector_counts(
    four: dict[str, Any], tmp_path: Path, kind: str, change: Any, words: str
) -> None:
    node = {"trusted-parties": str(trusting(tmp_path, "red", "green", "blue", "grey"))}
    settings = Settings.parse(four | SKIP | {"rounds": 1})
    run = served(settings, Broken(kind, "grey", change), node)
    (line,) = merged(run)
    assert (line["tasks"], line["failures"]) == (["red", "green", "blue", "grey"], {})
    warned = [line["text"] for line in read_metrics(run.directory) if line["kind"] == "warning"]
    assert warned == ([f"round 1: its sum was unmasked without {words}"] if words else [])
    honest = in_process(Settings.parse({**settings.as_config(), "run-dir": four["run-dir"] + "-honest"}))
    assert same(final(run.directory), final(honest.directory))


def trusting(folder: Path, *clients: str) -> Path:
    """A file of trusted-parties with the keys that these clients have on this machine."""
    file = folder / "trusted-parties"
    file.write_text("".join(f"{public_line(client)}\n" for client in clients))
    return file


def served(settings: Settings, app: ClientApp, node: dict[str, Any]) -> Run:
    """A run of the server's own code in this process, every node of which has `node` in its node-config."""
    grid = InProcessGrid(app, len(settings.task_names), settings.as_config())
    for context in grid.contexts.values():
        context.node_config = {**context.node_config, **node}
    return serve(grid, settings)


def test_a_run_among_parties_that_pin_each_other_has_the_bits_of_one_among_strangers(
    four: dict[str, Any], tmp_path: Path
) -> None:
    node = {"trusted-parties": str(trusting(tmp_path, "red", "green", "blue", "grey"))}
    run = served(Settings.parse(four), client_app, node)
    other = in_process(Settings.parse({**four, "run-dir": four["run-dir"] + "-strangers"}))
    assert same(final(run.directory), final(other.directory))


def test_a_party_whose_key_is_not_the_one_that_the_others_trust_is_out_by_name(
    four: dict[str, Any], tmp_path: Path
) -> None:
    """As one that lost its disk, or is someone else."""
    node = {"trusted-parties": str(trusting(tmp_path, "red", "green", "blue", "grey"))}
    (tmp_path / "cache" / "identity" / "grey").unlink()
    run = served(Settings.parse(four | SKIP | {"rounds": 1}), client_app, node)
    assert merged(run)[0]["tasks"] == ["red", "green", "blue"]
    assert "trusted-parties has another key of grey than this party's own" in merged(run)[0]["failures"]["grey"]

    class Forgetful(ClientApp):
        """grey itself trusts anyone."""

        def __call__(self, message: Message, context: Context) -> Message:
            if context.node_config["partition-id"] == 3:
                context.node_config = {"partition-id": 3, "num-partitions": 4}
            return client_app(message, context)

    again = served(Settings.parse({**four, **SKIP, "rounds": 1, "run-dir": four["run-dir"] + "2"}), Forgetful(), node)
    assert merged(again)[0]["failures"] == {"grey": "refused: keys refused by red, green, blue"}


class HostileServer:
    """Speaks to one real ClientApp, and plays all the other parties of its run to it."""

    def __init__(self, settings: Settings, victim: int, node: dict[str, Any]) -> None:
        self.settings, self.run = settings, Run(settings)
        grid = InProcessGrid(client_app, len(settings.task_names), settings.as_config())
        self.context = grid.contexts[victim + 1]
        self.context.node_config = {**self.context.node_config, **node}
        self.victim = settings.party_names[victim]

    def ask(
        self, kind: str, records: dict[str, dict[str, Any]], arrays: dict[str, np.ndarray] | None = None
    ) -> Message:
        """The victim's reply. RunError if it is an error."""
        info = {"run": self.run.id, "round": 1, "codec": "fp32", "layout": self.run.layout.digest, "from": ""}
        content = RecordDict({"info": ConfigRecord(info | {"base": self.run.digest})})
        for name, record in records.items():
            content[name] = ConfigRecord(record)
        if arrays is not None:
            content["arrays"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        reply = client_app(Message(content, self.context.node_id, kind), self.context)
        if reply.has_error():
            raise RunError(reply.error.reason)
        return reply

    def steal(self) -> np.ndarray:
        """The victim's vector, in words [n]."""
        names, threshold = self.settings.party_names, self.settings.threshold
        session = secure_aggregation.session_of(self.run.id, 1)
        played = {name: Member(name, session, names, threshold) for name in names if name != self.victim}
        keys = {name: member.advertise() for name, member in played.items()}
        keys[self.victim] = self.ask("query.keys", {}).content["keys"]["keys"]
        sealed = {name: member.share(keys) for name, member in played.items()}
        sealed[self.victim] = dict(self.ask("query.shares", {"keys": keys}).content["shares"])
        self.ask("query.confirm", {"sealed": passed_on(sealed, self.victim)})
        base = codecs.Fp32().encode(self.run.base, self.run.layout)
        reply = self.ask("train", {"parties": {"clients": list(names)}}, base)
        total = reply.content.array_records["arrays"]["words"].numpy().copy()
        for name, member in played.items():
            member.open(passed_on(sealed, name))
            member.mask(nothing := np.zeros_like(total), names)
            total += nothing
        summed = {"summed": {"clients": list(names)}}
        signed = {name: member.agree(names) for name, member in played.items()}
        signed[self.victim] = self.ask("query.sign", summed).content["sign"]["signature"]
        revealed = {name: member.reveal(names, signed) for name, member in played.items()}
        revealed[self.victim] = dict(self.ask("query.unmask", summed | {"signatures": signed}).content["unmask"])
        unmask(total, session, names, threshold, keys, list(names), revealed)
        return total


def test_a_hostile_server_recovers_a_vector_bit_for_bit_and_from_a_party_with_pins_nothing(
    four: dict[str, Any], tmp_path: Path
) -> None:
    """The man in the middle gives out keys of its own for the real parties; sybils are parties that it invented."""
    man_in_the_middle = Settings.parse(four | {"rounds": 1})
    red = man_in_the_middle.task_names[0]
    sybils = Settings.parse(four | {"rounds": 1, "tasks": f"{red},./one,./two", "run-dir": four["run-dir"] + "-sybils"})
    party = party_module.Party(man_in_the_middle, red)
    vector = party.train(HostileServer(man_in_the_middle, 0, {}).run.base, 1).arrays
    assert vector
    attacks = [man_in_the_middle, sybils]
    for number, settings in enumerate(attacks):  # without pins both work
        settings = Settings.parse({**settings.as_config(), "run-dir": f"{four['run-dir']}-open-{number}"})
        stolen = HostileServer(settings, 0, {}).steal()
        values = [
            actual.ring.decode(words) for actual, words in ((settings, stolen), (man_in_the_middle, vector["words"]))
        ]
        torch.testing.assert_close(values[0], values[1], rtol=0, atol=float(settings.ring.step))
        if settings.ring == man_in_the_middle.ring:
            assert np.array_equal(stolen, vector["words"])  # bit for bit
    node = {"trusted-parties": str(trusting(tmp_path, "red", "green", "blue", "grey"))}
    for number, (settings, words) in enumerate(
        [
            (man_in_the_middle, "good keys of 1 parties, 3 are needed .green: keys that are not signed by the one"),
            (sybils, "refused: a run with one, two, whom this party's trusted-parties does not name"),
        ]
    ):
        settings = Settings.parse({**settings.as_config(), "run-dir": f"{four['run-dir']}-pinned-{number}"})
        with pytest.raises(RunError, match=words):
            HostileServer(settings, 0, node).steal()


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_a_party_with_pins_sends_no_vector_outside_a_sum(four: dict[str, Any], tmp_path: Path, kind: str) -> None:
    """A server decides the run's settings, but not these."""
    node = {"trusted-parties": str(trusting(tmp_path, "red", "green", "blue", "grey"))}
    server = HostileServer(Settings.parse(four | {"secure-aggregation": False}), 0, node)
    with pytest.raises(
        RunError, match="refused: secure-aggregation=false, and a party with trusted-parties answers in"
    ):
        server.ask(kind, {}, codecs.Fp32().encode(server.run.base, server.run.layout))


def test_a_vector_beyond_the_range_is_said_by_name(four: dict[str, Any]) -> None:
    with pytest.raises(RunError, match=r"red's task vector of round 1 has an element beyond secure-range=1e-07"):
        in_process(Settings.parse(four | {"secure-range": 1e-7}))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"merge": "ties"}, "merge='ties': not with secure-aggregation=true.*alone: iso-c, mean, task-arithmetic"),
        ({"merge": "median"}, "merge='median': not with secure-aggregation=true"),
        ({"merge": "clipped-mean"}, "merge='clipped-mean': not with secure-aggregation=true"),
        ({"codec-up": "int8"}, "codec-up='int8': not with secure-aggregation=true"),
        ({"alignment": True}, "alignment=true: not with secure-aggregation=true"),
        ({"fraction": 0.5}, "fraction=0.5: not with secure-aggregation=true"),
        ({"participation": "red=2-"}, "participation='red=2-': not with secure-aggregation=true"),
        ({"secure-threshold": 2}, "secure-threshold=2: it must be more than half of the 4 tasks"),
        ({"secure-threshold": 5}, "secure-threshold=5: it must be more than half of the 4 tasks and at most all"),
        ({"on-failure": "skip", "min-successful": 2}, "min-successful=2: secure-threshold=3 parties must be there"),
        ({"secure-range": 0.0}, "secure-range=0.0: it must be a positive number"),
        ({"secure-aggregation": False, "secure-threshold": 3}, "secure-threshold=3: it needs secure-aggregation=true"),
    ],
)
def test_settings_that_do_not_go_with_it_are_said(four: dict[str, Any], wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        Settings.parse(four | wrong)


def test_it_needs_three_parties(config: dict[str, Any], folders: list[str]) -> None:
    with pytest.raises(SettingError, match="it needs 3 tasks"):
        Settings.parse(config | {"tasks": ",".join(folders[:2]), "secure-aggregation": True})


@pytest.mark.slow
def test_ray_simulation_ends_with_the_same_bits(tmp_path: Path) -> None:
    from atm_fl.server.simulation import run_simulation

    config = {"tasks": "digits,mnist,icons", "rounds": 2, "local-epochs": 1, "secure-aggregation": True}
    plain, ray = (Settings.parse({**config, "run-dir": str(tmp_path / name)}) for name in ("plain", "ray"))
    run_loop(plain)
    run_simulation(ray, Path(__file__).parents[1])
    assert same(final(plain.run_dir), final(ray.run_dir))
