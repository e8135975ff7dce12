"""What would keep a party from joining: one line for each thing that is wrong on its machine."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection
from pathlib import Path

import psutil
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from atm_fl import plugins, tasks
from atm_fl.deployment.keys import SECRET_MODE, key_id
from atm_fl.errors import SettingError
from atm_fl.policy import Policy
from atm_fl.tasks.folder import list_folder
from atm_fl.tasks.texts import UNREAD, is_text

TIMEOUT = 10.0
SKEW = 8.0
"""Seconds that this clock may be off: the SuperLink refuses signatures older than 10."""
SOON = 30
"""Days before its end from which a certificate is said to expire."""
DISK, MEMORY = 2.0, 1.5
"""GB that must be free: caches and bundles; a client of the small backbone with PyTorch."""


@dataclass(frozen=True)
class Machine:
    """What a party is about to join with. Parts that are empty are not checked."""

    superlink: str
    authority: Path
    key: Path | None = None
    task: str = ""
    data: Path | None = None
    policy: Path | None = None
    disk: float = DISK
    memory: float = MEMORY


class Wrong(Exception):
    """A check's verdict; its text is the line."""


def check(machine: Machine) -> Iterator[tuple[str, str, bool]]:
    """Yield (what was checked, what was found, whether it is as it must be), one a check; a failed one stops none."""
    checks: list[tuple[str, Callable[[Machine], str]]] = [
        ("address", _address),
        ("certificate", _certificate),
        ("clock", _clock),
        *([("key", _key)] if machine.key else []),
        *([("task", _task)] if machine.task else []),
        *([("data", _data)] if machine.data else []),
        *([("policy", _policy), ("apps", _apps)] if machine.policy else []),
        *([("plugins", _plugins)] if os.environ.get(plugins.VARIABLE) else []),
        ("disk", _disk),
        ("memory", _memory),
    ]
    for name, verify in checks:
        try:
            yield name, verify(machine), True
        except Wrong as wrong:
            yield name, str(wrong), False


def _split(superlink: str) -> tuple[str, int]:
    host, _, port = superlink.rpartition(":")
    if not host or not port.isdigit():
        raise Wrong(f"{superlink!r} is not host:port, as fl.example.org:8000")
    return host, int(port)


def _address(machine: Machine) -> str:
    host, port = _split(machine.superlink)
    try:
        socket.create_connection((host, port), TIMEOUT).close()
    except socket.gaierror:
        raise Wrong(f"the name {host!r} is not known here; check it, or this machine's DNS") from None
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise Wrong(
            f"{machine.superlink} cannot be reached ({reason}); is the SuperLink up, a firewall between?"
        ) from None
    return f"{machine.superlink} can be reached"


def _connect(machine: Machine) -> HTTPSConnection:
    """A verified connection to the SuperLink; Wrong says what TLS found."""
    try:
        context = ssl.create_default_context(cafile=str(machine.authority))
    except FileNotFoundError:
        raise Wrong(f"{machine.authority} is not there; it is the ca.crt of the party's folder") from None
    except ssl.SSLError:
        raise Wrong(f"{machine.authority} is no certificate in PEM format") from None
    connection = HTTPSConnection(*_split(machine.superlink), timeout=TIMEOUT, context=context)
    try:
        connection.connect()
    except ssl.SSLCertVerificationError as error:
        host = machine.superlink.rpartition(":")[0]
        says = {
            10: "the SuperLink's certificate has expired, or this clock is wrong; `atm-fl deploy init --renew`",
            9: "the SuperLink's certificate is not valid yet; is this machine's clock right?",
            62: f"the SuperLink's certificate is not for {host!r}; `atm-fl deploy init --host {host}` adds the name",
            64: f"the SuperLink's certificate is not for {host!r}; `atm-fl deploy init --host {host}` adds the name",
        }
        other = (
            f"the SuperLink's certificate is not from the authority in {machine.authority}; is it this federation's?"
        )
        raise Wrong(says.get(error.verify_code, other)) from None
    except ssl.SSLError as error:
        raise Wrong(f"{machine.superlink} does not speak TLS ({error.reason})") from None
    except OSError:
        raise Wrong("not seen, since the address cannot be reached") from None
    return connection


def _certificate(machine: Machine) -> str:
    connection = _connect(machine)
    try:
        assert isinstance(connection.sock, ssl.SSLSocket)
        binary = connection.sock.getpeercert(binary_form=True) or b""
    finally:
        connection.close()
    left = (x509.load_der_x509_certificate(binary).not_valid_after_utc - datetime.now(UTC)).days
    if left < SOON:
        raise Wrong(f"the SuperLink's certificate expires in {left} days; renew it: `atm-fl deploy init --renew`")
    return f"from this federation's authority, valid for {left} days"


