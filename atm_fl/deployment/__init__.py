"""Deployment: certificates and keys, the files of a federation, and the check of one party's machine.

`federation.py` lays a folder out, `keys.py` makes what must stay secret, `checks.py` says what would keep a party from
joining. What talks Flower is in `atm_fl/server/` and `atm_fl/clients/`.
"""
