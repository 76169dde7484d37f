from __future__ import annotations

from pathlib import Path

import numpy as np

from compiler.capture import CapturedModel
from compiler.edge_cases import edge_cases
from isthmus.bundle import TensorSpec

TEXT = CapturedModel(
    Path("none.onnx"),
    "0" * 64,
    tuple(TensorSpec(name=name, datatype="INT64", shape=(-1, -1)) for name in ("ids", "mask")),
    (TensorSpec(name="logits", datatype="FP32", shape=(-1, 3)),),
    attention=True,
    axes={"ids": ("batch", "sequence"), "mask": ("batch", "sequence"), "logits": ("batch", "")},
    lengths={"batch": (1, 64), "sequence": (1, 12)},
)
FIXED = CapturedModel(
    Path("none.onnx"),
    "0" * 64,
    (TensorSpec(name="image", datatype="FP32", shape=(1, 3, 4, 4)),),
    (TensorSpec(name="boxes", datatype="FP32", shape=(1, 8)),),
    attention=False,
)


def test_batches_lengths_and_values_at_their_ends() -> None:
    ids = np.random.default_rng(0).integers(5, 90, (6, 8))
    cases = edge_cases(TEXT, {"ids": ids, "mask": np.ones_like(ids)}, max_batch=32)

    shapes = {name: case["ids"].shape for name, case in cases.items()}
    assert shapes == {
        "batch 1": (1, 8), "batch 2": (2, 8), "batch 32": (32, 8), "sequence 1": (1, 1), "sequence 12": (1, 12),
        "smallest values": (1, 8), "largest values": (1, 8),
    }  # fmt: skip
    assert all(case["ids"].shape == case["mask"].shape for case in cases.values())
    assert (cases["smallest values"]["ids"] == ids.min()).all()
    assert (cases["largest values"]["ids"] == ids.max()).all()
    assert all(case["ids"].dtype == np.int64 for case in cases.values())
    np.testing.assert_array_equal(cases["sequence 12"]["ids"][0, 8:], ids[0, :4])


def test_a_model_of_fixed_shape_gets_no_other_shapes() -> None:
    cases = edge_cases(FIXED, {"image": np.ones((3, 3, 4, 4), np.float32)}, max_batch=8)

    assert {name: case["image"].shape for name, case in cases.items()} == dict.fromkeys(
        ("batch 1", "smallest values", "largest values"), (1, 3, 4, 4)
    )
