"""A running site for tests that attack it or look at it from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from examples.quickstart.programs import Shell
from examples.quickstart.site import Site


@contextmanager
def running_site(folder: Path, bundle: Path) -> Iterator[Site]:
    """Start cloud and agent with one published bundle; stop both at the end."""
    folder.mkdir(parents=True)
    site = Site(Shell(Console(quiet=True), folder), folder, "tiny")
    try:
        site.init_keys()
        site.start_cloud()
        site.publish(bundle)
        site.enrol_device("localhost")
        site.start_agent()
        yield site
    finally:
        site.stop()
