"""Key files: created privately, never overwritten, replaced whole, and refused when they hold something else."""

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from isthmus.errors import ConfigError, ConflictError
from security.keyfiles import (
    create_secret,
    load_ec_key,
    load_ed25519_key,
    load_private_key,
    replace_file,
    save_private_key,
)


def test_a_secret_is_private_whatever_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        create_secret(tmp_path / "secret", b"x")
        replace_file(tmp_path / "token", b"x", mode=0o600)
    finally:
        os.umask(previous)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_a_secret_does_not_follow_a_planted_link(tmp_path: Path) -> None:
    (tmp_path / "secret").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConflictError):
        create_secret(tmp_path / "secret", b"x")
    assert not (tmp_path / "elsewhere").exists()


def test_a_replaced_file_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for data in (b"one", b"two"):
        replace_file(tmp_path / "file", data)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"two"


def test_keys_round_trip(tmp_path: Path) -> None:
    edwards, p256 = ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())
    save_private_key(tmp_path / "a.key", edwards)
    save_private_key(tmp_path / "b.key", p256)
    assert load_ed25519_key(tmp_path / "a.key").public_key() == edwards.public_key()
    assert load_ec_key(tmp_path / "b.key").public_key() == p256.public_key()
    with pytest.raises(ConfigError, match="ECDSA"):
        load_ec_key(tmp_path / "a.key")
    with pytest.raises(ConfigError, match="Ed25519"):
        load_ed25519_key(tmp_path / "b.key")


def _pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, password: bytes = b"") -> bytes:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        _pem(rsa.generate_private_key(65537, 2048)),
        _pem(ec.generate_private_key(ec.SECP384R1())),
        _pem(ec.generate_private_key(ec.SECP256R1()), b"password"),
    ],
)
def test_other_files_are_refused_without_repeating_them(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.key").write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        load_private_key(tmp_path / "x.key")
    assert "nonsense" not in refusal.value.message


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_private_key(tmp_path / "x.key")
