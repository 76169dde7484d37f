"""Which requests are sent to the cloud before the light answer is there: those that will probably escalate anyway.

Off unless it is switched on: it hides the time of a slow light model from hard requests, and pays for it with the
bytes and cloud time of requests that turn out easy. Pure state (no I/O, no clock). The rules:

1. A request that asks for a route needs no prediction.
2. The caller may say what it expects, with the request parameter `isthmus.hedge`.
3. Otherwise a request of a model is hedged when its share of escalations lately is above a limit; each request
   weighs a twentieth, the ones before it the rest.
"""

from __future__ import annotations

from typing import Final

from isthmus.errors import InputError

HEDGE_PARAMETER: Final = "isthmus.hedge"
_WEIGHT: Final = 0.05  # of the newest request in the share


class Hedge:
    """Predicts escalations from those of recent requests.

    Args:
        above: Share of a model's recent requests that escalated, above which the next one is expected to.
    """

    def __init__(self, *, above: float = 0.5) -> None:
        self._above = above
        self._shares: dict[str, float] = {}

    def expects(self, model: str, *, route: str | None, hint: bool | None) -> bool:
        """Return whether a request will probably escalate.

        Args:
            model: Its model.
            route: The route that the caller asked for.
            hint: What the caller said.
        """
        if route is not None:
            return route == "cloud"
        return self._shares.get(model, 0.0) > self._above if hint is None else hint

    def note(self, model: str, *, escalates: bool) -> None:
        """Note what the light answer to a request of this model called for."""
        share = self._shares.get(model, 0.0)
        self._shares[model] = share + _WEIGHT * (escalates - share)


def check_hint(hint: object) -> bool:
    """Return what the caller said about its request.

    Raises:
        InputError: It is not a bool.
    """
    if not isinstance(hint, bool):
        raise InputError(f"parameter {HEDGE_PARAMETER}: expected a bool, got {str(hint)[:40]!r}")
    return hint
