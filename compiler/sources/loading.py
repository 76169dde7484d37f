"""Whether ONNX Runtime can load a model in bounded time and memory, and how its outputs' axes follow its inputs'."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from compiler.sources import onnx_file
from compiler.sources.axes import BATCH, is_fixed
from isthmus.errors import InputError

LOAD_SECONDS: Final = 120.0
LOAD_BYTES: Final = 3 << 30  # and some times the model's own size
_COPIES: Final = 4  # of the weights, while ONNX Runtime optimizes
_MAX_ELEMENTS: Final = 1 << 31  # of one value between operators, with every axis that may vary at 1
_MAX_FOLDED: Final = 1 << 28  # of one value that is computed from constants alone
_KEPT_BYTES: Final = 1 << 12  # weights up to this size may be shapes
_BATCHES: Final = (2, 3, 5)
# Sizes tried for other axes, the first that the model takes wins: multiples of 32 suit images, small ones short texts.
_SIZES: Final = ((96, 128, 160), (32, 64, 96), (8, 9, 11), (512, 512, 512))

Shapes = Mapping[str, Sequence[int | str]]


@dataclass(frozen=True, slots=True)
class Observed:
    """What runs of a model at several sizes showed; nothing, where no size suited it."""

    shapes: Shapes = field(default_factory=dict)  # output -> each axis: a size, an input's axis, or "" for neither
    batch: tuple[str, ...] = ()  # axes of inputs that turned out to be the batch


def skeleton(model: Any) -> Any:
    """Return the model without its large weights, which become inputs: small enough to be copied and checked."""
    from onnx import ModelProto, helper

    slim = ModelProto()
    for entry in model.opset_import:
        slim.opset_import.add().CopyFrom(entry)
    slim.ir_version = max(model.ir_version, 4)  # before 4 every weight had to be an input as well
    graph = slim.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.sparse_initializer.extend(model.graph.sparse_initializer)
    for tensor in model.graph.initializer:
        if tensor.ByteSize() <= _KEPT_BYTES:
            graph.initializer.append(tensor)
        else:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return slim


def check(slim: Any, what: str) -> None:
    """Check the structure of the graph.

    Raises:
        InputError: onnx.checker refuses it; the message is the checker's.
    """
    import onnx

    try:
        onnx.checker.check_model(slim)
    except (onnx.checker.ValidationError, ValueError) as error:
        first = (str(error).strip().splitlines() or [""])[0][:300]
        raise InputError(f"{what}: not a valid ONNX model: {first}") from error


def infer(slim: Any, inputs: Collection[str], what: str) -> Shapes:
    """Return the shapes of the values that follow from the operators, an axis of which nothing is known as "".

    Raises:
        InputError: The operators contradict each other, or make a value that no computer can hold.
    """
    import onnx

    for value in slim.graph.output:
        if not value.type.HasField("tensor_type"):
            raise InputError(f"{what}: {value.name!r}: expected a tensor")
        value.type.tensor_type.ClearField("shape")  # what the file says of it is not to be believed here
    try:
        # Without data propagation: it computes shapes, however long they are made.
        done = onnx.shape_inference.infer_shapes(slim, strict_mode=False, data_prop=False)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{what}: the shapes of its values contradict each other: {str(error)[:300]}") from error
    shapes: dict[str, Sequence[int | str]] = {}
    for value in (*done.graph.value_info, *done.graph.output):
        if value.type.tensor_type.HasField("shape"):
            shapes[value.name] = [
                dim.dim_value if is_fixed(dim) else dim.dim_param for dim in value.type.tensor_type.shape.dim
            ]
    _check_elements(slim, set(inputs), shapes, what)
    return shapes


def _check_elements(slim: Any, variable: set[str], shapes: Shapes, what: str) -> None:
    for node in slim.graph.node:
        depends = not variable.isdisjoint(node.input) or any(
            attribute.HasField("g") or attribute.graphs for attribute in node.attribute
        )
        if depends:
            variable.update(node.output)
        limit = _MAX_ELEMENTS if depends else _MAX_FOLDED
        for name in node.output:
            count = 1
            for axis in shapes.get(name, ()):
                count *= axis if isinstance(axis, int) else 1
            if count > limit:
                raise InputError(
                    f"{what}: node {(node.name or name)[:200]!r} ({node.op_type}) makes {count} elements; "
                    f"expected at most {limit}",
                    hint="export the model without it, or for smaller inputs",
                )


def loose_axes(inputs: Sequence[Any]) -> tuple[str, ...]:
    """Return the axes that nobody named, after a fixed one: it may be that they must equal the batch."""
    return tuple(
        dim.dim_param
        for value in inputs
        for index, dim in enumerate(value.type.tensor_type.shape.dim)
        if index > 0 and is_fixed(value.type.tensor_type.shape.dim[0]) and dim.dim_param == f"{value.name}_axis_{index}"
    )


def load(
    path: Path,
    inputs: Sequence[Any],
    *,
    observe: bool,
    ranges: Mapping[str, tuple[int, int]],
    what: str,
    seconds: float = LOAD_SECONDS,
) -> Observed:
    """Load and run the model in a process of its own; when asked to, at several sizes, and return what was seen.

    Raises:
        InputError: ONNX Runtime cannot load it, or not in so much memory and time.
    """
    if not observe:  # one run shows what it takes
        _ask(path, [_feeds(inputs, _sizes(ranges, 0, _SIZES[0]))], what, seconds)
        return Observed()
    for same, sizes in _attempts(inputs, ranges):
        runs = [_feeds(inputs, {**size, **dict.fromkeys(same, size.get(BATCH, 1))}) for size in sizes]
        answer = _ask(path, runs, what, seconds)
        shapes = answer["shapes"]
        if shapes and all(one is not None for one in shapes):
            return Observed({name: _explained([one[name] for one in shapes], sizes) for name in shapes[0]}, same)
    return Observed()


def fold(model: Any, folder: Path, what: str) -> Any:
    """Return the model with everything computed that follows from constants, branches taken and left out as well.

    ONNX Runtime does it, in a process of its own; the operators stay standard ones.

    Raises:
        InputError: ONNX Runtime cannot load it, or not in so much memory and time.
    """
    whole, folded = folder / "whole.onnx", folder / "folded.onnx"
    whole.write_bytes(model.SerializeToString(deterministic=True))
    _ask(whole, [], what, LOAD_SECONDS, folded)
    return onnx_file.load(folded)


def _ask(path: Path, runs: Sequence[Any], what: str, seconds: float, folded: Path | None = None) -> Any:
    memory = LOAD_BYTES + _COPIES * path.stat().st_size
    job = json.dumps({"path": str(path), "memory": memory, "runs": runs, "folded": str(folded or "")})
    limits = f"{memory >> 20} MiB and {seconds:.0f} s"
    command = [sys.executable, "-I", str(Path(__file__).with_name("probe.py"))]
    try:
        done = subprocess.run(command, input=job, capture_output=True, text=True, timeout=seconds, check=False)
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{what}: ONNX Runtime could not load and run it within {limits}") from error
    except json.JSONDecodeError as error:  # it was killed, or had no memory left to say so
        raise InputError(f"{what}: ONNX Runtime could not load and run it within {limits}") from error
    if "memory" in answer:
        text = " ".join(answer["memory"].split())[:300]
        raise InputError(f"{what}: ONNX Runtime could not load and run it within {limits}: {text}")
    if "error" in answer:
        text = " ".join(answer["error"].split())
        raise InputError(f"{what}: ONNX Runtime cannot load it: {text[:300]}", reason="unsupported-model")
    return answer


def _attempts(
    inputs: Sequence[Any], ranges: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[tuple[str, ...], list[dict[str, int]]]]:
    """Yield which unnamed axes are taken for the batch, and the sizes of all axes in each run."""
    loose = loose_axes(inputs)
    for same in ((), loose) if loose and BATCH in ranges else ((),):
        for sizes in _SIZES:
            yield same, [_sizes(ranges, run, sizes) for run in range(len(_BATCHES))]


def _sizes(ranges: Mapping[str, tuple[int, int]], run: int, sizes: Sequence[int]) -> dict[str, int]:
    """Return a size for every axis: different ones for different axes, where their ranges allow it."""
    found = {}
    others = 0
    for name, (shortest, longest) in ranges.items():
        wanted = _BATCHES[run] if name == BATCH else sizes[(run + others) % len(sizes)]
        others += name != BATCH
        found[name] = min(max(wanted, shortest), longest)
    return found


def _feeds(inputs: Sequence[Any], sizes: Mapping[str, int]) -> dict[str, tuple[str, list[int]]]:
    from onnx import helper

    feeds = {}
    for value in inputs:
        tensor = value.type.tensor_type
        shape = [dim.dim_value if is_fixed(dim) else sizes[dim.dim_param] for dim in tensor.shape.dim]
        feeds[value.name] = (helper.tensor_dtype_to_np_dtype(tensor.elem_type).str, shape)
    return feeds


def _explained(shapes: Sequence[Sequence[int]], sizes: Sequence[Mapping[str, int]]) -> list[int | str]:
    """Return for each axis of an output its size, when it never changed, or the input's axis that it equalled."""
    axes: list[int | str] = []
    for seen in zip(*shapes, strict=False):
        names = [name for name in sizes[0] if tuple(one[name] for one in sizes) == seen]
        if len(set(seen)) == 1 and seen[0] > 0:
            axes.append(seen[0])
        else:
            axes.append(names[0] if names else "")
    return axes
