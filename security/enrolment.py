"""Enrolment: how a new device gets its certificate.

The device makes a key that never leaves it and a signing request (PKCS#10). The cloud checks an enrolment code, which
names the device, and signs. What is taken from the request is checked, and little is:

- its self-signature, which proves that the sender holds the key; the key must be ECDSA P-256;
- at most 8 hosts under which the device's own clients reach it, each a DNS name or an IP address;
- never the identity (that is the code's), and no host of the cloud itself: such a certificate could pose as the cloud.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from isthmus.errors import ConfigError, InputError, PermissionDeniedError
from security.authority import (
    MAX_HOSTS,
    SERVER_AND_CLIENT,
    Authority,
    chain_pem,
    host_names,
    load_certificate,
    sign_leaf,
)
from security.keyfiles import save_private_key

log = structlog.get_logger(__name__)

DEVICE_LIFETIME: Final = timedelta(days=90)
MAX_REQUEST_BYTES: Final = 16 * 1024
_DEVICE_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# What the library raises for a certificate or request that it cannot read; most of them are of no common class.
_NOT_READ: Final = (
    ValueError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.InvalidVersion, x509.UnsupportedGeneralNameType,
)  # fmt: skip


def check_device_id(device_id: str) -> str:
    """Return `device_id` when a device may be called so.

    Raises:
        InputError: It may not.
    """
    if not _DEVICE_ID.fullmatch(device_id):
        raise InputError(
            f"expected a device id of 1 to 64 letters, digits, dots, dashes and underscores, got {device_id[:80]!r}",
            hint="for example camera-1; it begins with a letter or digit",
        )
    return device_id


def new_device_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Create a device's private key.

    Raises:
        ConflictError: There is a file already.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    save_private_key(path, key)
    return key


def make_csr(key: ec.EllipticCurvePrivateKey, device_id: str, hosts: Sequence[str]) -> bytes:
    """Return a signing request, PEM, for a device that its clients reach under `hosts`.

    Args:
        key: The device's key.
        device_id: Its id as far as it knows it; "" when only its enrolment code says it.
        hosts: DNS names and IP addresses.

    Raises:
        InputError: A host is neither a DNS name nor an IP address, or there are more than 8.
    """
    subject = [x509.NameAttribute(NameOID.COMMON_NAME, check_device_id(device_id))] if device_id else []
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(subject))
    names = host_names(hosts)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """Return the hosts that a device's certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]


def public_key_of(pem: bytes) -> bytes:
    """Return the public key, PEM, of a certificate (the first of a chain) or a signing request.

    Raises:
        InputError: It is neither.
    """
    try:
        if b"CERTIFICATE REQUEST" in pem:
            key = x509.load_pem_x509_csr(pem).public_key()
        else:
            key = x509.load_pem_x509_certificate(pem).public_key()
    except _NOT_READ as error:
        raise InputError("expected a PEM certificate or signing request") from error
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


class IssuingCa:
    """The cloud's authority for device certificates; follows the files.

    Args:
        cloud_dir: The workspace's `cloud` folder.

    Raises:
        ConfigError: Its files are missing or do not fit together.
    """

    def __init__(self, cloud_dir: Path) -> None:
        self._folder = cloud_dir
        self._read()

    @classmethod
    def load(cls, cloud_dir: Path) -> IssuingCa:
        """Read the authority of a workspace, and the names of the cloud that no device may have.

        Raises:
            ConfigError: Its files are missing or do not fit together.
        """
        return cls(cloud_dir)

    def refresh(self) -> None:
        """Take in files that were replaced since; those that do not fit together change nothing, for now."""
        if self._stamp() == self._seen:
            return
        try:
            self._read()
        except ConfigError as error:
            log.warning("issuing authority not replaced", reason=error.message)
            return
        log.info("issuing authority replaced", until=self._authority.certificate.not_valid_after_utc.isoformat())

    def _read(self) -> None:
        seen = self._stamp()
        server = load_certificate(self._folder / "server.pem")
        try:
            names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound as error:
            raise ConfigError(f"{self._folder / 'server.pem'} names no host") from error
        self._authority = Authority.load(self._folder, "issuing-ca")
        self._cloud_names = frozenset(name for name in names if not _is_loopback(name))
        self._seen = seen

    def _stamp(self) -> tuple[object, ...]:
        """Return what changes when a file is replaced."""
        names = ("issuing-ca.key", "issuing-ca.pem", "server.pem")
        try:
            stats = [(self._folder / name).stat() for name in names]
        except OSError as error:
            return (str(error),)
        return tuple((s.st_mtime_ns, s.st_size, s.st_ino) for s in stats)

    def sign(self, csr_pem: bytes, device_id: str, now: datetime) -> bytes:
        """Return the device's certificate and the authority's own, PEM.

        Args:
            csr_pem: The device's request.
            device_id: Who the device is, from its enrolment code.
            now: The time.

        Raises:
            InputError: The request is malformed, its signature is wrong, or its key is not ECDSA P-256.
            PermissionDeniedError: It asks for a host name of the cloud.
        """
        check_device_id(device_id)
        request = _parse_request(csr_pem)
        key = request.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise InputError("the signing request must be for an ECDSA P-256 key")
        hosts = _requested_hosts(request)
        if self._cloud_names.intersection(hosts):
            raise PermissionDeniedError("a device cannot have a host name of the cloud", reason="host-not-allowed")
        identity = x509.UniformResourceIdentifier(f"isthmus://device/{device_id}")
        names = [identity, *hosts]
        leaf = sign_leaf(self._authority, key, device_id, names, SERVER_AND_CLIENT, now, DEVICE_LIFETIME)
        return chain_pem([leaf, self._authority.certificate])


def _parse_request(csr_pem: bytes) -> x509.CertificateSigningRequest:
    if len(csr_pem) > MAX_REQUEST_BYTES:
        raise InputError(f"expected a signing request of at most {MAX_REQUEST_BYTES} bytes, got {len(csr_pem)}")
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        signed = request.is_signature_valid
        list(request.extensions)  # parsed only when asked for
    except _NOT_READ as error:
        raise InputError("expected a PEM signing request (PKCS#10)") from error
    if not signed:
        raise InputError("the signing request is not signed with its own key")
    return request


def _requested_hosts(request: x509.CertificateSigningRequest) -> list[x509.GeneralName]:
    try:
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    if len(list(names)) > MAX_HOSTS:
        raise InputError(f"expected at most {MAX_HOSTS} hosts in the signing request")
    if not all(isinstance(name, x509.DNSName | x509.IPAddress) for name in names):
        raise InputError("expected DNS names and IP addresses only in the signing request")
    return host_names([str(name.value) for name in names])


def _is_loopback(name: x509.GeneralName) -> bool:
    if isinstance(name, x509.IPAddress):
        return bool(name.value.is_loopback)
    return bool(name.value == "localhost")
