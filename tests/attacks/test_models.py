"""Models made to harm whoever compiles them: each is refused in bounded time and memory, and nothing of it is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from compiler.capture import capture
from compiler.sources import SourceOptions, loading
from compiler.sources.pickle_file import UnpickledWarning, read_pickle
from compiler.sources.pt2_archive import clean_archive
from compiler.sources.wire import MAX_FIELDS, MAX_MODEL_BYTES, MAX_NODES, MAX_PACKED_BYTES
from isthmus.errors import InputError
from tests.compiler.sources import graphs
from tests.compiler.sources.conftest import classifier, program, quiet

__all__ = ["classifier", "program"]  # fixtures

SECONDS = 60.0  # on a busy machine
MEMORY = 512 << 20  # bytes more than before
ENDS = [graphs.value("x", ["batch", 4])], [graphs.value("y", ["batch", 4])]


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    yield
    assert time.monotonic() - started < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY


def refused(source: Path, message: str, **options: Any) -> None:
    destination = source.parent / "captured.onnx"
    with pytest.raises(InputError, match=message) as caught:
        capture(source, destination, SourceOptions(**options))
    assert len(str(caught.value)) < 2000
    assert not list(source.parent.glob("capture-*"))  # nothing half done is left


def refused_model(tmp_path: Path, model: Any, message: str) -> None:
    refused(graphs.write(tmp_path / "m.onnx", model), message)


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


# Wire format


def field(number: int, content: bytes) -> bytes:
    """Return a length-delimited field."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (field(7, b"\x0a" + varint(1 << 40)), "reaches beyond its message"),
        (field(7, b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), "has no end"),
        (field(7, b"\x0f"), "unknown wire type 7"),
        (field(7, b"\x0b" * 1000), "unknown wire type 3"),  # groups in groups
        (field(7, b"\x02\x00"), "reaches beyond its message"),  # field number 0
        (field(7, b"\x0a"), "cut short"),
    ],
)
def test_bytes_that_are_no_message(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.onnx").write_bytes(content)

    refused(tmp_path / "m.onnx", f"not an ONNX file: .*{message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (field(7, field(1, b"") * (MAX_NODES + 1)), f"at most {MAX_NODES} operators"),
        (field(7, field(1, field(1, b"") * (MAX_FIELDS + 1))), f"at most {MAX_FIELDS} fields"),
        (field(7, field(1, field(4, b"x" * 70_000))), "at most 65536 bytes in one field of node, got 70000"),
        (field(7, field(1, field(5, field(8, b"x" * (65 << 20))))), "bytes in one field of attribute"),
    ],
)
def test_more_of_something_than_any_model_has(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.onnx").write_bytes(content)

    refused(tmp_path / "m.onnx", message)


@pytest.mark.parametrize("levels", [9, 40, 5000])
def test_graphs_in_graphs_in_graphs(tmp_path: Path, levels: int) -> None:
    content = field(1, b"")
    for _ in range(levels):
        content = field(1, field(5, field(6, content)))
    (tmp_path / "m.onnx").write_bytes(field(7, content))

    refused(tmp_path / "m.onnx", "levels deep|nested too deeply")


def test_types_in_types_in_types(tmp_path: Path) -> None:
    content = b""
    for _ in range(5000):
        content = field(4, field(1, content))
    (tmp_path / "m.onnx").write_bytes(field(7, field(11, field(2, content))))

    refused(tmp_path / "m.onnx", "nested too deeply")


def sparse_file(path: Path, size: int, start: bytes = b"") -> Path:
    """Write a file of this size that takes no space: zeros after the start."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
    return path


def test_a_file_of_many_gigabytes(tmp_path: Path) -> None:
    refused(sparse_file(tmp_path / "m.onnx", 1 << 40), f"at most {MAX_MODEL_BYTES} bytes, got {1 << 40}")


def test_integers_that_unfold_in_memory(tmp_path: Path) -> None:
    count = MAX_PACKED_BYTES + 1
    tensor = varint(7 << 3 | 2) + varint(count)
    inner = varint(5 << 3 | 2) + varint(count + len(tensor)) + tensor
    head = varint(7 << 3 | 2) + varint(count + len(inner)) + inner

    refused(sparse_file(tmp_path / "m.onnx", len(head) + count, head), f"at most {MAX_PACKED_BYTES} bytes of packed")


@pytest.mark.parametrize("target", ["/dev/zero", "fifo"])
def test_a_model_that_is_no_file(tmp_path: Path, target: str) -> None:
    if target == "fifo":
        os.mkfifo(tmp_path / "fifo")
        target = str(tmp_path / "fifo")
    (tmp_path / "m.onnx").symlink_to(target)

    refused(tmp_path / "m.onnx", "expected a regular file")


# Weights in other files


def external(tmp_path: Path, *entries: tuple[str, str], dims: tuple[int, ...] = (4,), copies: int = 1) -> Path:
    """Write a model whose weights are described by these entries."""
    names = [f"w{index}" for index in range(copies)]
    nodes = [graphs.node("Sum", ["x", *names], ["y"])]
    model = graphs.graph(nodes, *ENDS)
    for name in names:
        tensor = model.graph.initializer.add(name=name, data_type=TensorProto.FLOAT, dims=dims)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in entries:
            tensor.external_data.add(key=key, value=value)
    (tmp_path / "model").mkdir(exist_ok=True)
    return graphs.write(tmp_path / "model" / "m.onnx", model)


@pytest.mark.parametrize(
    "location",
    ["../secret.bin", "/etc/passwd", "a/../../secret.bin", "link.bin", "folder/secret.bin", "fifo", ".", "", "w\0.bin"],
)
def test_weights_outside_of_the_folder(tmp_path: Path, location: str) -> None:
    source = external(tmp_path, ("location", location))
    (tmp_path / "secret.bin").write_bytes(b"s" * 16)
    (tmp_path / "model" / "a").mkdir()
    (tmp_path / "model" / "link.bin").symlink_to(tmp_path / "secret.bin")
    (tmp_path / "model" / "folder").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "model" / "fifo")

    refused(source, "expected a file in the model's folder")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("offset", "8")], r"tensor 'w0': shape \[4\] takes 16 bytes, got 8"),
        ([("offset", "8"), ("length", "16")], "bytes 8 to 24 lie beyond its 16"),
        ([("offset", "99999999999")], "lie beyond its 16"),
        ([("offset", "-8")], "expected a number as offset, got '-8'"),
        ([("length", "1e3")], "expected a number as length"),
        ([("length", "9" * 400)], "expected a number as length"),
        ([("length", "٣")], "expected a number as length"),
        ([("length", "8")], r"takes 16 bytes, got 8"),
    ],
)
def test_pieces_that_are_not_in_the_file(tmp_path: Path, entries: list[tuple[str, str]], message: str) -> None:
    source = external(tmp_path, ("location", "w.bin"), *entries)
    (tmp_path / "model" / "w.bin").write_bytes(b"w" * 16)

    refused(source, message)


def test_one_file_of_weights_read_a_thousand_times(tmp_path: Path) -> None:
    source = external(tmp_path, ("location", "w.bin"), dims=(4 << 20,), copies=1000)
    sparse_file(tmp_path / "model" / "w.bin", 16 << 20)

    refused(source, f"at most {MAX_MODEL_BYTES} bytes with its weights")


def test_weights_said_to_be_elsewhere_but_not_where(tmp_path: Path) -> None:
    refused(external(tmp_path), "expected a file in the model's folder, got ''")


# Graphs


@pytest.mark.parametrize("dims", [[1 << 62, 4], [1 << 40], [-4], [2] * 17, [0, 1 << 62, 3], [(1 << 63) - 1] * 3])
def test_tensors_that_say_they_are_larger_than_they_are(tmp_path: Path, dims: list[int]) -> None:
    model = graphs.graph([graphs.node("Add", ["x", "w"], ["y"])], *ENDS)
    model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=dims, raw_data=b"\0" * 16)

    refused_model(tmp_path, model, "tensor 'w': (shape|expected at most 16 axes)")


@pytest.mark.parametrize("kind", [0, 99, 8])
def test_tensors_of_unknown_kinds(tmp_path: Path, kind: int) -> None:
    model = graphs.graph([graphs.node("Add", ["x", "w"], ["y"])], *ENDS)
    model.graph.initializer.add(name="w", data_type=kind, dims=[4], raw_data=b"\0" * 16)

    refused_model(tmp_path, model, "tensor 'w'")


def giant(*nodes: Any, **weights: Any) -> Any:
    """Add the sum of what the nodes make, called "big", to x."""
    sums = [graphs.node("ReduceSum", ["big"], ["sum"], keepdims=0), graphs.node("Add", ["x", "sum"], ["y"])]
    return graphs.graph([*nodes, *sums], *ENDS, weights=weights)


def test_a_constant_of_a_terabyte(tmp_path: Path) -> None:
    model = giant(graphs.node("ConstantOfShape", ["shape"], ["big"], name="bomb"), shape=np.array([1 << 38]))

    refused_model(tmp_path, model, r"node 'bomb' \(ConstantOfShape\) makes 274877906944 elements; expected at most")


def test_constants_that_double_again_and_again(tmp_path: Path) -> None:
    names = ["seed", *(f"c{index}" for index in range(39)), "big"]
    nodes = [graphs.node("Concat", [old, old], [new], axis=0, name=f"double_{new}") for old, new in pairwise(names)]
    model = giant(*nodes, seed=np.ones(1, np.float32))

    refused_model(tmp_path, model, r"node 'double_c28' \(Concat\) makes 536870912 elements")


def test_an_expansion_of_what_is_given(tmp_path: Path) -> None:
    nodes = [
        graphs.node("ReduceSum", ["x"], ["one"], keepdims=0),
        graphs.node("Expand", ["one", "shape"], ["big"], name="bomb"),
    ]

    refused_model(tmp_path, giant(*nodes, shape=np.array([1 << 20, 1 << 20])), r"node 'bomb' \(Expand\) makes")


def loop(step: str, kept: graphs.Shape, count: str, start: str, output: str) -> Any:
    """Return a Loop that doubles what it keeps by the operator `step`."""
    attributes: dict[str, Any] = {"axis": 0} if step == "Concat" else {}
    body = helper.make_graph(
        [
            helper.make_node(step, ["kept", "kept"], ["next"], **attributes),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("index", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("kept", TensorProto.FLOAT, kept),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, kept),
        ],
    )
    return graphs.node("Loop", [count, "", start], [output], body=body)


FLAT = graphs.node("Reshape", ["count", "flat"], ["counts"])
MADE: dict[str, list[Any]] = {
    "Range": [
        graphs.node("Range", ["zero", "count", "step"], ["numbers"]),
        graphs.node("Cast", ["numbers"], ["big"], to=TensorProto.FLOAT),
    ],
    "Tile": [graphs.node("Reshape", ["count", "flat"], ["counts"]), graphs.node("Tile", ["one", "counts"], ["big"])],
    "Expand": [
        graphs.node("Reshape", ["count", "flat"], ["counts"]),
        graphs.node("Expand", ["one", "counts"], ["big"]),
    ],
    "Loop": [loop("Concat", [None], "count", "one", "big")],
}


@pytest.mark.slow
@pytest.mark.parametrize("operator", MADE)
def test_constants_whose_size_only_running_tells(tmp_path: Path, operator: str) -> None:
    """The size is computed, so no shape inference sees it: the process that loads the model runs out of memory."""
    count = [graphs.node("Exp", ["power"], ["many"]), graphs.node("Cast", ["many"], ["count"], to=TensorProto.INT64)]
    weights = {"power": np.float64(24), "zero": np.array(0), "step": np.array(1), "flat": np.array([1])}
    model = giant(*count, *MADE[operator], **weights, one=np.ones(1, np.float32))
    path = graphs.write(tmp_path / "m.onnx", model)

    with pytest.raises(InputError, match="ONNX Runtime could not load and run it within"):
        loading.load(path, model.graph.input, observe=False, ranges={"batch": (1, 8)}, what="m.onnx")


def test_a_model_that_never_ends(tmp_path: Path) -> None:
    model = graphs.graph([loop("Add", ["batch", 4], "count", "x", "y")], *ENDS, weights={"count": np.array(1 << 62)})
    path = graphs.write(tmp_path / "m.onnx", model)

    with pytest.raises(InputError, match=r"could not load and run it within .* MiB and 3 s"):
        loading.load(path, model.graph.input, observe=True, ranges={"batch": (1, 8)}, what="m.onnx", seconds=3.0)


def test_sparse_weights_that_unfold(tmp_path: Path) -> None:
    model = giant(graphs.node("Identity", ["thin"], ["big"]))
    sparse = model.graph.sparse_initializer.add(dims=[1 << 40])
    sparse.values.CopyFrom(onnx.numpy_helper.from_array(np.ones(1, np.float32), "thin"))
    sparse.indices.CopyFrom(onnx.numpy_helper.from_array(np.array([7]), "thin_indices"))

    refused_model(tmp_path, model, "sparse tensor 'thin': expected at most 268435456 elements, got 1099511627776")


def test_functions_that_call_functions_that_call_functions(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    functions = [helper.make_function("own", "F0", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], opsets)]
    for level in range(1, 30):
        calls = [
            helper.make_node(f"F{level - 1}", ["a"], ["t"], domain="own"),
            helper.make_node(f"F{level - 1}", ["t"], ["b"], domain="own"),
        ]
        functions.append(helper.make_function("own", f"F{level}", ["a"], ["b"], calls, opsets))
    model = graphs.graph(
        [graphs.node("F29", ["x"], ["y"], domain="own")], *ENDS, domains=[("own", 1)], functions=functions
    )

    refused_model(tmp_path, model, f"at most {MAX_NODES} operators with functions inlined, got {1 << 29}")


def test_a_function_that_calls_itself(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    functions = [
        helper.make_function("own", name, ["a"], ["b"], [helper.make_node(called, ["a"], ["b"], domain="own")], opsets)
        for name, called in (("Odd", "Even"), ("Even", "Odd"))
    ]
    model = graphs.graph(
        [graphs.node("Odd", ["x"], ["y"], domain="own")], *ENDS, domains=[("own", 1)], functions=functions
    )

    refused_model(tmp_path, model, "function '(Odd|Even)' calls itself")


def test_a_graph_that_runs_in_circles(tmp_path: Path) -> None:
    nodes = [
        graphs.node("Add", ["x", "b"], ["a"]),
        graphs.node("Relu", ["a"], ["b"]),
        graphs.node("Relu", ["b"], ["y"]),
    ]

    refused_model(tmp_path, graphs.graph(nodes, *ENDS), "not a valid ONNX model: .*topologically sorted")


def test_one_name_for_two_values(tmp_path: Path) -> None:
    nodes = [graphs.node("Relu", ["x"], ["y"]), graphs.node("Abs", ["x"], ["y"])]

    refused_model(tmp_path, graphs.graph(nodes, *ENDS), "not a valid ONNX model")


def test_a_message_that_would_fill_the_screen(tmp_path: Path) -> None:
    refused_model(tmp_path, graphs.graph([graphs.node("Z" * 60_000, ["x"], ["y"])], *ENDS), "there is no operator 'ZZZ")


# Pickles


def test_a_pickle_is_not_read_without_being_asked_to(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(pickle.dumps(Evil(tmp_path / "trace")))

    refused(tmp_path / "w.pt", "a pickle, which can run code", factory="nets.py:make")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("form", ["zip", "plain", "legacy"])
def test_a_pickle_that_runs_code_does_not_run_it(tmp_path: Path, form: str) -> None:
    path, evil = tmp_path / "w.pt", Evil(tmp_path / "trace")
    if form == "plain":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save({"head": torch.ones(2), "more": evil}, path, _use_new_zipfile_serialization=form == "zip")

    with (
        pytest.warns(UnpickledWarning),
        pytest.raises(InputError, match=r"holds more than tensors|torch 1\.6 or newer"),
    ):
        read_pickle(path)
    assert not (tmp_path / "trace").exists()


def test_a_program_in_a_file_of_weights(tmp_path: Path) -> None:
    with quiet():
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "w.pt")

    with (
        pytest.warns(UnpickledWarning),
        pytest.raises(InputError, match="a TorchScript archive, which holds a program"),
    ):
        read_pickle(tmp_path / "w.pt")


def test_an_archive_that_unfolds(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data/0", b"\0" * (64 << 20))

    with pytest.warns(UnpickledWarning), pytest.raises(InputError, match="expected an archive without compression"):
        read_pickle(tmp_path / "w.pt")


@pytest.mark.parametrize("claim", [(1 << 63) - 1, 1 << 40, 200 << 20])
def test_safetensors_that_claim_a_giant_header(tmp_path: Path, claim: int) -> None:
    (tmp_path / "nets.py").write_text("def make():\n    return None\n")
    (tmp_path / "w.safetensors").write_bytes(claim.to_bytes(8, "little") + b"{}")

    refused(tmp_path / "w.safetensors", "not a safetensors file", factory="nets.py:make")


# Exported programs

Change = Callable[[dict[str, bytes]], None]


def rewritten(program: Path, target: Path, change: Change, *, method: int = zipfile.ZIP_STORED) -> Path:
    """Copy a program with some entries changed, added or left out."""
    with zipfile.ZipFile(program) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return target


def edit_json(suffix: str, change: Callable[[Any], None]) -> Change:
    def apply(entries: dict[str, bytes]) -> None:
        name = next(name for name in entries if name.endswith(suffix))
        document = json.loads(entries[name])
        change(document)
        entries[name] = json.dumps(document).encode()

    return apply


def set_expression(text: str) -> Change:
    def change(document: Any) -> None:
        sizes = document["graph_module"]["graph"]["tensor_values"]["images"]["sizes"]
        sizes[0]["as_expr"]["expr_str"] = text

    return edit_json("models/model.json", change)


def set_target(text: str) -> Change:
    return edit_json("model.json", lambda document: document["graph_module"]["graph"]["nodes"][0].update(target=text))


def set_spec(spec: Any) -> Change:
    def change(document: Any) -> None:
        document["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps([1, spec])

    return edit_json("models/model.json", change)


def set_pickled(document: Any) -> None:
    next(iter(document["config"].values()))["use_pickle"] = True


def add(name: str, data: bytes = b"x") -> Change:
    return lambda entries: entries.update({f"{next(iter(entries)).partition('/')[0]}{name}": data})


LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
ENUM = {"__enum__": True, "fqn": "antigravity:nothing", "name": "x"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_target("torch.os.system"), r"calls 'torch\.os\.system', which is not an operator of PyTorch"),
        (set_target("torch.ops.aten.from_file.default"), "is not an operator"),
        (set_target("torch.ops.load_library"), "is not an operator"),
        (set_target("_operator.methodcaller"), "is not an operator"),
        (set_target("#evil:run"), "is not an operator"),
        (set_target("builtins.exec"), "is not an operator"),
        (set_expression("__import__('os').mkdir('TRACE')"), "is no expression of sizes"),
        (set_expression("Symbol('s0').__class__.__base__.__subclasses__()"), "is no expression of sizes"),
        (set_expression('Integer(\'__import__("os").mkdir("TRACE")\')'), "is no expression of sizes"),
        (set_expression("Symbol('s0; import os')"), "is no expression of sizes"),
        (set_expression("Pow(Integer(9), Integer(99999999))"), "is no expression of sizes"),
        (set_expression("[open('TRACE', 'w') for _ in (1,)]"), "is no expression of sizes"),
        (set_expression("(" * 3000 + ")" * 3000), "is no expression of sizes"),
        (set_expression("1+" * 3000 + "1"), "is no expression of sizes"),
        (set_spec({"type": "builtins.dict", "context": json.dumps([ENUM]), "children_spec": [LEAF]}), "plain keys"),
        (set_spec({"type": "collections.defaultdict", "context": "{}", "children_spec": []}), "are in a 'collections"),
        (set_spec(3), "is not described as torch does it"),
        (edit_json("weights_config.json", set_pickled), "is kept as a pickle, which can run code"),
        (add("/data/aotinductor/model/evil.so"), r"holds '.*evil\.so', which a program .* does not need"),
        (add("/../../evil.py"), "does not need"),
        (add("/data/constants/custom_obj_0"), "does not need"),
        (add("/data/weights/model.pt"), "does not need"),
        (add("2/data/weights/weight_9"), "does not need"),
        (add("/models/second.json", b"{}"), "expected one program in the archive, got 2"),
        (lambda entries: entries.pop(next(name for name in entries if "models/" in name)), "one program .* got 0"),
    ],
)
def test_a_program_that_wants_more_than_arithmetic(
    program: Path, tmp_path: Path, change: Change, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    refused(rewritten(program, tmp_path / "m.pt2", change), message)
    assert not (tmp_path / "TRACE").exists()


def test_a_program_in_an_archive_that_unfolds(program: Path, tmp_path: Path) -> None:
    changed = rewritten(program, tmp_path / "m.pt2", lambda _: None, method=zipfile.ZIP_DEFLATED)

    refused(changed, "expected an archive without compression")


def test_one_entry_twice(program: Path, tmp_path: Path) -> None:
    shutil.copy(program, tmp_path / "m.pt2")
    with zipfile.ZipFile(tmp_path / "m.pt2", "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        name = next(name for name in archive.namelist() if name.endswith("weight_0"))
        archive.writestr(name, b"other")

    refused(tmp_path / "m.pt2", "does not need")


@pytest.mark.slow
def test_sample_inputs_that_run_code_are_not_unpickled(program: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save((Evil(tmp_path / "trace"),), buffer)

    def change(entries: dict[str, bytes]) -> None:
        entries[next(name for name in entries if "sample_inputs" in name)] = buffer.getvalue()

    model = capture(rewritten(program, tmp_path / "m.pt2", change), tmp_path / "out.onnx")

    assert model.axes["logits"] == ("batch", "")
    assert not (tmp_path / "trace").exists()


def test_guards_that_are_code_are_left_out(program: Path, tmp_path: Path) -> None:
    change = edit_json("models/model.json", lambda document: document.update(guards_code=["__import__('os').abort()"]))

    clean_archive(rewritten(program, tmp_path / "m.pt2", change), tmp_path / "clean.pt2")

    assert b"abort" not in (tmp_path / "clean.pt2").read_bytes()


# Hugging Face folders


@pytest.fixture
def folder(classifier: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(classifier, tmp_path / "hf"))


def test_code_in_a_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")

    refused(folder, "the model's code is in the folder, and is not run from there")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_pickled_weights_of_a_folder_are_not_run(folder: Path, tmp_path: Path, allow_pickle: bool) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"classifier.bias": Evil(tmp_path / "trace")}, folder / "pytorch_model.bin")

    refused(folder, "transformers cannot load it" if allow_pickle else "a pickle, which", allow_pickle=allow_pickle)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "evil.bin", "missing.safetensors"])
def test_an_index_that_points_elsewhere(folder: Path, name: str) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "model.safetensors")
    (folder / "evil.bin").write_bytes(b"pickle")
    index = {"metadata": {}, "weight_map": {"classifier.bias": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    refused(folder, "expected safetensors files of the same folder")


def test_an_adapter_of_pickles(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["query"]}))
    torch.save({"x": Evil(tmp_path / "trace")}, adapter / "adapter_model.bin")

    refused(folder, r"adapter_model\.bin: a pickle, which can run code", adapter=adapter)
    refused(folder, "peft cannot merge it", adapter=adapter, allow_pickle=True)
    assert not (tmp_path / "trace").exists()


def test_a_folder_for_another_machine_is_not_looked_up(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"architectures": ["BertForMaskedLM"], "model_type": "no"}))
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")

    refused(tmp_path / "hf", "transformers cannot load it as fill-mask")
