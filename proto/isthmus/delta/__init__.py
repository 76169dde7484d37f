"""Deltas: turn one file or folder into another, bit for bit, with few bytes.

The format is described in `docs/delta-format.md`; what is named here is all that others need.
"""

from isthmus.delta.apart import apply_apart
from isthmus.delta.codec import DeltaInfo, apply_delta, make_delta
from isthmus.delta.container import Header, Method, read_header
from isthmus.delta.folder import apply_folder_delta, is_folder_delta, make_folder_delta, read_entries
from isthmus.delta.rebuild import describe

__all__ = [
    "DeltaInfo",
    "Header",
    "Method",
    "apply_apart",
    "apply_delta",
    "apply_folder_delta",
    "describe",
    "is_folder_delta",
    "make_delta",
    "make_folder_delta",
    "read_entries",
    "read_header",
]
