"""Names of timm and torchvision, where those are not installed, or not for this torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from compiler.capture import capture
from compiler.sources import digest
from compiler.sources.named_model import seed, split
from isthmus.errors import ConfigError, InputError


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_missing_library_is_named_with_what_to_install(tmp_path: Path, library: str) -> None:
    assert find_spec(library) is None, "this environment was made without it"

    with pytest.raises(ConfigError, match=f"{library} cannot be imported: No module named '{library}'") as caught:
        capture(f"{library}:resnet18", tmp_path / "out.onnx")

    assert caught.value.reason == "missing-extra"
    assert "must be made for its release" in caught.value.hint


def test_a_name_may_have_weights(tmp_path: Path) -> None:
    assert split("timm:vit_tiny_patch16_224") == ("vit_tiny_patch16_224", None)
    assert split(f"timm:resnet18.a1_in1k@{tmp_path}/w.safetensors") == ("resnet18.a1_in1k", tmp_path / "w.safetensors")


def test_random_weights_follow_from_the_name() -> None:
    assert seed("timm:resnet18") == seed("torchvision:resnet18") != seed("timm:resnet50")


def test_the_digest_is_the_name_s_or_the_weights(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"one")
    source = f"timm:resnet18@{tmp_path / 'w.safetensors'}"

    before = digest(source)
    (tmp_path / "w.safetensors").write_bytes(b"two")

    assert len({digest("timm:resnet18"), digest("timm:resnet50"), before, digest(source)}) == 4


@pytest.mark.parametrize("name", ["w.pth", "nowhere.safetensors"])
def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "w.pth").write_bytes(b"pickle")

    with pytest.raises(InputError, match="expected a safetensors file after the @"):
        digest(f"timm:resnet18@{tmp_path / name}")
