"""Deployment: certificates, keys and compose files as `deploy init` makes them, and what `deploy check` says is wrong.

The drill on a real engine is `slow`; it runs where Docker is, or where ENGINE names a program that starts it.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import re
import shutil
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import forked
import httpx
import pytest
import yaml
from conftest import make_folder
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509.verification import PolicyBuilder, Store
from typer.testing import CliRunner

from atm_fl.cli import terminal
from atm_fl.deployment import checks, keys
from atm_fl.deployment.checks import Machine, check
from atm_fl.deployment.federation import lay_out, read_parties
from atm_fl.errors import RunError, SettingError
from atm_fl.server.simulation import QUIET
from atm_fl.settings import defaults

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """An empty folder with the compose file and a line of its own in .env."""
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    (tmp_path / ".env").write_text("ATM_FL_PARTY_MEMORY=8g\nATM_FL_BIND=1\n")
    return tmp_path


def environment(checkout: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in (checkout / ".env").read_text().splitlines())


def services(checkout: Path) -> dict[str, Any]:
    """The services of all compose files that .env names."""
    read = [yaml.safe_load((checkout / name).read_text()) for name in environment(checkout)["COMPOSE_FILE"].split(":")]
    return {name: service for file in read for name, service in file["services"].items()}


def test_the_certificate_is_for_the_superlink_its_machine_and_the_host(checkout: Path) -> None:
    lay_out(checkout, "mnist", host="fl.example.org")
    home = checkout / "federation" / "superlink"
    authority = x509.load_pem_x509_certificate((home / "ca.crt").read_bytes())
    certificate = x509.load_pem_x509_certificate((home / "superlink.crt").read_bytes())
    for name in ("superlink", "localhost", "fl.example.org"):
        PolicyBuilder().store(Store([authority])).build_server_verifier(x509.DNSName(name)).verify(certificate, [])
    assert keys.certified_hosts(home / "superlink.crt") == ["superlink", "localhost", "127.0.0.1", "fl.example.org"]
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days == keys.CERTIFICATE_DAYS
    assert certificate.not_valid_after_utc < authority.not_valid_after_utc


def test_every_secret_is_its_owners_alone_and_in_a_folder_that_git_ignores(checkout: Path) -> None:
    before = os.umask(0)
    try:
        lay_out(checkout, "mnist,digits")
    finally:
        os.umask(before)
    secrets = [path for path in checkout.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
    names = {str(path.relative_to(checkout / "federation")) for path in secrets}
    assert names == {"ca.key", "apps.key", "superlink/superlink.key", "parties/mnist/key", "parties/digits/key"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}
    assert stat.S_IMODE((checkout / "federation").stat().st_mode) == 0o700
    assert (checkout / "federation" / ".gitignore").read_text() == "*\n"
    for ignored in ("federation/ca.key", ".env"):
        assert subprocess.run(["git", "check-ignore", "-q", ignored], cwd=ROOT, check=False).returncode == 0
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"  # only what is named goes into the image
    assert "federation" not in (ROOT / ".dockerignore").read_text()


def test_each_party_has_a_key_of_its_own(checkout: Path) -> None:
    folders = lay_out(checkout, "mnist,digits")
    for folder in folders:
        public = checkout / "federation" / "superlink" / "parties" / f"{folder.name}.pub"
        secret = load_ssh_private_key((folder / "key").read_bytes(), None)
        assert secret.public_key() == load_ssh_public_key(public.read_bytes())  # type: ignore[union-attr]
    assert len({(folder / "key").read_bytes() for folder in folders}) == 2


def test_a_second_call_adds_parties_and_leaves_every_key_as_it_is(checkout: Path) -> None:
    lay_out(checkout, "mnist")
    home = checkout / "federation"
    before = {
        path: path.read_bytes() for path in home.rglob("*") if path.suffix in (".crt", ".key") or path.name == "key"
    }
    lay_out(checkout, "mnist,digits")
    assert {path: path.read_bytes() for path in before} == before
    assert environment(checkout) == {
        "ATM_FL_PARTY_MEMORY": "8g",
        "COMPOSE_FILE": "docker-compose.yml:federation/parties/digits/docker-compose.yml"
        ":federation/parties/mnist/docker-compose.yml",
        "COMPOSE_PATH_SEPARATOR": ":",
        "ATM_FL_USER": f"{os.getuid() or 10001}:{os.getgid() or 10001}",
        "ATM_FL_BIND": "127.0.0.1",
        "ATM_FL_PORT": "8000",
    }
    lay_out(
        checkout, "icons", host="192.0.2.7"
    )  # a party elsewhere: another certificate by the same authority, open port
    changed = [path.name for path, content in before.items() if path.read_bytes() != content]
    assert sorted(changed) == ["superlink.crt", "superlink.key"]
    assert environment(checkout)["ATM_FL_BIND"] == "0.0.0.0"
    assert "icons" not in environment(checkout)["COMPOSE_FILE"]
    assert "192.0.2.7" in keys.certified_hosts(home / "superlink" / "superlink.crt")


@pytest.mark.parametrize(
    ("parties", "words"),
    [
        ("mnist,digit", "task 'digit' is unknown; did you mean 'digits'?"),
        ("mnist,mnist", "party 'mnist' is named twice"),
        ("Mnist", "party 'Mnist': a name is lower-case letters"),
        ("../x", "party '../x': a name is"),
        ("mnist,,digits", "party '': a name is"),
        ("superlink", "is not superlink or runs"),
        ("pets=data/pets", "its data folder must be an absolute path"),
        ("pets=/a:/b", "its data folder must be an absolute path"),
        ("cars", "say where its data are on its machine, as published:cars=/srv/data"),
        ("./birds", "say where its data are on its machine, as ./birds=/srv/data"),
        (
            "pets=/srv/pets",
            "say ./pets=/srv/pets if /srv/pets is a folder of images of its own, or published:pets=/srv",
        ),
        ("mnist=/srv/m", "say ./mnist=/srv/m if /srv/m is a folder of images of its own, or mnist for the embedded"),
        ("published:mnist=/srv/m", "mnist is embedded, not a published data set"),
        ("published:birds=/srv/m", "task 'birds' is unknown"),
        ("./pets=/srv/a,published:pets=/srv/b", "party 'pets' is named twice"),
        ("birds=/nowhere/birds", "/nowhere/birds is not a folder on this machine"),
    ],
)
def test_a_bad_party_is_one_clear_error_and_nothing_is_written(parties: str, words: str, checkout: Path) -> None:
    with pytest.raises(SettingError) as error:
        lay_out(checkout, parties)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (checkout / "federation").exists()


def test_a_bad_host_or_folder_is_one_clear_error(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(SettingError, match="host='a:8000': it must be a host name"):
        lay_out(checkout, "mnist", host="a:8000")
    with pytest.raises(SettingError, match="has no docker-compose.yml"):
        lay_out(tmp_path_factory.mktemp("empty"), "mnist")


def test_a_party_is_told_its_task_or_where_its_data_are() -> None:
    parties = "mnist, birds=/srv/birds, published:cars=/srv/published, ./pets=/srv/pets"
    plain, folder, published, named_alike = read_parties(parties)
    assert (plain.node_config, plain.inside) == ('task="mnist" policy="/etc/atm-fl/policy.toml"', "")
    assert (folder.node_config, folder.inside) == ('data="/data/birds" policy="/etc/atm-fl/policy.toml"', "/data/birds")
    assert (published.node_config, published.inside) == ('task="cars" policy="/etc/atm-fl/policy.toml"', "/data")
    assert (named_alike.node_config, named_alike.inside) == (
        'data="/data/pets" policy="/etc/atm-fl/policy.toml"',
        "/data/pets",
    )


def test_the_compose_files_give_each_role_no_more_than_it_needs(checkout: Path) -> None:
    (checkout / "birds").mkdir()
    lay_out(checkout, f"mnist,birds={checkout}/birds")
    actual = services(checkout)
    assert sorted(actual) == ["birds", "mnist", "superlink"]
    for name, service in actual.items():
        assert ("ports" in service) == (name == "superlink")
        assert service["restart"] == "unless-stopped"
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["user"] == "${ATM_FL_USER:-10001:10001}"
        assert {"mem_limit", "cpus", "pids_limit"} <= service.keys()
        for key in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"):
            assert service["environment"][key] == "0"
        for key in ("FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "HF_HUB_OFFLINE"):
            assert service["environment"][key] == "1"
        assert QUIET.keys() - {"RAY_DEDUP_LOGS"} <= service["environment"].keys()
    for name in ("mnist", "birds"):
        assert actual[name]["networks"] == ["federation"]
        mounts = [volume for volume in actual[name]["volumes"] if volume.startswith((".", "/"))]
        assert all(mount.endswith(":ro") for mount in mounts)
        assert all(f"/{name}/" in mount or mount == f"{checkout}/birds:/data/birds:ro" for mount in mounts)
    assert f"{checkout}/birds:/data/birds:ro" in actual["birds"]["volumes"]
    assert not any("/data" in volume for volume in actual["mnist"]["volumes"])
    assert actual["superlink"]["volumes"][:2] == [
        "./federation/superlink:/etc/atm-fl:ro",
        "./federation/plugins:/plugins:ro",
    ]
    for name, folder in (("superlink", "federation/plugins"), ("mnist", "federation/parties/mnist/plugins")):
        assert f"./{folder}:/plugins:ro" in actual[name]["volumes"]  # what runs cannot write what runs next
        assert actual[name]["environment"]["ATM_FL_PLUGINS"] == "/plugins"
        assert (checkout / folder).is_dir()
    assert "--enable-supernode-auth" in actual["superlink"]["command"]
    assert actual["superlink"]["environment"]["ATM_FL_APPS"] == "/etc/atm-fl/apps"
    assert "ATM_FL_LARGEST_REPLY" in actual["superlink"]["environment"]
    assert yaml.safe_load((checkout / "docker-compose.yml").read_text())["networks"]["federation"] == {"internal": True}


def test_a_later_call_leaves_the_port_as_parties_elsewhere_know_it(checkout: Path) -> None:
    lay_out(checkout, "mnist", host="fl.example.org", port=18443)
    lay_out(checkout)  # as after a party was removed
    assert environment(checkout)["ATM_FL_PORT"] == "18443"
    [folder] = lay_out(checkout, "digits", host="fl.example.org")
    assert "--superlink=fl.example.org:18443" in (folder / "docker-compose.yml").read_text()
    lay_out(checkout, port=443)
    assert environment(checkout)["ATM_FL_PORT"] == "443"


def test_a_party_elsewhere_gets_a_folder_that_is_enough(checkout: Path) -> None:
    [folder] = lay_out(checkout, "birds=/srv/birds", host="fl.example.org", port=8443)
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "ca.crt", "docker-compose.yml", "join", "key", "plugins", "policy.toml")
    }
    assert not list((folder / "plugins").iterdir())
    service = yaml.safe_load((folder / "docker-compose.yml").read_text())["services"]["birds"]
    assert "--superlink=fl.example.org:8443" in service["command"]
    assert service["volumes"][:2] == ["./ca.crt:/etc/atm-fl/ca.crt:ro", "./key:/etc/atm-fl/key:ro"]
    assert service["volumes"][2] == "./policy.toml:/etc/atm-fl/policy.toml:ro"
    assert service["volumes"][3] == "./plugins:/plugins:ro"
    subprocess.run(["sh", "-n", str(folder / "join")], check=True)
    assert "--data /data/birds" in (folder / "join").read_text()
    for file in filter(Path.is_file, folder.iterdir()):
        assert "@" not in file.read_text().replace("@federation", ""), file


def test_the_image_is_set_not_to_call_home_nor_to_run_as_root() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for line in (*(f"{key}={value}" for key, value in QUIET.items() if key != "RAY_DEDUP_LOGS"), "HF_HUB_OFFLINE=1"):
        assert f" {line} " in text
    assert "\nUSER 10001:10001\n" in text
    assert "\nHEALTHCHECK " in text


CALLS_HOME = """
import sys, threading
calls = []
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        calls.append(arguments)
        raise OSError("nothing leaves this test")
