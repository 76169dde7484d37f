"""What state.json remembers: the installed versions, the update that is under way, and what failed here.

The steps of an update, in order; each transition is on the disk before the next step begins:

    idle        nothing is under way
    plan        what signed metadata says of the version, which variant, which files
    fetch       bring each file into the partial slot, by delta where one is smaller, from the byte where it stopped
    verify      every file of the partial slot against the signed manifest
    apply       the partial slot becomes a whole one, in one rename; it does not serve
    self-test   open it with the device's runtime; golden answers, latency, memory
    shadow      it answers copies of live requests in the dark (when asked for)
    activate    the state names it, the model is swapped
    soak        it serves on trial, the version before it stays ready
    commit      it is kept for good
    roll-back   the version before it serves again
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import structlog
from pydantic import BaseModel, ConfigDict, Field

from edge.tally import Seen
from edge.trial import Terms

log = structlog.get_logger(__name__)


class Step(StrEnum):
    """Where an update is."""

    IDLE = "idle"
    PLAN = "plan"
    FETCH = "fetch"
    VERIFY = "verify"
    APPLY = "apply"
    SELF_TEST = "self-test"
    SHADOW = "shadow"
    ACTIVATE = "activate"
    SOAK = "soak"
    COMMIT = "commit"
    ROLL_BACK = "roll-back"


_MAY_FOLLOW: Final[dict[Step, frozenset[Step]]] = {
    Step.IDLE: frozenset({Step.PLAN, Step.SOAK}),  # soak: a trial goes on, after a restart too
    Step.PLAN: frozenset({Step.FETCH, Step.VERIFY, Step.IDLE}),  # verify: the slot is there already
    Step.FETCH: frozenset({Step.VERIFY, Step.IDLE}),
    Step.VERIFY: frozenset({Step.APPLY, Step.SELF_TEST, Step.IDLE}),
    Step.APPLY: frozenset({Step.SELF_TEST, Step.IDLE}),
    Step.SELF_TEST: frozenset({Step.SHADOW, Step.ACTIVATE, Step.IDLE}),
    Step.SHADOW: frozenset({Step.ACTIVATE, Step.IDLE}),
    Step.ACTIVATE: frozenset({Step.SOAK, Step.COMMIT, Step.IDLE}),
    Step.SOAK: frozenset({Step.COMMIT, Step.ROLL_BACK}),
    Step.COMMIT: frozenset({Step.IDLE}),
    Step.ROLL_BACK: frozenset({Step.IDLE}),
}


class _Kept(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)  # a newer agent may have written more


class Order(_Kept):
    """A version that the cloud asks for, and how it has to prove itself."""

    version: int = 0
    rollout: str = ""
    attempt: int = 0
    terms: Terms | None = None  # None: as the device is configured


class Progress(_Kept):
    """The update that is under way, or the version on trial."""

    order: Order
    step: Step
    crashes: int = 0  # self-tests in a row that the process did not survive
    bytes_fetched: int = 0
    terms: Terms = Terms()
    seen: Seen = Seen()  # of the version on trial, up to the last checkpoint
    before: Seen = Seen()  # of the version before it
    reason: str = ""  # of a roll back
    detail: str = ""


class Became(StrEnum):
    """What became of an update."""

    ACTIVE = "active"
    REFUSED = "refused"
    UPDATING = "updating"
    SOAKING = "soaking"
    ROLLED_BACK = "rolled-back"


class Last(_Kept):
    """What became of the last update; told again after a restart, since the report of it may be lost."""

    version: int
    became: Became
    reason: str = ""
    detail: str = ""
    rollout: str = ""
    attempt: int = 0
    seen: Seen | None = None
    before: Seen | None = None


class State(_Kept):
    """What state.json says."""

    current: int = 0
    previous: int = 0
    newest: int = 0  # the highest version that was ever kept
    variant: str = ""
    previous_variant: str = ""
    failed: dict[int, str] = {}
    attempts: dict[int, int] = {}  # by failed version: the attempt of the order that failed
    progress: Progress | None = None
    last: Last | None = None
    # A version that kills its process must not do so for ever. Until one has lived for a while:
    proven: bool = True
    crashes: int = Field(default=0, ge=0)  # starts in a row that did not end in an orderly stop
    stopped: bool = False  # in an orderly way

    @property
    def on_trial(self) -> bool:
        """Return whether the version that serves is on trial."""
        return self.progress is not None and self.progress.step in (Step.SOAK, Step.ROLL_BACK)


class Course:
    """The step that a model's update or trial is at; only a step that may follow can be entered.

    Args:
        model: Its name.
    """

    def __init__(self, model: str) -> None:
        self.step = Step.IDLE
        self._model = model

    def enter(self, step: Step, version: int) -> None:
        """Begin a step with a version."""
        if step not in _MAY_FOLLOW[self.step]:
            raise RuntimeError(f"update of {self._model}: {step} cannot follow {self.step}")
        self.step = step
        log.info("update", model=self._model, version=version, step=step.value)

    def end(self) -> None:
        """Nothing is under way any more."""
        self.step = Step.IDLE
