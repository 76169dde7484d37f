"""report.json: what the compiler measured, for people and for the next stage of a rollout.

Times are not in it: the same input must give the same bytes. `isthmus compile` prints them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from compiler.recipe import GuardSection


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VariantReport(_Part):
    """One variant against the source of the light model."""

    id: str
    bytes: int
    accuracy: float
    accuracy_drop: float  # against the source; negative when it is better
    max_difference: float  # largest absolute one of any output
    tolerance: float
    grid: Literal["", "kept", "new"]  # int8: scales of the version before, or new ones
    grid_note: str  # why the grid is new although there is a version before
    clipped: float  # kept grid: largest share of one tensor's weights that had to be clipped


class Report(_Part):
    """The whole report."""

    schema_version: Literal[1] = 1
    samples: int
    light_accuracy: float  # of the source
    heavy_accuracy: float
    guard: GuardSection
    variants: tuple[VariantReport, ...]

    def to_json(self) -> bytes:
        """Return canonical JSON."""
        return self.model_dump_json(indent=2).encode() + b"\n"
