"""`isthmus edge`: enrol a device, measure variants, run its agent, ask how it is, take captures and late answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from isthmus.terminal import JsonOption, note, show_record, show_table

app = typer.Typer(no_args_is_help=True, help="Enrol a device and run its agent.")
captures_app = typer.Typer(no_args_is_help=True, help="Escalated requests with the cloud's answers.")
app.add_typer(captures_app, name="captures")
deferred_app = typer.Typer(no_args_is_help=True, help="Requests that wait for the cloud, and their late answers.")
app.add_typer(deferred_app, name="deferred")

Address = Annotated[str, typer.Option(help="Where the agent listens.")]
Ca = Annotated[Path | None, typer.Option(help="CA of an agent that listens with TLS.")]
TokenFile = Annotated[Path | None, typer.Option(help="File with an access token, with --ca.")]
_ADDRESS: Final = "127.0.0.1:8001"
# Counts that say something at zero, too; those of what seldom happens are shown when it has.
_SAID_OF_NONE: Final = frozenset(
    {"uplink attempts", "uplink successes", "uplink failures", "deferred pending", "deferred results"}
)
Queue = Annotated[str, typer.Option(help="What the requests named in isthmus.queue.")]
Home = Annotated[Path, typer.Option(help="The device's folder.")]


@app.command()
def enrol(
    cloud: Annotated[str, typer.Option(help="HOST:PORT of the cloud.", envvar="ISTHMUS_CLOUD")],
    code: Annotated[str, typer.Option(help="One-time code from `isthmus device invite`.")],
    trust: Annotated[Path, typer.Option(help="Folder with the cloud's ca.pem and root.json.")],
    home: Home,
    host: Annotated[
        list[str] | None, typer.Option(help="Name or address under which other machines call this device.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make this device's key, and exchange an enrolment code for its identity."""
    import asyncio

    from edge import identity

    device = identity.DeviceHome(home)
    enrolment = asyncio.run(identity.enrol(device, cloud=cloud, code=code, trust=trust, hosts=host or ()))
    show_record("enrolled", enrolment.model_dump() | {"home": str(home)}, as_json=as_json)


