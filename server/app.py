"""The ServerApp of `flwr run .`, which is the installed package's: `atm_fl/server/` has its code."""

from atm_fl.server.app import app

__all__ = ["app"]
