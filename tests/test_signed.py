"""Signed apps: a party runs only what its policy's rule `apps` names, and nothing of another is kept or executed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_folder
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from federation import ROOT, Federation
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import ErrorCode
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal as flower
from flwr.supernode.nodestate import NodeStateFactory
from hypothesis import given, seed
from hypothesis import settings as tries
from hypothesis import strategies as st
from typer.testing import CliRunner

from atm_fl.cli import terminal
from atm_fl.clients.app import app as client_app
from atm_fl.clients.signed import AppRefused, check_app, guarded
from atm_fl.deployment import checks, keys
from atm_fl.errors import RunError, SettingError
from atm_fl.policy import Policy, template
from atm_fl.server.app import serve
from atm_fl.server.deployment import sign
from atm_fl.server.grid import InProcessGrid
from atm_fl.server.superlink import APPS, with_signatures
from atm_fl.settings import Settings


@pytest.fixture(scope="module")
def bundle() -> bytes:
    """This checkout's app as `flwr run` ships it."""
    return build_fab_from_disk(ROOT)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two signers' keys, `operator` and `other`; the SuperLink hands out signatures of `signatures`."""
    for name in ("operator", "other"):
        keys.make_signing_key(tmp_path / name, tmp_path / f"{name}.pub")
    monkeypatch.setenv(APPS, str(tmp_path / "signatures"))
    return tmp_path


def policy_by(folder: Path, *apps: str) -> Path:
    """A policy of the operator's apps, or of `apps`."""
    file = folder / "policy.toml"
    file.write_text(template(apps=apps or ((folder / "operator.pub").read_text().strip(),)))
    return file


def as_handed_over(content: bytes, **said: Any) -> tuple[Fab, Run]:
    """An app as a SuperLink sends it, and its run, of which a hostile one may have `said` something else."""
    digest = hashlib.sha256(content).hexdigest()
    run = Run.create_empty(7)
    run.fab_id, run.fab_version, run.fab_hash = "atm-fl/atm-fl", "0.1.0", digest
    for name, value in said.items():
        setattr(run, name, value)
    return with_signatures(Fab(digest, content, {})), run


def test_a_signed_app_is_taken_and_any_other_refused(folder: Path, bundle: bytes) -> None:
    policy = Policy.read(policy_by(folder))
    with pytest.raises(AppRefused, match="apps: the app sha256:.* is neither named there nor signed by whom it names"):
        check_app(*as_handed_over(bundle), policy)
    list(sign(ROOT, folder / "other", folder / "signatures"))
    with pytest.raises(AppRefused, match="neither named there nor signed"):
        check_app(*as_handed_over(bundle), policy)
    message = list(sign(ROOT, folder / "operator", folder / "signatures"))  # beside the other's
    check_app(*as_handed_over(bundle), policy)
    fab, run = as_handed_over(bundle)
    assert message[0] == f"app: sha256:{run.fab_hash}"
    assert len(fab.verifications) == 3
    changed = Fab(run.fab_hash, bundle + b"\0", fab.verifications)
    with pytest.raises(AppRefused, match="neither named there nor signed"):
        check_app(changed, run, policy)
    check_app(*as_handed_over(bundle + b"\0"), Policy())  # without the rule any app runs


def test_flowers_own_supernode_takes_the_same_signatures(folder: Path, bundle: bytes) -> None:
    list(sign(ROOT, folder / "operator", folder / "signatures"))
    fab, _ = as_handed_over(bundle)
    public = (folder / "operator.pub").read_text().strip()
    assert fab.verifications["valid_license"]
    assert flower._verify_fab(fab, {keys.key_id(public): public})
    other = (folder / "other.pub").read_text().strip()
    assert not flower._verify_fab(fab, {keys.key_id(public): other})


def test_a_party_may_name_one_app_by_its_bytes(folder: Path, bundle: bytes) -> None:
    fab, run = as_handed_over(bundle)
    policy = Policy.read(policy_by(folder, f"sha256:{run.fab_hash}"))
    check_app(fab, run, policy)
    with pytest.raises(AppRefused, match="neither named there"):
        check_app(*as_handed_over(bundle + b"\0"), policy)


