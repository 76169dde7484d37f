"""The options with which a command names a cloud and who asks it: one definition, which a decorator hands out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cloud.config import OperatorSettings
from isthmus.errors import ConfigError
from isthmus.settings import load_settings

if TYPE_CHECKING:
    from cloud.client import CloudClient

_OPTIONS: Final = {  # in the order in which --help lists them
    "cloud": Annotated[str | None, typer.Option(help="HOST:PORT of the cloud.")],
    "trust": Annotated[Path | None, typer.Option(help="Folder with ca.pem.")],
    "token_file": Annotated[Path | None, typer.Option(help="File with a token, or API key, of a role that may do it.")],
    "tenant": Annotated[
        str | None, typer.Option(help="Tenant to act in, for admins of the cloud. Default: the token's own.")
    ],
    "config": Annotated[Path | None, typer.Option(help="TOML file with these settings.")],
}
_PARAMETER: Final = "connection"


@dataclass(frozen=True, slots=True)
class Connection:
    """What the options say; environment and file say the rest."""

    cloud: str | None
    trust: Path | None
    token_file: Path | None
    tenant: str | None
    config: Path | None

    @contextmanager
    def open(self, **more: object) -> Iterator[tuple[CloudClient, OperatorSettings]]:
        """Yield a client of the cloud, and the settings.

        Args:
            more: Other settings that the command has options for; they go before these.

        Raises:
            ConfigError: A setting is missing.
        """
        from cloud.client import Address, CloudClient

        flags = {name: getattr(self, name) for name in _OPTIONS if name != "config"} | more
        settings = load_settings(OperatorSettings, self.config, flags).value
        if settings.trust is None or settings.token_file is None:
            missing = "trust" if settings.trust is None else "token_file"
            what = "the workspace's trust folder" if settings.trust is None else "a file that isthmus token mint wrote"
            raise ConfigError(
                f"the setting {missing} is not set",
                hint=f"--{missing.replace('_', '-')} or ISTHMUS_{missing.upper()} names {what}",
            )
        with CloudClient(
            Address(settings.cloud, settings.trust, settings.token_file, settings.tenant), timeout_s=settings.timeout_s
        ) as client:
            yield client, settings


def asks_cloud(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, in place of its parameter `connection`, the options of a connection."""
    return _with_options(command, tuple(_OPTIONS))


def asks_whole_cloud(command: Callable[..., None]) -> Callable[..., None]:
    """Do the same for a command that is for the whole cloud, or has a --tenant of its own: in no tenant but one's own.

    A setting for all commands, such as ISTHMUS_TENANT, does not change that.
    """
    return _with_options(command, tuple(name for name in _OPTIONS if name != "tenant"))


def _with_options(command: Callable[..., None], names: tuple[str, ...]) -> Callable[..., None]:
    before = inspect.signature(command, eval_str=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [inspect.Parameter(name, keyword, default=None, annotation=_OPTIONS[name]) for name in names]
    parameters: list[inspect.Parameter] = []
    for parameter in before.parameters.values():
        parameters += options if parameter.name == _PARAMETER else [parameter.replace(kind=keyword)]

    @functools.wraps(command)
    def called(**values: Any) -> None:
        told = {"tenant": ""} | {name: values.pop(name) for name in names}
        command(**values, connection=Connection(**told))

    called.__signature__ = before.replace(parameters=parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called
