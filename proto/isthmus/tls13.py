"""TLS 1.3 or nothing, for every gRPC listener and channel of this process.

gRPC's C core has no minimum-version option and accepts TLS 1.2. Its list of TLS 1.2 cipher suites is read from the
environment when the library is loaded: a list with one pre-shared-key suite, for which no key exists, makes every
1.2 handshake fail and leaves 1.3 (whose suites are not configurable there) untouched.
"""

from __future__ import annotations

import os
import sys
from typing import Final

from isthmus.errors import ConfigError

_VARIABLE: Final = "GRPC_SSL_CIPHER_SUITES"
_UNUSABLE_TLS12_SUITE: Final = "ECDHE-PSK-CHACHA20-POLY1305"


def enforce() -> None:
    """Allow TLS 1.3 only; a program calls this before anything imports grpc.

    Raises:
        ConfigError: grpc is loaded already, with other suites.
    """
    if is_enforced():
        return
    if "grpc" in sys.modules:
        raise ConfigError("TLS 1.3 must be enforced before grpc is imported")
    os.environ[_VARIABLE] = _UNUSABLE_TLS12_SUITE


def is_enforced() -> bool:
    """Return whether this process refuses TLS 1.2."""
    return os.environ.get(_VARIABLE) == _UNUSABLE_TLS12_SUITE
