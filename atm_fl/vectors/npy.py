"""Arrays out of the bytes that another machine sent: nothing is reserved for what the bytes do not hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from io import BytesIO

import numpy as np
from numpy.lib import format as npy

MOST_ARRAYS = 8
"""No codec has more."""
HEADER = 4096
"""Bytes that a header may have; ours have 128."""
SLACK = 2**20
"""Bytes beyond twice a vector's that all arrays of one may have: headers, and what does not compress."""


def most_bytes(elements: int) -> int:
    """Bytes that the arrays of a vector of so many elements may have, by any codec: none takes more than 8 of one."""
    return 2 * 4 * elements + SLACK


def read_arrays(contents: Mapping[str, bytes], elements: int) -> dict[str, np.ndarray]:
    """The arrays in `contents`, .npy files by name, of a vector of so many elements. ValueError if they are too large.

    Each is a copy of its own, which may be changed.
    """
    if len(contents) > MOST_ARRAYS:
        raise ValueError(f"{len(contents)} arrays; {MOST_ARRAYS} at most")
    size, most = sum(map(len, contents.values())), most_bytes(elements)
    if size > most:
        raise ValueError(f"arrays of {size} bytes; {most} at most for {elements} elements")
    return {name: read_array(content) for name, content in contents.items()}


def read_array(content: bytes, dimensions: int = 1) -> np.ndarray:
    """The array of numbers or booleans, of up to so many dimensions, in a .npy file. ValueError for anything else.

    Its size is that of the bytes, whatever the header declares.
    """
    file = BytesIO(content)
    try:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"version {version}")
        shape, by_columns, dtype = read(file, max_header_size=HEADER)
    except Exception as error:  # the header is Python source, which fails in many ways
        raise ValueError(f"{len(content)} bytes that are no array: {type(error).__name__}") from None
    if dtype.hasobject or dtype.kind not in "fiub" or dtype.subdtype is not None:
        raise ValueError(f"an array of {str(dtype)[:40]}, not of numbers")
    if len(shape) > dimensions or any(isinstance(length, bool) or length < 0 for length in shape):
        raise ValueError(f"an array of {len(shape)} dimensions, or of a negative length")
    held, declared = len(content) - file.tell(), math.prod(shape) * dtype.itemsize
    if held != declared:
        raise ValueError(f"{held} bytes of an array that declares {declared:.4g}")
    array = np.frombuffer(content, dtype, offset=file.tell())
    return array.reshape(shape, order="F" if by_columns else "C").copy(order="C")
