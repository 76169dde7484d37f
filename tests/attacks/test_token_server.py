"""Forged tokens at a running server, signed with either algorithm; tests/attacks/test_tokens.py has the finer cuts."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloud import database as db
from isthmus.v1 import fleet_pb2
from security.jws import assemble
from security.keyfiles import save_private_key
from security.keyset import public_jwk
from security.signer import EDDSA, ES256, FileSigner, Signer, new_key
from security.tokens import TokenIssuer
from security.workspace import init_workspace
from tests.attacks.doors import open_door, refusal

Claims = dict[str, Any]
WHO = fleet_pb2.WhoAmIRequest()


class Forge:
    """What an attacker knows: a token of their own, the public keys, and how to sign with keys of their own."""

    def __init__(self, workspace: Path, folder: Path) -> None:
        self.issuer = TokenIssuer.load(workspace / "cloud")
        self.genuine = self.issuer.mint("eve", "client", models=["triage"], ttl=timedelta(hours=1))[0]
        self.claims: Claims = jwt.decode(self.genuine, options={"verify_signature": False})
        self.header: Claims = jwt.get_unverified_header(self.genuine)
        self.cloud_key: Signer = FileSigner(workspace / "cloud" / "tokens" / f"{self.issuer.kid}.key")
        save_private_key(folder / "own.key", new_key(self.cloud_key.algorithm))
        self.own_key: Signer = FileSigner(folder / "own.key")
        save_private_key(folder / "other.key", new_key(ES256 if self.cloud_key.algorithm == EDDSA else EDDSA))
        self.other_key: Signer = FileSigner(folder / "other.key")

    def own(self, header: Claims | None = None, claims: Claims | None = None, signer: Signer | None = None) -> str:
        """Return a token that the attacker signed."""
        sign = (signer or self.own_key).sign
        return assemble(self.header | (header or {}), self.claims | (claims or {}), sign)

    def edited(self, **claims: Any) -> str:
        """Return the genuine token with other claims under the same signature."""
        header, _, signature = self.genuine.split(".")
        body = base64.urlsafe_b64encode(json.dumps(self.claims | claims).encode()).rstrip(b"=").decode()
        return f"{header}.{body}.{signature}"

    def issued(self, without: str = "", **claims: Any) -> str:
        """Return what only the issuer itself could sign, were it wrong."""
        said = {name: value for name, value in (self.claims | claims).items() if name != without}
        return assemble(self.header, said, self.cloud_key.sign)

    def symmetric(self, secret: bytes) -> str:
        return assemble(
            self.header | {"alg": "HS256"}, self.claims, lambda text: hmac.digest(secret, text, hashlib.sha256)
        )


def _in(**more: float) -> int:
    return int((datetime.now(UTC) + timedelta(**more)).timestamp())


def _pem(forge: Forge) -> bytes:
    return forge.cloud_key.public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


FORGERIES: dict[str, tuple[str, Callable[[Forge], str]]] = {
    "nothing": ("missing-token", lambda f: ""),
    "no token": ("malformed-token", lambda f: "x.y.z"),
    "alg none": ("wrong-algorithm", lambda f: assemble(f.header | {"alg": "none"}, f.claims, lambda _: b"")),
    "alg none, signed": ("wrong-algorithm", lambda f: f.own({"alg": "nOnE"})),
    "no signature": ("wrong-signature", lambda f: assemble(f.header, f.claims, lambda _: b"")),
    "HS256 with the public key as PEM": ("wrong-algorithm", lambda f: f.symmetric(_pem(f))),
    "HS256 with the key set": ("wrong-algorithm", lambda f: f.symmetric(f.issuer.jwks)),
    "the other algorithm": ("wrong-algorithm", lambda f: f.own({"alg": f.other_key.algorithm}, signer=f.other_key)),
    "the other algorithm's key": ("wrong-signature", lambda f: f.own(signer=f.other_key)),
    "a wrong key under a known kid": ("wrong-signature", lambda f: f.own()),
    "an unknown kid": ("unknown-key", lambda f: f.own({"kid": public_jwk(f.own_key.public_key)["kid"]})),
    "a kid that is a path": ("unknown-key", lambda f: f.own({"kid": "../../../dev/null"})),
    "jku": ("malformed-token", lambda f: f.own({"jku": "https://eve.example/jwks.json"})),
    "x5u": ("malformed-token", lambda f: f.own({"x5u": "https://eve.example/chain.pem"})),
    "jwk": ("malformed-token", lambda f: f.own({"jwk": public_jwk(f.own_key.public_key)})),
    "more scopes": ("wrong-signature", lambda f: f.edited(scope="access:admin fleet:admin infer")),
    "more models": ("wrong-signature", lambda f: f.edited(models=["*"])),
    "another subject": ("wrong-signature", lambda f: f.edited(sub="root")),
    "another tenant": ("wrong-signature", lambda f: f.edited(tenant="b")),
    "a longer life": ("wrong-signature", lambda f: f.edited(exp=_in(days=365))),
    "expired": ("expired-token", lambda f: f.issued(exp=_in(minutes=-1), nbf=_in(hours=-1), iat=_in(hours=-1))),
    "future nbf": ("not-yet-valid-token", lambda f: f.issued(nbf=_in(minutes=2))),
    "future iat": ("not-yet-valid-token", lambda f: f.issued(iat=_in(minutes=2))),
    "another audience": ("wrong-audience", lambda f: f.issued(aud="isthmus://eve/cloud")),
    "another issuer": ("wrong-issuer", lambda f: f.issued(iss="isthmus://eve/tokens")),
    **{
        f"without {name}": ("missing-claim", lambda f, name=name: f.issued(without=name))  # type: ignore[misc]
        for name in ("iss", "aud", "sub", "exp", "nbf", "iat", "jti", "scope", "models")
    },
    "bound to a certificate that is not shown": (
        "certificate-required",
        lambda f: f.issued(cnf={"x5t#S256": "A" * 43}),
    ),
    "bound to something else": ("malformed-token", lambda f: f.issued(cnf={"jkt": "A" * 43})),
}


@pytest.mark.parametrize("algorithm", [EDDSA, ES256])
def test_every_forgery_is_refused_by_a_running_server(tmp_path: Path, algorithm: str) -> None:
    workspace = tmp_path / "workspace"
    init_workspace(workspace, ["localhost"], "acme", datetime.now(UTC), token_algorithm=algorithm)
    forge = Forge(workspace, tmp_path)

    async def story() -> dict[str, str]:
        async with open_door(workspace, db.Database(f"sqlite:///{tmp_path / 'isthmus.db'}")) as door:
            assert (await door.ask("WhoAmI", WHO, forge.genuine)).subject == "eve"
            assert (await door.ask("WhoAmI", WHO, forge.issued())).subject == "eve"
            reasons = {}
            for name, (_, make) in FORGERIES.items():
                code, reasons[name] = await refusal(door.ask("WhoAmI", WHO, make(forge)))
                assert code is grpc.StatusCode.UNAUTHENTICATED, name
            listed = fleet_pb2.ListDevicesRequest()
            assert await refusal(door.ask("ListDevices", listed, forge.genuine)) == (
                grpc.StatusCode.PERMISSION_DENIED,
                "missing-scope",
            )
            return reasons

    assert asyncio.run(story()) == {name: reason for name, (reason, _) in FORGERIES.items()}