sys.addaudithook(refuse)
from flwr.supercore import telemetry, update_check
from flwr.superlink.cli.flower_superlink import _runtime_dependency_install_default as installs
telemetry.event(telemetry.EventType.PING).result()
update_check.warn_if_flwr_update_available("flower-superlink")
[thread.join(10) for thread in threading.enumerate() if "update" in thread.name]
print(bool(calls), installs())
"""


def test_nothing_calls_home_and_without_our_settings_it_would(tmp_path: Path) -> None:
    without = {key: value for key, value in os.environ.items() if key not in QUIET} | {"FLWR_HOME": str(tmp_path)}
    for variables, expected in (({**without, **QUIET}, "False False"), (without, "True True")):
        command = [sys.executable, "-c", CALLS_HOME]
        said = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
        assert said.stdout.split("\n")[-2] == expected


class Health(BaseHTTPRequestHandler):
    """Answers as a SuperLink does."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Start TLS servers with a certificate and key; each call returns an address."""
    servers = []

    def start(certificate: Path, key: Path, handler: type[BaseHTTPRequestHandler] = Health) -> str:
        server = HTTPServer(("127.0.0.1", 0), handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def wrong(machine: Machine) -> dict[str, str]:
    """What `check` says is wrong, by check; every line is one line."""
    actual = {name: line for name, line, good in checks.check(machine) if not good}
    assert not any("\n" in line for line in actual.values())
    return actual


def test_a_party_that_can_join_is_told_so(checkout: Path, serve: Callable[..., str]) -> None:
    [folder] = lay_out(checkout, "mnist")
    home = checkout / "federation" / "superlink"
    address = serve(home / "superlink.crt", home / "superlink.key")
    data = make_folder(checkout / "birds", 0)
    arguments = [
        "deploy",
        "check",
        "--superlink",
        address,
        "--ca",
        str(folder / "ca.crt"),
        "--key",
        str(folder / "key"),
    ]
    good = CliRunner().invoke(terminal.app, [*arguments, "--data", str(data), "--memory", "0", "--disk", "0"])
    assert good.exit_code == 0, good.output
    assert len(good.output.splitlines()) == 7
    bad = CliRunner().invoke(terminal.app, [*arguments, "--task", "mnits", "--memory", "1e9", "--disk", "1e9"])
    assert bad.exit_code == 1
    assert next(line for line in bad.output.splitlines() if line.startswith("WRONG")) == (
        "WRONG task: task 'mnits' is unknown; did you mean 'mnist'?"
    )
    assert "GB of memory are free" in bad.output
    assert "GB are needed" in bad.output


def test_check_says_what_is_wrong_with_the_superlink(checkout: Path, serve: Callable[..., str]) -> None:
    lay_out(checkout, "mnist")
    home, ca = checkout / "federation", checkout / "federation" / "superlink" / "ca.crt"
    assert "cannot be reached (Connection refused)" in wrong(Machine("127.0.0.1:1", ca))["address"]
    assert "is not known here" in wrong(Machine("nowhere.invalid:8000", ca))["address"]
    assert "is not host:port" in wrong(Machine("nowhere", ca))["address"]

    def certificate(name: str, hosts: list[str], days: int = 90) -> str:
        paths = checkout / f"{name}.crt", checkout / f"{name}.key"
        keys.make_certificate(*paths, ca, home / "ca.key", hosts, days)
        return serve(*paths)

    assert "has expired" in wrong(Machine(certificate("old", ["127.0.0.1"], 0), ca))["certificate"]
    assert "expires in 9 days" in wrong(Machine(certificate("soon", ["127.0.0.1"], 10), ca))["certificate"]
    assert "is not for '127.0.0.1'" in wrong(Machine(certificate("other", ["superlink"]), ca))["certificate"]
    good = certificate("good", ["127.0.0.1"])
    assert "certificate" not in wrong(Machine(good, ca))
    keys.make_authority(checkout / "stranger.crt", checkout / "stranger.key")
    assert "is not from the authority" in wrong(Machine(good, checkout / "stranger.crt"))["certificate"]
    assert "is not there" in wrong(Machine(good, checkout / "none.crt"))["certificate"]
    assert "is no certificate" in wrong(Machine(good, checkout / "docker-compose.yml"))["certificate"]


def test_check_says_what_is_wrong_with_the_clock(
    checkout: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(checkout, "mnist")
    home = checkout / "federation" / "superlink"

    class Behind(Health):
        def date_time_string(self, timestamp: float | None = None) -> str:
            return "Mon, 02 Nov 2026 10:00:00 GMT"

    address = serve(home / "superlink.crt", home / "superlink.key", Behind)
    assert "s ahead; set it" in wrong(Machine(address, home / "ca.crt"))["clock"]
    assert "is not known" in wrong(Machine("127.0.0.1:1", home / "ca.crt"))["clock"]


def test_check_says_what_is_wrong_with_key_and_data(checkout: Path) -> None:
    [folder] = lay_out(checkout, "mnist")
    ca, key = folder / "ca.crt", folder / "key"

    def said(**parts: Any) -> dict[str, str]:
        return wrong(Machine("127.0.0.1:1", ca, **parts))

    assert "key" not in said(key=key)
    key.chmod(0o644)
    assert f"has mode 0644, so that others can read it; chmod 600 {key}" in said(key=key)["key"]
    key.chmod(0o600)
    key.write_text("nonsense")
    assert "is no private key" in said(key=key)["key"]
    assert "is not there" in said(key=checkout / "none")["key"]
    assert "is not a folder on this machine" in said(data=checkout / "none")["data"]
    (checkout / "birds" / "train").mkdir(parents=True)
    assert "has no folder 'val'" in said(data=checkout / "birds")["data"]
    assert f"and 2 more: atm-fl tasks check {checkout / 'birds'}" in said(data=checkout / "birds")["data"]
    pets = make_folder(checkout / "pets", 0)
    (pets / "train" / "class0" / "a.heic").touch()
    (counts,) = (found for name, found, _ in check(Machine("127.0.0.1:1", ca, data=pets)) if name == "data")
    passed_over = "passed over as no pictures: 1 .heic"
    assert counts == f"{pets}: 3 classes, 36 train, 12 validation, 12 test pictures; {passed_over}"
    for split in ("train", "validation", "test"):
        (checkout / "mail").mkdir(exist_ok=True)
        (checkout / "mail" / f"{split}.csv").write_text("text,label\nhello,ham\nbuy,spam\n")
    (told,) = (found for name, found, _ in check(Machine("127.0.0.1:1", ca, data=checkout / "mail")) if name == "data")
    assert told == f"{checkout / 'mail'}: 2 classes, 2 train, 2 validation, 2 test texts"
    (checkout / "mail" / "test.csv").write_text("text\nhello\n")
    assert "test.csv, row 2, has no 'label'" in said(data=checkout / "mail")["data"]


def test_the_control_api_answers_its_own_machine_alone() -> None:
    from atm_fl.server.superlink import LocalControl

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def status(path: str, client: str) -> int:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "path": path, "client": (client, 1), "method": "POST", "headers": []}
        asyncio.run(LocalControl(inner)(scope, None, send))  # type: ignore[arg-type]
        return sent[0]["status"]

    for path in ("/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/x", "/docs", "/", "/v1/fleet"):
        assert status(path, "192.0.2.9") == 403
        assert status(path, "127.0.0.1") == status(path, "::1") == 200
    for path in ("/health", "/v1/fleet/pull-messages"):
        assert status(path, "192.0.2.9") == 200


def test_bodies_are_handed_over_whole() -> None:
    from atm_fl.server.superlink import WholeBodies

    seen: list[Any] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([await receive(), await receive()])

    def hand_over(*coming: dict[str, Any]) -> list[Any]:
        messages = iter(coming)

        async def receive() -> Any:
            return next(messages)

        seen.clear()
        asyncio.run(WholeBodies(inner)({"type": "http", "path": "/health", "headers": []}, receive, None))  # type: ignore[arg-type]
        return list(seen)

    gone = {"type": "http.disconnect"}
    pieces = [{"type": "http.request", "body": body, "more_body": body != b"c"} for body in (b"a", b"", b"b", b"c")]
    assert hand_over(*pieces, gone) == [{"type": "http.request", "body": b"abc", "more_body": False}, gone]
    assert hand_over({"type": "http.request"}, gone) == [
        {"type": "http.request", "body": b"", "more_body": False},
        gone,
    ]
    assert hand_over(pieces[0], gone) == []


def test_flower_still_reads_what_the_launchers_pace() -> None:
    """Flower's modules sleep by the `time` that is put in place, and read the variables."""
    script = """if True:
    from atm_fl.deployment import pace
    pace.set_variables()
    from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as chunk
    from flwr.supercore.superexec.run_superexec import _get_task_poll_interval
    from flwr.supernode import start_client_internal as supernode
    assert chunk == int(pace.VARIABLES["FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE"])
    assert _get_task_poll_interval() == float(pace.VARIABLES["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"])
    code = [supernode.start_client_internal, supernode._push_messages]
    assert all("time" in function.__code__.co_names for function in code)
    """
    subprocess.run([sys.executable, "-c", script], check=True)


def test_register_lets_in_whose_keys_are_there_and_no_others(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from atm_fl.server import deployment

    class SuperLink:
        """The nodes of a SuperLink, by public key."""

        nodes: ClassVar[dict[bytes, SimpleNamespace]] = {}

        def ListNodes(self, _: Any) -> Any:
            return SimpleNamespace(nodes_info=list(self.nodes.values()))

        def RegisterNode(self, request: Any) -> Any:
            node = SimpleNamespace(
                node_id=len(self.nodes), name=request.name, status="registered", public_key=request.public_key
            )
            self.nodes[request.public_key] = node
            return node

        def UnregisterNode(self, request: Any) -> None:
            next(node for node in self.nodes.values() if node.node_id == request.node_id).status = "unregistered"

    monkeypatch.setattr(deployment, "control", lambda *_: nullcontext(SuperLink()))
    lay_out(checkout, "mnist,digits")
    public = checkout / "federation" / "superlink" / "parties"

    def said() -> list[str]:
        return list(deployment.register("superlink:8000", public, public))

    assert said() == ["digits: registered as node 0", "mnist: registered as node 1"]
    assert said() == ["digits: registered", "mnist: registered"]
    (public / "digits.pub").unlink()
    assert said() == ["mnist: registered", f"digits: removed, its public key is not in {public}"]
    assert said() == ["mnist: registered"]


def test_a_superlink_that_cannot_be_asked_is_one_clear_error(checkout: Path) -> None:
    from atm_fl.server import deployment

    [folder] = lay_out(checkout, "mnist")
    with pytest.raises(RunError, match="the SuperLink at 127.0.0.1:1: "):
        list(deployment.register("127.0.0.1:1", folder / "ca.crt", folder))
    with pytest.raises(SettingError, match="none.crt is not there; name the federation's ca.crt with --ca"):
        list(deployment.register("127.0.0.1:1", folder / "none.crt", folder))


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (httpx.ConnectError("TLS/SSL connection has been closed (EOF) (_ssl.c:992)"), False),
        (httpx.ConnectError("[Errno 111] Connection refused"), False),
        (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"), True),
    ],
)
def test_a_supernode_tries_again_unless_the_certificate_is_wrong(error: Exception, final: bool) -> None:
    from atm_fl.clients.supernode import patient_invoker

    gives_up = patient_invoker().should_giveup
    assert gives_up is not None
    assert gives_up(error) is final


def test_a_process_has_longer_to_start_and_then_is_watched_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore.constant import TaskType
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode.nodestate import InMemoryNodeState, NodeStateFactory, nodestate_factory

    from atm_fl.clients.supernode import START, PatientState

    def seconds_left(state: InMemoryNodeState) -> list[float]:
        task = state.create_task(task_type=TaskType.CLIENT_APP, run_id=1, fab_hash="x")
        assert task is not None
        assert state.claim_task(task)
        assert state.claim_task(task) is None
        actual = [state.task_token_store[task].active_until]
        assert state.activate_task(task)
        actual.append(state.task_token_store[task].active_until)
        return [(moment - datetime.now(UTC)).total_seconds() for moment in actual]

    store = ObjectStoreFactory().store()
    usual = seconds_left(InMemoryNodeState(store))
    monkeypatch.setattr(nodestate_factory, "InMemoryNodeState", PatientState)
    made = NodeStateFactory(ObjectStoreFactory()).state()
    assert isinstance(made, PatientState)
    assert seconds_left(made) == pytest.approx([START, usual[1]], abs=5)
    assert usual[0] < START / 5


@pytest.fixture
def superexec(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that launches a message of an app, answered by tests/forked.py, whose token is a file to write."""
    from flwr.supercore.constant import TaskType
    from flwr.supercore.superexec.executor import ExecutionSpec

    from atm_fl.clients import superexec

    monkeypatch.setattr(superexec, "work", forked.work)
    executor = superexec.WarmExecutor()

    def launch(log: Path, app: str = "app", kind: TaskType = TaskType.CLIENT_APP) -> dict[str, Any]:
        executor.launch(ExecutionSpec(kind, "127.0.0.1:1", str(log), True, None, False, None, False, 1, app))
        deadline = time.monotonic() + 60
        while kind == TaskType.CLIENT_APP and not log.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        while time.monotonic() < deadline and any(worker.since is None for worker in executor.workers):
            time.sleep(0.05)
            executor.reconcile()
        return json.loads(log.read_text()) if log.exists() else {}

    launch.executor = executor  # type: ignore[attr-defined]
    yield launch
    executor.close()
    for process in multiprocessing.active_children():
        process.join(30)
        assert not process.is_alive()


def test_a_client_apps_process_begins_with_its_imports_and_no_more_of_ours(superexec: Any, tmp_path: Path) -> None:
    actual = superexec(tmp_path / "one")
    assert (actual["missing"], actual["threads"]) == ([], 1)
    assert sorted(actual["ours"]) == ["atm_fl", "atm_fl.clients", "atm_fl.clients.superexec"]
    assert actual["name"] == "flwr-clientapp"


def test_one_process_answers_the_messages_of_an_app(superexec: Any, tmp_path: Path) -> None:
    first = superexec(tmp_path / "one")
    process, second = superexec.executor.workers[0].process, superexec(tmp_path / "two")
    assert first["process"] == second["process"] != os.getpid()
    other = superexec(tmp_path / "three", "another app")
    assert other["process"] != first["process"]
    process.join(30)
    assert not process.is_alive()
    failed = superexec(tmp_path / "error", "another app")
    assert failed["process"] == other["process"]
    assert superexec(tmp_path / "four", "another app")["process"] != failed["process"]  # an error ended it


def test_a_killed_process_is_replaced_and_an_idle_one_ends(
    superexec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = superexec(tmp_path / "one")
    os.kill(first["process"], 9)
    superexec.executor.workers[0].process.join(30)
    second = superexec(tmp_path / "two")
    assert second["process"] != first["process"]
    monkeypatch.setattr("atm_fl.clients.superexec.IDLE", 0.0)
    time.sleep(0.1)
    superexec.executor.reconcile()
    assert superexec.executor.workers == []


def test_other_programs_are_started_as_flower_does(
    superexec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.supercore.constant import TaskType
    from flwr.supercore.superexec.executor import subprocess_executor

    started: list[list[str]] = []
    monkeypatch.setattr(subprocess_executor.subprocess, "Popen", lambda command, **_: started.append(command))
    superexec(tmp_path / "token", kind=TaskType.SERVER_APP)
    assert started[0][0] == "flwr-serverapp"


def test_the_end_of_a_run_runs_its_exit_handlers_and_not_the_processs_end() -> None:
    from flwr.supercore.exit.exit_handler import add_exit_handler

    from atm_fl.clients.superexec import Left, leave

    called = []
    add_exit_handler(lambda: called.append(1))
    for code in (0, 600):
        with pytest.raises(Left) as left:
            leave(code, event_type=None)
        assert left.value.args == (code,)
    assert called == [1]


def test_a_supernode_starts_our_superexec(monkeypatch: pytest.MonkeyPatch) -> None:
    from atm_fl.clients.supernode import OurSuperExec

    started: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", started.append)
    OurSuperExec.Popen(["flower-superexec", "--insecure", "--parent-pid", "7"])
    assert started == [[sys.executable, "-m", "atm_fl.clients.superexec", "--insecure", "--parent-pid", "7"]]


@pytest.mark.slow
def test_the_drill_on_a_real_engine() -> None:
    engine = os.environ.get("ENGINE") or (
        shutil.which("docker") and not subprocess.run(["docker", "info"], check=False).returncode
    )
    if not engine:
        pytest.skip("no Docker engine; ENGINE names a program that starts one")
    done = subprocess.run([str(ROOT / "deploy" / "drill")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "bit-equal to the plain loop's" in done.stdout


def test_the_commands_of_the_guide_make_what_it_says(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "deployment.md").read_text()
    blocks = [block for place, block in enumerate(text.split("\n```")) if place % 2]
    lines = [line.partition(" #")[0].split() for block in blocks for line in block.splitlines()]
    commands = [words[1:] for words in lines if words[:3] == ["atm-fl", "deploy", "init"]]
    assert len(commands) == 3
    monkeypatch.chdir(checkout)
    for command in commands[:2]:
        done = CliRunner().invoke(terminal.app, command)
        assert done.exit_code == 0, done.output
    parties = checkout / "federation" / "parties"
    assert {path.name for path in parties.iterdir()} == {"digits", "pets", "mnist"}
    command = yaml.safe_load((parties / "pets" / "docker-compose.yml").read_text())["services"]["pets"]["command"]
    assert any('data="/data/pets"' in word for word in command)
    removal = next(words for words in lines if words[:2] == ["rm", "-r"])
    subprocess.run(removal, check=True)
    assert CliRunner().invoke(terminal.app, commands[2]).exit_code == 0
    assert {path.name for path in parties.iterdir()} == {"digits", "pets"}


@pytest.mark.parametrize("guide", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_every_setting_and_file_of_configs_that_a_guide_names_is_there(guide: str) -> None:
    text = (ROOT / guide).read_text()
    named = set(re.findall(r"-c \"?([a-z][a-z0-9-]*)=", text))
    assert not named - defaults().keys() - {"key"}
    assert all((ROOT / name).is_file() for name in re.findall(r"\bconfigs/[a-z_-]+\.toml", text))
