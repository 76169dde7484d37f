"""`isthmus tenant`: on the cloud's machine, add a tenant and list the tenants."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer

from isthmus.terminal import JsonOption, note, show_record, show_table

app = typer.Typer(no_args_is_help=True, help="Add a tenant to a cloud, with update keys of its own, and list them.")

HomeOption = Annotated[Path, typer.Option("--home", help="The workspace's cloud folder.", metavar="DIR")]
_NEXT_STEPS: Final = """\
Added the tenant {name}; a cloud that runs knows it at once. Give its operators
  {folder}/operator  offline: signs {name}'s models. Nothing can replace it.
  {folder}/trust     public: for every device and operator of {name}.

Next:
  isthmus token mint --home {home} --role admin --tenant {name} --subject YOU --ttl 12h --output {name}.token
Its models and devices have names that begin with "{name}." """


@app.callback()
def tenant() -> None:
    """Keep `tenant` a group."""


@app.command()
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Lower-case letters, digits and dashes.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make, for the tenant's operators.")],
    home: HomeOption,
    trust: Annotated[Path, typer.Option("--trust", help="The workspace's trust folder.", metavar="DIR")],
    as_json: JsonOption = False,
) -> None:
    """Add a tenant: its own update keys, and a place for its signed metadata in the cloud."""
    from security.tenants import add_tenant

    add_tenant(home, name, folder, trust / "ca.pem", datetime.now(UTC))
    if as_json:
        made = {"tenant": name, "operator": str(folder / "operator"), "trust": str(folder / "trust")}
        show_record("tenant", made, as_json=True)
        return
    note(_NEXT_STEPS.format(name=name, folder=folder, home=home))


@app.command("list")
def list_tenants(home: HomeOption, as_json: JsonOption = False) -> None:
    """List the tenants of a cloud."""
    from security.tenancy import DEFAULT_TENANT
    from security.tenants import tenants_of

    show_table("tenants", [{"tenant": name} for name in (DEFAULT_TENANT, *tenants_of(home))], as_json=as_json)
