"""What the agent and the gateway add: the same light model called directly, behind a bare gRPC echo, and by the agent.

Everything runs at once on this machine and is measured in turn, a round of each after the other, so that noise hits
all alike. The model is the smart-meter story's (built on first use, half a minute): it takes microseconds, so what is
left is overhead. Cloud answers go agent -> TLS gateway -> Triton; the floor is the same Triton without both.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

from isthmus import tls13

tls13.enforce()  # before anything imports grpc

import grpc  # noqa: E402
import numpy as np  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402

from benchmarks.result import Goal, publish  # noqa: E402
from edge.runtimes import open_runtime  # noqa: E402
from examples.quickstart.datasets import Split  # noqa: E402
from examples.quickstart.meter import MeterStory  # noqa: E402
from examples.quickstart.models import save_samples, train_first  # noqa: E402
from examples.quickstart.programs import Shell  # noqa: E402
from examples.quickstart.recipe import write_recipe  # noqa: E402
from examples.quickstart.site import VARIANT, Site  # noqa: E402
from examples.quickstart.traffic import Application  # noqa: E402
from isthmus.bundle import open_bundle  # noqa: E402
from isthmus.terminal import progress  # noqa: E402

app = typer.Typer()
ROUND = 50  # calls of one kind in a row


@app.command()
def main(
    quick: Annotated[bool, typer.Option(help="Fewer calls.")] = False,
    json: Annotated[Path | None, typer.Option(help="Where the figures go.")] = None,
) -> None:
    """Measure p50 and p99 of one synchronous client."""
    rounds = 10 if quick else 60
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        site, bundle, test = _serve(Path(scratch), stack)
        calls = _calls(site, bundle, test, stack)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name] += [_milliseconds(call) for _ in range(ROUND)]
    rows = [
        {"call": name, "p50_ms": _percentile(values, 50), "p99_ms": _percentile(values, 99), "calls": len(values)}
        for name, values in times.items()
    ]
    p50 = {name: _percentile(values, 50) for name, values in times.items()}
    floor = p50["runtime, direct"] + p50["grpc echo"]
    goals = [Goal("agent p50 / (runtime + echo) p50", round(p50["agent, edge"] / floor, 2), 3.0)]
    publish("agent", rows, goals, json)


def _serve(folder: Path, stack: ExitStack) -> tuple[Site, Path, Split]:
    build, story = Path("build").absolute(), MeterStory()
    with progress() as bars:
        splits = story.prepare(build / "data", bars)
        models = train_first(story, splits, build / "models", bars)
    save_samples(splits.quantization, folder / "quantization.safetensors", labels=False)
    save_samples(splits.calibration, folder / "calibration.safetensors", labels=True)
    recipe = write_recipe(
        folder / "recipe.toml",
        story=story,
        version=1,
        light=models.light,
        heavy=models.heavy,
        samples=folder,
        previous=None,
    )
    site = Site(Shell(Console(stderr=True), folder), folder, story.model_name)
    stack.callback(site.stop)
    bundle = folder / "bundle"
    site.shell.run("compile", recipe, "--output", bundle)
    site.init_keys()
    site.start_cloud()
    site.publish(bundle)
    site.enrol_device()
    site.start_agent()
    return site, bundle, splits.test


def _calls(site: Site, bundle: Path, test: Split, stack: ExitStack) -> dict[str, Callable[[], object]]:
    rows = {name: array[:1] for name, array in test.inputs.items()}
    variant = open_bundle(bundle).variant(VARIANT)
    runtime = open_runtime(variant.runtime, bundle / variant.entry, threads=1, inference_precision="f32")
    stack.callback(runtime.close)
    echo = stack.enter_context(_echo())
    payload = b"x" * sum(array.nbytes for array in rows.values())
    edge = stack.enter_context(Application(site.agent_address, site.model, route="edge"))
    cloud = stack.enter_context(Application(site.agent_address, site.model, route="cloud"))
    for warm in (edge, cloud):
        warm.ask(rows, slice(0, 1), deadline_s=30.0)
    return {
        "runtime, direct": lambda: runtime.infer(rows),
        "grpc echo": lambda: echo(payload),
        "agent, edge": lambda: _answered(edge, rows, "edge"),
        "agent, cloud": lambda: _answered(cloud, rows, "cloud"),
    }


def _answered(application: Application, rows: dict[str, Any], route: str) -> None:
    record = application.ask(rows, slice(0, 1))[0]
    if record.route != route:
        raise RuntimeError(f"expected an answer by {route}, got {record.route}: {record.reason}")


@contextmanager
def _echo() -> Iterator[Callable[[bytes], bytes]]:
    """A gRPC server that sends back what it gets, and a call to it."""
    handler: Any = grpc.unary_unary_rpc_method_handler(lambda request, _context: request)
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("echo.Echo", {"Echo": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.unary_unary("/echo.Echo/Echo")
        yield call
    server.stop(None)


def _milliseconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return (time.perf_counter() - begun) * 1e3


def _percentile(values: list[float], percent: float) -> float:
    return round(float(np.percentile(values, percent)), 3)


app()
