"""What a heavy model is asked before it serves, and the form that its answer must have.

Triton's Python backend does not check outputs: a wrong shape or a missing one would pass as OK.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from isthmus.bundle import Manifest
from isthmus.errors import BundleError
from isthmus.tensors import DTYPES, Array


def one_request(manifest: Manifest, samples: Mapping[str, Array]) -> dict[str, Array]:
    """Return as many samples as the model takes at a time, the axis that counts them gone where it has none."""
    arrays = {spec.name: samples[spec.name][: manifest.max_batch] for spec in manifest.inputs}
    return {
        spec.name: arrays[spec.name][0] if arrays[spec.name].ndim > len(spec.shape) else arrays[spec.name]
        for spec in manifest.inputs
    }


def check_outputs(manifest: Manifest, rows: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
    """Check the outputs of a heavy model for these inputs.

    Raises:
        BundleError: Outputs lack, have another datatype or shape than the manifest says, or are not finite.
    """
    batch = len(next(iter(rows.values()))) if manifest.max_batch > 1 else -1
    for spec in manifest.outputs:
        want = tuple(batch if index == 0 and axis == -1 else axis for index, axis in enumerate(spec.shape))
        got = outputs.get(spec.name)
        if got is None or got.dtype != DTYPES[spec.datatype] or not _fits(got.shape, want):
            found = "nothing" if got is None else f"{got.dtype} {list(got.shape)}"
            raise BundleError(
                f"heavy output {spec.name!r}: expected {spec.datatype} {list(want)}, got {found}",
                reason="heavy-wrong",
            )
        if got.dtype.kind == "f" and not np.isfinite(got).all():
            raise BundleError(f"heavy output {spec.name!r} is not finite on golden inputs", reason="heavy-wrong")


def _fits(shape: tuple[int, ...], want: tuple[int, ...]) -> bool:
    return len(shape) == len(want) and all(axis in (-1, size) for axis, size in zip(want, shape, strict=True))
