"""The processes that build: what they do not load."""

from __future__ import annotations

import subprocess
import sys

import pytest

BUILD = "import compiler.worker as worker, sys\n{}\nimport nncf, tvm\nprint('torch' in sys.modules)"


@pytest.mark.slow
@pytest.mark.parametrize(("hide", "loaded"), [("worker._hide_torch()", "False"), ("", "True")])
def test_tools_that_only_look_for_torch_do_not_find_it(hide: str, loaded: str) -> None:
    """Without this, each build would begin with two seconds of imports that it does not need."""
    done = subprocess.run([sys.executable, "-c", BUILD.format(hide)], capture_output=True, text=True, check=True)

    assert done.stdout.split()[-1] == loaded
