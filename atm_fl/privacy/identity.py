"""A party's long-term key, and those of the others that it trusts: what a server that passes keys on cannot swap.

    $ATM_FL_CACHE/identity/<client>     the party's own, Ed25519 as an OpenSSH file of mode 0600, made when first needed

A public key is a line as in OpenSSH's allowed_signers: `digits ssh-ed25519 AAAA…`. The parties give each other theirs
by a way that does not lead over the server.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from atm_fl import tasks
from atm_fl.errors import OwnFileError, SettingError
from atm_fl.files import write_once

SIGNATURE_BYTES = 64


@dataclass(frozen=True)
class Identity:
    """One party's long-term key, and the public ones (32 bytes) that it trusts, by client, its own among them.

    trusted: empty where none are pinned; then nobody's signature is worth anything, and none is asked for.
    """

    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate, repr=False)
    trusted: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def public(self) -> bytes:
        """Its public key, 32 bytes."""
        return self.key.public_key().public_bytes_raw()

    def sign(self, *content: object) -> bytes:
        """The signature, 64 bytes, of what JSON can hold."""
        return self.key.sign(_message(content))

    def signed(self, client: str, signature: bytes, *content: object) -> bool:
        """Whether `client`, which is trusted, has signed just this."""
        try:
            Ed25519PublicKey.from_public_bytes(self.trusted[client]).verify(signature, _message(content))
        except InvalidSignature:
            return False
        return True


def _message(content: tuple[object, ...]) -> bytes:
    return json.dumps(["atm-fl secure aggregation", *content]).encode()


def party_key(client: str) -> Ed25519PrivateKey:
    """The long-term key of a party on this machine, made if there is none. SettingError if its file is no such key."""
    if "/" in client or client in ("", ".", ".."):
        raise SettingError(f"{client!r} is no party's name")  # it becomes a path
    path = tasks.cache_dir() / "identity" / client
    if not path.exists():
        key = Ed25519PrivateKey.generate()
        write_once(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    try:
        loaded = load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SettingError(f"{path} is no OpenSSH private key without a passphrase: {error}") from error
    if not isinstance(loaded, Ed25519PrivateKey):
        raise SettingError(f"{path}: a party's key is of the type ed25519")
    return loaded


def public_line(client: str) -> str:
    """What the other parties need to know of a party on this machine, as a line of `trusted-parties`."""
    public = party_key(client).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return f"{client} {public.decode()}"


def trusted_parties(keys: Mapping[str, str]) -> dict[str, bytes]:
    """Public keys (32 bytes) by client from OpenSSH's text, `ssh-ed25519 AAAA…`, which may go on with a comment.

    SettingError names the first that is none, or that two clients have.
    """
    key_of: dict[str, bytes] = {}
    for client, text in keys.items():
        try:
            key = load_ssh_public_key(text.encode())
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise SettingError(f"trusted-parties: {client}: {text!r} is no public key of the form 'ssh-ed25519 AAAA…'")
        public = key.public_bytes_raw()
        if public in key_of.values():
            raise SettingError(f"trusted-parties: {client} has another client's key; each party has its own")
        key_of[client] = public
    return key_of


def read_trusted(path: str | Path) -> dict[str, bytes]:
    """`trusted_parties` of a file of lines `CLIENT ssh-ed25519 AAAA…`; empty lines and # comments are passed over.

    SettingError, also if the file is not there, names nobody or names one twice.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OwnFileError("trusted-parties", f"trusted-parties={str(path)!r} cannot be read: {error}") from error
    keys: dict[str, str] = {}
    for line in lines:
        client, _, text = line.strip().partition(" ")
        if not client or client.startswith("#"):
            continue
        if client in keys:
            raise OwnFileError("trusted-parties", f"trusted-parties={str(path)!r} names {client} twice")
        keys[client] = text.strip()
    if not keys:
        raise OwnFileError("trusted-parties", f"trusted-parties={str(path)!r} names nobody")
    try:
        return trusted_parties(keys)
    except SettingError as error:
        raise OwnFileError("trusted-parties", str(error)) from error
