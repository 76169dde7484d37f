"""What became of an update, as the agent tells it to the cloud and to whoever asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from edge.assembly import FileResult
from edge.state import Became, Last, Order, Step
from edge.trial import Evidence

# Refusals that time may heal: a clock that is wrong until the network is up, metadata that the cloud must sign anew.
# Also what a change of the cloud's keys looks like to a device that asks in the middle of it.
MAY_PASS: Final = frozenset(
    {"expired-metadata", "freeze", "mix-and-match", "not-published", "revoked-key", "wrong-threshold"}
)
# Refusals that say nothing about the model: another attempt may find mended metadata or blobs, or another machine.
NO_VERDICT: Final = MAY_PASS | {
    "digest-mismatch", "malformed-metadata", "missing-extra", "no-fitting-variant", "not-found", "rollback",
    "too-long", "unsigned", "untrusted", "withdrawn",
}  # fmt: skip

_NO_ORDER: Final = Order()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an update."""

    model: str
    from_version: int
    to_version: int
    variant: str = ""
    became: Became = Became.ACTIVE
    reason: str = ""
    detail: str = ""
    files: tuple[FileResult, ...] = ()
    bytes_fetched: int = 0  # over the wire, those of earlier attempts included
    step: Step = Step.IDLE
    order: Order = _NO_ORDER
    evidence: Evidence | None = None

    @property
    def active(self) -> bool:
        """Return whether the version that was asked for serves."""
        return self.became in (Became.ACTIVE, Became.SOAKING)

    @property
    def final(self) -> bool:
        """Return whether trying this version again can only end in the same way."""
        return self.reason not in MAY_PASS

    @property
    def serving_version(self) -> int:
        """Return the version that serves now."""
        return self.to_version if self.active else self.from_version

    @property
    def bytes_full(self) -> int:
        """Return the bytes of the same files in full."""
        return sum(file.bytes_full for file in self.files)

    def to_last(self) -> Last:
        """Return what is remembered of it over restarts."""
        return Last(
            version=self.to_version,
            became=self.became,
            reason=self.reason,
            detail=self.detail[:1000],
            rollout=self.order.rollout,
            attempt=self.order.attempt,
            seen=None if self.evidence is None else self.evidence.now,
            before=None if self.evidence is None else self.evidence.before,
        )


def remembered(model: str, serving: int, variant: str, last: Last) -> Outcome:
    """Return the outcome that an earlier run of the agent came to."""
    evidence = None if last.seen is None or last.before is None else Evidence(last.seen, last.before)
    order = Order(version=last.version, rollout=last.rollout, attempt=last.attempt)
    return Outcome(
        model,
        serving,
        last.version,
        variant,
        last.became,
        last.reason,
        last.detail,
        order=order,
        evidence=evidence,
    )
