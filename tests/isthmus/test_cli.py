"""The command: quick, complete, and helpful about typos."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from isthmus.cli import GROUPS

ROOT = Path(__file__).parents[2]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "isthmus", *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env=ENV,
    )


ENV = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}", "COLUMNS": "120"}


def test_help_lists_every_group() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in GROUPS)


@pytest.mark.parametrize(
    ("typo", "meant"), [("kyes", "keys"), ("clod", "cloud"), ("modle", "model"), ("compil", "compile")]
)
def test_a_mistyped_command_names_the_right_one(typo: str, meant: str) -> None:
    shown = run(typo)
    assert shown.returncode == 2
    assert f"did you mean `isthmus {meant}`?" in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_every_group_has_help(group: str) -> None:
    shown = run(group, "--help")
    assert shown.returncode == 0, shown.stderr
    assert "Usage" in shown.stdout


@pytest.mark.parametrize(
    ("package", "words", "extra"),
    [
        ("fsspec", ["cloud", "serve", "--home", "."], "cloud"),
        ("sqlalchemy", ["cloud", "serve", "--home", "."], "cloud"),
        ("tritonclient", ["edge", "run", "--home", ".", "--model", "m"], "edge-openvino"),
        ("tritonclient", ["model", "list"], "serving"),
    ],
)
def test_a_package_that_is_not_installed_becomes_the_extra_to_install(
    package: str, words: list[str], extra: str
) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; sys.argv[1:] = {words!r}; import isthmus.cli as c; c.main()"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False, env=ENV)
    assert shown.returncode == 2
    assert f"needs the package '{package}" in shown.stderr
    assert f"isthmus[{extra}]" in shown.stderr
    assert "Traceback" not in shown.stderr


def test_a_wrong_log_level_lists_the_right_ones() -> None:
    shown = run("--log-level", "loud", "keys", "--help")
    assert shown.returncode == 2
    assert "expected one of debug, info, warning, error" in shown.stderr


def test_version_is_the_packages() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run("--version").stdout.strip() == f"isthmus {declared}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("delta", "make", "README.md", "README.md", "/nothere/delta"),
        ("delta", "inspect", "README.md"),
        ("config", "show", "egde"),
        ("config", "show", "edge", "--config", "/nothere.toml"),
        ("edge", "enrol", "--cloud", "localhost:1", "--code", "c", "--trust", "/nothere", "--home", "/proc/x"),
        ("edge", "status", "--token-file", "/nothere"),
    ],
)
def test_a_mistake_gets_one_line_and_a_hint(arguments: tuple[str, ...]) -> None:
    shown = run(*arguments)
    assert shown.returncode not in (0, 1)
    error, hint = shown.stderr.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert not shown.stdout


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("isthmus quo", {"quota"}),
        ("isthmus traffic ", {"set", "show", "rollback", "replicas", "drain", "resume"}),
        ("isthmus keys sealing ", {"rotate", "show"}),
        ("isthmus apikey r", {"rotate", "revoke"}),
        ("isthmus quota set --ra", {"--rate"}),
    ],
)
def test_a_shell_completes_groups_commands_and_flags(line: str, offered: set[str]) -> None:
    asked = {"_ISTHMUS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    program = "import sys; sys.argv = ['isthmus']; from isthmus.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False, env=ENV | asked
    )
    assert set(done.stdout.split()) == offered, done.stderr


def test_a_table_of_settings_is_shown_as_one() -> None:
    (limits,) = (
        row for row in json.loads(run("config", "show", "edge", "--json").stdout) if row["setting"] == "listener"
    )
    assert json.loads(limits["value"])["connections"] == 256
