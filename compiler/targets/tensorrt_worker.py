"""Parses one ONNX graph with TensorRT and builds its engine, in a process of its own: TensorRT can crash on a graph.

It is run by its path with the folder of a job as only argument, and imports nothing of this project. In the folder are
graph.onnx and job.json; it writes `plan` (the engine) and result.json, or only a result.json with the field "failed",
and notes in `progress`, line by line, which node it is at: the last thing that is known when it ends by a signal.

The two libraries, `tensorrt` and `tensorrt_rtx`, share one interface. Where they differ:
* weakly typed networks exist in TensorRT 10 only, where strong typing must be asked for;
* only TensorRT-RTX builds for compute capabilities that it is told;
* only TensorRT measures kernels while it builds, and keeps what it measured in a timing cache.

Parts of an engine get names that depend on the order of addresses in memory. So the process starts itself again with
addresses that are the same in every run, where the system allows that: then the same job gives the same bytes, but for
int8, where they depend on the order of threads, too.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, Final

_ADDR_NO_RANDOMIZE: Final = 0x0040000  # <sys/personality.h>
_ASK: Final = 0xFFFFFFFF
_AT_NODE: Final = "Parsing node: "
_UNKNOWN: Final = "it has no such operator"
_DATATYPES: Final = {
    "BOOL": "BOOL", "FLOAT": "FP32", "HALF": "FP16", "INT32": "INT32", "INT64": "INT64", "INT8": "INT8",
    "UINT8": "UINT8",
}  # fmt: skip


class Failure(Exception):  # noqa: N818 - it is what the result calls it
    """The engine cannot be built: at which step, why, and at which node where that is known."""

    def __init__(self, step: str, message: str, operator: str = "", node: str = "") -> None:
        super().__init__(message)
        self.fields = {"failed": step, "message": " ".join(message.split()), "operator": operator, "node": node}


def fix_addresses() -> bool:
    """Return whether memory has the same addresses in every run; start again so that it has, where that is allowed."""
    personality = ctypes.CDLL(None).personality
    now = int(personality(_ASK))
    if now != -1 and not now & _ADDR_NO_RANDOMIZE and personality(now | _ADDR_NO_RANDOMIZE) != -1:
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - this very program
    return now != -1 and bool(now & _ADDR_NO_RANDOMIZE)  # containers may forbid it


def main(folder: Path) -> None:
    """Do the job in the folder."""
    fixed = fix_addresses()
    job = json.loads((folder / "job.json").read_text())
    try:
        result = run(job, folder) | {"fixed_addresses": fixed}
    except Failure as failure:
        result = failure.fields
    (folder / "result.json").write_text(json.dumps(result))


def run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Build the engine; return what is known of it.

    Raises:
        Failure: It cannot be built.
    """
    trt = _library(job["modules"])
    errors: list[str] = []
    with (folder / "progress").open("w", buffering=1) as progress:
        logger = _logger(trt, errors, progress)
        builder = trt.Builder(logger)
        typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if typed is None else 1 << int(typed))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse((folder / "graph.onnx").read_bytes()):
            raise _not_parsed([parser.get_error(index) for index in range(parser.num_errors)], errors)
        _check_interface(network, job)
        config = _configuration(trt, builder, network, job)
        cache = _timing_cache(config, job)
        progress.write("building\n")
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise Failure("build", errors[0] if errors else "it gave no reason")
        (folder / "plan").write_bytes(bytes(plan))
        if cache is not None:
            _replace(cache, bytes(config.get_timing_cache().serialize()))
    return {"version": str(trt.__version__), "layers": int(network.num_layers)}


def _library(names: list[str]) -> Any:
    for name in names[:-1]:
        try:
            return import_module(name)
        except ImportError:
            continue  # a package and its bindings can be installed under two names
    return import_module(names[-1])


def _logger(trt: Any, errors: list[str], progress: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # a class that exists only once the library is imported
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(message)
            elif message.startswith(_AT_NODE):
                progress.write(message.removeprefix(_AT_NODE) + "\n")

    return Logger()


def _not_parsed(found: list[Any], errors: list[str]) -> Failure:
    for error in found:
        if error.node_operator():
            text = _UNKNOWN if error.desc() in ("", "false") else error.desc()
            return Failure("parse", text, error.node_operator(), error.node_name())
    texts = [error.desc() for error in found] or errors or ["it gave no reason"]
    return Failure("parse", texts[0])


def _check_interface(network: Any, job: dict[str, Any]) -> None:
    """Check that the network takes and gives what the model does, by name, datatype and shape."""
    for what, count, get in (
        ("input", network.num_inputs, network.get_input),
        ("output", network.num_outputs, network.get_output),
    ):
        tensors = {tensor.name: tensor for tensor in map(get, range(count))}
        for name, datatype, shape in job[what + "s"]:
            tensor = tensors.get(name)
            if tensor is None:
                raise Failure("interface", f"{what} {name!r} of the model got lost")
            made = (_DATATYPES.get(tensor.dtype.name, tensor.dtype.name), list(tensor.shape))
            fits = len(made[1]) == len(shape) and all(
                -1 in pair or pair[0] == pair[1] for pair in zip(shape, made[1], strict=True)
            )
            if made[0] != datatype or not fits:
                raise Failure(
                    "interface", f"{what} {name!r} would be {made[0]}{made[1]}, the model has {datatype}{shape}"
                )


def _configuration(trt: Any, builder: Any, network: Any, job: dict[str, Any]) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace"])
    profile = builder.create_optimization_profile()
    for tensor in map(network.get_input, range(network.num_inputs)):
        if tensor.is_shape_tensor:
            if tensor.name not in job["values"]:
                raise Failure("values", tensor.name)
            profile.set_shape_input(tensor.name, *job["values"][tensor.name])
        elif tensor.name in job["shapes"]:
            profile.set_shape(tensor.name, *job["shapes"][tensor.name])
    config.add_optimization_profile(profile)
    if job["capabilities"]:
        known = trt.ComputeCapability.__members__
        config.num_compute_capabilities = len(job["capabilities"])
        for index, name in enumerate(job["capabilities"]):
            if name not in known or not config.set_compute_capability(known[name], index):
                there = ", ".join(sorted(entry.lower() for entry in known if entry.startswith("SM")))
                raise Failure("capability", f"{name.lower()!r}; it knows {there}")
    return config


def _timing_cache(config: Any, job: dict[str, Any]) -> Path | None:
    """Give the builder what earlier builds measured on this GPU; return where to keep what this one measures."""
    if not job["timing_cache"]:
        return None
    path = Path(job["timing_cache"])
    before = path.read_bytes() if path.is_file() else b""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TensorRT-RTX has the calls, and does nothing
        cache = config.create_timing_cache(before) or config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return path


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
