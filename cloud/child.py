"""Becomes a program that dies with its parent: `python child.py PARENT_PID PROGRAM ARGUMENTS...`.

A cloud that is killed must not leave a Triton behind that holds memory and a socket. The kernel can see to that
(prctl(2), PR_SET_PDEATHSIG), but only the child can ask for it. Runs as a script with the standard library alone:
doing this between fork and exec of a process with threads is not safe.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def main(arguments: list[str]) -> None:
    """Ask to be killed with the parent, then become the program."""
    parent, program = int(arguments[0]), arguments[1]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        sys.exit(1)
    os.execv(program, arguments[1:])  # noqa: S606 - the arguments come from cloud.supervisor


if __name__ == "__main__":
    main(sys.argv[1:])
