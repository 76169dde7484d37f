"""Structured logs: readable on a terminal, one JSON object a line otherwise; always on standard error.

Request ids travel in structlog's context variables, so every line of a request carries its id.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Final

import structlog

_MAX_TEXT: Final = 4000  # characters of one value
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
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            _without_control_characters,
            *([structlog.processors.format_exc_info] if as_json else []),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )


def _without_control_characters(_logger: Any, _method: str, event: Any) -> Any:
    """Write what a terminal or a log reader would obey, in texts that others send, as the escapes that name it.

    A line break in a device's name must not begin a line that looks like another event, and no escape sequence may
    paint over what was logged before. Tracebacks, which this program makes, keep their lines: they are added later.
    """
    return {name: value if name == "exc_info" else _plain(value) for name, value in event.items()}


def _plain(value: Any) -> Any:
    match value:
        case str():
            if value.isprintable() and len(value) <= _MAX_TEXT:
                return value
            return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value[:_MAX_TEXT])
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
        case dict():
            return {_plain(name): _plain(item) for name, item in value.items()}
        case _:
            return value
