"""Structured logs: readable on a terminal, one JSON object a line otherwise; always on standard error.

Request ids travel in structlog's context variables, so every line of a request carries its id.

Nothing logs a secret on purpose. `redact` is the second line: what looks like a token, an API key, an enrolment code or
a private key leaves the process as "[redacted]", wherever in a line it stands, tracebacks included.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any, Final

import structlog

_MAX_TEXT: Final = 4000  # characters of one value
LEVELS: Final = ("debug", "info", "warning", "error")
REDACTED: Final = "[redacted]"
# A JWT (three parts of base64url, the first is a JSON object), an API key, a PEM private key as it is or in JSON.
_SECRETS: Final = re.compile(
    r"eyJ[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]*"
    r"|isk_[A-Za-z0-9_-]{8,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
# An enrolment code: 32 characters of base64url. Digests and ids are hexadecimal, in lower case only.
_CODE: Final = re.compile(r"(?<![\w-])(?=[\w-]*[A-Z])(?=[\w-]*[a-z])[A-Za-z0-9_-]{32}(?![\w-])")
_NAMES: Final = frozenset(
    {"token", "access_token", "api_key", "assertion", "authorization", "enrolment_code"}
    | {"password", "private_key", "secret"}
)


def redact(text: str) -> str:
    """Return a text with what looks like a token, an API key, a private key or an enrolment code replaced."""
    return _CODE.sub(REDACTED, _SECRETS.sub(REDACTED, text))


def _redact_fields(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace what stands under the name of a secret, whatever it looks like, and secrets that a colour would hide."""
    for name, value in event.items():
        if name in _NAMES:
            event[name] = REDACTED
        elif isinstance(value, str):
            event[name] = redact(value)
    return event


def _redact_line(_logger: Any, _method: str, line: Any) -> Any:
    """Replace secrets in a finished line."""
    return redact(line) if isinstance(line, str) else line


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
            _redact_fields,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            _without_control_characters,
            *([structlog.processors.format_exc_info] if as_json else []),
            renderer,
            _redact_line,
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
