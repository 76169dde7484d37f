"""The command line stays light, and says what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edge.cli import app
from isthmus.errors import ConfigError, InputError, IsthmusError, NotFoundError, UnavailableError

HEAVY = ("torch", "onnx", "nncf", "tvm", "openvino", "onnxruntime", "sqlalchemy", "fastapi", "tritonclient", "grpc")
ENROL = ("--code", "c", "--trust", "{home}/nothere", "--home", "{home}/device")


@pytest.mark.slow
def test_import_is_light() -> None:
    script = (
        "import sys, edge.cli, edge.config\n"
        f"loaded = [name for name in {(*HEAVY, 'numpy')!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": ".:proto"})


@pytest.mark.slow
def test_agent_loads_its_own_runtime_only() -> None:
    script = (
        "import sys\n"
        "from isthmus import tls13; tls13.enforce()\n"
        "import edge.bootstrap\n"
        f"loaded = [name for name in {HEAVY[:-2]!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
        "programs = [name for name in sys.modules if name.partition('.')[0] in ('cloud', 'compiler')]\n"
        "assert not programs, programs\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": ".:proto"})


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["run", "--home", "{home}", "--model", "m"], ConfigError, "not the folder of an enrolled device"),
        (["captures", "export", "--home", "{home}", "--output", "{home}/o"], NotFoundError, "no captures"),
        (["status", "--address", "10.0.0.1:1"], IsthmusError, "expected --ca"),
        (["status", "--address", "localhost"], ConfigError, "--address: expected HOST:PORT"),
        (["status", "--address", "localhost:1"], UnavailableError, "agent at localhost:1"),
        (["status", "--token-file", "{home}/empty"], InputError, "expected one access token"),
        (["enrol", "--cloud", "https://x:1", *ENROL], ConfigError, "--cloud: expected HOST:PORT"),
        (["enrol", "--cloud", "x:1", *ENROL], ConfigError, "missing ca.pem and root.json"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, arguments: list[str], kind: type[IsthmusError], message: str) -> None:
    (tmp_path / "empty").touch()
    result = CliRunner().invoke(app, [argument.replace("{home}", str(tmp_path)) for argument in arguments])
    assert isinstance(result.exception, kind)
    assert message in result.exception.message
    assert result.exception.hint


def test_help_lists_the_commands() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("enrol", "run", "status", "captures"):
        assert command in result.output
