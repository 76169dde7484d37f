"""What it costs to know who calls, on the warm path: a token, a token of grants, an API key, an external token.

Each request brings its credential as a new string, as gRPC hands metadata over, so its hash is computed every time.
Nothing is sent: what is measured is the processor time between the metadata and the claims.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Final

import jwt
import typer
from cryptography.hazmat.primitives.asymmetric import rsa

from benchmarks.result import Goal, publish
from security.apikeys import ApiKey, key_digest, new_api_key
from security.authenticator import Authenticator
from security.oidc import OidcConfig, OidcIssuers
from security.roles import AccessBook, Grant
from security.tokens import TokenIssuer, create_token_issuer

LIMIT_US: Final = 5.0
_ISSUER: Final = "https://idp.example"
_OTHERS: Final = 1000  # grants and keys of others that are there as well


def measure(*, rounds: int = 30, calls: int = 2000) -> list[dict[str, Any]]:
    """Return the microseconds of one verification for each kind of credential, over rounds."""
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        authenticator, credentials = _set_up(Path(folder))
    rows = []
    for kind, credential in credentials.items():
        authenticator.verify(credential)
        costs = [_cost(authenticator.verify, credential, calls) for _ in range(rounds)]
        rows.append(
            {
                "credential": kind,
                "best_us": min(costs),
                "median_us": statistics.median(costs),
                "slowest_us": max(costs),
            }
        )
    return rows


def _cost(work: Callable[[str], object], credential: str, calls: int) -> float:
    first, rest = credential[:10], credential[10:]
    gc.collect()
    gc.disable()
    started = time.thread_time_ns()
    for _ in range(calls):
        work(first + rest)
    spent = time.thread_time_ns() - started
    gc.enable()
    return spent / calls / 1000


def _set_up(folder: Path) -> tuple[Authenticator, dict[str, str]]:
    create_token_issuer(folder / "tokens", issuer="i", audience="a")
    issuer, hour = TokenIssuer.load(folder), timedelta(hours=1)
    signer = rsa.generate_private_key(65537, 2048)
    entry = json.loads(jwt.get_algorithm_by_name("RS256").to_jwk(signer.public_key())) | {"kid": "k", "use": "sig"}
    (folder / "jwks.json").write_text(json.dumps({"keys": [entry]}))
    issuers = OidcIssuers(
        [OidcConfig(name="corp", issuer=_ISSUER, audience="a", jwks_file=folder / "jwks.json", algorithms=("RS256",))]
    )
    issuers.all[0].keys.load()
    now, book = time.time(), AccessBook()
    key, prefix = new_api_key()
    principals = ("subject:ann", "apikey:shop", "oidc:corp:ann", *(f"subject:{number}" for number in range(_OTHERS)))
    book.replace(
        [Grant("default", name, "client", frozenset({"triage"})) for name in principals],
        [
            ApiKey(prefix, key_digest(key), "default", "shop", now + 3600),
            *(ApiKey(str(n), key_digest(str(n)), "default", str(n), now + 3600) for n in range(_OTHERS)),
        ],
    )
    external = {"iss": _ISSUER, "aud": "a", "sub": "ann", "iat": int(now), "exp": int(now) + 3600}
    return Authenticator(issuer.verifier(), book=book, issuers=issuers), {
        "token": issuer.mint("ann", "client", ttl=hour)[0],
        "token of grants": issuer.mint("ann", "granted", ttl=hour)[0],
        "API key": key,
        "external token": jwt.encode(external, signer, "RS256", headers={"kid": "k"}),
    }


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")] = None,
) -> None:
    """Measure and print."""
    rows = measure(rounds=7 if quick else 30)
    goals = [Goal(f"warm verification of a {row['credential']}, us", row["median_us"], LIMIT_US) for row in rows]
    publish("authentication", rows, goals, json_file)


if __name__ == "__main__":
    typer.run(main)
