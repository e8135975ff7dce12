"""`python -m atm_fl.clients.superexec …`: Flower's SuperExec, in which one process answers all messages of an app.

Flower's own starts Python anew for every message. A ClientApp of ours then imports PyTorch, loads the model and the
data, and wakes the GPU, which takes longer than decoding, adding and encoding a ViT-B/16. Here a process answers one
message after another, as Ray's actors do in simulation, until it has had none for IDLE seconds, an answer was an error,
or another app comes; and it is forked from one that has imported PyTorch (PRELOADED). Nothing else of atm-fl is
imported there: that comes with the app that a message names.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import time
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from flwr.supercore.cli import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult, SubprocessExecutor, factory

PRELOADED = [
    "flwr.clientapp",
    "flwr.supercore.cli",
    "flwr.supercore.superexec.executor",
    "flwr.supernode.runtime.run_clientapp",
    "safetensors.torch",
    "sklearn.linear_model",
    "timm.models.vision_transformer",
    "torch",
    "torchvision.transforms",
    "zstandard",
]
"""None of them may start a thread or touch a GPU when it is imported, since neither outlives a fork."""
IDLE = 900.0
"""Seconds without a message after which a process gives its memory back."""


class Worker:
    """A process that answers messages of one app, and whether it is at it."""

    def __init__(self, context: Any, app: str | None) -> None:
        self.app = app
        self.pipe, theirs = context.Pipe()
        # No daemon, which may have no children: a data loader's workers. It ends itself when this process is gone.
        self.process = context.Process(target=work, args=(theirs,), name="flwr-clientapp")
        self.process.start()
        theirs.close()
        self.since: float | None = None
        """When it became idle, None while it works."""

    def give(self, spec: ExecutionSpec) -> None:
        """Have it answer a message."""
        self.since = None
        self.pipe.send(spec)

    def look(self) -> bool:
        """Note whether it is idle now; False if it is no more."""
        with suppress(EOFError, OSError):
            while self.pipe.poll():
                self.pipe.recv()
                self.since = time.monotonic()
            return self.process.is_alive()
        return False

    def end(self) -> None:
        """Let it end, which it does when it is idle."""
        self.pipe.close()


class WarmExecutor(SubprocessExecutor):
    """Flower's executor of local processes, but for ClientApps, which share a Worker."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()  # now, and not at the first message
        self.workers: list[Worker] = []

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Have the message that `spec` tells of answered."""
        if spec.task_type != TaskType.CLIENT_APP:
            return super().launch(spec)
        self.workers = [worker for worker in self.workers if worker.look()]
        idle = [worker for worker in self.workers if worker.since is not None]
        ready = next((worker for worker in idle if worker.app == spec.fab_hash), None)
        for worker in idle:
            if worker is not ready:  # its memory is wanted
                self._end(worker)
        if ready is None:
            ready = Worker(self.context, spec.fab_hash)
            self.workers.append(ready)
        ready.give(spec)
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """End who has been idle for long; Flower calls this all the time."""
        for worker in list(self.workers):
            if not worker.look() or (worker.since is not None and time.monotonic() - worker.since > IDLE):
                self._end(worker)

    def close(self) -> None:
        """End all that are idle; the others end when they see that this process is gone."""
        for worker in list(self.workers):
            self._end(worker)

    def _end(self, worker: Worker) -> None:
        worker.end()
        self.workers.remove(worker)


def work(specs: Connection) -> None:
    """Answer the messages that `specs` tells of, saying so after each, until it is closed or an answer is an error."""
    from flwr.supercore.app_utils import start_parent_process_monitor
    from flwr.supernode.runtime import run_clientapp

    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(15, b"flwr-clientapp")  # PR_SET_NAME: what ps, top and pkill know it by
    run_clientapp.flwr_exit = leave
    watched = False
    with suppress(EOFError, BrokenPipeError):  # nobody is there any more
        while True:
            spec: ExecutionSpec = specs.recv()
            if spec.parent_pid is not None and not watched:
                start_parent_process_monitor(spec.parent_pid)
                watched = True
            if not answer(spec):
                return
            specs.send(None)
            gc.collect()  # Flower's messages are reference cycles, with vectors in them


def answer(spec: ExecutionSpec) -> bool:
    """Do what `flwr-clientapp` does; whether it went well."""
    from flwr.supercore.tls import validate_and_resolve_root_certificates
    from flwr.supernode.runtime.run_clientapp import run_clientapp

    try:
        run_clientapp(
            runtime_api_address=spec.runtime_api_address,
            token=spec.token,
            insecure=spec.insecure,
            certificates=validate_and_resolve_root_certificates(spec.root_certificates_path, spec.insecure),
            runtime_dependency_install=spec.runtime_dependency_install,
        )
    except Left as left:
        return left.args[0] == 0
    return False


class Left(BaseException):
    """The end of a ClientApp's run, with its exit code."""


def leave(code: int, *_: object, **__: object) -> NoReturn:
    """In place of Flower's `flwr_exit` where a run ends by itself: everything but the end of the process."""
    from flwr.supercore.exit.exit_handler import trigger_exit_handlers

    for before in (True, False):
        trigger_exit_handlers(run_before_force_exit=before)
    raise Left(code)


def main() -> None:
    """Run flower-superexec, its arguments unchanged."""
    factory.SubprocessExecutor = WarmExecutor  # type: ignore[misc]
    flower_superexec()


if __name__ == "__main__":
    main()
