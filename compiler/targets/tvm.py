"""TVM on the device: machine code for one kind of processor, and the weights in the form that the code wants them in.

Rules:
* The code is for batch 1 and fixed lengths; the runtime computes a batch row by row.
* Constants are taken out of the library after the schedules have packed them, so that two versions of one model
  differ in weights.safetensors alone.
* Same model, same bytes: nothing in the library depends on the time, a path or the process.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Final, Literal

import numpy as np
from safetensors.numpy import save_file

from compiler.capture import CapturedModel
from compiler.targets import BuildOptions, Built, UnsupportedModelError
from isthmus.errors import InputError, IsthmusError, MissingExtraError
from isthmus.machine import machine
from isthmus.tensors import Array, datatype_of
from isthmus.tvm_artifact import ENTRY, LIBRARY, WEIGHTS, Artifact, Tensor, release_of
from isthmus.tvm_module import TvmModule, runtime_version

if importlib.util.find_spec("tvm") is None:  # imported for good by `build` only: it takes seconds and 300 MB
    raise ModuleNotFoundError("No module named 'tvm'", name="tvm")

_SEARCHED: Final = "a search measured code and kept what was fastest; from the same database it finds the same"
_TRIPLES: Final[Mapping[str, str]] = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}
_DEFAULT_CPU: Final[Mapping[str, str]] = {"x86_64": "x86-64-v3", "aarch64": "generic"}
_ATTRIBUTES: Final[Mapping[str, list[str]]] = {"x86_64": [], "aarch64": ["+neon"]}
_LINKERS: Final[Mapping[str, tuple[tuple[str, ...], str]]] = {  # commands, Debian's package
    "x86_64": (("x86_64-linux-gnu-g++", "g++", "c++"), "g++"),
    "aarch64": (("aarch64-linux-gnu-g++",), "g++-aarch64-linux-gnu"),
}
_LINK_OPTIONS: Final = ("-Wl,--build-id=none", "-Wl,-z,relro,-z,now,-z,noexecstack", "-s")
_CPU_FLAGS: Final[Mapping[str, str]] = {  # LLVM's name of what instructions may be used -> /proc/cpuinfo's
    "sse3": "pni", "ssse3": "ssse3", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "sse4a": "sse4a", "popcnt": "popcnt",
    "cx16": "cx16", "movbe": "movbe", "lzcnt": "abm", "bmi": "bmi1", "bmi2": "bmi2", "tbm": "tbm", "adx": "adx",
    "aes": "aes", "pclmul": "pclmulqdq", "vaes": "vaes", "vpclmulqdq": "vpclmulqdq", "gfni": "gfni", "sha": "sha_ni",
    "f16c": "f16c", "fma": "fma", "fma4": "fma4", "xop": "xop", "avx": "avx", "avx2": "avx2", "avxvnni": "avx_vnni",
    "avx512f": "avx512f", "avx512cd": "avx512cd", "avx512bw": "avx512bw", "avx512dq": "avx512dq",
    "avx512vl": "avx512vl", "avx512ifma": "avx512ifma", "avx512vbmi": "avx512vbmi", "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni", "avx512bitalg": "avx512_bitalg", "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512bf16": "avx512_bf16", "avx512fp16": "avx512_fp16", "amx-tile": "amx_tile", "amx-int8": "amx_int8",
    "amx-bf16": "amx_bf16",
    "fp-armv8": "fp", "neon": "asimd", "fullfp16": "asimdhp", "dotprod": "asimddp", "i8mm": "i8mm", "bf16": "bf16",
    "lse": "atomics", "crc": "crc32", "rdm": "asimdrdm", "fp16fml": "asimdfhm", "complxnum": "fcma", "jsconv": "jscvt",
    "rcpc": "lrcpc", "sve": "sve", "sve2": "sve2", "sme": "sme", "sha2": "sha2",
}  # fmt: skip


class TvmTarget:
    """The light model as a library that TVM compiled, in full precision."""

    role: ClassVar[Literal["light", "heavy"]] = "light"
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    platforms: ClassVar[tuple[str, ...]] = ("x86_64", "aarch64")
    tools: ClassVar[tuple[str, ...]] = ("apache-tvm", "apache-tvm-ffi")
    runs_here: ClassVar[bool] = True

    def settings(self, precision: str) -> tuple[str, ...]:
        """Return the one way there is."""
        del precision
        return ("default",)

    def build(self, model: CapturedModel, folder: Path, options: BuildOptions) -> Built:
        """Compile the model for `options.platform` and `options.cpu`, tuned as long as `options.tuning` says."""
        version = runtime_version()
        tvm = _import_tvm()
        link = _linker(options.platform)
        target, cpu = _target(tvm, options.platform, options.cpu)
        from compiler.schedules import lower
        from compiler.targets.tvm_import import import_model

        imported = import_model(model)
        note = ""
        if options.tuning.trials or options.tuning.seconds:
            from compiler.tuning import lower_tuned

            _check_tunable(options.platform)
            tuned = lower_tuned(imported.module, target, options.tuning, options.advance)
            lowered, note = tuned.module, tuned.note
        else:
            lowered = lower(imported.module, target)
        for name, kernel in imported.kernels.items():
            lowered[name] = kernel
        lifted, weights = lift_weights(lowered)
        try:
            tvm.relax.build(lifted, target).export_library(str(folder / LIBRARY), fcompile=link)
        except RuntimeError as error:
            raise _cannot_compile(error) from error
        artifact = Artifact(
            tvm=release_of(version),
            platform=options.platform,  # `_target` knows it
            cpu=cpu,
            features=_features(tvm, target),
            inputs=imported.inputs,
            outputs=imported.outputs,
            weights=tuple(
                Tensor(name=name, datatype=datatype_of(array), shape=array.shape) for name, array in weights.items()
            ),
        )
        save_file(weights, folder / WEIGHTS)
        (folder / ENTRY).write_bytes(artifact.to_json())
        return Built(ENTRY, note=note, not_reproducible=_SEARCHED if note else "")

    def open(self, entry: Path, *, threads: int) -> TvmModule:
        """Load the library."""
        try:
            return TvmModule(entry, threads=threads)
        except MissingExtraError:
            raise
        except IsthmusError as error:
            raise InputError(f"TVM {error.message}", hint=error.hint) from error


def _check_tunable(platform: str) -> None:
    """Refuse to search for another machine: candidates are run here."""
    if platform != machine():
        raise InputError(
            f"TVM cannot search for faster code for {platform} on {machine()}",
            hint="leave out tune_trials and tune_minutes, or compile on such a machine",
        )


def lift_weights(module: Any) -> tuple[Any, dict[str, Array]]:
    """Return the module with its constants as one more parameter of `main`, a tuple, and their values by name.

    Names follow the order in which `main` uses them first, so that they are the same for every version of a model.
    Numbers that are no arrays stay.
    """
    from tvm import IRModule, relax
    from tvm.ir import GenericConst

    main = module["main"]
    found: dict[Any, Any] = {}

    def collect(expression: Any) -> None:
        if isinstance(expression, GenericConst) and expression not in found:
            array = expression.value.numpy()
            if array.ndim > 0:
                found[expression] = array

    relax.analysis.post_order_visit(main.body, collect)
    if not found:
        return module, {}
    names = [f"w{index:05d}" for index in range(len(found))]
    bundle = relax.Var("weights", relax.TupleType([constant.ty for constant in found]))
    places = {constant: relax.TupleGetItem(bundle, index) for index, constant in enumerate(found)}

    @relax.expr_functor.mutator
    class Lift(relax.PyExprMutator):  # type: ignore[misc]
        def visit_generic_const_(self, constant: Any) -> Any:
            return places.get(constant, constant)

    lifter = Lift(module)
    body = lifter.visit_expr(main.body)
    lifted = relax.Function([*main.params, bundle], body, main.ret_ty, main.is_pure, main.attrs)
    functions = {variable: function for variable, function in module.functions_items() if variable.name_hint != "main"}
    functions[module.get_global_var("main")] = lifted
    weights = {name: np.ascontiguousarray(array) for name, array in zip(names, found.values(), strict=True)}
    return IRModule(functions, attrs=module.attrs), weights


def _import_tvm() -> ModuleType:
    hook = sys.excepthook
    tvm = importlib.import_module("tvm")
    sys.excepthook = hook  # TVM's own ends every child process when an error reaches the top
    return tvm


def _target(tvm: ModuleType, platform: str, cpu: str) -> tuple[Any, str]:
    """Return TVM's description of the processor, and its name.

    Raises:
        InputError: LLVM knows no such processor.
    """
    if platform not in _TRIPLES:
        raise InputError(f"TVM compiles for {', '.join(_TRIPLES)}, not for {platform!r}", hint="mend platform")
    name = cpu or _DEFAULT_CPU[platform]
    kind: dict[str, Any] = {"kind": "llvm", "mtriple": _TRIPLES[platform]}
    known = sorted(str(known) for known in tvm.target.codegen.llvm_get_cpu_archlist(tvm.target.Target(kind)))
    if name not in known:
        close = get_close_matches(name, known, n=3)
        raise InputError(
            f"TVM knows no {platform} processor {name[:64]!r}",
            hint=f"did you mean {' or '.join(close)}?" if close else f"leave cpu out for {_DEFAULT_CPU[platform]}",
        )
    kind |= {"mcpu": name, "num-cores": 1}
    if _ATTRIBUTES[platform]:
        kind["mattr"] = _ATTRIBUTES[platform]
    return tvm.target.Target(kind), name


def _features(tvm: ModuleType, target: Any) -> tuple[str, ...]:
    """Return what the code may use, as /proc/cpuinfo calls it."""
    names = (str(name) for name in tvm.target.codegen.llvm_get_cpu_features(target))
    return tuple(sorted({_CPU_FLAGS[name] for name in names if name in _CPU_FLAGS}))


def _linker(platform: str) -> Callable[..., None]:
    """Return what links object files to a library for the platform.

    Raises:
        InputError: There is no such linker here; the hint names the Debian package.
    """
    from tvm.support import cc

    if platform not in _LINKERS:
        raise InputError(f"TVM compiles for {', '.join(_LINKERS)}, not for {platform!r}", hint="mend platform")
    commands, package = _LINKERS[platform]
    found = next((command for command in commands if shutil.which(command)), None)
    if found is None:
        raise InputError(
            f"linking a library for {platform} needs {commands[0]}, which is not installed",
            hint=f"on Debian and Ubuntu: apt install {package}",
        )
    return cc.cross_compiler(found, options=list(_LINK_OPTIONS))  # type: ignore[no-any-return]


def _cannot_compile(error: Exception) -> UnsupportedModelError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UnsupportedModelError(
        f"TVM cannot compile the model: {lines[-1][:300]}",
        hint="use the target openvino or onnxruntime for this model instead",
    )
