"""The ClientApp of `flwr run .`, which is the installed package's: `atm_fl/clients/` has its code.

So what a run ships is these lines, and a party trains by the code that it installed itself.
"""

from atm_fl.clients.app import app

__all__ = ["app"]
