"""Certificates: the workspace's own authority, the server's certificate, and the authority that certifies devices.

    ca (operator, offline, 10 years)
     ├── server certificate (cloud, 397 days)
     └── issuing authority (cloud, 2 years) ── device certificates (90 days, security.enrolment)

All keys are ECDSA P-256: the TLS library inside gRPC takes no Ed25519 certificates by default. Times are handed in.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from isthmus.errors import ConfigError, InputError
from security.keyfiles import load_ec_key, read_file, replace_file, replace_private_key, save_private_key

CA_LIFETIME: Final = timedelta(days=3650)
ISSUING_CA_LIFETIME: Final = timedelta(days=730)
SERVER_LIFETIME: Final = timedelta(days=397)
BACKDATED: Final = timedelta(minutes=5)  # so that a device whose clock is a little behind accepts a new certificate
MAX_HOSTS: Final = 8

_LABEL: Final = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
_DNS_NAME: Final = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*\Z")

SERVER: Final = (ExtendedKeyUsageOID.SERVER_AUTH,)
SERVER_AND_CLIENT: Final = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate with its key: it can sign others."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def load(cls, folder: Path, name: str) -> Authority:
        """Read `name`.pem and `name`.key from a folder.

        Raises:
            ConfigError: They are missing or do not belong together.
        """
        certificate, key = load_certificate(folder / f"{name}.pem"), load_ec_key(folder / f"{name}.key")
        if certificate.public_key() != key.public_key():
            raise ConfigError(f"{folder / name}.pem does not certify the key in {folder / name}.key")
        return cls(certificate, key)


def host_name(host: str) -> x509.GeneralName:
    """Return a host as it appears in a certificate.

    Raises:
        InputError: It is neither a DNS name nor an IP address (wildcards are not accepted).
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    # A name of digits and dots only is a mistyped address.
    if not _DNS_NAME.match(host) or host.replace(".", "").isdigit():
        raise InputError(
            f"expected a DNS name or an IP address, got {host[:80]!r}",
            hint="for example cloud.example or 192.0.2.7, with neither scheme nor port",
        )
    return x509.DNSName(host.lower())


def host_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Return hosts as they appear in a certificate, each once.

    Raises:
        InputError: There are more than 8, or one is neither a DNS name nor an IP address.
    """
    names = list(dict.fromkeys(host_name(host) for host in hosts))
    if len(names) > MAX_HOSTS:
        raise InputError(f"expected at most {MAX_HOSTS} hosts, got {len(names)}")
    return names


def create_ca(folder: Path, name: str, now: datetime) -> Authority:
    """Create the workspace's root authority: `ca.key` and `ca.pem`.

    Raises:
        ConflictError: There is one already.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(f"{name} root")
    builder = _builder(subject, subject, key.public_key(), now, now + CA_LIFETIME)
    certificate = _as_authority(builder, 1).sign(key, hashes.SHA256())
    _save(folder, "ca", key, [certificate])
    return Authority(certificate, key)


