"""A real OpenID Connect issuer on loopback: an https server with a CA of its own, keys that rotate, and a bad mood."""

from __future__ import annotations

import base64
import json
import ssl
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from security.authority import create_ca, issue_server_certificate
from security.oidc import OidcConfig

AUDIENCE: Final = "isthmus"
ALGORITHMS: Final = ("RS256", "ES256", "EdDSA")
_SIGNERS: Final[dict[str, Any]] = {
    "RS256": lambda: rsa.generate_private_key(65537, 2048),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}


@dataclass(slots=True)
class Issuer:
    """The issuer and what it answers with: its keys, or whatever `answer` says instead."""

    url: str
    ca: Path
    keys: dict[str, tuple[str, Any]] = field(default_factory=dict)  # algorithm and private key by kid
    answer: tuple[int, dict[str, str], bytes] | None = None
    fetched: int = 0

    def add_key(self, algorithm: str, kid: str = "") -> str:
        """Make a key; return its id."""
        kid = kid or uuid.uuid4().hex
        self.keys[kid] = (algorithm, _SIGNERS[algorithm]())
        return kid

    def jwks(self) -> bytes:
        """Return the public keys."""
        entries = []
        for kid, (algorithm, key) in self.keys.items():
            kind = jwt.get_algorithm_by_name(algorithm)
            entry = json.loads(kind.to_jwk(key.public_key()))
            entry.pop("key_ops", None)
            entries.append(entry | {"kid": kid, "use": "sig", "alg": algorithm})
        return json.dumps({"keys": entries}).encode()

    def config(self, **values: Any) -> OidcConfig:
        """Return how a cloud is told of this issuer."""
        wanted: dict[str, Any] = {
            "name": "corp", "issuer": self.url, "audience": AUDIENCE, "jwks_url": f"{self.url}/keys",
            "ca_file": self.ca, "algorithms": ALGORITHMS,
        }  # fmt: skip
        return OidcConfig(**wanted | values)

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Return the claims of a good token, with changes; None takes one out."""
        now = int(time.time())
        claims = {
            "iss": self.url, "aud": AUDIENCE, "sub": "u-17", "iat": now, "exp": now + 600, "jti": uuid.uuid4().hex,
            "groups": ["vision", "night shift"],
        } | changes  # fmt: skip
        return {name: value for name, value in claims.items() if value is not None}

    def token(self, kid: str = "", *, header: dict[str, Any] | None = None, **changes: Any) -> str:
        """Return a token signed by one of the keys."""
        kid = kid or next(iter(self.keys))
        algorithm, key = self.keys[kid]
        return jwt.encode(self.claims(**changes), key, algorithm, headers={"kid": kid, **(header or {})})


def assemble(header: Any, claims: Any, signature: bytes = b"") -> str:
    """Put a token together by hand."""
    parts = (json.dumps(header).encode(), json.dumps(claims).encode(), signature)
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


@contextmanager
def oidc_issuer(folder: Path, *, algorithms: tuple[str, ...] = ("RS256",)) -> Iterator[Issuer]:
    """Run an issuer with one key for each algorithm."""
    folder.mkdir(parents=True, exist_ok=True)
    ca = create_ca(folder, "issuer", datetime.now(UTC))
    issue_server_certificate(ca, folder, ["127.0.0.1"], datetime.now(UTC))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    issuer = Issuer(f"https://127.0.0.1:{server.server_address[1]}", folder / "ca.pem")
    for algorithm in algorithms:
        issuer.add_key(algorithm)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            issuer.fetched += 1
            code, headers, body = issuer.answer or (200, {}, issuer.jwks())
            if not code:  # what is no HTTP at all, or an answer of more than one status
                self.wfile.write(body)
                self.close_connection = True
                return
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: Any) -> None:
            return

    server.RequestHandlerClass = Handler
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield issuer
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
