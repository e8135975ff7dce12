"""What the image is made of: pinned by hashes and a digest, which `deploy/refresh` renews."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
OF_TORCH = re.compile(r"torch|torchvision|triton|(nvidia|cuda)-.+")
"""What comes from PyTorch's index, which has other files than PyPI, or only with CUDA."""
INDEX = json.dumps({"schemaVersion": 2, "manifests": []}).encode()


def pins(name: str) -> dict[str, str]:
    """The versions in a file of deploy/, by normalized name."""
    lines = re.findall(r"^([A-Za-z0-9._-]+)==([^\s\\]+)", (ROOT / "deploy" / name).read_text(), re.MULTILINE)
    return {canonicalize_name(package): version for package, version in lines}


def test_the_lock_has_what_the_project_asks_for_in_the_tested_versions() -> None:
    lock, tested = pins("requirements.lock"), pins("constraints.txt")
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert len(required) > 20
    for requirement in map(Requirement, required):
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains({**tested, **lock}[name]), requirement
        assert (name in lock) == (not OF_TORCH.fullmatch(name))
    assert not [name for name in lock if OF_TORCH.fullmatch(name)]
    assert {name: tested[name] for name in lock} == lock
    assert {name for name in tested if not OF_TORCH.fullmatch(name)} == lock.keys()


def test_every_package_of_the_lock_has_a_hash() -> None:
    text = (ROOT / "deploy" / "requirements.lock").read_text()
    entries = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(entries) == len(pins("requirements.lock"))
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)


def test_the_image_installs_the_lock_and_beside_it_only_torch() -> None:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    installs = re.findall(r"pip install ([^&\n]+)", text)
    assert [line.strip() for line in installs] == [
        "--require-hashes --no-deps --requirement requirements.lock",
        '--index-url "${TORCH_INDEX}" --constraint constraints.txt torch torchvision',
        "--no-deps --no-build-isolation .",
    ]
    assert "pip check" in text
    shipped = (ROOT / ".dockerignore").read_text().splitlines()
    for file in re.findall(r"deploy/\S+", next(line for line in text.splitlines() if line.startswith("COPY deploy/"))):
        assert f"!{file}" in shipped
    assert re.search(r"^ARG BASE=python:3\.11-slim(@sha256:[0-9a-f]{64})?\nFROM \$\{BASE\}$", text, re.MULTILINE)


@pytest.fixture
def registry() -> Iterator[tuple[str, dict[str, str]]]:
    """A registry on loopback with python:3.11-slim, which asks for a token as Docker's does; and what it says."""
    says = {"docker-content-digest": f"sha256:{hashlib.sha256(INDEX).hexdigest()}"}

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            here = f"http://127.0.0.1:{self.server.server_port}"  # type: ignore[attr-defined]
            if self.path.startswith("/token?"):
                status, headers, body = 200, {}, b'{"token": "nobody"}'
            elif self.path != "/v2/library/python/manifests/3.11-slim":
                status, headers, body = 404, {}, b""
            elif self.headers["authorization"] != "Bearer nobody":
                scope = "repository:library/python:pull"
                asked = f'Bearer realm="{here}/token",service="registry",scope="{scope}"'
                status, headers, body = 401, {"www-authenticate": asked}, b""
            else:
                status, headers, body = 200, says, INDEX
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", says
    server.shutdown()
    server.server_close()


def refresh(root: Path, address: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "deploy" / "refresh"), "base", "--registry", address, "--root", str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_refresh_pins_the_base_image_and_pins_it_anew(tmp_path: Path, registry: tuple[str, dict[str, str]]) -> None:
    text = re.sub(r"@sha256:[0-9a-f]{64}", "", (ROOT / "Dockerfile").read_text())
    digest = f"sha256:{hashlib.sha256(INDEX).hexdigest()}"
    for before in ("", f"@sha256:{'0' * 64}"):
        (tmp_path / "Dockerfile").write_text(
            text.replace("ARG BASE=python:3.11-slim", f"ARG BASE=python:3.11-slim{before}")
        )
        done = refresh(tmp_path, registry[0])
        assert done.returncode == 0, done.stderr
        pinned = text.replace("ARG BASE=python:3.11-slim", f"ARG BASE=python:3.11-slim@{digest}")
        assert (tmp_path / "Dockerfile").read_text() == pinned


def test_a_registry_that_says_another_digest_than_it_sent_is_not_believed(
    tmp_path: Path, registry: tuple[str, dict[str, str]]
) -> None:
    registry[1]["docker-content-digest"] = f"sha256:{'1' * 64}"
    shutil.copy(ROOT / "Dockerfile", tmp_path)
    done = refresh(tmp_path, registry[0])
    assert done.returncode == 1
    assert "the registry says sha256:1111" in done.stderr
    assert (tmp_path / "Dockerfile").read_text() == (ROOT / "Dockerfile").read_text()
