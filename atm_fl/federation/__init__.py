"""A round: from a base to the next.

`client` tunes a base (`shared_model`) on its share of its data (`shares`) under its head (`heads`) and keeps what
outlives the round (`client_state`); `chain` is the task vector's way to the merge; `aggregation` takes vectors in,
`server_round` merges them and moves the base; `loop` does it all without Flower. `bounds` is what a client refuses.
"""
