"""`atm-fl deploy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atm_fl.cli.terminal import Authority, Superlink, app, say

deploy = typer.Typer(no_args_is_help=True, help="Set up a federation of real machines: docs/deployment.md.")
app.add_typer(deploy, name="deploy")


@deploy.command()
def init(
    parties: Annotated[
        str,
        typer.Option(
            help="the parties by their tasks, as mnist,digits; with data of their own: birds=/srv/birds; where the "
            "name is a known task's too: ./pets=/srv/pets, or published:pets=/srv/data"
        ),
    ] = "",
    host: Annotated[
        str, typer.Option(help="the parties are on other machines, which reach this one by this name or address")
    ] = "",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="the port they reach it by; 0: the one it has, at first 8000")
    ] = 0,
    renew: Annotated[bool, typer.Option(help="make a new certificate for the SuperLink; restart it then")] = False,
    root: Annotated[Path, typer.Option(help="the checkout, where docker-compose.yml is")] = Path(),
) -> None:
    """Make certificates, keys and compose files, or add parties to those that are there."""
    from atm_fl.deployment.federation import lay_out

    for folder in lay_out(root, parties, host, port, renew):
        then = "carry it to its machine, and there: sh join" if host else "starts with docker-compose up -d"
        say(f"{folder}: {then}")


@deploy.command()
def sign(
    app_dir: Annotated[Path, typer.Option("--app", help="the checkout whose apps `atm-fl run` ships")] = Path(),
    key: Annotated[Path, typer.Option(help="the private key, Ed25519 in OpenSSH's form")] = Path("federation/apps.key"),
    to: Annotated[Path, typer.Option(help="the folder of signatures that the SuperLink hands out")] = Path(
        "federation/superlink/apps"
    ),
) -> None:
    """Sign the apps of a checkout, so that parties whose policy names the key in `apps` run them, and no others."""
    from atm_fl.server.deployment import sign

    for line in sign(app_dir, key, to):
        say(line)


@deploy.command()
def check(
    superlink: Superlink,
    ca: Authority,
    key: Annotated[Path | None, typer.Option(help="the party's private key")] = None,
    task: Annotated[str, typer.Option(help="its task, a registered one")] = "",
    data: Annotated[Path | None, typer.Option(help="its data folder")] = None,
    policy: Annotated[Path | None, typer.Option(help="its policy.toml: what it bounds is shown")] = None,
    disk: Annotated[float, typer.Option(help="GB of disk that must be free")] = 2.0,
    memory: Annotated[float, typer.Option(help="GB of memory that must be free")] = 1.5,
) -> None:
    """Say in one line each what would keep a party on this machine from joining; exit status 1 if anything would."""
    from atm_fl.deployment.checks import Machine, check

    outcomes = list(check(Machine(superlink, ca, key, task, data, policy, disk, memory)))
    for name, line, good in outcomes:
        say(f"{'ok   ' if good else 'WRONG'} {name}: {line}")
    if not all(good for *_, good in outcomes):
        raise typer.Exit(1)


@deploy.command()
def register(
    superlink: Superlink = "127.0.0.1:8000",
    ca: Authority = Path("/etc/atm-fl/ca.crt"),
    keys: Annotated[Path, typer.Option(help="the folder of the parties' public keys, NAME.pub")] = Path(
        "/etc/atm-fl/parties"
    ),
) -> None:
    """On the SuperLink's machine: let the parties whose public keys are there join, and no others."""
    from atm_fl.server.deployment import register

    for line in register(superlink, ca, keys):
        say(line)
