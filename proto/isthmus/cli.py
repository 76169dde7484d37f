"""The `isthmus` command: one group for each program, imported only when it is used.

Groups are named by import string, so a device without the cloud's packages runs `isthmus edge`, `isthmus --help` stays
quick, and the contract package imports no program.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Final

import typer
import typer.core
import typer.main

from isthmus import __version__, tls13
from isthmus.errors import ConfigError, IsthmusError


@dataclass(frozen=True, slots=True)
class Group:
    """Where a command group lives and what `isthmus --help` says about it."""

    target: str  # "module:attribute" of a typer.Typer
    help: str
    extra: str = "serving"  # what to install when a package of its is missing


GROUPS: Final = {
    "compile": Group("compiler.cli:app", "Make a bundle from a light and a heavy model.", "compiler"),
    "evaluate": Group("compiler.evaluate_cli:app", "Replay labelled data through policies.", "compiler"),
    "targets": Group("compiler.targets_cli:app", "Try every target on one model, side by side.", "compiler"),
    "bundle": Group("compiler.bundle_cli:app", "Inspect, verify and compare bundles."),
    "keys": Group("security.cli:keys_app", "Create, show, rotate and sign with the keys of a workspace."),
    "token": Group("security.cli:token_app", "Mint and inspect access tokens."),
    "role": Group("cloud.access_cli:role_app", "Grant, revoke and list roles."),
    "apikey": Group("cloud.access_cli:apikey_app", "Create, rotate, revoke and list API keys of plain clients."),
    "tenant": Group("security.tenant_cli:app", "Add a tenant to a cloud, with update keys of its own, and list them."),
    "cloud": Group("cloud.cli:app", "Run the gateway, registry and Triton.", "cloud"),
    "model": Group("cloud.operator_cli:model_app", "Publish, release and list model versions."),
    "traffic": Group("cloud.traffic_cli:app", "Spread requests over versions; drain and resume Tritons."),
    "rollout": Group("cloud.rollout_cli:app", "Roll a version out in stages, watch, pause, resume and abort."),
    "device": Group("cloud.operator_cli:device_app", "Invite, revoke, list, label, pin and retry devices."),
    "quota": Group("cloud.usage_cli:quota_app", "Set, show and clear what tenants, devices and models may ask."),
    "usage": Group("cloud.usage_cli:usage_app", "Show what was asked of the cloud, as a table, CSV or JSON."),
    "audit": Group("cloud.audit_cli:app", "Verify, search and export the audit log."),
    "edge": Group("edge.cli:app", "Enrol a device and run its agent.", "edge-openvino"),
    "delta": Group("isthmus.delta.cli:app", "Make, apply and inspect deltas of files."),
    "config": Group("isthmus.config_cli:app", "Show where each setting's value comes from."),
}

_CALLED: Final = "isthmus.cli.called"  # key of the called group's name in the context


class LazyGroup(typer.core.TyperGroup):
    """Lists all groups without importing them; imports the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all groups, in the order of the work."""
        del ctx
        return list(GROUPS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a placeholder with the group's help: enough to list it."""
        del ctx
        group = GROUPS.get(cmd_name)
        return None if group is None else _placeholder(cmd_name, group)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the group that is called; a wrong name gets the nearest right one as a hint."""
        if not args or args[0].startswith("-"):
            return super().resolve_command(ctx, args)
        name, *rest = args
        group = GROUPS.get(name)
        if group is None:
            close = get_close_matches(name, GROUPS, n=1)
            hint = f"did you mean `isthmus {close[0]}`?" if close else "`isthmus --help` lists the commands"
            raise ConfigError(f"there is no command {name!r}", hint=hint)
        ctx.meta[_CALLED] = name
        return name, _import_command(name, group), rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a package that its program lacks, whenever it is missed, becomes the extra to install."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            name = ctx.meta.get(_CALLED, "")
            if name not in GROUPS:
                raise
            raise ConfigError(
                f"`isthmus {name}` needs the package {error.name!r}, which is not installed",
                hint=f"pip install 'isthmus[{GROUPS[name].extra}]'",
            ) from error


def _placeholder(name: str, group: Group) -> Any:
    app = typer.Typer(help=group.help)
    app.callback()(lambda: None)
    command = typer.main.get_command(app)
    command.name = name
    return command


def _import_command(name: str, group: Group) -> Any:
    module_name, attribute = group.target.split(":")
    command = typer.main.get_command(getattr(importlib.import_module(module_name), attribute))
    command.name = name
    return command


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"isthmus {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="isthmus",
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Edge/cloud split inference gateway: a light model on the device, a heavy one in the cloud for hard requests.",
)


@app.callback()
def root(
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.", envvar="ISTHMUS_LOG_LEVEL")] = "info",
    log_json: Annotated[
        bool | None,
        typer.Option("--log-json/--log-text", help="Force the form of log lines.", envvar="ISTHMUS_LOG_JSON"),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Set up what all groups share."""
    del version
    from isthmus import logs

    if log_level not in logs.LEVELS:
        raise ConfigError(f"--log-level: expected one of {', '.join(logs.LEVELS)}, got {log_level!r}")
    logs.configure(level=log_level, json=log_json)


def main() -> None:
    """Run the command line; errors of ours become one line and a hint, with the error's own exit code."""
    tls13.enforce()
    # No program of ours calls gRPC in a child that it forked; gRPC's handlers for those would write lines between the
    # log's, which are no JSON, whenever a program is started.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    try:
        app()
    except IsthmusError as error:
        typer.secho(f"error: {error.message}", err=True, fg="red")
        if error.hint:
            typer.secho(f"hint: {error.hint}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:  # a file or folder that somebody named, and that the system refuses
        path = f"{error.filename}: " if error.filename is not None else ""
        typer.secho(f"error: {path}{error.strerror or error}", err=True, fg="red")
        typer.secho("hint: expected a path that this user can read, or write where results go", err=True)
        sys.exit(ConfigError.exit_code)
