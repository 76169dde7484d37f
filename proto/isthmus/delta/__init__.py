"""Deltas: turn one file into another, bit for bit, with few bytes.

The format is described in `isthmus.delta.container`; `make_delta` and `apply_delta` are all that others need.
"""

from isthmus.delta.codec import DeltaInfo, apply_delta, make_delta
from isthmus.delta.container import Header, Method, read_header

__all__ = ["DeltaInfo", "Header", "Method", "apply_delta", "make_delta", "read_header"]
