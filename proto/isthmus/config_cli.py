"""`isthmus config`: which value each setting has, and where it came from."""

from __future__ import annotations

import importlib
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Final

import typer
from pydantic import BaseModel

from isthmus.errors import ConfigError, InputError
from isthmus.settings import Settings, load_settings
from isthmus.terminal import JsonOption, show_table

app = typer.Typer(no_args_is_help=True, help="Show where each setting's value comes from.")

# Named by import string: the contract package imports no program.
PROGRAMS: Final = {
    "cloud": "cloud.config:CloudSettings",
    "edge": "edge.config:EdgeSettings",
    "operator": "cloud.config:OperatorSettings",
}


@app.callback()
def group() -> None:
    """Settings come from defaults, a TOML file, the environment and flags; the last one wins."""


@app.command()
def show(
    program: Annotated[str, typer.Argument(help="cloud, edge or operator.")],
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print every setting of PROGRAM with its value and origin."""
    loaded = load_settings(_settings_class(program), config, {})
    rows = [
        {
            "setting": name,
            "value": _text(getattr(loaded.value, name)),
            "from": loaded.origins[name],
            "meaning": field.description or "",
        }
        for name, field in type(loaded.value).model_fields.items()
    ]
    show_table(f"{program} settings", rows, as_json=as_json)


def _text(value: object) -> str:
    """Return a setting's value as text; a table as JSON, without what is not set."""
    return value.model_dump_json(exclude_none=True) if isinstance(value, BaseModel) else str(value)


def _settings_class(program: str) -> type[Settings]:
    target = PROGRAMS.get(program)
    if target is None:
        raise InputError(
            f"expected a program, one of {', '.join(PROGRAMS)}, got {program!r}",
            hint=f"for example `isthmus config show {next(iter(get_close_matches(program, PROGRAMS, n=1)), 'edge')}`",
        )
    module, name = target.split(":")
    settings: type = getattr(importlib.import_module(module), name)
    if not issubclass(settings, Settings):
        raise ConfigError(f"{target} is not a settings class")
    return settings
