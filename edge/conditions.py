"""Whether an update may go on now: its turn in the fleet, the disk, the link, the maintenance window.

What is not met postpones the update; it never refuses a version.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from edge.assembly import Fetcher
from edge.config import UpdateSettings
from edge.plan import FilePlan
from edge.window import parse_window, spread_s
from isthmus.errors import UnavailableError

_SLACK_BYTES: Final = 1 << 20  # manifest, state, and what a file system needs for itself
_RETRY_S: Final = 300.0  # where nothing says when to look again


class PostponedError(UnavailableError):
    """The update has to wait.

    Args:
        message: What for.
        reason: "no-space", "metered", "outside-window" or "not-its-turn".
        retry_s: When to try again.
    """

    def __init__(self, message: str, *, reason: str, retry_s: float = _RETRY_S, hint: str = "") -> None:
        super().__init__(message, reason=reason, hint=hint)
        self.retry_s = retry_s


def needed_bytes(files: Sequence[FilePlan], *, here: int) -> int:
    """Return the disk space that bringing the files takes at most: their own, and that of rebuilding the largest.

    Args:
        files: What is wanted; what an installed slot has takes nothing.
        here: Bytes of it that an earlier attempt left.
    """
    lengths = [plan.wanted.length for plan in files if plan.base != plan.wanted]
    return max(sum(lengths) - here, 0) + max(lengths, default=0) + _SLACK_BYTES


class Conditions:
    """The conditions on this device for one model.

    Args:
        settings: What the operator set.
        device: Its name.
        model: The model.
        clock: Monotonic seconds.
        now: Local time.
    """

    def __init__(
        self,
        settings: UpdateSettings,
        device: str,
        model: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self.settings = settings
        self._device = device
        self._model = model
        self._clock = clock
        self._now = now
        self._window = None if settings.window is None else parse_window(settings.window)
        self._heard: tuple[int, float] = (0, 0.0)  # a version, and when it was asked for first

    def check_turn(self, version: int) -> None:
        """Raise PostponedError until it is this device's turn to fetch a version."""
        if self._heard[0] != version:
            self._heard = (version, self._clock())
        wait = spread_s(self._device, self._model, version, self.settings.jitter_s)
        left = self._heard[1] + wait - self._clock()
        if left > 0:
            raise PostponedError(f"its turn is in {left:.0f} s", reason="not-its-turn", retry_s=left)

    def check_fetch(self, needed: int, free: int) -> None:
        """Raise PostponedError while files must not be brought.

        Args:
            needed: Bytes of disk space.
            free: Bytes that are free.
        """
        if not self.settings.fetch_outside_window:
            self.check_window()
        if needed > free:
            raise PostponedError(
                f"expected {needed} bytes of free disk space, got {free}",
                reason="no-space",
                hint="the update goes on when there is room",
            )

    def check_window(self) -> None:
        """Raise PostponedError while the maintenance window is closed."""
        wait = 0.0 if self._window is None else self._window.opens_in_s(self._now())
        if wait > 0:
            told = f"the maintenance window {self.settings.window} opens in {wait / 60:.0f} min"
            raise PostponedError(told, reason="outside-window", retry_s=wait)


class Meter:
    """Counts what an update moves over the wire, and stops it at the limit of a metered link.

    Args:
        fetcher: The registry.
        settings: Whether the link is metered, and how much may move.
        moved: Bytes that earlier attempts have moved.
    """

    def __init__(self, fetcher: Fetcher, settings: UpdateSettings, moved: int = 0) -> None:
        self._fetcher = fetcher
        self._limit = settings.metered_max_bytes if settings.metered else None
        self.moved = moved

    async def blob(self, sha256: str, path: Path, *, length: int) -> int:
        """Fetch as the registry does; a blob that would break the limit is not begun."""
        here = _size(path)
        if self._limit is not None and length - here > self._limit - self.moved:
            raise self._over(length - here)
        try:
            return await self._fetcher.blob(sha256, path, length=length)
        finally:
            self.moved += max(_size(path) - here, 0)

    async def delta(self, from_sha256: str, to_sha256: str, path: Path, *, limit: int) -> int:
        """Fetch as the registry does, and no further than the limit."""
        here = _size(path)
        if self._limit is not None:
            limit = min(limit, here + self._limit - self.moved)
            if limit <= here:
                raise self._over(1)
        try:
            return await self._fetcher.delta(from_sha256, to_sha256, path, limit=limit)
        finally:
            self.moved += max(_size(path) - here, 0)

    def _over(self, wanted: int) -> PostponedError:
        told = f"the link is metered: {self.moved} bytes have moved, {wanted} more are wanted, {self._limit} may"
        return PostponedError(told, reason="metered", hint="updates.metered, updates.metered_max_bytes")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