@pytest.mark.parametrize(
    "said",
    [{"fab_id": "../data/pets"}, {"fab_version": "0.1.0/../.."}, {"fab_hash": "0" * 64}],
    ids=lambda said: str(said),
)
def test_a_signed_app_is_no_leave_to_load_another_folder(folder: Path, bundle: bytes, said: dict[str, str]) -> None:
    list(sign(ROOT, folder / "operator", folder / "signatures"))
    with pytest.raises(AppRefused, match="the run does not name the app"):
        check_app(*as_handed_over(bundle, **said), Policy.read(policy_by(folder)))


SIGNER = ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
WORDS = st.one_of(st.text(), st.integers(), st.none(), st.floats(), st.lists(st.text()))


@seed(0)
@tries(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.text(),
        WORDS.map(json.dumps),
        st.fixed_dictionaries({}, optional={"signed_at": WORDS, "signature": WORDS}).map(json.dumps),
        st.just("[" * 100_000),
    )
)
def test_no_invented_signature_is_taken_or_ends_the_supernode(said: str) -> None:
    run = Run.create_empty(7)
    with pytest.raises(AppRefused, match="neither named there nor signed"):
        check_app(
            Fab("", b"an app", {keys.key_id(SIGNER): said, "valid_license": "Valid"}), run, Policy(apps=(SIGNER,))
        )


