"""What knowing the truth would do: the line that no policy can cross. It cannot run on a device."""

from __future__ import annotations

import random

from isthmus.bundle import VariantCalibration
from isthmus.policies import Case


class Oracle:
    """Escalates exactly the requests that the heavy model gets right and the light one does not.

    Args:
        point: Not used.
        chance: Not used.
    """

    threshold: float | None = None

    def __init__(self, *, point: VariantCalibration, chance: random.Random) -> None:
        del point, chance

    def escalates(self, case: Case) -> bool:
        """Return whether escalating mends the answer.

        Raises:
            ValueError: The truth is not known.
        """
        if case.gain is None:
            raise ValueError("the oracle needs labels")
        return case.gain > 0
