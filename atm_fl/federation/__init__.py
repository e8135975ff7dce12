"""A round: from a base to the next.

`client` tunes a base on its data (`shared_model`) and keeps what outlives the round (`client_state`); `aggregation`
takes vectors in, `server_round` merges them and moves the base; `loop` does it all without Flower. `bounds` is what a
client refuses.
"""
