"""docs/reference.md: every command with its flags, every setting, every method, every scope of a role is in it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pydantic import BaseModel

from cloud.config import CloudSettings, OperatorSettings, QuotasSettings
from edge.config import EdgeSettings
from isthmus.cli import GROUPS
from isthmus.settings import Settings
from security.limits import ListenerLimits
from security.scopes import METHOD_SCOPES, SCOPES, SCOPES_OF_ROLE

DOCS = Path(__file__).parents[2] / "docs"
REFERENCE = (DOCS / "reference.md").read_text()
CONNECTION = frozenset(
    re.findall(r"^\| `(--[a-z-]+)`", REFERENCE.split("### Connection options")[1].split("###")[0], re.M)
)


def leaves(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the commands below `command` that do something, each with the words that call it."""
    below = getattr(command, "commands", {})
    for name, child in below.items():
        yield from leaves(child, (*path, name))
    if not below:
        yield " ".join(path), command


def all_commands() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, group in GROUPS.items():
        module, attribute = group.target.split(":")
        command = typer.main.get_command(getattr(importlib.import_module(module), attribute))
        found.update(leaves(command, ("isthmus", name)))
    return found


def sections() -> dict[str, str]:
    """Return the text below each command's heading; `a pause|resume X` is the heading of two commands."""
    found = {}
    for heading, text in re.findall(r"^### `(isthmus [^`]+)`\n(.*?)(?=^##|\Z)", REFERENCE, re.M | re.S):
        words = [word for word in heading.split() if re.fullmatch(r"[a-z-]+(\|[a-z-]+)*", word)]
        for last in words[-1].split("|"):
            found[" ".join([*words[:-1], last])] = text
    return found


def rows(title: str) -> set[str]:
    """Return the names in the first column of the tables below the heading `### title`."""
    text = REFERENCE.split(f"### {title}\n")[1]
    return set(re.findall(r"^\| `([a-z0-9_.]+)` \|", re.split(r"^##", text, maxsplit=1, flags=re.M)[0], re.M))


def names(kind: type[BaseModel], prefix: str = "") -> set[str]:
    """Return the names of all settings; those of the table `updates` with its name."""
    found = set()
    for name, field in kind.model_fields.items():
        found.add(f"{prefix}{name}")
        if prefix.startswith("updates") or name == "updates":
            inner = type(field.default)
            if issubclass(inner, BaseModel):
                found.remove(f"{prefix}{name}")
                found |= names(inner, f"{prefix}{name}.")
    return found


def test_it_has_every_command_and_no_other() -> None:
    assert set(sections()) == set(all_commands())


def test_it_has_every_flag_of_every_command() -> None:
    missing = []
    for name, text in sections().items():
        shared = CONNECTION | {"--config"} if "connection options" in text else frozenset()
        for parameter in all_commands()[name].params:
            flag = parameter.opts[0]
            if flag.startswith("--") and flag not in shared and f"`{flag}" not in text:
                missing.append(f"{name} {flag}")
    assert not missing


def test_it_has_no_flag_that_a_command_does_not_take() -> None:
    surplus = []
    for name, text in sections().items():
        taken = {
            flag for parameter in all_commands()[name].params for flag in (*parameter.opts, *parameter.secondary_opts)
        }
        rows_of_flags = re.findall(r"^\| ((?:`--?[a-z-]+`[, …]*)+)\|", text, re.M)
        shown = {flag for row in rows_of_flags for flag in re.findall(r"`(--?[a-z-]+)`", row)}
        surplus += [f"{name} {flag}" for flag in sorted(shown - taken)]
    assert not surplus


def test_connection_options_are_what_the_operator_commands_share() -> None:
    text = REFERENCE.split("### Connection options")[1].split("###")[0]
    assert {name for name in OperatorSettings.model_fields if f"`{name}`" not in text} == set()


@pytest.mark.parametrize(("title", "kind"), [("Cloud", CloudSettings), ("Edge", EdgeSettings)])
def test_it_has_every_setting_and_no_other(title: str, kind: type[Settings]) -> None:
    # `updates` is a row, too: it points at its table.
    assert rows(title) - {"updates"} == names(kind)


def test_every_limit_of_a_listener_is_in_the_deployment_page() -> None:
    text = (DOCS / "deployment.md").read_text()
    assert [name for name in ListenerLimits.model_fields if f"`{name}`" not in text] == []


def test_every_quota_is_in_the_usage_page() -> None:
    text = (DOCS / "usage.md").read_text()
    kinds = {type(field.default) for field in QuotasSettings.model_fields.values()}
    assert [name for kind in kinds for name in kind.model_fields if f"`{name}`" not in text] == []


def test_it_has_every_reason_that_the_programs_give() -> None:
    root, given = DOCS.parent, set[str]()
    for folder in ("proto/isthmus", "security", "compiler", "edge", "cloud"):
        for file in (root / folder).rglob("*.py"):
            given |= set(re.findall(r"\breason=\"([a-z-]+)\"", file.read_text()))
    assert sorted(reason for reason in given if f"`{reason}`" not in REFERENCE) == []


def test_it_has_the_scopes_of_every_role() -> None:
    shown = dict(re.findall(r"^\| `([a-z]+)` \| ((?:`[a-z:]+` ?)+|all[^|]*)\|", REFERENCE, re.M))
    for role, scopes in SCOPES_OF_ROLE.items():
        said = SCOPES if shown[role].startswith("all") else set(re.findall(r"`([a-z:]+)`", shown[role]))
        assert said == scopes, role


def test_it_has_every_method_of_ours_beside_what_it_asks_for() -> None:
    table = dict(re.findall(r"^\| ((?:with(?:out)?) [^|]+) \| ([^|]+) \|$", REFERENCE, re.M))
    said = {"public": "without a token", "authenticated": "with any valid token"}
    missing = []
    for path, scope in METHOD_SCOPES.items():
        service, method = path.rsplit("/", 1)
        service = service.rsplit(".", 1)[1]
        if not path.startswith("/isthmus."):
            continue
        row = table[said.get(scope, f"with `{scope}`")]
        if not re.search(rf"\b{method}\b", row) and not re.search(rf"\b{service}\b(?!/)", row):
            missing.append(f"{path}: {scope}")
    assert not missing
