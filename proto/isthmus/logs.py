"""Structured logs: readable on a terminal, one JSON object a line otherwise; always on standard error.

Request ids travel in structlog's context variables, so every line of a request carries its id.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Final

import structlog

LEVELS: Final = ("debug", "info", "warning", "error")


def configure(*, level: str = "info", json: bool | None = None) -> None:
    """Set up logging for this process.

    Args:
        level: One of `LEVELS`; less severe lines are dropped.
        json: True for JSON lines, False for text, None for text on a terminal and JSON otherwise.
    """
    as_json = not sys.stderr.isatty() if json is None else json
    # Plain tracebacks: the pretty ones print local variables, and tokens and codes are among them.
    console = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    renderer: Any = structlog.processors.JSONRenderer() if as_json else console
    escape = [] if as_json else [_escape]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            *([structlog.processors.format_exc_info] if as_json else []),
            *escape,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )


def _escape(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Escape control characters of values, which may be a stranger's: on a terminal they write lines, and more."""
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[name] = value.encode("unicode_escape").decode("ascii")
    return event
