"""Attacks: what someone who sees a party's task vectors, or who is a party, can learn or break. docs/attacks.md.

`scenario` says who sends what and what the attacker knows; `reconstruction` (with `simulation`) looks for the images
behind a vector and `labels` for their classes; `similarity` and `measurement` say how near they came. `membership` asks
who was tuned on, `audit` whether DP-SGD keeps its ε, `poisoning` what parties that send other vectors do.
"""