def create_issuing_ca(ca: Authority, folder: Path, name: str, now: datetime) -> Authority:
    """Create the authority that certifies devices: `issuing-ca.key` and `issuing-ca.pem`.

    Raises:
        ConflictError: There is one already.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _issuing_certificate(ca, _name(f"{name} devices"), key, now)
    _save(folder, "issuing-ca", key, [certificate])
    return Authority(certificate, key)


def _issuing_certificate(
    ca: Authority, subject: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime
) -> x509.Certificate:
    until = min(now + ISSUING_CA_LIFETIME, ca.certificate.not_valid_after_utc)
    builder = _builder(subject, ca.certificate.subject, key.public_key(), now, until)
    builder = _as_authority(builder, 0).add_extension(_issued_by(ca), critical=False)
    # What this authority signs can be used for TLS and nothing else.
    builder = builder.add_extension(x509.ExtendedKeyUsage(SERVER_AND_CLIENT), critical=False)
    return builder.sign(ca.key, hashes.SHA256())


def replace_issuing_ca(ca: Authority, folder: Path, now: datetime) -> x509.Certificate:
    """Let a new authority certify devices from now on; what the one before has certified stays good.

    `issuing-ca.pem` holds the new certificate, then those that devices may still have certificates from.

    Raises:
        ConfigError: There is no issuing authority in the folder.
    """
    path = folder / "issuing-ca.pem"
    before = [old for old in load_certificates(path) if old.not_valid_after_utc > now]
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _issuing_certificate(ca, before[0].subject if before else ca.certificate.subject, key, now)
    replace_private_key(folder / "issuing-ca.key", key)
    replace_file(path, chain_pem([certificate, *before]))
    return certificate


def issue_server_certificate(ca: Authority, folder: Path, hosts: Sequence[str], now: datetime) -> x509.Certificate:
    """Create the cloud's key and certificate for these hosts: `server.key` and `server.pem`.

    Raises:
        InputError: There is no host, or one is neither a DNS name nor an IP address.
        ConflictError: There is a key already.
    """
    names = host_names(hosts)
    if not names:
        raise InputError("a server certificate needs at least one host", hint="--host NAME names one")
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = sign_leaf(ca, key.public_key(), hosts[0], names, SERVER, now, SERVER_LIFETIME)
    _save(folder, "server", key, [certificate])
    return certificate


def replace_server_certificate(ca: Authority, folder: Path, hosts: Sequence[str], now: datetime) -> x509.Certificate:
    """Give the cloud a new key and certificate in place of those in `folder`; a running cloud takes them up.

    Args:
        ca: The authority that signs.
        folder: Gets server.key and server.pem.
        hosts: As before; empty for the hosts of the certificate that is there.
        now: The time.

    Raises:
        ConfigError: No hosts are given and there is no certificate to read them from.
        InputError: One is neither a DNS name nor an IP address.
    """
    names = host_names(hosts) if hosts else _hosts_of(load_certificate(folder / "server.pem"))
    if not names:
        raise InputError("a server certificate needs at least one host", hint="--host NAME names one")
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = sign_leaf(ca, key.public_key(), str(names[0].value), names, SERVER, now, SERVER_LIFETIME)
    # A cloud that looks between the two finds a pair that does not fit, and goes on with the one that it has.
    replace_private_key(folder / "server.key", key)
    replace_file(folder / "server.pem", chain_pem([certificate]))
    return certificate


def _hosts_of(certificate: x509.Certificate) -> list[x509.GeneralName]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def sign_leaf(
    authority: Authority,
    public_key: ec.EllipticCurvePublicKey,
    common_name: str,
    names: Sequence[x509.GeneralName],
    usages: Sequence[x509.ObjectIdentifier],
    now: datetime,
    lifetime: timedelta,
) -> x509.Certificate:
    """Return a certificate for a key that signs nothing but TLS handshakes, never outliving its authority."""
    until = min(now + lifetime, authority.certificate.not_valid_after_utc)
    builder = _builder(_name(common_name), authority.certificate.subject, public_key, now, until)
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(list(usages)), critical=False)
        .add_extension(x509.SubjectAlternativeName(list(names)), critical=False)
        .add_extension(_issued_by(authority), critical=False)
        .sign(authority.key, hashes.SHA256())
    )


def load_certificate(path: Path) -> x509.Certificate:
    """Read the first certificate of a PEM file.

    Raises:
        ConfigError: There is none.
    """
    return load_certificates(path)[0]


def load_certificates(path: Path) -> list[x509.Certificate]:
    """Read the certificates of a PEM file.

    Raises:
        ConfigError: There is none.
    """
    try:
        return x509.load_pem_x509_certificates(read_file(path))
    except ValueError as error:
        raise ConfigError(f"{path}: expected a PEM certificate") from error


def chain_pem(certificates: Sequence[x509.Certificate]) -> bytes:
    """Return certificates as PEM, in the given order."""
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def _save(folder: Path, name: str, key: ec.EllipticCurvePrivateKey, certificates: Sequence[x509.Certificate]) -> None:
    save_private_key(folder / f"{name}.key", key)
    replace_file(folder / f"{name}.pem", chain_pem(certificates))


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _as_authority(builder: x509.CertificateBuilder, path_length: int) -> x509.CertificateBuilder:
    return builder.add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True).add_extension(
        _key_usage(signs_certificates=True), critical=True
    )


def _issued_by(authority: Authority) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
