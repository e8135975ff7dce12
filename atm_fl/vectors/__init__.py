"""Vectors: their layout, what is kept of them on disk, passes over them, linear algebra, files."""

from atm_fl.vectors.layout import Layout, bind, digest, float_buffers, shared_entries

__all__ = [
    "Layout",
    "bind",
    "digest",
    "float_buffers",
    "shared_entries",
]
