"""Blobs appear whole, under the digest of their bytes, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from cloud.blobs import CHUNK, Blobs, Deltas
from isthmus.digests import sha256_bytes
from isthmus.errors import ConfigError, DigestMismatchError, InputError, NotFoundError

DATA = bytes(range(256)) * (CHUNK // 256) + b"and a little more"
DIGEST = sha256_bytes(DATA)


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_blob_comes_back_from_any_offset(tmp_path: Path) -> None:
    blobs = Blobs(str(tmp_path))
    assert blobs.store(DATA) == DIGEST
    assert blobs.store(DATA) == DIGEST
    assert blobs.length(DIGEST) == len(DATA)
    for offset in (0, 1, CHUNK, len(DATA) - 1, len(DATA)):
        assert b"".join(blobs.read(DIGEST, offset)) == DATA[offset:]
    assert max(len(chunk) for chunk in blobs.read(DIGEST)) == CHUNK
    with pytest.raises(InputError, match="offset"):
        next(blobs.read(DIGEST, len(DATA) + 1))


@pytest.mark.parametrize("sent", [DATA[:-1], DATA + b"x", DATA[:-1] + b"x", b""])
def test_other_bytes_than_announced_are_not_stored(tmp_path: Path, sent: bytes) -> None:
    blobs = Blobs(str(tmp_path))
    with pytest.raises(DigestMismatchError), blobs.upload(DIGEST, len(DATA)) as upload:
        upload.write(sent)
    assert not blobs.has(DIGEST)
    assert files_below(tmp_path) == []


def test_what_a_crash_left_is_removed_and_never_served(tmp_path: Path) -> None:
    Blobs(str(tmp_path))
    (tmp_path / "incoming" / "half").write_bytes(DATA[:100])
    os.utime(tmp_path / "incoming" / "half", (0, 0))
    (tmp_path / "incoming" / "of-another-cloud").write_bytes(DATA[:100])
    blobs = Blobs(str(tmp_path))
    assert files_below(tmp_path) == ["of-another-cloud"]
    assert not blobs.has(DIGEST)


@pytest.mark.parametrize("name", ["../../etc/passwd", DIGEST.upper(), DIGEST[:-1], "", f"{DIGEST}\n"])
def test_only_digests_become_paths(tmp_path: Path, name: str) -> None:
    blobs, deltas = Blobs(str(tmp_path / "blobs")), Deltas(str(tmp_path / "deltas"))
    for ask in (blobs.has, blobs.length, blobs.read):
        with pytest.raises(InputError, match="SHA-256"):
            ask(name)
    with pytest.raises(InputError, match="SHA-256"):
        deltas.has(DIGEST, name)


def test_a_blob_that_the_disk_changed_is_noticed(tmp_path: Path) -> None:
    blobs = Blobs(str(tmp_path / "blobs"))
    blobs.store(DATA)
    with blobs.as_path(DIGEST) as path:
        path.write_bytes(DATA[:-1] + b"x")
    with pytest.raises(DigestMismatchError, match="damaged"):
        blobs.read_all(DIGEST)
    with pytest.raises(DigestMismatchError):
        blobs.copy_to(DIGEST, tmp_path / "copy")


def test_missing_blobs_and_deltas_are_not_found(tmp_path: Path) -> None:
    blobs, deltas = Blobs(str(tmp_path / "blobs")), Deltas(str(tmp_path / "deltas"))
    with pytest.raises(NotFoundError):
        next(blobs.read(DIGEST))
    with pytest.raises(NotFoundError):
        next(deltas.read(DIGEST, DIGEST))


def test_a_damaged_blob_is_known_and_mended_by_the_next_upload(tmp_path: Path) -> None:
    blobs = Blobs(str(tmp_path))
    blobs.store(DATA)
    assert blobs.intact(DIGEST)
    (stored,) = [path for path in tmp_path.rglob(DIGEST) if path.is_file()]
    stored.write_bytes(b"x" + DATA[1:])
    assert not blobs.intact(DIGEST)
    with blobs.upload(DIGEST, len(DATA)) as upload:
        upload.write(DATA)
    assert blobs.intact(DIGEST)
    assert not blobs.intact("0" * 64)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Yield the address of a folder in a bucket, behind an S3 server on this machine."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ACCESS_KEY_ID": "test",
            "SECRET_ACCESS_KEY": "test",
            "DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(f"AWS_{name}", value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        fsspec.filesystem("s3").mkdir("models")
        yield "s3://models/cloud-1"
    server.stop()


@pytest.fixture(params=["folder", "memory", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return an address of each kind."""
    if request.param == "bucket":
        return str(request.getfixturevalue("bucket"))
    return str(tmp_path / "state") if request.param == "folder" else f"memory://{tmp_path.name}"


def test_any_place_will_do(place: str, tmp_path: Path) -> None:
    blobs, deltas = Blobs(f"{place}/blobs"), Deltas(f"{place}/deltas")
    assert not blobs.has(DIGEST)
    assert blobs.store(DATA) == DIGEST
    assert blobs.read_all(DIGEST) == DATA
    assert blobs.length(DIGEST) == len(DATA)
    assert b"".join(blobs.read(DIGEST, CHUNK + 3)) == DATA[CHUNK + 3 :]
    assert blobs.intact(DIGEST)
    with pytest.raises(DigestMismatchError), blobs.upload("0" * 64, 5) as upload:
        upload.write(b"wrong")
    assert not blobs.has("0" * 64)
    with pytest.raises(NotFoundError):
        blobs.length("0" * 64)
    with blobs.as_path(DIGEST) as path:
        assert path.read_bytes() == DATA
    (tmp_path / "delta").write_bytes(b"delta")
    deltas.store(DIGEST, "0" * 64, tmp_path / "delta")
    assert b"".join(deltas.read(DIGEST, "0" * 64, 2)) == b"lta"


def test_two_clouds_share_a_place(place: str) -> None:
    one, other = Blobs(f"{place}/shared"), Blobs(f"{place}/shared")
    assert not other.has(DIGEST)
    with one.upload(DIGEST, len(DATA)) as upload:
        upload.write(DATA[:CHUNK])
        third = Blobs(f"{place}/shared")  # starts meanwhile, and leaves what is on its way alone
        upload.write(DATA[CHUNK:])
    assert other.read_all(DIGEST) == third.read_all(DIGEST) == DATA


@pytest.mark.parametrize("url", ["nothing://bucket/folder", "s4://bucket"])
def test_addresses_of_no_known_kind_are_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        Blobs(url)
