"""Opens and runs what TVM compiled, with as little of TVM as that takes: two libraries of 6 MB, no compiler.

`import tvm` would load 260 MB of compiler (and PyTorch, where that is installed). The runtime alone is a shared library
beside it that registers itself with `tvm_ffi`; this module loads just that.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import math
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError, safe_open

from isthmus.errors import BundleError, ConfigError, InputError, MissingExtraError
from isthmus.machine import machine, processor_features
from isthmus.tensors import DTYPES, Array, datatype_of
from isthmus.tvm_artifact import (
    ENTRY,
    LIBRARY,
    WEIGHTS,
    Port,
    check_machine,
    read_artifact,
    release_of,
)

_ALIGNMENT: Final = 64  # bytes: compiled code loads whole vectors from where tensors begin
_CPU, _POOLED_ALLOCATOR = 1, 2  # DLPack's device type, TVM's allocator
_BIG_CORES: Final = 1  # the thread pool prefers the quick cores of a big.LITTLE processor
_runtime_lock: Final = threading.Lock()


def runtime_version() -> str:
    """Return the version of the TVM that is installed.

    Raises:
        MissingExtraError: None is.
        ConfigError: The package `tvm` is another project's.
    """
    try:
        return importlib.metadata.version("apache-tvm")
    except importlib.metadata.PackageNotFoundError:
        pass
    if importlib.util.find_spec("tvm") is None:
        raise MissingExtraError("TVM (apache-tvm)", "edge-tvm")
    raise ConfigError(
        "the installed package tvm is not Apache TVM: that name belongs to a library about the time value of money",
        hint="pip uninstall tvm && pip install 'isthmus[edge-tvm]'",
        reason="wrong-package",
    )


class TvmModule:
    """A compiled model with its weights, in memory.

    Threads may share it but not call it at the same time.

    Args:
        path: The entry file, model.json.
        threads: Threads that one call may use.

    Raises:
        BundleError: The files are not what they should be, or the code is for another machine or TVM.
        MissingExtraError: TVM is not installed.
    """

    def __init__(self, path: Path, *, threads: int) -> None:
        artifact = read_artifact(path)
        check_machine(artifact, machine=machine(), features=processor_features())
        installed = runtime_version()
        if release_of(installed) != artifact.tvm:
            raise BundleError(
                f"cannot open {ENTRY}: the model was compiled by TVM {artifact.tvm}, {installed[:40]} is installed",
                hint=f"pip install 'apache-tvm=={artifact.tvm}.*', or compile the model again",
                reason="wrong-runtime-version",
            )
        self.artifact: Final = artifact
        self._threads = threads
        self._configured: set[int] = set()
        self._ffi = _load_runtime()
        self._main = _load_library(self._ffi, path.parent / LIBRARY, len(artifact.inputs) + bool(artifact.weights))
        self._weights = self._load_weights(path.parent / WEIGHTS)
        self._rows = [_aligned(port.shape, DTYPES[port.datatype]) for port in artifact.inputs]
        self._arguments = [self._ffi.from_dlpack(row) for row in self._rows]
        self._configure_threads = self._ffi.get_global_func("runtime.config_threadpool")

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name, in arrays of their own.

        Rows beyond the ones that the code was compiled for are computed one after the other.

        Raises:
            InputError: Names, datatypes, shapes or indices are not the model's.
        """
        count = self._check(inputs)
        self._prepare_thread()
        if count == 1:
            return dict(zip((port.name for port in self.artifact.outputs), self._call(inputs, 0), strict=True))
        results = [np.empty(_with_rows(port, count), DTYPES[port.datatype]) for port in self.artifact.outputs]
        for row in range(count):
            for port, result, value in zip(self.artifact.outputs, results, self._call(inputs, row), strict=True):
                result[_one_row(port, row)] = value
        return {port.name: result for port, result in zip(self.artifact.outputs, results, strict=True)}

    def _call(self, inputs: Mapping[str, Array], row: int) -> list[Array]:
        for port, place in zip(self.artifact.inputs, self._rows, strict=True):
            np.copyto(place, inputs[port.name][_one_row(port, row)])
        try:
            results = self._main(*self._arguments, *self._weights)
        except Exception as error:  # TVM's errors share no base class
            raise InputError(f"TVM cannot run the model: {str(error)[:300]}", reason="cannot-infer") from error
        if len(self.artifact.outputs) == 1 and isinstance(results, self._ffi.Tensor):
            results = (results,)
        # A result may share its memory with an input or a weight: the copy is the caller's own.
        return [np.from_dlpack(result).copy() for result in results]

    def _check(self, inputs: Mapping[str, Array]) -> int:
        """Return how many rows there are."""
        known = {port.name for port in self.artifact.inputs}
        unknown = [name for name in inputs if name not in known]
        if unknown:
            raise _refusal(f"no input {unknown[0][:80]!r}; the model's inputs are {', '.join(sorted(known))}")
        counts: set[int] = set()
        for port in self.artifact.inputs:
            array = inputs.get(port.name)
            if array is None:
                raise _refusal(f"input {port.name!r} is missing")
            _check_input(port, array)
            if port.batch_axis is not None:
                counts.add(array.shape[port.batch_axis])
        if len(counts) > 1:
            raise _refusal(f"all inputs must have the same number of rows, got {sorted(counts)}")
        count = counts.pop() if counts else 1
        unbatched = [port.name for port in self.artifact.outputs if port.batch_axis is None]
        if count > 1 and unbatched:
            raise _refusal(f"output {unbatched[0]!r} has no batch axis, so one row at a time, got {count}")
        return count

    def _prepare_thread(self) -> None:
        # TVM has one thread pool for each thread that calls it; a pool takes as many threads as there are processors
        # until it is told otherwise.
        caller = threading.get_ident()
        if caller not in self._configured:
            self._configure_threads(_BIG_CORES, self._threads)
            self._configured.add(caller)

    def _load_weights(self, path: Path) -> list[Any]:
        """Return the tuple of weights that the code takes last; nothing when it takes none."""
        if not self.artifact.weights:
            return []
        tensors = []
        try:
            with safe_open(path, framework="numpy") as file:
                names = set(file.keys())
                if names != {spec.name for spec in self.artifact.weights}:
                    raise BundleError(
                        f"cannot open {path.name}: expected the {len(self.artifact.weights)} weights that {ENTRY} "
                        f"lists, got {len(names)} of other names",
                        reason="cannot-open",
                    )
                for spec in self.artifact.weights:
                    found = file.get_tensor(spec.name)
                    if datatype_of(found) != spec.datatype or found.shape != spec.shape:
                        raise BundleError(
                            f"cannot open {path.name}: {spec.name}: expected {spec.datatype}{list(spec.shape)}, "
                            f"got {found.dtype}{list(found.shape)}",
                            reason="cannot-open",
                        )
                    place = _aligned(spec.shape, DTYPES[spec.datatype])
                    np.copyto(place, found)
                    tensors.append(self._ffi.from_dlpack(place))
        except (OSError, SafetensorError) as error:
            raise BundleError(f"cannot open {path.name}: {str(error)[:300]}", reason="cannot-open") from error
        return [self._ffi.convert(tuple(tensors))]


