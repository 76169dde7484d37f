"""What is installed where: a device stays light, every import is declared, and the wheel holds the five packages."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = {"isthmus": ROOT / "proto" / "isthmus", **{n: ROOT / n for n in ("security", "edge", "cloud", "compiler")}}
NOT_ON_A_DEVICE = {"torch", "onnx", "nncf", "tvm", "sqlalchemy", "fastapi", "fsspec", "pytriton", "alembic", "mlflow"}
# Where the name that is imported is not the name that is installed.
DISTRIBUTION = {
    "google": "protobuf",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "jwt": "pyjwt",
    "pytriton": "nvidia-pytriton",
    "pydantic_core": "pydantic",
    "pydantic_settings": "pydantic-settings",
    "tensorrt_rtx": "tensorrt_rtx_cu12_bindings",
    "timm": "",  # a source of models where somebody has installed it
    "torchvision": "",  # the same
    "triton_python_backend_utils": "",  # provided by Triton to the models that it runs
    "mlflow": "mlflow-skinny",
    "prometheus_client": "prometheus-client",
    "tvm": "apache-tvm",
    "tvm_ffi": "apache-tvm-ffi",
    "yaml": "pyyaml",
}


def declared(*extras: str) -> set[str]:
    """Return the distributions that the extras install by name, the project's own extras followed."""
    wanted = list(PROJECT["dependencies"])
    for extra in extras:
        wanted += PROJECT["optional-dependencies"][extra]
    names: set[str] = set()
    for requirement in wanted:
        name = re.split(r"[\[<>=!;~ ]", requirement, maxsplit=1)[0].lower()
        if name == "isthmus":
            names |= declared(*re.findall(r"[\w-]+", requirement.partition("[")[2]))
        else:
            names.add(name)
    return names


def imported(package: Path) -> set[str]:
    """Return the top-level names that a package needs: what its files import at whatever depth, and what those do."""
    names: set[str] = set()
    todo, seen = set(package.rglob("*.py")), set[Path]()
    while todo:
        path = todo.pop()
        seen.add(path)
        modules = imports_of(path)
        names |= {module.partition(".")[0] for module in modules}
        todo |= {file for module in modules if (file := file_of(module)) is not None} - seen
    return names - set(sys.stdlib_module_names) - set(PACKAGES) - {"examples"}


def imports_of(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def file_of(module: str) -> Path | None:
    """Return the file of a module of ours; None for others, and for names that are no modules."""
    top, *rest = module.split(".")
    path = PACKAGES[top].joinpath(*rest) if top in PACKAGES else ROOT / "nowhere"
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


@pytest.mark.parametrize(
    ("package", "extras"),
    [
        ("security", ()),
        ("edge", ("edge-openvino", "edge-onnxruntime", "edge-tvm", "edge-uvloop")),
        ("cloud", ("cloud", "redis")),
        ("compiler", ("compiler", "mlflow", "tensorrt", "tensorrt-rtx", "torch", "tvm")),
    ],
)
def test_every_import_is_declared_in_the_extra_of_its_program(package: str, extras: tuple[str, ...]) -> None:
    names = {DISTRIBUTION.get(name, name).lower() for name in imported(PACKAGES[package])} - {""}
    assert names <= declared(*extras)


@pytest.mark.parametrize("extra", ["edge-openvino", "edge-onnxruntime", "edge-tvm", "edge-uvloop"])
def test_a_device_is_asked_to_install_nothing_heavy(extra: str) -> None:
    assert not declared(extra) & (NOT_ON_A_DEVICE | {"nvidia-pytriton", "matplotlib"})


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=ENV)
    return {name.partition(".")[0] for name in shown.stdout.split()}


ENV = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"}


def test_the_edge_command_line_loads_no_runtime_and_no_server() -> None:
    assert not loaded_by("import edge.cli") & (NOT_ON_A_DEVICE | {"openvino", "onnxruntime", "grpc", "tritonclient"})


@pytest.mark.slow
def test_a_running_agent_loads_nothing_of_the_other_programs() -> None:
    assert not loaded_by("import edge.bootstrap") & (
        NOT_ON_A_DEVICE | {"cloud", "compiler", "openvino", "onnxruntime", "prometheus_client"}
    )


@pytest.mark.slow
def test_the_wheel_holds_the_five_packages_and_nothing_else(tmp_path: Path) -> None:
    build = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    source = tmp_path / "source"
    source.mkdir()
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True, cwd=ROOT)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], check=True, cwd=source, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    assert "isthmus/v1/fleet.proto" in names
    assert "compiler/targets/triton_python_model.py" in names
    assert "edge/py.typed" in names


def named_extras(source: str) -> set[str]:
    """Return the extras that errors of this source name: as an argument, or in a hint."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    raised = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "MissingExtraError"]
    last = [call.args[-1] for call in raised]
    extras = {node.value for node in last if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return extras | set(re.findall(r"isthmus\[([a-z-]+)\]", source))


def test_an_error_names_no_extra_that_there_is_not() -> None:
    assert named_extras('raise MissingExtraError(f"a ({str(error)[:9]}),", "nothing")') == {"nothing"}
    named: set[str] = set()
    for folder in ("proto", "compiler", "edge", "cloud", "security"):
        for path in (ROOT / folder).rglob("*.py"):
            named |= named_extras(path.read_text())
    assert named
    assert named <= set(PROJECT["optional-dependencies"])
