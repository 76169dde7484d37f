"""Programs that torch.export.save wrote (.pt2); `pt2_archive` says what is believed of their files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.sources import Exported, SourceOptions
from compiler.sources.axes import BATCH
from compiler.sources.onnx_file import refuse
from compiler.sources.pt2_archive import clean_archive

if TYPE_CHECKING:
    import torch


class TorchExport:
    """An exported program."""

    def files(self, source: str, options: SourceOptions) -> Mapping[str, Path]:
        """Return the program's file."""
        refuse(source, options, "a .pt2 file", ("task", "adapter", "factory"))
        return {Path(source).name: Path(source)}

    def to_onnx(self, source: str, options: SourceOptions, folder: Path) -> Exported:
        """Return the program as ONNX, its axes named and bounded as they were exported."""
        import torch

        from compiler.sources.torch_module import cannot_export, compare, export_program, quiet

        self.files(source, options)
        cleaned = folder / "program.pt2"
        clean_archive(Path(source), cleaned)
        with quiet():
            try:
                program = torch.export.load(cleaned)
            except Exception as error:  # torch raises whatever a broken archive leads it to
                raise cannot_export(source, error) from error
            finally:
                cleaned.unlink()
        path = folder / "model.onnx"
        export_program(program, _outputs(program), options=options, path=path, what=source)
        names, bounds = _axes(program)
        inputs = _name(path, names)
        compare(lambda given: program.module()(*given.values()), path, _example(program, inputs, bounds), source)
        lengths = {names[symbol]: length for symbol, length in bounds.items()}
        return Exported(path, lengths)


def _axes(program: torch.export.ExportedProgram) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Return a name for each symbol in the inputs' shapes, and the sizes that it may have."""
    names: dict[str, str] = {}
    bounds: dict[str, tuple[int, int]] = {}
    limits = {str(symbol): limit for symbol, limit in program.range_constraints.items()}
    shapes = list(_shapes(program))
    first = next((str(shape[0]) for _, shape in shapes if shape and not isinstance(shape[0], int)), "")
    for name, shape in shapes:
        for index, size in enumerate(shape):
            symbol = str(size)
            if isinstance(size, int) or symbol in names:
                continue
            names[symbol] = BATCH if symbol == first else f"{name}_axis_{index}"
            limit = limits.get(symbol)
            shortest, longest = (1, 1 << 31) if limit is None else (limit.lower, limit.upper)
            longest = int(longest) if str(longest).isdigit() else 1 << 31
            # From 0 or 2: torch tells 0 and 1 from other sizes; whether 1 works is compared, not believed.
            bounds[symbol] = (1 if int(shortest) <= 2 else int(shortest), longest)
    others = [symbol for symbol in names if symbol != first]
    if len(others) == 1 and names[others[0]].endswith("_axis_1"):
        names[others[0]] = "sequence"
    return names, bounds


def _shapes(program: torch.export.ExportedProgram) -> Iterator[tuple[str, tuple[Any, ...]]]:
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in inputs:
            yield node.name, tuple(node.meta["val"].shape)


def _outputs(program: torch.export.ExportedProgram) -> list[str]:
    """Return the names of what the program returns, as the module that was exported returned it."""
    from torch.utils import _pytree

    from compiler.sources.torch_module import output_names

    spec = program.call_spec.out_spec
    leaves = list(range(len(program.graph_signature.user_outputs)))
    return output_names(_pytree.tree_unflatten(leaves, spec) if spec is not None else leaves)


def _name(path: Path, names: Mapping[str, str]) -> list[str]:
    """Give the axes of the ONNX file their names; return those of its inputs."""
    import onnx

    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = names.get(dim.dim_param, dim.dim_param)
    onnx.save(model, path)
    return [value.name for value in model.graph.input]


def _example(
    program: torch.export.ExportedProgram, inputs: list[str], bounds: Mapping[str, tuple[int, int]]
) -> dict[str, torch.Tensor]:
    """Return inputs of sizes within the bounds, different ones for different axes where they allow it."""
    import torch

    sizes = {
        symbol: min(max(limits[0], 3 + 2 * index), limits[1]) for index, (symbol, limits) in enumerate(bounds.items())
    }
    generator = torch.Generator().manual_seed(0)
    nodes = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    example = {}
    for name, symbolic in zip(inputs, program.graph_signature.user_inputs, strict=True):
        value = nodes[str(symbolic)]
        shape = [size if isinstance(size, int) else sizes[str(size)] for size in value.shape]
        drawn = torch.rand(shape, generator=generator) if value.dtype.is_floating_point else torch.ones(shape)
        example[name] = drawn.to(value.dtype)
    return example
