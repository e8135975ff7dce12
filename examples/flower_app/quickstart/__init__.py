"""A Flower app as its quickstart has it."""
