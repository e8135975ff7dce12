"""A federation of real machines, from the SuperLink's side: which SuperNodes may join, and runs with an honest end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from flwr.cli.supernode.register import try_load_public_key
from flwr.cli.typing import SuperLinkConnection
from flwr.cli.utils import flwr_cli_exc_handler, init_http_client_from_connection
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.control import ControlHttpClient

from atm_fl.errors import RunError, SettingError
from atm_fl.settings import Settings
from server.simulation import check_app, environment, flower_run


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
