"""What task vectors give away, and what bounds it."""
