"""Images with channels last: convolutions, and what lies between them, are moved to NHWC before kernels are chosen."""

from __future__ import annotations

from typing import Any, Final

_DESIRED: Final = {"relax.nn.conv2d": ["NHWC", "OHWI"]}


def channels_last(module: Any) -> Any:
    """Return the module with 2-D convolutions in NHWC; transpositions remain where the graph leaves that layout."""
    from tvm import relax

    module = relax.transform.ConvertLayout(_DESIRED)(module)
    return relax.transform.Normalize()(module)
