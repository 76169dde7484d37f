"""Credentials for gRPC listeners and channels: TLS 1.3 only, certificates that rotate without a restart.

The server looks at its key and chain files at each handshake. When they changed, the new pair is used from then on;
a pair that does not fit together (somebody is in the middle of replacing it) is left for the next handshake, and the
old one serves on.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any, cast

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from isthmus import tls13
from isthmus.errors import ConfigError
from security.keyfiles import load_private_key, read_file

log = structlog.get_logger(__name__)


def server_credentials(key: Path, chain: Path, clients: Path | None = None) -> grpc.ServerCredentials:
    """Return credentials that follow the files.

    Args:
        key: Private key, PEM.
        chain: The server's certificate, then those of intermediate authorities, PEM.
        clients: Certificates of the authorities that clients must have one from, PEM; None asks for none. gRPC's
            Python servers cannot ask for a certificate and do without one, hence listeners of both kinds.

    Raises:
        ConfigError: TLS 1.3 is not enforced in this process, or the files do not hold a pair.
    """
    _require_tls13()
    pair = _RotatingPair(key, chain, clients)
    return grpc.dynamic_ssl_server_credentials(
        pair.read(), pair.changed, require_client_authentication=clients is not None
    )


def channel_credentials(ca: Path, key: Path | None = None, chain: Path | None = None) -> grpc.ChannelCredentials:
    """Return credentials for a channel that trusts the authority in the file `ca`, and no other.

    Args:
        ca: The authority's certificate, PEM.
        key: Private key of the certificate that is shown to a server that asks for one.
        chain: That certificate, then those of intermediate authorities, PEM.

    Raises:
        ConfigError: TLS 1.3 is not enforced in this process, or a file does not hold what it should.
    """
    _require_tls13()
    pem = read_file(ca)
    _load_chain(ca, pem)
    if key is None or chain is None:
        return grpc.ssl_channel_credentials(root_certificates=pem)
    return grpc.ssl_channel_credentials(pem, *_read_pair(key, chain))


def client_context(ca: Path) -> ssl.SSLContext:
    """Return what `channel_credentials` does, for connections without gRPC: HTTP/2 to servers of one authority.

    Raises:
        ConfigError: The file does not hold a certificate.
    """
    pem = read_file(ca)
    _load_chain(ca, pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and host name
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=pem.decode("ascii"))
    context.set_alpn_protocols(["h2"])
    return context


def negotiated(context: grpc.aio.ServicerContext[Any, Any]) -> tuple[str, str]:
    """Return the connection's TLS version and key exchange group; both are empty on a connection without TLS."""
    # The stubs promise more than plain mappings of names to byte strings; this is what arrives.
    properties = cast("dict[str, list[bytes]]", context.auth_context())
    version, group = (
        (properties.get(name) or [b""])[0].decode("ascii", "replace")
        for name in ("ssl_tls_version", "ssl_negotiated_key_exchange_group")
    )
    return version, group


def _require_tls13() -> None:
    if not tls13.is_enforced():
        raise ConfigError(
            "TLS 1.3 is not enforced in this process",
            hint="call isthmus.tls13.enforce() before anything imports grpc",
        )


def _read_pair(key: Path, chain: Path) -> tuple[bytes, bytes]:
    """Return a private key and the chain that certifies it, as they are on the disk.

    Raises:
        ConfigError: They cannot be read or do not belong together.
    """
    chain_pem = read_file(chain)
    leaf = _load_chain(chain, chain_pem)[0]
    own = load_private_key(key).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != own:
        raise ConfigError(f"{chain} does not certify the key in {key}")
    return read_file(key), chain_pem


class _RotatingPair:
    """A key and a certificate chain on disk, and the authorities of clients; re-read when a file was replaced."""

    def __init__(self, key: Path, chain: Path, clients: Path | None) -> None:
        self._key = key
        self._chain = chain
        self._clients = clients
        self._seen: tuple[object, ...] = ()

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Read the files.

        Raises:
            ConfigError: They cannot be read or do not belong together.
        """
        self._seen = self._stamp()
        pair = _read_pair(self._key, self._chain)
        roots = None
        if self._clients is not None:
            roots = read_file(self._clients)
            _load_chain(self._clients, roots)
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)

    def changed(self) -> grpc.ServerCertificateConfiguration:
        """Return the new pair, or None while nothing usable changed; grpc calls this at each handshake."""
        unchanged = cast("grpc.ServerCertificateConfiguration", None)  # grpc keeps what it has; its stubs do not say so
        if self._stamp() == self._seen:
            return unchanged
        try:
            configuration = self.read()
        except ConfigError as error:
            log.warning("certificate not replaced", reason=error.message)
            return unchanged
        log.info("certificate replaced", chain=str(self._chain))
        return configuration

    def _stamp(self) -> tuple[object, ...]:
        paths = [path for path in (self._key, self._chain, self._clients) if path is not None]
        try:
            return tuple((s.st_mtime_ns, s.st_size, s.st_ino) for s in (path.stat() for path in paths))
        except OSError as error:
            return (str(error),)


def _load_chain(path: Path, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigError(f"{path}: expected PEM certificates", hint="isthmus keys init wrote them") from error
