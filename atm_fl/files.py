"""Writing files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_write(path: Path, flush: bool = True, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path` (same suffix); on success flush it to disk and rename it to `path`.

    Without `flush`, for what can be had again, a power cut may leave a damaged file. `private`: the file has mode 0600
    and its folder 0700, whatever the umask and whatever they were.
    """
    if private:
        private_folder(path.parent)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        if private:
            temporary.chmod(0o600)
        if flush:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_once(path: Path, content: bytes) -> None:
    """Write a new private file, which has its name only once it is whole on disk; one that is there already stays.

    Half of a secret, after a crash or in a race of two processes, could be guessed.
    """
    if path.exists():
        return
    fresh = private_folder(path.parent) / f".{path.name}.{os.urandom(4).hex()}"
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):  # another process was first
            os.link(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def private_folder(path: Path) -> Path:
    """Make a folder, if there is none, that its owner alone may enter; returns it. Open ones are shut."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_mode & 0o077 and path.stat().st_uid == os.getuid():
        path.chmod(0o700)
    return path


def packaged(path: Path) -> Path:
    """A configuration's file: `path`, or, where there is none, this package's own `configs/NAME.toml`."""
    inside = Path(__file__).parent / "configs" / path.name
    return inside if path.parent == Path("configs") and not path.exists() and inside.is_file() else path
