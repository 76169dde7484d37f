"""Names for the axes that may vary, the same ones in every model.

Rules: the axis that samples are counted along is "batch", wherever it stands. It is the axis that the model itself
calls so, or the first axis of its inputs. Other axes keep their names, made identifiers; those without one are called
after their tensor. Axes that were given one size become fixed. An output's axis is the input's that it always equals.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final

from compiler.sources.onnx_file import graphs_of
from isthmus.errors import InputError

BATCH: Final = "batch"
DEFAULT_LENGTHS: Final[Mapping[str, tuple[int, int]]] = {BATCH: (1, 64)}
DEFAULT_LENGTH: Final = (1, 512)
MAX_LENGTH: Final = 1 << 31
_BATCH_NAMES: Final = {"batch", "batch_size", "batchsize", "n", "bs", "b", "num_samples", "samples"}
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")

Lengths = Mapping[str, int | tuple[int, int]]


def name_input_axes(model: Any, what: str) -> dict[str, str]:
    """Name the symbolic axes of all inputs in the model; return the new name of each old one.

    Raises:
        InputError: An input is no tensor, or has no shape.
    """
    for value in model.graph.input:
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type"):
            raise InputError(f"{what}: {value.name!r}: expected a tensor")
        if not tensor.HasField("shape"):
            raise InputError(f"{what}: input {value.name!r} has no shape", hint="export it with one")
        for index, dim in enumerate(tensor.shape.dim):
            if not is_fixed(dim) and not re.search(r"\w", dim.dim_param):  # some exporters write "?"
                dim.dim_param = f"{value.name} axis {index}"
    batch = _batch_axes(model.graph.input)
    renamed: dict[str, str] = {}
    taken = {BATCH}
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.dim_param:
                continue
            old = dim.dim_param
            if old not in renamed:
                renamed[old] = BATCH if old in batch else _identifier(old, taken)
                taken.add(renamed[old])
            dim.dim_param = renamed[old]
    return renamed


def fix_lengths(model: Any, lengths: Lengths, what: str) -> None:
    """Give input axes with one length that size; a shape that was written for other sizes is forgotten.

    Raises:
        InputError: There is no such axis, or a length cannot be one.
    """
    known = [dim.dim_param for value in model.graph.input for dim in value.type.tensor_type.shape.dim if dim.dim_param]
    for name, length in lengths.items():
        shortest, longest = (length, length) if isinstance(length, int) else length
        if not 1 <= shortest <= longest <= MAX_LENGTH:
            raise InputError(f"{what}: lengths.{name}: expected 1 <= shortest <= longest, got {length}")
        if name not in known:
            close = get_close_matches(name, known, n=1)
            raise InputError(
                f"{what}: lengths.{name}: the model has no such axis; those that may vary are "
                f"{', '.join(dict.fromkeys(known)) or 'none'}",
                hint=f"did you mean {close[0]}?" if close else "mend the recipe",
            )
    fixed = {name: length for name, length in lengths.items() if isinstance(length, int)}
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in fixed:
                dim.dim_value = fixed[dim.dim_param]
    if fixed:
        for value in model.graph.output:
            for dim in value.type.tensor_type.shape.dim:
                if not is_fixed(dim):
                    dim.Clear()
        forget_shapes(model)


def rename_axes(model: Any, renamed: Mapping[str, str]) -> dict[tuple[str, int], str]:
    """Use the new names in outputs and in what the file says of values between; names of no input are taken out.

    Returns what the outputs' own axes were called, by output and position.
    """
    own: dict[tuple[str, int], str] = {}
    for graph in graphs_of(model):
        for value in (*graph.value_info, *graph.output):
            for index, dim in enumerate(value.type.tensor_type.shape.dim):
                if dim.dim_param in renamed:
                    dim.dim_param = renamed[dim.dim_param]
                elif not is_fixed(dim):
                    if graph is model.graph and dim.dim_param:
                        own[value.name, index] = dim.dim_param
                    dim.Clear()
    return own


def forget_shapes(model: Any) -> None:
    """Take out what the file says of the shapes of values between."""
    for graph in graphs_of(model):
        del graph.value_info[:]


def is_fixed(dim: Any) -> bool:
    """Return whether the axis has one size; some exporters write -1 or 0 for those that have not."""
    return bool(dim.HasField("dim_value") and dim.dim_value > 0)


def open_axes(model: Any) -> bool:
    """Return whether an output has an axis of which nothing is known."""
    return any(
        not is_fixed(dim) and not dim.dim_param
        for value in model.graph.output
        for dim in value.type.tensor_type.shape.dim
    )


def take_inferred(model: Any, shapes: Mapping[str, Sequence[int | str]]) -> None:
    """Write into the outputs' open axes what follows from the operators: a size, or the name of an input's axis."""
    inputs = {dim.dim_param for value in model.graph.input for dim in value.type.tensor_type.shape.dim}
    for value in model.graph.output:
        inferred = shapes.get(value.name, ())
        for dim, known in zip(_dims(value, len(inferred)), inferred, strict=False):
            if is_fixed(dim) or dim.dim_param:
                continue
            if isinstance(known, int):
                dim.dim_value = known
            elif known in inputs:
                dim.dim_param = known


def merge_batch(model: Any, names: Sequence[str]) -> None:
    """Make these axes of inputs the batch."""
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = BATCH


def name_output_axes(
    model: Any, observed: Mapping[str, Sequence[int | str]], own: Mapping[tuple[str, int], str]
) -> None:
    """Write sizes and names into the outputs' open axes.

    Args:
        model: Changed in place.
        observed: For each output, the size or the name of the input's axis; "" where it is neither.
        own: What the file called an axis, by output and position.
    """
    inputs = {dim.dim_param for value in model.graph.input for dim in value.type.tensor_type.shape.dim}
    for value in model.graph.output:
        axes = observed.get(value.name, ())
        for index, dim in enumerate(_dims(value, len(axes))):
            if is_fixed(dim) or dim.dim_param:
                continue
            known = axes[index] if index < len(axes) else ""
            if isinstance(known, int):
                dim.dim_value = known
            elif known:
                dim.dim_param = known
            elif index == 0 and not axes and BATCH in inputs:  # nothing was observed: the most likely
                dim.dim_param = BATCH
            else:
                name = own.get((value.name, index), "")
                dim.dim_param = _identifier(name if _NAME.fullmatch(name) else f"{value.name} axis {index}", inputs)


def ranges(model: Any, lengths: Lengths, known: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Return the shortest and longest of every input axis that may vary: as given, as the source says, or a default."""
    found: dict[str, tuple[int, int]] = {}
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            name = dim.dim_param
            if name and name not in found:
                given = lengths.get(name)
                default = known.get(name, DEFAULT_LENGTHS.get(name, DEFAULT_LENGTH))
                found[name] = default if given is None or isinstance(given, int) else given
    return found