@pytest.mark.parametrize("signed", [False, True])
def test_of_a_refused_app_nothing_is_kept_and_the_operator_is_told_the_rule(
    folder: Path, bundle: bytes, signed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's own pull of a message, guarded, with a SuperNode's real state."""
    if signed:
        list(sign(ROOT, folder / "operator", folder / "signatures"))
    fab, run = as_handed_over(bundle)
    monkeypatch.setattr(TaskIdentity, "_task_id", 1, raising=False)
    monkeypatch.setattr(TaskIdentity, "_run_id", run.run_id, raising=False)
    monkeypatch.setattr(TaskIdentity, "_node_id", 1, raising=False)
    objects = ObjectStoreFactory()
    state = NodeStateFactory(objectstore_factory=objects).state()
    state.set_node_id(3)
    message = Message(RecordDict({"info": ConfigRecord({})}), dst_node_id=3, message_type="query")
    message.metadata.__dict__.update(_run_id=run.run_id, _message_id=message.object_id)
    contents: dict[str, bytes] = {id: item.deflate() for id, item in flower.get_all_nested_objects(message).items()}
    pulled = guarded(flower._pull_and_store_message)(
        state=state,
        object_store=objects.store(),
        node_config={"policy": str(policy_by(folder))},
        receive=lambda: (message, get_object_tree(message)),
        get_run=lambda _: run,
        get_fab=lambda *_: fab,
        pull_object=lambda _, id: contents[id],
        confirm_message_received=lambda *_: None,
        trusted_entities=None,
    )
    assert pulled == run.run_id
    assert (state.get_fab(run.fab_hash) is not None) == signed
    assert (state.get_run(run.run_id) is not None) == signed
    replies = state.get_messages_legacy(is_reply=True)
    assert len(replies) == (not signed)
    for reply in replies:
        assert reply.error.code == ErrorCode.INVALID_FAB
        assert "refused by this party's policy, apps: the app sha256:" in reply.error.reason


def test_a_supernode_that_does_not_keep_the_rule_is_no_party_of_it(config: dict[str, Any], folder: Path) -> None:
    settings = Settings.parse(config)
    grid = InProcessGrid(client_app, len(settings.task_names), settings.as_config())
    grid.contexts[1].node_config["policy"] = str(policy_by(folder))
    with pytest.raises(RunError, match="start it as python -m atm_fl.clients.supernode"):
        serve(grid, settings)


@pytest.mark.parametrize("entry", ["operator", "ssh-ed25519 AAAA", "ssh-rsa AAAA", "sha256:12", "ssh-ed25519", ""])
def test_a_rule_that_names_nobody_is_one_clear_error(tmp_path: Path, entry: str) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(f'apps = ["{entry}"]')
    with pytest.raises(SettingError, match="apps=.*is neither a public key, .*, nor an app"):
        Policy.read(file)


def test_deploy_init_names_the_operators_key_and_check_shows_it(tmp_path: Path, monkeypatch: Any) -> None:
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    monkeypatch.chdir(tmp_path)
    cli = CliRunner()
    assert cli.invoke(terminal.app, ["deploy", "init", "--parties", "mnist"]).exit_code == 0
    home = tmp_path / "federation"
    assert (home / "apps.key").stat().st_mode & 0o777 == 0o600
    assert not list((home / "superlink").rglob("apps.key"))
    public = (home / "apps.pub").read_text().strip()
    policy = home / "parties" / "mnist" / "policy.toml"
    assert Policy.read(policy).apps == (public.removesuffix(" apps"),)
    (home / "apps.key").rename(tmp_path / "kept-elsewhere")
    assert cli.invoke(terminal.app, ["deploy", "init", "--parties", "digits"]).exit_code == 0
    assert not (home / "apps.key").exists()
    assert (home / "apps.pub").read_text().strip() == public
    missing = cli.invoke(terminal.app, ["deploy", "sign", "--app", str(ROOT)])
    assert "federation/apps.key cannot be read" in str(missing.exception)
    signing = ["deploy", "sign", "--app", str(ROOT), "--key", "kept-elsewhere"]
    assert f"signed by {keys.key_id(public)}" in cli.invoke(terminal.app, signing).output
    assert len(list((home / "superlink" / "apps").glob("*.json"))) == 1

    def said(file: Path) -> tuple[str, bool]:
        machine = checks.Machine("127.0.0.1:1", home / "ca.crt", policy=file)
        return next((line, good) for name, line, good in checks.check(machine) if name == "apps")

    assert said(policy) == (f"only those signed by {keys.key_id(public)}", True)
    (tmp_path / "open.toml").write_text(template())
    assert "any code that the SuperLink sends runs here" in said(tmp_path / "open.toml")[0]


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """Two parties with a folder of images each."""
    folders = [make_folder(tmp_path / "data" / name, seed) for seed, name in enumerate(("red", "green"))]
    made = Federation(tmp_path / "federation", [str(folder) for folder in folders])
    yield made
    made.stop()


@pytest.mark.slow
def test_over_real_processes_only_the_signed_app_runs(tmp_path: Path, federation: Federation) -> None:
    """TLS on loopback. `changed` is this checkout whose ClientApp leaves a mark as soon as it is imported."""
    home = federation.home / "federation"
    federation.start(policy=str(home / "parties" / "red" / "policy.toml"))
    changed, mark = tmp_path / "changed", tmp_path / "mark"
    changed.mkdir()
    for name in ("server", "clients"):
        shutil.copytree(ROOT / name, changed / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, changed)
    code = (changed / "clients" / "app.py").read_text()
    (changed / "clients" / "app.py").write_text(f"{code}\nimport pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    config = {"tasks": "./red,./green", "rounds": 1, "batch-size": 8, "device": "cpu", "node-timeout": 240.0}
    keys.make_signing_key(tmp_path / "stranger", tmp_path / "stranger.pub")

    def end(name: str, app: Path) -> str:
        return federation.run({**config, "run-dir": str(tmp_path / name)}, app).finish()

    refused = "refused by this party's policy, apps: the app sha256:"
    assert refused in "".join(end("unsigned", ROOT).split("\n"))
    list(sign(changed, tmp_path / "stranger", home / "superlink" / "apps"))
    list(sign(ROOT, home / "apps.key", home / "superlink" / "apps"))
    assert refused in "".join(end("changed", changed).split("\n"))
    machines = federation.home / "machines"
    assert not mark.exists()
    assert not [folder for name in ("red", "green") for folder in (machines / name / "flower").glob("apps/*")]
    assert end("signed", ROOT) == ""
    assert [folder for name in ("red", "green") for folder in (machines / name / "flower").glob("apps/*")]
