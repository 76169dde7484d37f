"""Which operators a model uses: versions and names that ONNX Runtime knows, and functions made part of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, Final

from compiler.sources import NEWEST_OPSET, OLDEST_OPSET
from compiler.sources.onnx_file import graphs_of
from compiler.sources.wire import MAX_NODES
from isthmus.errors import InputError

_ONNX: Final = ("", "ai.onnx")
_NEWEST_IR: Final = 13  # of what ONNX Runtime loads
_MICROSOFT: Final = "com.microsoft"
_REASON: Final = "unsupported-model"


def check_operators(model: Any, what: str) -> None:
    """Check that ONNX Runtime knows the versions and every operator; drop versions of domains that nothing uses.

    Raises:
        InputError: It does not; the message names the operator and the node.
    """
    versions = {"" if entry.domain in _ONNX else entry.domain: entry.version for entry in model.opset_import}
    opset = versions.get("", 0)
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise InputError(
            f"{what}: expected an opset from {OLDEST_OPSET} to {NEWEST_OPSET}, got {opset or 'none'}",
            hint=f"export it anew, for example with opset_version={OLDEST_OPSET + 7}",
            reason=_REASON,
        )
    if model.ir_version > _NEWEST_IR:
        raise InputError(f"{what}: expected an IR version up to {_NEWEST_IR}, got {model.ir_version}", reason=_REASON)
    own = {(function.domain, function.name) for function in model.functions}
    used = {""}
    for node in _nodes(model):
        domain = "" if node.domain in _ONNX else node.domain
        used.add(domain)
        if (node.domain, node.op_type) in own:
            continue
        if domain not in versions:
            raise InputError(f"{what}: node {_name(node)}: no version is given for the domain {domain[:200]!r}")
        if not _known(node.op_type, domain, versions[domain]):
            raise _unknown(node, domain, versions[domain], what)
    kept = [entry for entry in model.opset_import if ("" if entry.domain in _ONNX else entry.domain) in used]
    if len(kept) < len(model.opset_import):
        kept = [type(entry).FromString(entry.SerializeToString()) for entry in kept]
        del model.opset_import[:]
        model.opset_import.extend(kept)


def inline_functions(model: Any, what: str) -> Any:
    """Return the model with the functions that it defines made part of its graph.

    Raises:
        InputError: They call themselves, or together they are longer than a model may be.
    """
    if not model.functions:
        return model
    import onnx.inliner

    _check_expansion(model, what)
    try:
        return onnx.inliner.inline_local_functions(model)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{what}: its functions cannot be inlined: {str(error)[:300]}") from error


def _nodes(model: Any) -> Iterator[Any]:
    for graph in graphs_of(model):
        yield from graph.node


def _name(node: Any) -> str:
    return repr((node.name or (node.output[0] if node.output else ""))[:200])


def _known(operator: str, domain: str, version: int) -> bool:
    import onnx

    if domain in ("", "ai.onnx.ml"):
        return (
            onnx.defs.has(operator, version, domain) and not onnx.defs.get_schema(operator, version, domain).deprecated
        )
    return operator in _runtime_operators(domain)


def _runtime_operators(domain: str) -> set[str]:
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    return {schema.name for schema in get_all_operator_schema() if schema.domain == domain == _MICROSOFT}


def _unknown(node: Any, domain: str, version: int, what: str) -> InputError:
    import onnx

    name = f"{domain}.{node.op_type}" if domain else node.op_type
    names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == domain}
    close = get_close_matches(node.op_type, names, n=1)
    hint = "export the model with standard operators, or give a torch module instead"
    if node.op_type in names:
        hint = "it is of a newer opset: export the model with that one"
    elif close:
        hint = f"did the exporter mean {close[0]}?"
    where = f" in opset {version}" if not domain else ""
    return InputError(
        f"{what}: node {_name(node)}: there is no operator {name[:200]!r}{where}", hint=hint, reason=_REASON
    )


def _check_expansion(model: Any, what: str) -> None:
    """Check how many nodes inlining would give, before it is done: functions may call functions that call functions."""
    bodies = {(function.domain, function.name): function for function in model.functions}
    sizes: dict[tuple[str, str], int] = {}
    waiting = list(bodies)
    open_calls: set[tuple[str, str]] = set()
    while waiting:
        key = waiting[-1]
        calls = [(node.domain, node.op_type) for node in _body_nodes(bodies[key])]
        missing = [call for call in calls if call in bodies and call not in sizes]
        if missing and key not in sizes:
            if key in open_calls:
                raise InputError(f"{what}: function {key[1][:200]!r} calls itself")
            open_calls.add(key)
            waiting += missing
            continue
        sizes[key] = sum(sizes.get(call, 1) for call in calls)
        open_calls.discard(key)
        waiting.pop()
    total = sum(
        sizes.get((node.domain, node.op_type), 1) for graph in _graphs_below(model.graph) for node in graph.node
    )
    if total > MAX_NODES:
        raise InputError(f"{what}: expected at most {MAX_NODES} operators with functions inlined, got {total}")


def _body_nodes(function: Any) -> Iterator[Any]:
    for graph in _graphs_below(function):
        yield from graph.node


def _graphs_below(graph: Any) -> Iterator[Any]:
    waiting = [graph]
    while waiting:
        current = waiting.pop()
        yield current
        for node in current.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    waiting.append(attribute.g)
                waiting.extend(attribute.graphs)
