"""Settings: the last layer wins, every value knows its origin, and typos are refused."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field

from isthmus.errors import ConfigError
from isthmus.settings import Settings, load_settings


class Sample(Settings):
    """Two settings."""

    env_prefix: ClassVar[str] = "SAMPLE_"
    port: int = Field(default=1, ge=1, description="A port.")
    name: str = "plain"


def test_the_last_layer_wins_and_origins_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sample.toml"
    file.write_text('port = 2\nname = "from file"\n')
    assert load_settings(Sample, None, {}).origins == {"port": "default", "name": "default"}
    assert load_settings(Sample, file, {}).value.port == 2
    monkeypatch.setenv("SAMPLE_PORT", "3")
    loaded = load_settings(Sample, file, {"name": "from flag"})
    assert (loaded.value.port, loaded.value.name) == (3, "from flag")
    assert loaded.origins == {"port": "environment SAMPLE_PORT", "name": "flag"}
    assert load_settings(Sample, file, {"port": None}).value.port == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 2", "unknown setting 'prot'"),
        ("port = 0", "port"),
        ("port = ", "not valid TOML"),
        ('port = "many"', "port"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "sample.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_settings(Sample, file, {})


def test_a_typo_gets_a_hint(tmp_path: Path) -> None:
    file = tmp_path / "sample.toml"
    file.write_text("prot = 2")
    with pytest.raises(ConfigError) as caught:
        load_settings(Sample, file, {})
    assert caught.value.hint == "did you mean port?"


def test_a_bad_environment_value_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMPLE_PORT", "zero")
    with pytest.raises(ConfigError, match="environment SAMPLE_PORT"):
        load_settings(Sample, None, {})


def test_a_mistyped_variable_is_refused_like_a_mistyped_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMPLE_PROT", "3")
    with pytest.raises(ConfigError, match="environment SAMPLE_PROT: unknown setting 'prot'") as caught:
        load_settings(Sample, None, {})
    assert caught.value.hint == "did you mean port?"


def test_the_shared_prefix_belongs_to_others_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shared(Settings):
        cloud: str = ""

    monkeypatch.setenv("ISTHMUS_LOG_LEVEL", "debug")
    monkeypatch.setenv("ISTHMUS_CLOUD", "localhost:1")
    assert load_settings(Shared, None, {}).value.cloud == "localhost:1"


def test_a_list_in_the_environment_that_is_no_json_gets_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    class Listed(Settings):
        env_prefix: ClassVar[str] = "LISTED_"
        models: tuple[str, ...] = ()

    monkeypatch.setenv("LISTED_MODELS", '["a"]')
    assert load_settings(Listed, None, {}).value.models == ("a",)
    monkeypatch.setenv("LISTED_MODELS", "a")
    with pytest.raises(ConfigError, match=r"environment LISTED_\*.*models") as caught:
        load_settings(Listed, None, {})
    assert "JSON" in caught.value.hint
