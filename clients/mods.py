"""Mods of the ClientApp."""

from __future__ import annotations

import traceback
from logging import ERROR

from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.constant import ErrorCode
from flwr.common.logger import log

from atm_fl.errors import RunError, SettingError


def named_errors(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Turn an exception into an error reply in one line, the same in every runtime; the traceback goes to the log."""
    try:
        return call_next(message, context)
    except (RunError, SettingError) as error:
        reason = str(error)
    except Exception as error:
        log(ERROR, traceback.format_exc())
        reason = f"{type(error).__name__}: {error}"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, " ".join(reason.split())), reply_to=message)
