"""Which apps run on a party's machine: those that its policy's rule `apps` names, by who signed them or by their bytes.

An app is code, and it is the server that sends it. So the SuperNode, which is the party's own program, looks at an app
before it is kept, installed or imported. Signatures are Flower's, of its hub's apps (`--trusted-entities`): Ed25519 of
the time and the bundle's SHA-256. The server hands them over, and cannot make them; `atm-fl deploy sign` can.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from logging import WARNING
from typing import Any

from flwr.app import Error, Message
from flwr.common.config import get_fab_config, get_metadata_from_config
from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run
from flwr.supernode import start_client_internal as flower

from atm_fl.deployment.keys import key_id
from atm_fl.errors import SettingError
from atm_fl.policy import Policy, policy_of


class AppRefused(Exception):
    """An app that this party does not run; the text names the rule."""


def check_app(fab: Fab, run: Run, policy: Policy) -> None:
    """AppRefused if `policy` does not let the app `fab` of `run` run, whatever the server says of it."""
    if not policy.apps:
        return
    digest = hashlib.sha256(fab.content).hexdigest()
    if f"sha256:{digest}" not in policy.apps and not _signed(fab, policy):
        raise AppRefused(
            f"refused by this party's policy, apps: the app sha256:{digest} is neither named there nor signed by whom "
            "it names; `atm-fl deploy sign` signs it"
        )
    # Flower loads an app from a folder of these names, and not from the bytes that were checked.
    names = (*get_metadata_from_config(get_fab_config(fab.content)), digest, digest)
    if names != (run.fab_id, run.fab_version, run.fab_hash, fab.hash_str):
        raise AppRefused(
            f"refused by this party's policy, apps: the run does not name the app sha256:{digest} that it has"
        )


def _signed(fab: Fab, policy: Policy) -> bool:
    signers = {key_id(entry): entry for entry in policy.apps if " " in entry}
    verifications = {signer: said for signer, said in fab.verifications.items() if signer in signers}
    try:
        return flower._verify_fab(Fab(fab.hash_str, fab.content, verifications), signers)
    except Exception as error:  # whatever a hostile server wrote there is no signature
        log(WARNING, "an app's signature cannot be read: %s", error)
        return False


Pull = Callable[..., int | None]


def guarded(pull: Pull) -> Pull:
    """Flower's `_pull_and_store_message`, which answers a refused app's messages by an error with the rule."""

    def pull_and_store(
        *,
        state: Any,
        object_store: Any,
        node_config: dict[str, Any],
        receive: Callable[[], tuple[Message, Any] | None],
        get_run: Callable[[int], Run],
        get_fab: Callable[[str, int], Fab],
        **others: Any,
    ) -> int | None:
        messages: list[Message] = []
        runs: list[Run] = []

        def receive_noted() -> tuple[Message, Any] | None:
            received = receive()
            messages.extend([received[0]] if received else [])
            return received

        def get_run_noted(run_id: int) -> Run:
            runs.append(get_run(run_id))
            return runs[-1]

        def get_fab_checked(fab_hash: str, run_id: int) -> Fab:
            fab = get_fab(fab_hash, run_id)
            try:
                check_app(fab, runs[-1], policy_of(node_config))
            except SettingError as error:
                raise AppRefused(str(error)) from error
            return fab

        try:
            return pull(
                state=state,
                object_store=object_store,
                node_config={**node_config, "apps-checked": True},
                receive=receive_noted,
                get_run=get_run_noted,
                get_fab=get_fab_checked,
                **others,
            )
        except AppRefused as refused:
            return refuse(messages[-1], ErrorCode.INVALID_FAB, str(refused), state, object_store)

    return pull_and_store


def refuse(message: Message, code: int, reason: str, state: Any, object_store: Any) -> int:
    """Have a SuperNode answer a message by an error, in the place of its ClientApp; the message's run."""
    log(WARNING, "%s", reason)
    flower._insert_message(Message(Error(code, reason), reply_to=message), state, object_store)
    return message.metadata.run_id
