"""A party's answers in secure aggregation, beside the vector itself; between messages its secrets are on its disk.

Not in Flower's Context, which travels with every message and outlives the round.

`trusted-parties` of this party's policy or `--node-config`, which no server decides, is a file with the long-term
public keys of all parties, this one's too. With it this party answers in sums alone, among those it names.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import ConfigRecord, Context, Message

from atm_fl.errors import RunError, SettingError
from atm_fl.federation.client import Party
from atm_fl.federation.client_state import ClientState
from atm_fl.policy import policy_of
from atm_fl.privacy.identity import Identity, party_key, read_trusted
from atm_fl.privacy.secure_aggregation import Member, session_of
from atm_fl.settings import Settings


def trusted(context: Context) -> dict[str, bytes]:
    """The parties that this one trusts, with their long-term public keys; none if it was told of none."""
    policy = policy_of(context.node_config)
    path = context.node_config.get("trusted-parties", policy.trusted_parties)
    if not isinstance(path, str):
        raise SettingError(f"trusted-parties={path!r} in this SuperNode's --node-config: it must be a path")
    return read_trusted(path) if path else {}


def check(settings: Settings, trusted: Mapping[str, bytes]) -> None:
    """RunError if the run is none that a party which trusts these, and only these, takes part in."""
    if not trusted:
        return
    if not settings.secure_aggregation:
        raise RunError("refused: secure-aggregation=false, and a party with trusted-parties answers in sums alone")
    if unknown := [name for name in settings.party_names if name not in trusted]:
        raise RunError(f"refused: a run with {', '.join(unknown)}, whom this party's trusted-parties does not name")


def keys(message: Message, party: Party, trusted: Mapping[str, bytes]) -> ConfigRecord:
    """Draw this round's secrets, in place of those before, and say the public keys."""
    settings = party.settings
    if not settings.secure_aggregation:
        raise RunError(f"{party.client}: the server asks for keys, but secure-aggregation=false")
    session = session_of(*_round(message))
    identity = Identity(party_key(party.client), trusted)
    names, neighbours = settings.party_names, settings.secure_neighbours
    member = Member(party.client, session, names, settings.threshold, identity, neighbours)
    public = member.advertise()
    _kept(message, party).save_secret(member.dump())
    return ConfigRecord({"keys": public})


def shares(message: Message, party: Party, trusted: Mapping[str, bytes]) -> ConfigRecord:
    """Share the secrets among those whose keys the server passes on and this party accepts."""
    member = _taken(message, party, trusted)
    sealed = member.share(_bytes(message, "keys"))
    _kept(message, party).save_secret(member.dump())
    return ConfigRecord(dict(sealed))


def confirm(message: Message, party: Party, trusted: Mapping[str, bytes]) -> ConfigRecord:
    """Whose shares have arrived and open."""
    member = _taken(message, party, trusted)
    opened = member.open(_bytes(message, "sealed"))
    _kept(message, party).save_secret(member.dump())
    return ConfigRecord({"opened": opened})


def mask(message: Message, party: Party, trusted: Mapping[str, bytes], words: np.ndarray) -> None:
    """Mask the words [n] of a task vector, in place."""
    member = _taken(message, party, trusted)
    member.mask(words, _names(message, "parties"))
    _kept(message, party).save_secret(member.dump())


def sign(message: Message, party: Party, trusted: Mapping[str, bytes]) -> ConfigRecord:
    """The signature of those whose vectors are in the sum."""
    member = _taken(message, party, trusted)
    signature = member.agree(_names(message, "summed"))
    _kept(message, party).save_secret(member.dump())
    return ConfigRecord({"signature": signature})


def reveal(message: Message, party: Party, trusted: Mapping[str, bytes]) -> ConfigRecord:
    """The shares that take the masks off the sum; the secrets of the round are gone."""
    member = _taken(message, party, trusted)
    return ConfigRecord(dict(member.reveal(_names(message, "summed"), _bytes(message, "signatures"))))


def _taken(message: Message, party: Party, trusted: Mapping[str, bytes]) -> Member:
    """The round's member, taken from the disk: asked for twice it is gone, and after an error too."""
    text, session = _kept(message, party).take_secret(), session_of(*_round(message))
    member = Member.load(text, Identity(party_key(party.client), trusted)) if text else None
    if member is None or member.session != session:
        raise RunError(f"{party.client}: secure aggregation of {session}: no secrets here, or they were used already")
    return member


def _round(message: Message) -> tuple[str, int]:
    info = message.content.config_records["info"]
    return str(info["run"]), int(info["round"])  # type: ignore[arg-type]


def _kept(message: Message, party: Party) -> ClientState:
    return ClientState(_round(message)[0], party.client)


def _bytes(message: Message, name: str) -> dict[str, bytes]:
    """A record of bytes by client."""
    record = message.content.config_records[name]
    return {client: value for client, value in record.items() if isinstance(value, bytes)}


def _names(message: Message, name: str) -> list[str]:
    """A record of clients."""
    names = message.content.config_records[name]["clients"]
    return [str(client) for client in names] if isinstance(names, list) else []