@app.command()
def run(
    home: Annotated[Path | None, typer.Option(help="The device's folder.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model to serve; may be given again.")] = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT or unix:PATH.")] = None,
    variant: Annotated[
        str | None, typer.Option(help="Variant to install; the fastest measured, else the first that fits.")
    ] = None,
    ready_file: Annotated[Path | None, typer.Option(help="Written when the agent listens.")] = None,
    capture: Annotated[
        bool | None, typer.Option("--capture/--no-capture", help="Keep escalated requests with their answers.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
) -> None:
    """Serve the light model, escalate hard requests, keep the model current; until SIGTERM."""
    from edge.config import EdgeSettings
    from isthmus.settings import load_settings

    flags = {
        "home": home,
        "models": tuple(model) if model else None,
        "listen": listen,
        "variant": variant,
        "ready_file": ready_file,
        "capture": capture,
    }
    settings = load_settings(EdgeSettings, config, flags).value
    from edge.agent import open_runner, run_until_signal
    from edge.bootstrap import build_agent

    async def serve() -> None:
        await run_until_signal(build_agent(settings))

    with open_runner() as runner:
        runner.run(serve())


@app.command()
def bench(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder, or an installed version of a device.")],
    home: Annotated[
        Path | None, typer.Option(help="Also keep the fastest for this device's updates, in its variant.json.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads that one inference may use.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of a few calls of every variant.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Measure the variants of a bundle on this machine, batch 1, and rank those that pass their self-test."""
    from dataclasses import asdict

    from edge.bench import Choice, hardware, measure_variants, write_choice
    from edge.identity import DeviceHome
    from isthmus.errors import BundleError

    if home is not None:
        DeviceHome(home).enrolment()  # before minutes are spent on a folder that is none
    manifest, timings = measure_variants(bundle, threads=threads, rounds=rounds)
    rows = [asdict(timing) for timing in timings]
    if as_json:
        show_record("bench", {"model": manifest.name, "version": manifest.version, "variants": rows}, as_json=True)
    else:
        show_table(f"{manifest.name}@{manifest.version}, {threads} thread(s)", rows)
    best = timings[0]
    if best.latency_ms is None:
        raise BundleError("no variant can run here", hint="the notes say why", reason="no-fitting-variant")
    if home is not None:
        choice = Choice(variant=best.variant, latency_ms=best.latency_ms, version=manifest.version, hardware=hardware())
        write_choice(home, manifest.name, choice)
        note(f"{home}: updates of {manifest.name} prefer {best.variant}")


@app.command()
def status(
    address: Address = _ADDRESS,
    ca: Ca = None,
    token_file: TokenFile = None,
    as_json: JsonOption = False,
) -> None:
    """Print versions, answers by route, the uplink, deferred requests and the last update of a running agent."""
    from edge.status_client import fetch_status

    answer: dict[str, Any] = fetch_status(address, ca=ca, token_file=token_file)
    if as_json:
        show_record("agent", answer, as_json=True)
        return
    uplink: dict[str, Any] = answer["uplink"]
    deferred: dict[str, Any] = answer["deferred"] or {}
    uplink_told = {f"uplink {name}": value for name, value in uplink.items()}
    deferred_told = {f"deferred {name}": value for name, value in deferred.items()}
    show_record("agent", {"device": answer["device_id"], **_telling(uplink_told | deferred_told)})
    for model in answer["models"]:
        show_record(model["model"], _told(model))


def _telling(counts: dict[str, Any]) -> dict[str, Any]:
    """Return the counts that say something to a person: what happened, and what is worth knowing not to have."""
    return {name: value for name, value in counts.items() if value or name in _SAID_OF_NONE}


def _told(model: dict[str, Any]) -> dict[str, Any]:
    last = model.get("last_update") or {}
    update = f"{last['from_version']} -> {last['to_version']} {last['outcome']} {last['reason']}" if last else None
    plain = {name: model[name] for name in ("version", "variant", "threshold")}
    if (measured := model.get("measured")) is not None:
        took = measured.get("latency_ms")
        told = "not measured again" if took is None else f"{took:.3g} ms"
        plain["fastest measured"] = f"{measured['variant']}, {told} (version {measured['version']})"
    trial = model.get("trial")
    answers = {f"answers {route}": count for route, count in model["answers"].items()}
    update_told = {"step": model["step"], **({} if trial is None else _told_trial(trial)), "last update": update}
    update_told |= {"detail": last.get("detail") or None, "bytes fetched": last.get("bytes_fetched")}
    return {**plain, **answers, "errors": model["errors"], **_told_audit(model.get("audit")), **update_told}


def _told_trial(trial: dict[str, Any]) -> dict[str, Any]:
    return {
        "trial": f"{trial['seconds']:.0f} of {trial['soak_s']:.0f} s, {trial['requests']} requests",
        "trial errors": trial["errors"],
        "trial escalated": trial["escalated"],
        "trial disagreement": f"{trial['disagreed']} of {trial['audited']}",
    }


def _told_audit(audit: dict[str, Any] | None) -> dict[str, Any]:
    if audit is None:
        return {}
    told = f"{audit['low']:.1%} to {audit['high']:.1%}" if audit["audited"] else None
    return {
        "audited answers": audit["audited"],
        "disagreement": told,
        "disagreement expected": f"{audit['expected']:.1%}",
        "audit alarm": audit["alarm"],
    }


@app.command("import")
def import_stick(
    stick: Annotated[Path, typer.Argument(help="Folder or tar file that `isthmus model export` wrote.")],
    home: Annotated[Path | None, typer.Option(help="The device's folder.")] = None,
    accept_stale: Annotated[
        bool, typer.Option("--accept-stale", help="Vouch for its age: take it although its timestamp has expired.")
    ] = False,
    variant: Annotated[
        str | None, typer.Option(help="Variant to install; the fastest measured, else the first that fits.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Where the agent listens, if one is running: it installs the version.")
    ] = None,
    ca: Ca = None,
    token_file: TokenFile = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Install a version that was carried here, with the checks of one from the network."""
    from isthmus.errors import VerificationError

    if address is None:
        record = _install_stick(stick, {"home": home, "variant": variant}, config, accept_stale=accept_stale)
    else:
        from edge.status_client import find_agent, import_version

        agent = find_agent(address, ca=ca, token_file=token_file)
        record = import_version(agent, stick, accept_stale=accept_stale)
    detail = record.pop("detail")
    show_record("imported", record, as_json=as_json)
    if not record["installed"]:
        hint = "--accept-stale vouches for the age of what was carried" if record["reason"] == "freeze" else ""
        raise VerificationError(detail, reason=record["reason"], hint=hint)


def _install_stick(stick: Path, flags: dict[str, object], config: Path | None, *, accept_stale: bool) -> dict[str, Any]:
    import asyncio

    from edge.bootstrap import install_stick
    from edge.config import EdgeSettings
    from isthmus.settings import load_settings
    from isthmus.stick import Stick

    settings = load_settings(EdgeSettings, config, flags).value
    with Stick(stick) as carried:
        outcome = asyncio.run(install_stick(settings, carried, accept_stale=accept_stale))
    return {
        "model": outcome.model,
        "version": outcome.to_version,
        "variant": outcome.variant,
        "installed": outcome.active,
        "reason": outcome.reason,
        "detail": outcome.detail,
        "bytes_read": outcome.bytes_fetched,
        "bytes_full": outcome.bytes_full,
    }


@captures_app.command()
def export(
    home: Home,
    output: Annotated[Path, typer.Option(help="safetensors file to write.")],
    model: Annotated[str | None, typer.Option(help="The model; may be left out when there is one.")] = None,
    sealing_keys: Annotated[
        Path | None,
        typer.Option(help="The workspace's cloud folder, where captures are sealed for the gateway.", metavar="DIR"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Join a model's captures into one safetensors file."""
    from edge.sealing import CAPTURE
    from edge.spool import export_captures, find_spool
    from isthmus.envelopes import Opener
    from security.sealing import load_gateway_keys

    folder = find_spool(home / "spool", model)
    keys = None if sealing_keys is None else load_gateway_keys(sealing_keys)
    if keys is None:
        rows = export_captures(folder, output)
    else:
        private = keys.private
        rows = export_captures(folder, output, lambda data: Opener(private).open(data, (CAPTURE, folder.name)))
    note(f"{rows} rows of {folder.name}")
    show_record("captures", {"model": folder.name, "rows": rows, "output": str(output)}, as_json=as_json)


@deferred_app.command("list")
def list_deferred(
    address: Address = _ADDRESS, ca: Ca = None, token_file: TokenFile = None, as_json: JsonOption = False
) -> None:
    """Count requests that wait and results that nobody has acknowledged, by queue."""
    from edge.deferred.client import fetch_queues
    from edge.status_client import find_agent
    from isthmus.terminal import show_table

    show_table("deferred", fetch_queues(find_agent(address, ca=ca, token_file=token_file)), as_json=as_json)


@deferred_app.command("watch")
def watch_deferred(
    address: Address = _ADDRESS,
    queue: Queue = "default",
    cursor: Annotated[Path | None, typer.Option(help="File that remembers what was printed.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Stop after this many; go on for ever by default.")] = None,
    ca: Ca = None,
    token_file: TokenFile = None,
) -> None:
    """Print late answers as they come, one JSON object a line, and acknowledge each."""
    import asyncio
    import json

    from edge.deferred.client import watch
    from edge.status_client import find_agent

    async def print_all() -> None:
        agent = find_agent(address, ca=ca, token_file=token_file)
        async for answer in watch(agent, queue=queue, cursor=cursor, count=count):
            typer.echo(json.dumps(answer))

    asyncio.run(print_all())


@deferred_app.command("purge")
def purge_deferred(
    address: Address = _ADDRESS,
    queue: Queue = "default",
    ca: Ca = None,
    token_file: TokenFile = None,
    as_json: JsonOption = False,
) -> None:
    """Forget all that a queue holds: requests are not sent, results not delivered."""
    from edge.deferred.client import purge_queue
    from edge.status_client import find_agent

    purged = purge_queue(find_agent(address, ca=ca, token_file=token_file), queue)
    show_record("purged", purged, as_json=as_json)
