"""Configuration of a program: defaults, then a TOML file, then the environment, then flags; the last one wins.

Every value remembers where it came from, and `isthmus config show` prints it. A name that nobody declared is refused:
a typo in a configuration file must not be silently ignored.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from isthmus.errors import ConfigError


class Settings(BaseSettings):
    """Root of every program's settings; subclasses declare fields and `env_prefix`."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)
    env_prefix: ClassVar[str] = "ISTHMUS_"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take values as given: `load_settings` has merged the layers already."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)


T = TypeVar("T", bound=Settings)


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    """Settings with the origin of each value: "default", "file PATH", "environment NAME" or "flag"."""

    value: T
    origins: Mapping[str, str]


def load_settings(kind: type[T], file: Path | None, overrides: Mapping[str, object]) -> Loaded[T]:
    """Merge the layers into one `kind`.

    Args:
        kind: The settings class.
        file: TOML file, or None; keys are field names.
        overrides: Values of flags by field name; None means that the flag was not given.

    Raises:
        ConfigError: The file cannot be read, names an unknown setting, or a value does not fit; the message says
            which setting, and where its value came from.
    """
    merged: dict[str, Any] = {}
    origins = dict.fromkeys(kind.model_fields, "default")
    for name, value, origin in [*_from_file(kind, file), *_from_environment(kind), *_from_flags(overrides)]:
        merged[name], origins[name] = value, origin
    try:
        return Loaded(kind(**merged), origins)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        origin = origins.get(name, "default")
        raise ConfigError(
            f"{name} ({origin}): {first['msg'].removeprefix('Value error, ')}, got {str(first.get('input'))[:80]!r}"
        ) from error


def _from_file(kind: type[Settings], file: Path | None) -> list[tuple[str, Any, str]]:
    if file is None:
        return []
    try:
        values = tomllib.loads(file.read_text())
    except OSError as error:
        raise ConfigError(
            f"cannot read configuration {file}: {error.strerror}", hint="expected a TOML file of NAME = VALUE lines"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}", hint="expected NAME = VALUE lines") from error
    for name in values:
        _check_declared(kind, name, f"{file}: unknown setting {name!r}")
    return [(name, value, f"file {file}") for name, value in values.items()]


def _check_declared(kind: type[Settings], name: str, message: str) -> None:
    if name not in kind.model_fields:
        close = get_close_matches(name, kind.model_fields, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known settings: {', '.join(kind.model_fields)}"
        raise ConfigError(message, hint=hint)


def _from_environment(kind: type[Settings]) -> list[tuple[str, Any, str]]:
    present = {key.upper() for key in os.environ if key.upper().startswith(kind.env_prefix)}
    if kind.env_prefix != Settings.env_prefix:  # the programs' own prefixes begin with that one
        for key in sorted(present):
            name = key.removeprefix(kind.env_prefix).lower()
            _check_declared(kind, name, f"environment {key}: unknown setting {name!r}")
    try:
        values = EnvSettingsSource(kind, env_prefix=kind.env_prefix)()
    except SettingsError as error:
        raise ConfigError(
            f"environment {kind.env_prefix}*: {error}", hint='expected JSON for a list, for example ["a", "b"]'
        ) from error
    return [
        (name, value, f"environment {kind.env_prefix}{name.upper()}")
        for name, value in values.items()
        if f"{kind.env_prefix}{name.upper()}" in present
    ]


def _from_flags(overrides: Mapping[str, object]) -> list[tuple[str, Any, str]]:
    return [(name, value, "flag") for name, value in overrides.items() if value is not None]
