"""Whether a cell's answers are near enough to the source's; pure functions of what was measured.

The least cosines are those of `isthmus compile`. Labels, which its guard wants, the models of the zoo do not have: the
source's best class stands in for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from compiler.verify import LEAST_COSINE

LEAST_AGREEMENT: Final = 0.97  # of the best class, where that means something: what a guard of 0.03 asks for
MOST_RELATIVE: Final = 1e-3  # fp32: the largest difference, as a share of the output's range

State = Literal["green", "built", "inexact", "refused", "failed"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a cell."""

    state: State  # built: it cannot run on this machine; refused: the target says that it cannot take the model
    detail: str
    hint: str = ""

    @property
    def covered(self) -> bool:
        """Return whether the model can be used on the target."""
        return self.state in {"green", "built"}


def judge(result: Mapping[str, Any], precision: str, *, classifies: bool) -> Verdict:
    """Return the verdict on a cell's result.

    Args:
        result: As `benchmarks.cells.work_on` returns it.
        precision: What the variant computes in.
        classifies: The model has scores whose best class means something.
    """
    if result.get("error"):
        state: State = "refused" if result["reason"] == "unsupported-model" else "failed"
        return Verdict(state, str(result["error"]), str(result.get("hint", "")))
    if "parity" not in result:
        return Verdict("built", f"{result['bytes'] / (1 << 20):.1f} MiB")
    parity = result["parity"]
    if precision == "fp32":
        right = parity["difference"] <= MOST_RELATIVE
        return Verdict("green" if right else "inexact", f"{parity['difference']:.0e}")
    right = parity["cosine"] >= LEAST_COSINE[precision] and (not classifies or parity["agreement"] >= LEAST_AGREEMENT)
    detail = f"cos {parity['cosine']:.4f}" + (f", top-1 {parity['agreement']:.0%}" if classifies else "")
    return Verdict("green" if right else "inexact", detail)
