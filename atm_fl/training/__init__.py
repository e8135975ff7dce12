"""Training and evaluating a model on one client's data."""
