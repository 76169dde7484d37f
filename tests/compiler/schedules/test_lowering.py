"""Whole graphs: every function has a rule, symbolic batches work, other processors get code of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compiler.schedules import lower
from compiler.schedules.blocks import marks
from compiler.schedules.machine import Machine
from compiler.schedules.rules import LoweringReport, apply_rules
from tests.compiler.schedules.onnx_graphs import check, expected, graph, lowered, node, random, target


def small_cnn(batch: int | str = 1) -> Any:
    return graph(
        [
            node("Conv", ["x", "stem"], "a", pads=(1, 1, 1, 1), strides=(2, 2)),
            node("Clip", ["a", "low", "high"], "b"),
            node("Conv", ["b", "deep"], "c", pads=(1, 1, 1, 1), group=16),
            node("Sigmoid", ["c"], "d"),
            node("Mul", ["c", "d"], "e"),
            node("MaxPool", ["e"], "f", kernel_shape=(2, 2), strides=(2, 2)),
            node("Conv", ["f", "wide"], "g"),
            node("GlobalAveragePool", ["g"], "h"),
            node("Flatten", ["h"], "i"),
            node("Gemm", ["i", "head", "bias"], transB=1),
        ],
        {"x": ("float32", (batch, 3, 16, 16))},
        {
            "stem": random(16, 3, 3, 3),
            "low": np.array(0, np.float32),
            "high": np.array(6, np.float32),
            "deep": random(16, 1, 3, 3, seed=1),
            "wide": random(24, 16, 1, 1, seed=2),
            "head": random(10, 24, seed=3),
            "bias": random(10, seed=4),
        },
    )


def small_transformer() -> Any:
    """One layer with two heads of eight over ten tokens."""
    heads = np.array([1, 10, 2, 8])
    nodes = [node("Gather", ["table", "ids"], "t"), node("LayerNormalization", ["t", "s", "o"], "n", axis=-1)]
    for name, axes in (("q", (0, 2, 1, 3)), ("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3))):
        nodes += [
            node("MatMul", ["n", f"w{name}"], f"{name}1"),
            node("Add", [f"{name}1", "bias"], f"{name}2"),
            node("Reshape", [f"{name}2", "heads"], f"{name}3"),
            node("Transpose", [f"{name}3"], name, perm=axes),
        ]
    nodes += [
        node("MatMul", ["q", "k"], "scores"),
        node("Div", ["scores", "root"], "scaled"),
        node("Softmax", ["scaled"], "p", axis=-1),
        node("MatMul", ["p", "v"], "mixed"),
        node("Transpose", ["mixed"], "back", perm=(0, 2, 1, 3)),
        node("Reshape", ["back", "flat"], "joined"),
        node("MatMul", ["joined", "wq"], "projected"),
        node("Add", ["projected", "t"]),
    ]
    weights = {f"w{name}": random(16, 16, seed=seed) for seed, name in enumerate("qkv")}
    constants = {"heads": heads, "flat": np.array([1, 10, 16]), "root": np.array(8**0.5, np.float32)}
    vectors = {"table": random(30, 16, seed=5), "bias": random(16, seed=6), "s": random(16), "o": random(16, seed=7)}
    return graph(nodes, {"ids": ("int64", (1, 10))}, {**weights, **constants, **vectors})


@pytest.mark.slow
def test_every_function_of_a_cnn_has_a_rule() -> None:
    report = check(small_cnn(), {"x": random(1, 3, 16, 16, seed=5)})

    rules = list(report.rules.values())
    assert rules.count("convolution") == 2
    assert rules.count("depthwise") == 1
    assert rules.count("matmul") == 1
    assert {"transposed", "none"}.isdisjoint(rules)


@pytest.mark.slow
def test_every_function_of_a_transformer_has_a_rule_and_transpositions_vanish() -> None:
    report = check(small_transformer(), {"ids": np.random.default_rng(0).integers(0, 30, (1, 10))})

    assert {"matmul", "rows"} <= set(report.rules.values())
    assert not any("transpose" in name for name in report.rules)


@pytest.mark.slow
def test_a_symbolic_batch_runs_at_any_size() -> None:
    import tvm
    from tvm import relax

    model = small_cnn("batch")
    module, report = lowered(model, target())
    machine = relax.VirtualMachine(relax.build(module, target()), tvm.cpu())

    for batch in (1, 3):
        data = random(batch, 3, 16, 16, seed=batch)
        theirs = expected(model, {"x": data})
        result = machine["main"](tvm.runtime.tensor(data)).numpy()
        assert np.abs(result - theirs).max() <= 1e-5 * np.ptp(theirs)
    assert report.unscheduled == ()


@pytest.mark.slow
def test_code_for_arm_multiplies_and_adds_in_vectors() -> None:
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    arm = target("cortex-a72", mtriple="aarch64-linux-gnu")
    executable = relax.build(lower(from_onnx(small_cnn()), arm), arm)

    assembly = "".join(_assembly(module) for module in (executable.mod, *executable.mod.imports))
    assert "fmla\tv" in assembly


def _assembly(module: Any) -> str:
    try:
        return str(module.inspect_source("asm"))
    except (AttributeError, RuntimeError):  # the virtual machine's bytecode
        return ""


@pytest.mark.slow
def test_several_cores_give_what_one_gives() -> None:
    import tvm
    from tvm import relax

    model, data = small_cnn(), random(1, 3, 16, 16, seed=6)
    shared = target(cores=2)
    module, report = lowered(model, shared)
    machine = relax.VirtualMachine(relax.build(module, shared), tvm.cpu())

    theirs = expected(model, {"x": data})
    assert np.abs(machine["main"](tvm.runtime.tensor(data)).numpy() - theirs).max() <= 1e-5 * np.ptp(theirs)
    assert report.reasons == {}


def test_a_rule_that_fails_is_named_and_another_takes_the_function() -> None:
    import tvm
    from tvm import te

    data = te.placeholder((8,), name="x")
    notes = marks(kernel="convolution", rows=1, columns=1, lanes=8, vectors=1)
    odd = te.compute((8,), lambda i: data[i] + 1, name="odd", attrs=notes)
    module = tvm.IRModule({"odd": te.create_prim_func([data, odd])})
    report = LoweringReport()

    apply_rules(module, Machine.of(target()), report)

    assert report.rules == {"odd": "elementwise"}
    assert report.reasons["odd"].startswith("convolution: ")
