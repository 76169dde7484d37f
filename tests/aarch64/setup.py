"""Prepares an Arm device under emulation: `python -m tests.aarch64.setup` (about a minute, then at once).

What it makes in build/aarch64: `root`, with Debian's Python 3.11 for arm64 unpacked (nothing is installed on this
machine, nothing runs as root), and `site`, with the runtimes' wheels for aarch64 in the versions that are installed
here. It needs a Debian 12 with apt, and a network. To run it, qemu-user; to compile for it, g++-aarch64-linux-gnu.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from tests.aarch64 import device

_DEBIAN: Final = ("python3.11-minimal", "libpython3.11-stdlib", "libstdc++6")
_PYTHON: Final = ("numpy", "pydantic", "safetensors", "tritonclient", "grpcio", "protobuf", "python-rapidjson")
_RUNTIMES: Final = ("apache-tvm", "apache-tvm-ffi", "onnxruntime", "openvino")
_WHEELS: Final = ("manylinux_2_17", "manylinux2014", "manylinux_2_26", "manylinux_2_28", "manylinux_2_31",
                  "manylinux_2_34", "manylinux_2_35")  # fmt: skip
_APT: Final = """\
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::State "{folder}/state";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
"""
_CPUINFO: Final = """\
processor\t: 0
BogoMIPS\t: 100.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0b
CPU revision\t: 1

"""  # a Cortex-A76's; without one, ONNX Runtime reads this machine's and crashes


def main() -> None:
    """Make what is missing; exit with a message where something cannot be had."""
    try:
        wanted = "\n".join(f"{name}=={version(name)}" for name in (*_PYTHON, *_RUNTIMES)) + "\n"
    except PackageNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed; make setup")
    done = device.FOLDER / "complete"
    if done.is_file() and done.read_text() == wanted:
        return
    missing = [name for name in ("apt-get", "dpkg") if shutil.which(name) is None]
    if missing:
        sys.exit(f"error: {' and '.join(missing)} not found: this needs a Debian 12")
    shutil.rmtree(device.FOLDER, ignore_errors=True)
    device.FOLDER.mkdir(parents=True)
    try:
        _unpack_debian(device.FOLDER / "apt", device.ROOT)
        _install_wheels(wanted.split(), device.SITE)
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {' '.join(error.cmd[:4])} failed: {(error.stderr or '')[-600:]}")
    done.write_text(wanted)


def _unpack_debian(apt: Path, root: Path) -> None:
    """Unpack the packages with all that they depend on, by an apt that knows of nothing that is installed."""
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True)
    (apt / "status").touch()
    configuration = apt / "apt.conf"
    configuration.write_text(_APT.format(folder=apt))
    environment = os.environ | {"APT_CONFIG": str(configuration), "DEBIAN_FRONTEND": "noninteractive"}
    _run(["apt-get", "--quiet", "update"], environment)
    _run(["apt-get", "--quiet", "--yes", "--download-only", "install", *_DEBIAN], environment)
    root.mkdir()
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        _run(["dpkg", "-x", str(package), str(root)], environment)
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "cpuinfo").write_text(_CPUINFO)
    shutil.rmtree(apt)


def _install_wheels(wanted: list[str], site: Path) -> None:
    platforms = [argument for name in _WHEELS for argument in ("--platform", f"{name}_aarch64")]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", "3.11", *platforms, "--target", str(site)]
    _run([*command, "--constraint", "constraints.txt", *wanted], dict(os.environ))


def _run(command: list[str], environment: dict[str, str]) -> None:
    subprocess.run(command, check=True, env=environment, capture_output=True, text=True, cwd=device.CHECKOUT)


if __name__ == "__main__":
    main()
