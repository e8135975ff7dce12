"""`python -m clients.superexec …`: Flower's SuperExec, whose ClientApps begin with PyTorch already imported.

Flower's own starts Python anew for every message. A ClientApp of ours then imports PyTorch, timm and scikit-learn,
which takes longer than decoding, adding and encoding a ViT-B/16. This one has a process that has imported them
(PRELOADED) and forks one for each message. Nothing of atm-fl is imported there: that comes with the app that a message
names.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver

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


class ForkingExecutor(SubprocessExecutor):
    """Flower's executor of local processes, which forks a ClientApp's process from one that has the imports."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()  # now, and not at the first message

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start the process that `spec` asks for."""
        if spec.task_type != TaskType.CLIENT_APP:
            return super().launch(spec)
        # No daemon, which may have no children: a data loader's workers. It ends itself when this process is gone.
        self.context.Process(target=client_app, args=(spec,), name="flwr-clientapp").start()
        return LaunchResult.accepted()


def client_app(spec: ExecutionSpec) -> None:
    """What `flwr-clientapp` does, in a process that is there."""
    from flwr.supercore.tls import validate_and_resolve_root_certificates
    from flwr.supernode.runtime.run_clientapp import run_clientapp

    run_clientapp(
        runtime_api_address=spec.runtime_api_address,
        token=spec.token,
        insecure=spec.insecure,
        certificates=validate_and_resolve_root_certificates(spec.root_certificates_path, spec.insecure),
        parent_pid=spec.parent_pid,
        runtime_dependency_install=spec.runtime_dependency_install,
    )


def main() -> None:
    """Run flower-superexec, its arguments unchanged."""
    factory.SubprocessExecutor = ForkingExecutor  # type: ignore[misc]
    flower_superexec()


if __name__ == "__main__":
    main()
