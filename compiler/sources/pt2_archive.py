"""Archives that torch.export.save wrote (.pt2), and a copy of them that is safe to load.

torch.export.load believes its file: it unpickles sample inputs, evaluates expressions, imports what a pytree names,
calls any function below `torch`, and loads compiled libraries. So it is given a copy that holds weights and a graph of
known operators and nothing else; a file that needs more is refused. The rules are in `clean_archive`.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from compiler.sources.wire import MAX_MODEL_BYTES
from isthmus.errors import InputError

_MAX_JSON_BYTES: Final = 64 << 20
_MAX_EXPRESSION: Final = 4096  # characters
_MAX_INTEGER: Final = 1 << 63
_MAX_POWER: Final = 8
_HINT: Final = "save it anew with torch.export.save, or export it with torch.onnx.export"

_COPIED: Final = re.compile(
    r"(archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)"
    r"|data/weights/(weight_\d+|\w+_weights_config\.json)|data/constants/(tensor_\d+|\w+_constants_config\.json))"
)
_EMPTIED: Final = re.compile(r"data/sample_inputs/\w+\.pt")  # pickles; what they hold is not needed
_DROPPED: Final = re.compile(r"extra/.*|\.format_version|\.storage_alignment")
_GRAPH: Final = re.compile(r"models/\w+\.json")
_OPERATOR: Final = re.compile(
    r"torch\.ops\.(aten|prims|prim|_quantized|quantized_decomposed)\.\w+(\.\w+)?"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|map_impl|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|_operator\.[a-z]+|math\.[a-z]+|torch\.sym_[a-z]+"
)
_FORBIDDEN: Final = re.compile(  # they read files, or call what they are given
    r"torch\.ops\.aten\.(from_file|_from_file|to_file|save|load)\b|_operator\.(methodcaller|call|attrgetter)"
)
_FUNCTIONS: Final = {
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs", "Not", "And", "Or",
    "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan",
    "GreaterThan", "FloorDiv", "CleanDiv", "CeilDiv", "ModularIndexing", "PythonMod", "TruncToInt", "CeilToInt",
    "FloorToInt", "IntTrueDiv", "FloatTrueDiv", "ToFloat", "Where", "Piecewise", "Identity", "RoundToInt",
    "NegativeOne", "BooleanTrue", "BooleanFalse", "true", "false", "True", "False", "One", "Zero", "Half",
    "int_oo", "oo",
}  # fmt: skip
_ARITHMETIC: Final = (
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.USub, ast.UAdd, ast.Not, ast.And, ast.Or,
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.cmpop, ast.keyword, ast.Load,
)  # fmt: skip
_CONTAINERS: Final = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
_SYMBOL: Final = re.compile(r"[A-Za-z_]\w{0,63}")


def clean_archive(source: Path, destination: Path) -> None:
    """Copy what is harmless of a .pt2 archive.

    The rules:
     (1) it is a zip archive without compression, of bounded size, with one top folder and no name twice;
     (2) every entry is one of those that weights and a graph need; sample inputs are emptied, extra files left out;
     (3) no weight and no constant is a pickle;
     (4) every operator is one of PyTorch's own that compute something;
     (5) every expression of sizes is arithmetic, and every container a plain one;
     (6) stack traces and guards, which are code and paths, are left out.

    Raises:
        InputError: It breaks one of them; the message says which.
    """
    try:
        with zipfile.ZipFile(source) as archive, zipfile.ZipFile(destination, "w", zipfile.ZIP_STORED) as copy:
            entries = _checked_entries(archive, source)
            for name, entry in entries.items():
                target = f"program/{name}"
                if _COPIED.fullmatch(name):
                    if name.endswith("_config.json"):
                        _check_payloads(_json(archive, entry, source), source)
                    with archive.open(entry) as old, copy.open(target, "w", force_zip64=True) as new:
                        while chunk := old.read(1 << 20):
                            new.write(chunk)
                elif _EMPTIED.fullmatch(name):
                    copy.writestr(target, b"")
                elif _GRAPH.fullmatch(name):
                    copy.writestr(target, json.dumps(_checked_graph(_json(archive, entry, source), source)))
    except FileNotFoundError as error:
        raise InputError(f"cannot read {source}: {error.strerror}", hint="name a file that is there") from error
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{source}: not a file that torch.export.save wrote: {reason}", hint=_HINT) from error


def _checked_entries(archive: zipfile.ZipFile, source: Path) -> dict[str, zipfile.ZipInfo]:
    entries = {}
    infos = archive.infolist()
    if sum(info.file_size for info in infos) > MAX_MODEL_BYTES:
        raise InputError(f"{source}: expected at most {MAX_MODEL_BYTES} bytes")
    for info in infos:
        top, _, name = info.filename.partition("/")
        known = any(rule.fullmatch(name) for rule in (_COPIED, _EMPTIED, _DROPPED, _GRAPH))
        if not known or top in ("", ".", "..") or top != infos[0].filename.partition("/")[0] or name in entries:
            raise InputError(
                f"{source}: holds {info.filename[:200]!r}, which a program of weights and operators does not need",
                hint=_HINT,
            )
        if info.compress_type != zipfile.ZIP_STORED:
            raise InputError(f"{source}: expected an archive without compression, as torch writes it", hint=_HINT)
        entries[name] = info
    graphs = [name for name in entries if _GRAPH.fullmatch(name)]
    if len(graphs) != 1:
        raise InputError(f"{source}: expected one program in the archive, got {len(graphs)}", hint=_HINT)
    return entries


def _json(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, source: Path) -> Any:
    if entry.file_size > _MAX_JSON_BYTES:
        raise InputError(f"{source}: {entry.filename[:200]}: expected at most {_MAX_JSON_BYTES} bytes")
    try:
        return json.loads(archive.read(entry))
    except RecursionError as error:
        raise InputError(f"{source}: {entry.filename[:200]}: nested too deeply") from error


def _check_payloads(document: Any, source: Path) -> None:
    for name, payload in document.get("config", {}).items():
        if payload.get("use_pickle") or not re.fullmatch(r"(weight|tensor)_\d+", str(payload.get("path_name"))):
            raise InputError(
                f"{source}: {name[:200]!r} is kept as a pickle, which can run code when it is read",
                hint="save a program of plain tensors",
            )


def _checked_graph(document: Any, source: Path) -> Any:
    """Return the serialized program without stack traces and guards, when all that is left is known."""
    document["guards_code"] = []
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(value)
        if not isinstance(value, dict):
            continue
        if "target" in value and "inputs" in value:
            value["metadata"] = {}
        for key, check in _CHECKS.items():
            if value.get(key) is not None:
                check(value[key], source)
        waiting.extend(value.values())
    return document


def _check_operator(target: Any, source: Path) -> None:
    if not isinstance(target, str) or not _OPERATOR.fullmatch(target) or _FORBIDDEN.match(target):
        raise InputError(
            f"{source}: the program calls {str(target)[:100]!r}, which is not an operator of PyTorch",
            hint=_HINT,
            reason="unsupported-model",
        )


def _check_expression(text: Any, source: Path) -> None:
    """Check that the expression is arithmetic of numbers and symbols: it is going to be evaluated."""
    try:
        if not isinstance(text, str) or len(text) > _MAX_EXPRESSION:
            raise ValueError("too long")
        harmless = all(map(_harmless, ast.walk(ast.parse(text, mode="eval"))))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        harmless = False
    if not harmless:
        raise InputError(f"{source}: {str(text)[:100]!r} is no expression of sizes", hint=_HINT)


def _harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        texts = [one for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        if name == "Pow":
            power = node.args[1] if len(node.args) == 2 else None
            numbers = [one.value for one in ast.walk(power) if isinstance(one, ast.Constant)] if power else []
            return len(numbers) == 1 and isinstance(numbers[0], int) and abs(numbers[0]) <= _MAX_POWER
        inner = name != "Symbol" and any(one in node.args for one in texts)  # Integer("...") would evaluate it
        return name in _FUNCTIONS and not inner
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS or bool(re.fullmatch(r"z?[sufz]+\d+", node.id))
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return bool(_SYMBOL.fullmatch(node.value))
        return isinstance(node.value, bool | float) or (isinstance(node.value, int) and abs(node.value) < _MAX_INTEGER)
    return isinstance(node, _ARITHMETIC)


def _check_container(text: Any, source: Path) -> None:
    """Check that a pytree is made of plain containers: others name a module to import."""
    try:
        waiting = [json.loads(text)[1]]
        while waiting:
            one = waiting.pop()
            context = json.loads(one["context"]) if one["context"] is not None else None
            keys = context if isinstance(context, list) else [] if context is None else [context]
            if one["type"] not in _CONTAINERS or not all(isinstance(key, str | int) for key in keys):
                raise InputError(
                    f"{source}: its inputs or outputs are in a {str(one['type'])[:100]!r}; "
                    "expected tuples, lists and dicts with plain keys",
                    hint=_HINT,
                )
            waiting.extend(one["children_spec"])
    except (TypeError, KeyError, IndexError, ValueError, RecursionError) as error:
        raise InputError(f"{source}: what it takes or returns is not described as torch does it", hint=_HINT) from error


def _refuse_object(_: Any, source: Path) -> None:
    raise InputError(f"{source}: holds an object other than tensors and numbers", hint=_HINT)


_CHECKS: Final[Mapping[str, Callable[[Any, Path], None]]] = {
    "target": _check_operator,
    "as_operator": _check_operator,
    "as_custom_obj": _refuse_object,
    "custom_obj": _refuse_object,
    "expr_str": _check_expression,
    "in_spec": _check_container,
    "out_spec": _check_container,
}