def _clock(machine: Machine) -> str:
    try:
        connection = _connect(machine)
        connection.request("GET", "/health")
        date = connection.getresponse().getheader("date") or ""
        connection.close()
        off = time.time() - parsedate_to_datetime(date).timestamp()
    except (Wrong, OSError, HTTPException, ValueError):
        raise Wrong("not seen, since the SuperLink's time is not known") from None
    if abs(off) > SKEW:
        raise Wrong(f"this clock is {abs(off):.0f} s {'ahead' if off > 0 else 'behind'}; set it, best by NTP")
    return f"within {max(1, abs(round(off)))} s of the SuperLink's"


def _key(machine: Machine) -> str:
    path = machine.key
    assert path is not None
    try:
        status, content = path.stat(), path.read_bytes()
    except FileNotFoundError:
        raise Wrong(f"{path} is not there") from None
    except PermissionError:
        raise Wrong(f"{path} cannot be read by this user; it belongs to user {path.stat().st_uid}") from None
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise Wrong(f"{path} has mode {mode:04o}, so that others can read it; chmod {SECRET_MODE:o} {path}")
    try:
        key = load_ssh_private_key(content, None)
    except (ValueError, UnsupportedAlgorithm):
        raise Wrong(f"{path} is no private key in OpenSSH format; take the party's `key`") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Wrong(f"{path} is no elliptic-curve key, which Flower asks for; take the party's `key`")
    return f"{path}, mode {mode:04o}"


def _task(machine: Machine) -> str:
    try:
        tasks.check(machine.task)
    except SettingError as error:
        raise Wrong(str(error)) from None
    return machine.task


def _data(machine: Machine) -> str:
    folder = machine.data
    assert folder is not None
    if not folder.is_dir():
        raise Wrong(f"{folder} is not a folder on this machine; is the data mounted there?")
    try:
        next(folder.iterdir(), None)
        if not machine.task and is_text(folder):
            return _texts(folder)
        listing = list_folder(folder)
    except PermissionError:
        raise Wrong(f"{folder} cannot be read by this user; chmod -R a+rX it, or change the party's user") from None
    if machine.task and not listing.pictures:
        return str(folder)
    if listing.problems:
        more = f"; and {len(listing.problems) - 1} more: atm-fl tasks check {folder}" if listing.problems[1:] else ""
        raise Wrong(f"{listing.problems[0]}{more}")
    counts = ", ".join(f"{len(pictures)} {split}" for split, pictures in listing.pictures.items())
    passed_over = f"; {listing.passed_over_told()}" if listing.passed_over else ""
    return f"{folder}: {len(listing.classes)} classes, {counts} pictures{passed_over}"


def _texts(folder: Path) -> str:
    try:
        data = tasks.load(str(folder), 0, tokenizer=UNREAD)
    except SettingError as error:
        raise Wrong(str(error)) from None
    counts = ", ".join(f"{len(data.split(split))} {split}" for split in tasks.SPLITS)
    return f"{folder}: {len(data.classes)} classes, {counts} texts"


def _policy(machine: Machine) -> str:
    assert machine.policy is not None
    try:
        bounds = Policy.read(machine.policy).bounds()
    except SettingError as error:
        raise Wrong(str(error)) from None
    return ", ".join(bounds) or f"{machine.policy} bounds nothing: a run may ask for anything"


def _apps(machine: Machine) -> str:
    assert machine.policy is not None
    try:
        apps = Policy.read(machine.policy).apps
    except SettingError:
        raise Wrong("not seen, since the policy cannot be read") from None
    if not apps:
        return (
            f"any code that the SuperLink sends runs here; name who must sign it in {machine.policy}, "
            'apps = ["ssh-ed25519 …"] (the operator\'s federation/apps.pub)'
        )
    return "only those " + ", or ".join(f"signed by {key_id(app)}" if " " in app else f"with {app}" for app in apps)


def _plugins(machine: Machine) -> str:
    try:
        loaded = plugins.loaded()
    except SettingError as error:
        raise Wrong(str(error)) from None
    return "; ".join(f"{plugin}: {', '.join(things)}" for plugin, things in loaded.items()) or "none"


def machine_memory() -> int:
    """Bytes of memory of this machine, or of this container if that may have less."""
    limits = [psutil.virtual_memory().total]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if Path(file).exists() and (limit := Path(file).read_text().strip()).isdigit():
            limits.append(int(limit))
    return min(limits)


def _disk(machine: Machine) -> str:
    folder = tasks.cache_dir()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    if free < machine.disk:
        raise Wrong(f"{folder} has {free:.1f} GB free, {machine.disk:g} GB are needed")
    return f"{free:.0f} GB free in {folder}"


def _memory(machine: Machine) -> str:
    free = min(psutil.virtual_memory().available, machine_memory())
    if free / 1e9 < machine.memory:
        raise Wrong(f"{free / 1e9:.1f} GB of memory are free, {machine.memory:g} GB are needed")
    return f"{free / 1e9:.1f} GB free"
