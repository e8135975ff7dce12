"""A federation's folder: what `atm-fl deploy init` lays out beside docker-compose.yml.

    .env                          what docker-compose.yml asks for, and which parties' files belong to it
    federation/ca.key             the authority's secret; no container sees it, and it may be kept elsewhere
    federation/apps.key           signs apps (`atm-fl deploy sign`), in the same way; apps.pub is its public half
    federation/superlink/         all that the SuperLink sees: ca.crt, superlink.crt, superlink.key, parties/NAME.pub,
                                  apps/HASH.json, the signatures of apps
    federation/plugins/           the server's plugins, empty at first
    federation/parties/NAME/      all that a party sees: ca.crt, key, policy.toml, plugins/; its compose file, `join`,
                                  README

The folder itself is the record of what there is. A second call adds parties and leaves every key as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from atm_fl import tasks
from atm_fl.deployment.keys import certified_hosts, make_authority, make_certificate, make_key_pair, make_signing_key
from atm_fl.errors import SettingError
from atm_fl.files import atomic_write
from atm_fl.policy import template
from atm_fl.tasks.published import Published

LOCAL_HOSTS = ("superlink", "localhost", "127.0.0.1")
"""The SuperLink's names within its own compose file and machine."""
IMAGE_USER = 10001
"""The user of the image; see the Dockerfile."""
PORT = 8000
POLICY = "/etc/atm-fl/policy.toml"
"""Where a party's container finds its policy."""
_PARTY = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_TAKEN = ("superlink", "runs")
"""Names that docker-compose.yml has for other things."""
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


@dataclass(frozen=True)
class PartyPlan:
    """A party to be: its name, which is its task's, and where its data are on its machine ("" if they are embedded).

    published: its task is one of the published data sets, which are read from the data folder by their own name.
    """

    name: str
    data: str = ""
    published: bool = False

    @property
    def inside(self) -> str:
        """Where the container finds its data, "" if they are embedded."""
        return "" if not self.data else "/data" if self.published else f"/data/{self.name}"

    @property
    def node_config(self) -> str:
        """What its SuperNode tells its ClientApps."""
        holds = f'data="{self.inside}"' if self.data and not self.published else f'task="{self.name}"'
        return f'{holds} policy="{POLICY}"'


def read_parties(text: str) -> list[PartyPlan]:
    """Parties from `mnist,birds=/srv/birds,./pets=/srv/pets,published:cars=/srv/data`.

    `./` says a folder of images, as in the setting `tasks`, and `published:` a published data set; a name that may be
    either needs one of them. SettingError names the first that cannot be a party, and the fix.
    """
    plans: dict[str, PartyPlan] = {}
    for item in (item.strip() for item in text.split(",")):
        said, separator, data = (field.strip() for field in item.partition("="))
        name = said.removeprefix("./").removeprefix("published:")
        kind = said[: len(said) - len(name)]
        if said.startswith(tasks.HUB):
            raise SettingError(
                f"party {said!r}: bring it on its machine by atm-fl prepare --tasks {said}, and name the folder that "
                "this prints, as ./reviews=/srv/data/hf/OWNER/NAME/default"
            )
        if not _PARTY.fullmatch(name) or name in _TAKEN:
            raise SettingError(
                f"party {name!r}: a name is lower-case letters, digits, - and _, begins with a letter or digit, has at "
                f"most 40 characters, and is not {' or '.join(_TAKEN)}"
            )
        if name in plans:
            raise SettingError(f"party {name!r} is named twice; each party holds a task of its own")
        if separator and not re.fullmatch(r"/[^:$\"'\n]+", data):
            raise SettingError(f"party {item!r}: its data folder must be an absolute path without : $ or quotes")
        task = tasks.TASKS.get(name) if kind == "./" or (separator and not kind) else tasks.find(name)
        published = isinstance(task, Published)
        if not separator and (kind or published):
            form = f"{kind or 'published:'}{name}"
            raise SettingError(f"party {said!r}: say where its data are on its machine, as {form}=/srv/data")
        if kind == "published:" and not published:
            raise SettingError(f"party {said!r}: {name} is embedded, not a published data set; say {name} alone")
        if separator and task and not kind:
            other = f"published:{item}" if published else name
            what = f"published data set {name}" if published else f"embedded task {name}"
            raise SettingError(
                f"party {item!r}: say ./{item} if {data} is a folder of images of its own, or {other} for the {what}"
            )
        plans[name] = PartyPlan(name, data, kind == "published:")
    return list(plans.values())


def lay_out(root: Path, parties: str = "", host: str = "", port: int = 0, renew: bool = False) -> list[Path]:
    """Make or extend the federation of the checkout `root`; returns the folders of the parties named.

    parties: as `read_parties` takes them. host: the name or address by which other machines reach this one; the
    parties are then on other machines, and each folder is to be carried to one. Without it they are services beside
    the SuperLink. port: the one they reach it by; 0 leaves it as it is, at first 8000. renew: make
    a new certificate for the SuperLink even if there is one. SettingError before anything is written if something
    cannot work.
    """
    plans = read_parties(parties) if parties else []
    if host and not _HOST.fullmatch(host):
        raise SettingError(f"host={host!r}: it must be a host name or an IPv4 address, without a port")
    if not (root / "docker-compose.yml").is_file():
        raise SettingError(
            f"{root} has no docker-compose.yml; call this in the checkout of atm-fl, or name it with --root"
        )
    for plan in plans:
        if plan.data and not host and not Path(plan.data).is_dir():
            raise SettingError(
                f"party {plan.name!r}: {plan.data} is not a folder on this machine; make it, or say --host if it "
                f"is on another (in a container, mount it: -v {plan.data}:{plan.data}:ro)"
            )
    port = port or _known_port(root)
    home = root / "federation"
    (home / "superlink" / "parties").mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)
    (home / ".gitignore").write_text("*\n")
    _certify(home, host, renew)
    (home / "superlink" / "apps").mkdir(exist_ok=True)
    (home / "plugins").mkdir(exist_ok=True)
    if not (home / "apps.pub").exists():
        make_signing_key(home / "apps.key", home / "apps.pub")
    folders = [_add_party(home, plan, f"{host}:{port}" if host else "") for plan in plans]
    _write_environment(root, port)
    return folders


