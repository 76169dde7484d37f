"""The workspace on disk: complete, private where it must be, never overwritten."""

import stat
from datetime import timedelta
from pathlib import Path

import pytest

from isthmus.errors import ConfigError, ConflictError, InputError
from security.enrolment import IssuingCa
from security.repository import CloudRepository
from security.tokens import TokenIssuer
from security.workspace import describe_workspace, init_workspace
from tests.security.conftest import NOW


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_every_private_key_is_its_owners_alone(workspace: Path) -> None:
    keys = list(workspace.rglob("*.key"))
    assert len(keys) == 10
    assert {_mode(key) for key in keys} == {0o600}
    assert all(key.read_text().startswith("-----BEGIN PRIVATE KEY-----") for key in keys)
    assert {_mode(workspace / name) for name in ("operator", "cloud", "cloud/tokens")} == {0o700}


def test_what_is_handed_out_holds_no_secret(workspace: Path) -> None:
    files = {path.name: path.read_text() for path in (workspace / "trust").iterdir()}
    assert set(files) == {"ca.pem", "root.json", "audit.pub", "sealing.json"}
    assert not any("PRIVATE" in text for text in files.values())


def test_the_cloud_holds_no_key_that_can_sign_a_model(workspace: Path) -> None:
    cloud = {path.name for path in (workspace / "cloud").rglob("*.key")}
    assert not cloud & {"root.key", "targets.key", "ca.key"}


def test_all_parts_of_it_load(workspace: Path) -> None:
    cloud = workspace / "cloud"
    assert TokenIssuer.load(cloud).issuer == "isthmus://acme/tokens"
    assert CloudRepository(cloud).metadata("1.root.json") == (workspace / "trust" / "root.json").read_bytes()
    IssuingCa.load(cloud)


def test_a_workspace_is_never_overwritten(own_workspace: Path) -> None:
    before = {path: path.read_bytes() for path in own_workspace.rglob("*") if path.is_file()}
    with pytest.raises(ConflictError):
        init_workspace(own_workspace, ["localhost"], "acme", NOW)
    assert {path: path.read_bytes() for path in own_workspace.rglob("*") if path.is_file()} == before


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    init_workspace(tmp_path / "new", ["localhost"], "acme", NOW)
    assert (tmp_path / "new" / "trust" / "ca.pem").exists()


@pytest.mark.parametrize(
    ("hosts", "name"), [([], "acme"), (["*.x"], "acme"), (["a b"], "acme"), (["localhost"], "a/b"), (["x"], "")]
)
def test_wrong_input_leaves_nothing_behind(tmp_path: Path, hosts: list[str], name: str) -> None:
    with pytest.raises(InputError):
        init_workspace(tmp_path / "new", hosts, name, NOW)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(*_: object, **__: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("security.workspace.create_repository", disk_full)
    with pytest.raises(OSError, match="No space"):
        init_workspace(tmp_path / "new", ["localhost"], "acme", NOW)
    assert list(tmp_path.iterdir()) == []


def test_two_workspaces_share_no_key(tmp_path: Path) -> None:
    for name in ("a", "b"):
        init_workspace(tmp_path / name, ["localhost"], "acme", NOW)
    keys = [path.read_bytes() for path in tmp_path.rglob("*.key")]
    assert len(set(keys)) == len(keys) == 20


def test_the_description_lists_everything_and_no_secret(tmp_path: Path) -> None:
    init_workspace(tmp_path / "new", ["localhost"], "acme", NOW)
    entries = describe_workspace(tmp_path / "new")
    described = {entry.file for entry in entries}
    on_disk = {path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*.key")}
    assert on_disk <= described
    assert {"operator/ca.pem", "cloud/server.pem", "trust/root.json", "cloud/tuf/timestamp.json"} <= described
    by_file = {entry.file: entry for entry in entries}
    assert by_file["cloud/server.pem"].expires_at == NOW + timedelta(days=397)
    assert by_file["cloud/tuf/timestamp.json"].expires_at == NOW + timedelta(days=1)
    assert by_file["operator/root.key"].algorithm == "Ed25519"
    assert by_file["operator/ca.key"].algorithm == "ECDSA P-256"


def test_a_part_of_a_workspace_can_be_described(own_workspace: Path, tmp_path: Path) -> None:
    (own_workspace / "operator").rename(tmp_path / "safe")
    assert not any(entry.file.startswith("operator") for entry in describe_workspace(own_workspace))


def test_no_workspace_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no workspace"):
        describe_workspace(tmp_path)
