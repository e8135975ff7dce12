"""A federation of real machines, from the SuperLink's side: which SuperNodes may join, and runs with an honest end."""

from __future__ import annotations

import hashlib
import json
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.cli.build import build_fab_from_disk
from flwr.cli.supernode.register import try_load_public_key
from flwr.cli.typing import SuperLinkConnection
from flwr.cli.utils import flwr_cli_exc_handler, init_http_client_from_connection
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.primitives.asymmetric_ed25519 import create_message_to_sign, load_private_key, sign_message

from atm_fl.deployment.keys import key_id
from atm_fl.errors import RunError, SettingError
from atm_fl.files import atomic_write
from atm_fl.server.simulation import check_app, environment, flower_run
from atm_fl.settings import Settings


@contextmanager
def control(superlink: str, authority: Path) -> Iterator[ControlHttpClient]:
    """A client of a SuperLink's control API; RunError says why it refused or could not be reached."""
    if not authority.is_file():
        raise SettingError(f"{authority} is not there; name the federation's ca.crt with --ca")
    connection = SuperLinkConnection("deployment", superlink, str(authority.resolve()))
    client = None
    try:
        with flwr_cli_exc_handler():
            client = init_http_client_from_connection(connection)
            yield client
    except click.ClickException as error:
        raise RunError(f"the SuperLink at {superlink}: {error.format_message()}") from error
    finally:
        if client:
            client.close()


def register(superlink: str, authority: Path, keys: Path) -> Iterator[str]:
    """Make the SuperNodes that may join those whose public keys are `keys`/NAME.pub; yields a line for each.

    A node whose key is no longer there may not join any more.
    """
    wanted = {try_load_public_key(file): file.stem for file in sorted(keys.glob("*.pub"))}
    with control(superlink, authority) as client:
        known = {
            node.public_key: node
            for node in client.ListNodes(ListNodesRequest()).nodes_info
            if node.status != "unregistered"
        }
        for key, name in wanted.items():
            if key in known:
                yield f"{name}: {known[key].status}"
            else:
                node = client.RegisterNode(RegisterNodeRequest(public_key=key, name=name)).node_id
                yield f"{name}: registered as node {node}"
        for key, stranger in known.items():
            if key not in wanted:
                client.UnregisterNode(UnregisterNodeRequest(node_id=stranger.node_id))
                yield f"{stranger.name or stranger.node_id}: removed, its public key is not in {keys}"


def sign(app: Path, key: Path, folder: Path) -> Iterator[str]:
    """Sign the bundle that `flwr run` would make of the checkout `app`; yields its hash, who signed, and the file.

    The signature joins those of other keys in `folder`/HASH.json, which is in the form that Flower's SuperNodes take
    from its hub: Ed25519 of the time, 8 bytes, and the bundle's SHA-256. SettingError if there is no such checkout or
    key.
    """
    check_app(app)
    try:
        secret = load_private_key(key)
    except OSError as error:
        raise SettingError(
            f"{key} cannot be read ({error.strerror}); `atm-fl deploy init` makes it, --key names another"
        ) from error
    except ValueError as error:
        raise SettingError(
            f"{key} is no Ed25519 key in OpenSSH's form: {error}; make one by ssh-keygen -t ed25519"
        ) from error
    bundle, now = build_fab_from_disk(app), int(time.time())
    digest = hashlib.sha256(bundle).digest()
    signer = key_id(secret.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())
    signature = urlsafe_b64encode(sign_message(secret, create_message_to_sign(digest, now))).decode().rstrip("=")
    file = folder / f"{digest.hex()}.json"
    known = json.loads(file.read_text()) if file.exists() else {"valid_license": "Valid"}
    known[signer] = json.dumps({"signed_at": now, "signature": signature})
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(known, indent=1) + "\n")
    file.chmod(0o644)  # the SuperLink's container may run as another user
    yield f"app: sha256:{digest.hex()}"
    yield f"signed by {signer}: {file}"


def submit(settings: Settings, app: Path, superlink: str, authority: Path) -> None:
    """Run `settings` on a federation to the run's end. RunError, with the ServerApp's own message, if it failed.

    The ServerApp writes to `run-dir` on the SuperLink's machine, where this is meant to be called as well. Which runs
    are there, and how one is stopped, is Flower's: `flwr list`, `flwr stop`.
    """
    check_app(app)
    if not authority.is_file():
        raise SettingError(f"{authority} is not there; name the federation's ca.crt with --ca")
    with TemporaryDirectory() as home:
        (Path(home) / "config.toml").write_text(
            f'[superlink]\ndefault = "deployment"\n\n[superlink.deployment]\naddress = "{superlink}"\n'
            f'root-certificates = "{authority.resolve()}"\n'
        )
        flower_run(settings, app, "deployment", environment(Path(home)))