def _certify(home: Path, host: str, renew: bool) -> None:
    """An authority if there is none, and a SuperLink's certificate if there is none for `host`."""
    authority, authority_key = home / "superlink" / "ca.crt", home / "ca.key"
    certificate, key = home / "superlink" / "superlink.crt", home / "superlink" / "superlink.key"
    if not authority.exists():
        make_authority(authority, authority_key)
    known = certified_hosts(certificate) if certificate.exists() else list(LOCAL_HOSTS)
    if certificate.exists() and not renew and (not host or host in known):
        return
    if not authority_key.exists():
        raise SettingError(f"{authority_key} is not there; put it back to make a certificate")
    make_certificate(
        certificate, key, authority, authority_key, [*known, *([host] if host not in ("", *known) else [])]
    )
    _hand_over(key)


def _add_party(home: Path, plan: PartyPlan, address: str) -> Path:
    """The folder of one party; its key stays if it has one."""
    folder = home / "parties" / plan.name
    (folder / "plugins").mkdir(parents=True, exist_ok=True)
    key = folder / "key"
    if not key.exists():
        make_key_pair(key, home / "superlink" / "parties" / f"{plan.name}.pub", plan.name)
        _hand_over(key)
    (folder / "ca.crt").write_bytes((home / "superlink" / "ca.crt").read_bytes())
    if not (folder / "policy.toml").exists():
        (folder / "policy.toml").write_text(template(apps=((home / "apps.pub").read_text().strip(),)))
    superlink = address or f"superlink:{PORT}"
    values = {
        "party": plan.name,
        "superlink": superlink,
        "node_config": plan.node_config,
        # Compose takes relative paths from where the first of its files is.
        "folder": "." if address else f"./federation/parties/{plan.name}",
        "network": "default" if address else "federation",
        "data_volume": f"      - {plan.data}:{plan.inside}:ro\n" if plan.data else "",
        "data_note": f"{plan.data}, mounted read-only; docker-compose.yml names it, before the colon."
        if plan.data
        else "the task is embedded in the image.",
        "check": f"--superlink {superlink} --ca /etc/atm-fl/ca.crt --key /etc/atm-fl/key --policy {POLICY} "
        + (f"--data {plan.inside}" if plan.inside and not plan.published else f"--task {plan.name}"),
    }
    _fill("docker-compose.yml", folder, values)
    for name in ("join", "README.md"):
        if address:
            _fill(name, folder, values)
        else:
            (folder / name).unlink(missing_ok=True)
    return folder


def _fill(name: str, folder: Path, values: Mapping[str, str]) -> None:
    """Write a template of a party's folder with every @name@ replaced."""
    text = files("atm_fl.deployment").joinpath("party", name).read_text()
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    (folder / name).write_text(text)


def _write_environment(root: Path, port: int) -> None:
    """Write our lines of .env, and keep the others."""
    here = sorted(path for path in (root / "federation" / "parties").glob("*/docker-compose.yml") if _is_here(path))
    elsewhere = set(certified_hosts(root / "federation" / "superlink" / "superlink.crt")) - set(LOCAL_HOSTS)
    ours = {
        "COMPOSE_FILE": ":".join(["docker-compose.yml", *(str(path.relative_to(root)) for path in here)]),
        "COMPOSE_PATH_SEPARATOR": ":",
        "ATM_FL_USER": f"{os.getuid()}:{os.getgid()}" if os.getuid() else f"{IMAGE_USER}:{IMAGE_USER}",
        # Nobody but this machine needs the port while no party is elsewhere.
        "ATM_FL_BIND": "0.0.0.0" if elsewhere else "127.0.0.1",
        "ATM_FL_PORT": str(port),
    }
    file = root / ".env"
    lines = file.read_text().splitlines() if file.exists() else []
    kept = [line for line in lines if line.partition("=")[0] not in ours]
    with atomic_write(file) as temporary:
        temporary.write_text("\n".join([*kept, *(f"{key}={value}" for key, value in ours.items())]) + "\n")


def _known_port(root: Path) -> int:
    """The port of an earlier call, the usual one before the first: parties elsewhere know it."""
    file = root / ".env"
    match = re.search(r"^ATM_FL_PORT=(\d+)$", file.read_text() if file.exists() else "", re.MULTILINE)
    return int(match[1]) if match else PORT


def _is_here(compose_file: Path) -> bool:
    """Whether a party's compose file is for this machine."""
    return not (compose_file.parent / "join").exists()


def _hand_over(secret: Path) -> None:
    """Give a secret to the user in the container: the caller, or the image's own where the caller is root."""
    if os.getuid() == 0:
        os.chown(secret, IMAGE_USER, IMAGE_USER)
