"""Secure aggregation among neighbours: the same sum to the last bit, of work that does not grow with the parties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_folder
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from federation import final, in_process, same, tampered
from flwr.app import Error, Message
from flwr.clientapp import ClientApp
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import binomtest, chisquare, hypergeom

from atm_fl.errors import RunError, SettingError
from atm_fl.federation.loop import run_loop
from atm_fl.neighbours import (
    FAILURE,
    TRIES,
    circle,
    digest_of,
    disconnection,
    least_neighbours,
    neighbourhood,
    shares_needed,
)
from atm_fl.privacy import secure_aggregation, shamir
from atm_fl.privacy.identity import Identity
from atm_fl.privacy.secure_aggregation import Member, UnjoinedShares, add_mask, refused_keys, unmask, unshared
from atm_fl.runs.metrics import read_metrics
from atm_fl.settings import Settings
from atm_fl.vectors.ring import WORD

SESSION = "round 1 of run x"
PHASES = ("keys", "shares", "confirm", "vectors", "sign", "unmask")


def named(count: int) -> tuple[str, ...]:
    return tuple(f"p{number}" for number in range(count))


# ----------------------------------------------------------------------------------------------------------- the graph


@given(st.integers(3, 40), st.data())
@hypothesis_settings(max_examples=60, deadline=None)
def test_each_has_so_many_neighbours_on_either_side_and_is_theirs(count: int, data: st.DataObject) -> None:
    names, neighbours = named(count), 2 * data.draw(st.integers(1, (count - 1) // 2))
    roster = digest_of(SESSION, {name: data.draw(st.binary(max_size=4)) for name in names[:-1]})  # one is away
    near = {name: neighbourhood(name, names, neighbours, roster) for name in names}
    order = circle(names, roster)
    assert sorted(order) == sorted(names)
    for name, those in near.items():
        assert len(those) == neighbours + 1
        assert all(name in near[other] for other in those)
        apart = [(order.index(other) - order.index(name)) % count for other in those]
        assert max(min(steps, count - steps) for steps in apart) == neighbours // 2


def test_who_is_whose_neighbour_follows_from_every_key_and_favours_nobody() -> None:
    names = named(9)
    keys = {name: name.encode() for name in names}
    assert digest_of(SESSION, keys) == digest_of(SESSION, dict(reversed(keys.items())))
    others = [keys | {"p3": b"x"}, {name: keys[name] for name in names[1:]}]
    digests = {digest_of(SESSION, roster) for roster in (keys, *others)} | {digest_of("round 2 of run x", keys)}
    assert len(digests) == 4
    met: Counter[str] = Counter()
    for number in range(4000):
        met.update(neighbourhood("p0", names, 2, digest_of(SESSION, keys | {"p5": b"%d" % number})) - {"p0"})
    assert chisquare([met[name] for name in names[1:]]).pvalue > 1e-4


# ----------------------------------------------------------------------------------------------------------- the bound


def stretches(corrupt: np.ndarray, half: int) -> np.ndarray:
    """How many are corrupt of the `half` places from each on: [draws, n] of [draws, n]."""
    ahead = np.concatenate([corrupt, corrupt[:, : half - 1]], axis=1).cumsum(axis=1)
    return ahead[:, half - 1 :] - np.pad(ahead, ((0, 0), (1, 0)))[:, : corrupt.shape[1]]


def broken(corrupt: np.ndarray, half: int, least: int) -> np.ndarray:
    """Whether two disjoint stretches have `least` corrupt places each: [draws], of circles [draws, n]."""
    found, count = stretches(corrupt, half) >= least, corrupt.shape[1]
    return np.any([(found & np.roll(found, apart, axis=1)).any(1) for apart in range(half, count - half + 1)], axis=0)


@pytest.mark.parametrize(("count", "corrupt", "neighbours", "needed"), [(11, 4, 4, 5), (12, 6, 4, 5), (12, 5, 6, 6)])
def test_the_bound_holds_over_all_ways_to_be_corrupt(count: int, corrupt: int, neighbours: int, needed: int) -> None:
    half = neighbours // 2
    ways = np.array([np.isin(np.arange(count), chosen) for chosen in combinations(range(count), corrupt)])
    exact = broken(ways.astype(int), half, needed - half - 1).mean()
    assert 0 < exact < disconnection(count, neighbours, needed, corrupt) * (1 + 1e-9)


def test_the_bound_holds_in_a_simulation_and_is_not_far_off() -> None:
    """90 parties, 45 corrupt, stretches of 8 that are corrupt all through: no party may be left out."""
    random = np.random.default_rng(0)
    draws = random.permuted(np.tile(np.arange(90) < 45, (40_000, 1)), axis=1).astype(int)
    often, bound = int(broken(draws, 8, 8).sum()), disconnection(90, 16, 17, 45)
    assert bound < 0.03
    assert binomtest(often, 40_000, bound, alternative="greater").pvalue > 1e-3
    assert often / 40_000 > bound / 30


def test_the_bound_is_the_pairs_of_stretches_times_a_hypergeometric_tail() -> None:
    for count, neighbours, needed, corrupt in ((64, 24, 20, 21), (1000, 128, 100, 333), (300, 298, 200, 100)):
        least = 2 * (needed - neighbours // 2 - 1)
        tail = hypergeom.sf(least - 1, count, corrupt, neighbours)
        expected = min(1.0, count * (count - neighbours + 1) / 2 * tail)
        assert disconnection(count, neighbours, needed, corrupt) == pytest.approx(expected, rel=1e-8)


def test_so_many_shares_are_needed_as_keep_the_bound_and_no_more() -> None:
    for count in (3, 4, 8, 12, 33, 64, 257, 1000):
        least = least_neighbours(count, count // 2 + 1)
        for neighbours in range(2, min(count, 150), 2):
            if neighbours < least or not least:
                with pytest.raises(ValueError, match=f"too few for {count} parties"):
                    shares_needed(count, neighbours, count // 2 + 1)
                continue
            needed, corrupt = shares_needed(count, neighbours, count // 2 + 1), max(1 - count % 2, count // 3)
            assert neighbours // 2 + 2 <= needed <= neighbours + 1
            assert disconnection(count, neighbours, needed, corrupt) <= FAILURE / TRIES
            fewer = disconnection(count, neighbours, needed - 1, corrupt)
            assert needed == neighbours // 2 + 2 or fewer > FAILURE / TRIES
    assert (shares_needed(9, 0, 7), least_neighbours(8, 8)) == (7, 0)
    assert shares_needed(64, 40, 45) > shares_needed(64, 40, 33)  # a higher threshold guards against more


@given(st.integers(6, 30), st.data())
@hypothesis_settings(max_examples=150, deadline=None)
def test_honest_parties_whose_seeds_come_off_are_one_component(count: int, data: st.DataObject) -> None:
    """Whoever is corrupt, and whoever is left out: of two components one has a seed that stays, or the bound is met."""
    neighbours = 2 * data.draw(st.integers(1, (count - 1) // 2))
    half = neighbours // 2
    needed = data.draw(st.integers(half + 2, neighbours + 1))
    runs = data.draw(st.lists(st.tuples(st.sampled_from("hca"), st.integers(1, half + 2)), min_size=1, max_size=12))
    kinds = ("".join(kind * length for kind, length in runs) * count)[:count]  # honest, corrupt, absent
    near = [{(place + step) % count for step in range(-half, half + 1)} for place in range(count)]
    there = [place for place in range(count) if kinds[place] == "h"]
    assume(there)
    pairs = [(one, other) for one, p in enumerate(there) for other, q in enumerate(there) if q in near[p]]
    graph = coo_array((np.ones(len(pairs)), tuple(zip(*pairs, strict=True))), shape=(len(there), len(there)))
    parts, part = connected_components(graph)
    shown = [
        number
        for number in range(parts)
        if all(
            sum(kinds[other] != "a" for other in near[place]) >= needed
            for place, of in zip(there, part, strict=True)
            if of == number
        )
    ]
    if parts > 1 and shown:
        corrupt = np.array([[kind == "c" for kind in kinds]]).astype(int)
        assert broken(corrupt, half, needed - half - 1)[0]


# --------------------------------------------------------------------------------------------------------- the protocol


class Exchange:
    """A round among members that pin each other, with a server that does as it should where a test does not."""

    def __init__(self, count: int, neighbours: int, threshold: int = 0) -> None:
        self.names, self.neighbours, self.threshold = named(count), neighbours, threshold or count // 2 + 1
        keys = {name: Ed25519PrivateKey.generate() for name in self.names}
        pins = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
        self.members = {
            name: Member(name, SESSION, self.names, self.threshold, Identity(keys[name], pins), neighbours)
            for name in self.names
        }
        random = np.random.default_rng(0)
        self.vectors = {name: random.integers(0, 2**20, 50).astype(WORD) for name in self.names}
        self.sent: dict[str, np.ndarray] = {}

    def member(self, name: str) -> Member:
        """As over the disk."""
        self.members[name] = Member.load(self.members[name].dump(), self.members[name].identity)
        return self.members[name]

    def order(self) -> tuple[str, ...]:
        return circle(self.names, self.roster)

    def begin(self, gone: Callable[[str, str], bool] = lambda phase, name: False) -> None:
        """As far as the vectors; gone: whether a party drops out at a phase."""
        self.keys = {name: member.advertise() for name, member in self.members.items() if not gone("keys", name)}
        self.roster = digest_of(SESSION, self.keys)
        self.sealed: dict[str, dict[str, bytes]] = {}
        for name in self.keys:
            if not gone("shares", name):
                self.sealed[name] = self.member(name).share(self.keys)
        opened = {}
        for name in self.sealed:
            if not gone("confirm", name):
                opened[name] = self.member(name).open(self.sealed_for(name))
        out = unshared(opened, self.members[self.names[0]].needed)
        self.there = [name for name in opened if name not in out]
        for name in self.there:
            if not gone("vectors", name):
                self.send(name, self.there)

    def sealed_for(self, name: str) -> dict[str, bytes]:
        return {other: shares[name] for other, shares in self.sealed.items() if name in shares}

    def send(self, name: str, there: list[str]) -> None:
        self.sent[name] = self.vectors[name].copy()
        self.member(name).mask(self.sent[name], there)

    def end(self, summed: list[str], gone: Callable[[str, str], bool] = lambda phase, name: False) -> np.ndarray:
        """The sum without its masks."""
        signed = {name: self.member(name).agree(summed) for name in summed if not gone("sign", name)}
        revealed = {name: self.member(name).reveal(summed, signed) for name in signed if not gone("unmask", name)}
        return self.unmasked(summed, revealed)

    def unmasked(self, summed: list[str], revealed: dict[str, dict[str, bytes]]) -> np.ndarray:
        total = sum((self.sent[name] for name in summed), np.zeros(50, WORD))
        keys = {name: self.keys[name] for name in self.there}
        graph = self.neighbours, self.roster
        assert not unmask(total, SESSION, self.names, self.threshold, keys, summed, revealed, *graph)
        return total

    def sum(self, names: list[str]) -> np.ndarray:
        return sum((self.vectors[name] for name in names), np.zeros(50, WORD))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", ["p0", "p7"])
def test_the_sum_is_exact_whoever_drops_out_at_whichever_phase(phase: str, name: str) -> None:
    exchange = Exchange(12, 8)
    gone = lambda at, one: (at, one) == (phase, name)  # noqa: E731
    exchange.begin(gone)
    assert name in exchange.sent or phase not in ("sign", "unmask")
    assert np.array_equal(exchange.end(list(exchange.sent), gone), exchange.sum(list(exchange.sent)))


@given(st.dictionaries(st.sampled_from(named(16)), st.sampled_from(PHASES), max_size=6))
@hypothesis_settings(max_examples=15, deadline=None)
def test_the_sum_is_exact_or_there_is_none(lost: dict[str, str]) -> None:
    """Up to three of a neighbourhood of 13 may be lost, and so of all parties; of more as it happens."""
    exchange = Exchange(16, 12)
    assert exchange.members["p0"].needed == 10
    gone = lambda phase, name: lost.get(name) == phase  # noqa: E731
    try:
        exchange.begin(gone)
        total = exchange.end(list(exchange.sent), gone)
    except RunError:
        assert len(lost) > 3
    else:
        assert np.array_equal(total, exchange.sum(list(exchange.sent)))
        assert set(exchange.sent) >= set(exchange.names) - lost.keys() or len(lost) > 3


def test_whose_neighbours_are_too_few_is_named_and_the_sum_stays_masked() -> None:
    exchange = Exchange(12, 8)
    exchange.begin()
    order = exchange.order()
    lost = order[0:3:2]  # of whose neighbours in between two are gone, and of no party more than one may be
    summed = [name for name in exchange.names if name not in lost]
    few = {name for name in exchange.names if set(lost) <= neighbourhood(name, exchange.names, 8, exchange.roster)}
    with pytest.raises(UnjoinedShares, match="of those who have them 7 are left, 8 are needed") as error:
        exchange.end(summed)
    assert error.value.reasons.keys() == few


@pytest.mark.parametrize("count", [20, 34])
def test_masks_and_shares_are_of_neighbours_alone(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Of however many parties: per party 12 masks and its own, 12 sealed shares; at the server 13 a secret."""
    masks: list[int] = []
    joined: list[int] = []
    join = shamir.join
    monkeypatch.setattr(secure_aggregation, "add_mask", lambda *given: masks.append(1) or add_mask(*given))
    monkeypatch.setattr(shamir, "join", lambda shares: joined.append(len(shares)) or join(shares))
    exchange = Exchange(count, 12)
    exchange.begin()
    assert len(masks) == count * 13
    assert {len(shares) for shares in exchange.sealed.values()} == {12}
    exchange.end(list(exchange.names))
    assert joined == [13] * count
    assert len(masks) == count * 14  # every seed's, once more