def _dims(value: Any, count: int) -> Any:
    """Return the axes of the value; what the file says of another number of them than `count` is forgotten."""
    shape = value.type.tensor_type.shape
    shape.SetInParent()
    if count and len(shape.dim) != count:
        del shape.dim[:]
        for _ in range(count):
            shape.dim.add()
    return shape.dim


def _batch_axes(inputs: Any) -> set[str]:
    """Return the names of the axes that are the batch."""
    shapes = [list(value.type.tensor_type.shape.dim) for value in inputs]
    everywhere = [dim.dim_param for dims in shapes for dim in dims if dim.dim_param]
    named = [name for name in everywhere if name.lower() in _BATCH_NAMES]
    first = [dims[0].dim_param for dims in shapes if dims and dims[0].dim_param]
    if not named and not first:
        return set()
    batch = {named[0] if named else first[0]}
    later = {dim.dim_param for dims in shapes for dim in dims[1:] if dim.dim_param}
    # Exporters that know no names invent one for each axis: those that only ever come first are the same batch.
    batch |= {name for name in first if name not in later} if not (named and named[0] in later) else set()
    return batch


def _identifier(name: str, taken: set[str]) -> str:
    """Return the name made an identifier that is not taken."""
    plain = name if _NAME.fullmatch(name) else re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")[:56] or "axis"
    plain = plain if not plain[0].isdigit() else f"axis_{plain}"
    unique, count = plain, 1
    while unique in taken:
        count += 1
        unique = f"{plain}_{count}"
    return unique
