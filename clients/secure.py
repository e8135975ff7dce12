"""A party's answers in secure aggregation, beside the vector itself; between messages its secrets are on its disk.

Not in Flower's Context, which travels with every message and outlives the round.
"""

from __future__ import annotations

import numpy as np
from flwr.app import ConfigRecord, Message

from atm_fl.errors import RunError
from atm_fl.kept import Kept
from atm_fl.party import Party
from atm_fl.privacy.secure_aggregation import Member, session_of


def keys(message: Message, party: Party) -> ConfigRecord:
    """Draw this round's secrets, in place of those before, and say the public keys."""
    settings = party.settings
    if not settings.secure_aggregation:
        raise RunError(f"{party.client}: the server asks for keys, but secure-aggregation=false")
    session = session_of(*_round(message))
    member = Member(party.client, session, settings.party_names, settings.threshold)
    public = member.advertise()
    _kept(message, party).save_secret(member.dump())
    return ConfigRecord({"keys": public})


def shares(message: Message, party: Party) -> ConfigRecord:
    """Share the secrets among those whose keys the server names."""
    member = _taken(message, party)
    sealed = member.share(_record(message, "keys"))
    _kept(message, party).save_secret(member.dump())
    return ConfigRecord(dict(sealed))


def mask(message: Message, party: Party, words: np.ndarray) -> None:
    """Mask the words [n] of a task vector, in place."""
    member = _taken(message, party)
    member.mask(words, _record(message, "sealed"))
    _kept(message, party).save_secret(member.dump())


def reveal(message: Message, party: Party) -> ConfigRecord:
    """The shares that take the masks off the sum; the secrets of the round are gone."""
    summed = message.content.config_records["summed"]["tasks"]
    return ConfigRecord(dict(_taken(message, party).reveal(list(summed))))  # type: ignore[arg-type]


def _taken(message: Message, party: Party) -> Member:
    """The round's member, taken from the disk: asked for twice it is gone, and after an error too."""
    text, session = _kept(message, party).take_secret(), session_of(*_round(message))
    member = Member.load(text) if text else None
    if member is None or member.session != session:
        raise RunError(f"{party.client}: secure aggregation of {session}: no secrets here, or they were used already")
    return member


def _round(message: Message) -> tuple[str, int]:
    info = message.content.config_records["info"]
    return str(info["run"]), int(info["round"])  # type: ignore[arg-type]


def _kept(message: Message, party: Party) -> Kept:
    return Kept(_round(message)[0], party.client)


def _record(message: Message, name: str) -> dict[str, bytes]:
    found = message.content.config_records[name]
    return {task: value for task, value in found.items() if isinstance(value, bytes)}