def test_neighbours_are_of_no_effect_on_the_protocol_without() -> None:
    """A party of today and one from before know each other: what is signed, and every mask, is the same."""
    members = Exchange(4, 0).members
    one = members["p0"]
    keys = {name: member.advertise() for name, member in members.items()}
    assert one._of_keys("p1", b"key") == ("keys", SESSION, one.parties, 3, "p1", b"key".hex())
    assert set(one.share(keys)) == {"p1", "p2", "p3"}
    assert one._among() == SESSION


@given(st.integers(9, 20), st.data())
@hypothesis_settings(max_examples=60, deadline=None)
def test_bad_parties_put_out_no_good_one_of_their_neighbours(count: int, data: st.DataObject) -> None:
    """As long as no neighbourhood has more of them than it may lose."""
    names, neighbours = named(count), 2 * ((count - 1) // 2)
    most = neighbours + 1 - shares_needed(count, neighbours, count // 2 + 1)
    near = {name: neighbourhood(name, names, neighbours, "roster") for name in names}
    bad = data.draw(st.sets(st.sampled_from(names), max_size=most))
    refused = {name for name in bad if data.draw(st.booleans())}
    anything = st.sets(st.sampled_from(names))
    accepted = {one: data.draw(anything) if one in bad else near[one] - refused for one in names}
    out = refused_keys(accepted, most, near)
    assert refused <= out.keys() <= bad
    left = [name for name in names if name not in out]
    assert all(other in accepted[name] for name in left for other in near[name] & set(left) - {name})


# ----------------------------------------------------------------------------------------------- against a lying server


def test_shares_of_a_stranger_are_refused() -> None:
    exchange = Exchange(12, 8)
    exchange.begin()
    near = neighbourhood("p0", exchange.names, 8, exchange.roster)
    stranger = next(name for name in exchange.names if name not in near)
    other = Exchange(12, 8)
    other.keys = {name: member.advertise() for name, member in other.members.items()}
    while stranger in neighbourhood("p0", other.names, 8, digest_of(SESSION, other.keys)):
        other = Exchange(12, 8)
        other.keys = {name: member.advertise() for name, member in other.members.items()}
    other.members["p0"].share(other.keys)
    with pytest.raises(RunError, match=f"p0: .*refused: the server sent shares of .*{stranger}, who are not among"):
        other.members["p0"].open({stranger: exchange.sealed["p1"][next(iter(exchange.sealed["p1"]))]})


def test_a_member_that_was_told_of_fewer_neighbours_masks_nothing() -> None:
    """Else the server would tell a party of its friends and of strangers alone, whose seeds come off."""
    exchange = Exchange(12, 8)
    exchange.begin(lambda phase, name: phase == "vectors")
    near = neighbourhood("p0", exchange.names, 8, exchange.roster)
    left_out = sorted(near - {"p0"})[:2]
    with pytest.raises(RunError, match="p0: .*refused: the server sent a neighbourhood of 7 parties; 8 are needed"):
        exchange.send("p0", [name for name in exchange.names if name not in left_out])


def test_masks_of_members_that_were_told_different_things_do_not_cancel() -> None:
    """Told of one party fewer each, the two still mask, and nothing of their sum comes out but what is uniform."""
    exchange = Exchange(12, 8)
    exchange.begin(lambda phase, name: phase == "vectors")
    first, second = exchange.order()[:2]
    seeds: dict[str, set[bytes]] = {}
    pair_seed = secure_aggregation._pair_seed

    def noted(key: Any, public: bytes, session: str, one: str, other: str) -> bytes:
        seed = pair_seed(key, public, session, one, other)
        if {one, other} == {first, second}:
            seeds.setdefault(session, set()).add(seed)
        return seed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secure_aggregation, "_pair_seed", noted)
        exchange.send(first, list(exchange.names))
        exchange.send(second, [name for name in exchange.names if name != exchange.order()[2]])
    assert len(seeds) == len(set.union(*seeds.values())) == 2


def test_nothing_is_revealed_where_the_roster_or_the_survivors_differ() -> None:
    for lie in ("roster", "survivors"):
        exchange = Exchange(12, 8)
        exchange.begin(lambda phase, name: phase == "vectors")
        roster = dict.fromkeys(exchange.names, exchange.roster)
        if lie == "roster":  # as if half had been told other keys of parties that are not their neighbours
            for name in exchange.names[:6]:
                exchange.members[name].roster = "another"
        for name in exchange.names:
            exchange.send(name, exchange.there)
        fewer = list(exchange.names[:-1])
        told = {
            name: fewer if lie == "survivors" and number % 2 else list(roster) for number, name in enumerate(roster)
        }
        signed = {name: exchange.member(name).agree(told[name]) for name in fewer}
        for name in fewer:
            with pytest.raises(RunError, match="signatures of [56] parties on the same vectors and keys; 7 are needed"):
                exchange.member(name).reveal(told[name], signed)


@pytest.mark.parametrize("needed", [5, 6])
def test_a_server_that_leaves_out_the_right_ones_learns_no_groups_sum(
    monkeypatch: pytest.MonkeyPatch, needed: int
) -> None:
    """It leaves out four parties on either side of five. With a majority of nine shares it would; six are the least."""
    monkeypatch.setattr(secure_aggregation, "shares_needed", lambda *_: needed)
    exchange = Exchange(24, 8)
    exchange.begin()
    order = exchange.order()
    group, lost = list(order[4:9]), {*order[:4], *order[9:13]}
    summed = [name for name in exchange.names if name not in lost]
    signed = {name: exchange.member(name).agree(summed) for name in summed}
    revealed = {name: exchange.member(name).reveal(summed, signed) for name in summed}
    near = {name: neighbourhood(name, exchange.names, 8, exchange.roster) for name in exchange.names}
    keys = {name: exchange.keys[name] for name in [*group, *lost]}
    bound, kept = exchange.members[group[0]]._among(), {}
    masks = secure_aggregation._left_over(
        bound, exchange.names, needed, keys, group, revealed, near.__getitem__, set(), kept
    )
    total = sum((exchange.sent[name] for name in group), np.zeros(50, WORD))
    for seed, sign in masks:
        add_mask(total, seed, -sign)
    assert np.array_equal(total, exchange.sum(group)) == (needed == 5)
    assert {order[4], order[8]} <= kept.keys() if needed == 6 else kept.keys().isdisjoint(group)


def stories(exchange: Exchange, victim: str, friends: tuple[str, ...]) -> tuple[dict, dict[str, RunError]]:
    """(what a server has of the victim's seed and the others' mask keys, who refused) by holder.

    It tells the honest parties, as many at a time as its friends need to be a threshold, that they and the friends and
    the victim are the sum; the friends sign whatever it is.
    """
    needed, half = exchange.threshold, shamir.SHARE_BYTES
    honest = [name for name in exchange.names if name not in friends]
    held = {name: exchange.members[name].held for name in friends}
    revealed = {
        one: {name: pair[half:] if name == victim else pair[:half] for name, pair in shares.items()}
        for one, shares in held.items()
    }
    refused: dict[str, RunError] = {}
    before = {name: exchange.members[name].dump() for name in friends}
    step = needed - len(friends)
    for first in range(0, len(honest), step):
        group = honest[first : first + step]
        summed = list(dict.fromkeys([victim, *group, *friends, *honest]))[
            : max(needed, len({victim, *group, *friends}))
        ]
        signed = {name: exchange.member(name).agree(summed) for name in group}
        for name in friends:
            signed[name] = Member.load(before[name], exchange.members[name].identity).agree(summed)
        for name in group:
            try:
                shares = exchange.member(name).reveal(summed, signed)
            except RunError as error:
                refused[name] = error
            else:
                revealed[name] = {one: share for one, share in shares.items() if one == victim or one not in summed}
    return revealed, refused


@pytest.mark.parametrize(("neighbours", "threshold"), [(0, 5), (8, 5), (0, 7), (8, 7)])
def test_how_many_friends_a_server_that_lies_needs_is_the_same_with_neighbours(neighbours: int, threshold: int) -> None:
    """Three of nine make a threshold of 5 with any two, so three sets are signed, and one party's vector is out. They
    are too many for it, 2t − n = 1, and too few for a threshold of 7, 2t − n = 5."""
    exchange = Exchange(9, neighbours, threshold)
    exchange.begin()
    victim, friends = "p0", exchange.names[6:]
    revealed, refused = stories(exchange, victim, friends)
    member, kept = exchange.members[victim], {}
    near = {name: neighbourhood(name, exchange.names, neighbours, exchange.roster) for name in exchange.names}
    honest = {name: exchange.keys[name] for name in exchange.names[:6]}
    masks = list(
        secure_aggregation._left_over(
            *(member._among(), exchange.names, member.needed, honest, [victim], revealed, near.__getitem__),
            *(set(), kept),
        )
    )
    for name in friends:  # each of whom knows what it has in common with the victim
        key = X25519PrivateKey.from_private_bytes(exchange.members[name].mask_key)
        seed = secure_aggregation._pair_seed(key, exchange.keys[victim][:32], member._among(), name, victim)
        masks.append((seed, secure_aggregation._sign(victim, name)))
    sent = exchange.sent[victim].copy()
    for seed, sign in masks:
        add_mask(sent, seed, -sign)
    assert np.array_equal(sent, exchange.vectors[victim]) == (not kept) == (threshold == 5)
    assert refused.keys() == ({"p4", "p5"} if threshold == 7 else set())
    assert all("signatures of 5 parties" in str(error) for error in refused.values())


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def eight(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run config with eight tiny tasks, each of which masks with six others."""
    monkeypatch.setenv("ATM_FL_CACHE", str(tmp_path / "cache"))
    folders = [make_folder(tmp_path / "data" / f"t{number}", number, classes=2, images=3) for number in range(8)]
    secure = {"secure-aggregation": True, "secure-neighbours": 6, "rounds": 1, "metric-sinks": ""}
    return config | secure | {"tasks": ",".join(map(str, folders))}


def losing(kind: str, *tasks: str) -> ClientApp:
    """The ClientApp, of which these tasks' clients are lost at one phase."""

    def change(message: Message, reply: Message) -> Message:
        return Message(Error(2, "the line is dead"), reply_to=message)

    return tampered(change, tasks[0], kind)


def test_a_run_among_neighbours_ends_with_the_bits_of_the_plain_loop(eight: dict[str, Any]) -> None:
    flower = in_process(Settings.parse({**eight, "run-dir": eight["run-dir"] + "-flower"}))
    plain = {**eight, "secure-neighbours": 0, "run-dir": eight["run-dir"] + "-loop"}
    assert same(final(flower.directory), final(run_loop(Settings.parse(plain)).directory))


@pytest.mark.parametrize("kind", ["query.keys", "train", "query.unmask"])
def test_a_run_among_neighbours_survives_a_dropout(eight: dict[str, Any], kind: str) -> None:
    skip = {"on-failure": "skip"}
    runs = [
        in_process(Settings.parse(eight | skip | more | {"run-dir": f"{eight['run-dir']}{number}"}), losing(kind, "t3"))
        for number, more in enumerate(({}, {"secure-neighbours": 0}))
    ]
    assert same(*(final(run.directory) for run in runs))
    tasks = [next(line for line in read_metrics(run.directory) if line["kind"] == "merge")["tasks"] for run in runs]
    assert tasks[0] == tasks[1]
    assert ("t3" in tasks[0]) == (kind == "query.unmask")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"secure-neighbours": 5}, "secure-neighbours=5: it must be an even number from 2 on, below the 8 tasks; 0"),
        ({"secure-neighbours": 8}, "secure-neighbours=8: it must be an even number from 2 on, below the 8 tasks"),
        ({"secure-neighbours": -2}, "secure-neighbours=-2: it must be an even number"),
        (
            {"secure-neighbours": 2},
            "secure-neighbours=2: too few for 8 parties, of whom 2 may be in league with the server; take 4 or more",
        ),
        ({"secure-threshold": 8}, "of whom 7 may be in league with the server; take 0 for all others"),
        ({"secure-aggregation": False}, "secure-neighbours=6: it needs secure-aggregation=true"),
    ],
)
def test_neighbours_that_cannot_be_are_said(eight: dict[str, Any], wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        Settings.parse(eight | wrong)