def _check_input(port: Port, array: Array) -> None:
    expected = list(_with_rows(port, -1))
    fits = array.ndim == len(expected) and all(
        want in (-1, got) for want, got in zip(expected, array.shape, strict=True)
    )
    if array.dtype != DTYPES[port.datatype] or not fits or 0 in array.shape:
        raise _refusal(
            f"input {port.name!r} must be {port.datatype}{expected}, got {array.dtype}{list(array.shape)[:8]}"
        )
    if port.low is not None and port.high is not None:
        low, high = int(array.min()), int(array.max())
        if low < port.low or high > port.high:
            wrong = low if low < port.low else high
            raise _refusal(f"input {port.name!r} holds indices from {port.low} to {port.high}, got {wrong}")


def _refusal(what: str) -> InputError:
    return InputError(f"TVM cannot run the model: {what}", reason="cannot-infer")


def _with_rows(port: Port, rows: int) -> tuple[int, ...]:
    return tuple(rows if axis == port.batch_axis else size for axis, size in enumerate(port.shape))


def _one_row(port: Port, row: int) -> tuple[slice, ...]:
    if port.batch_axis is None:
        return (...,)  # type: ignore[return-value]  # the whole
    return (*(slice(None),) * port.batch_axis, slice(row, row + 1))


def _aligned(shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    """Return an array whose first byte lies where compiled code expects it."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


@contextmanager
def _no_torch() -> Iterator[None]:
    """Keep `tvm_ffi` from importing PyTorch, which it does wherever that is installed."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def _load_runtime() -> ModuleType:
    spec = importlib.util.find_spec("tvm")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("TVM (apache-tvm)", "edge-tvm")
    library = Path(spec.submodule_search_locations[0]) / "lib" / "libtvm_runtime.so"
    os.environ.setdefault("TVM_BIND_THREADS", "0")  # binding would also pin the thread of the caller to one core
    with _runtime_lock:
        try:
            with _no_torch():
                import tvm_ffi
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        except (ImportError, OSError) as error:
            raise ConfigError(
                f"the installation of apache-tvm is broken: {str(error)[:300]}", hint="install it again"
            ) from error
    return tvm_ffi


def _load_library(ffi: ModuleType, path: Path, expected: int) -> Any:
    try:
        # An absolute path: a bare name would be looked for where the system keeps its libraries.
        machine = ffi.load_module(path.resolve(), keep_module_alive=False)["vm_load_executable"]()
        machine["vm_initialization"](_CPU, 0, _POOLED_ALLOCATOR)
        arguments = machine["get_function_arity"]("main")
        main = machine["main"]
    except Exception as error:  # its errors share no base class
        raise BundleError(f"cannot open {path.name}: {str(error)[-300:]}", reason="cannot-open") from error
    if arguments != expected:
        raise BundleError(
            f"cannot open {path.name}: it takes {arguments} arguments, {ENTRY} describes {expected}",
            reason="cannot-open",
        )
    return main
