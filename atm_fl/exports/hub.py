"""Pushing an export to a hub of models, by the hub's own package."""

from __future__ import annotations

import re
from pathlib import Path

from atm_fl.errors import RunError, SettingError


def check_target(target: str) -> str:
    """USER/NAME of the target hf:USER/NAME. SettingError if it is no such thing."""
    if not re.fullmatch(r"hf:[\w.-]+/[\w.-]+", target):
        raise SettingError(f"push-to={target!r}: write it as hf:USER/NAME")
    return target.removeprefix("hf:")


def push(folder: Path, target: str) -> str:
    """Upload an export to hf:USER/NAME; a repository that is not there is made, private. Returns its address.

    Who pushes, and where to, is huggingface_hub's to know: `hf auth login` or HF_TOKEN, and HF_ENDPOINT. RunError, with
    the hub's own reason, if it refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    name, api = check_target(target), HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="atm-fl export")
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"push-to={target!r}: the hub did not take {folder}, which stays here ({reason})") from error
    return f"{api.endpoint}/{name}"
