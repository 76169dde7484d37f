"""Keeps the device's certificate current, and the connection that shows it.

The certificate lives for 90 days and is renewed when a third of that is left, for the same key, on the strength of an
assertion: so a device that was offline for longer than that comes back by itself. The new connection has a token of
its own before anybody uses it; no call is lost. A cloud that is away is asked again, with growing pauses.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

import grpc
import structlog

from edge.backoff import Backoff
from edge.channel import RenewableChannel
from edge.identity import AccessToken, DeviceHome, described, renew_certificate
from isthmus.errors import IsthmusError
from security.authority import load_certificate

LOOK_S: Final = 3600.0  # clocks are set, and machines sleep
_RENEW_AT: Final = 2 / 3  # of its life
_SPREAD: Final = 0.05  # of its life, so that devices that were enrolled on one day do not come on one day

log = structlog.get_logger(__name__)


class CertificateKeeper:
    """See the module.

    Args:
        home: The device's folder.
        channel: To the cloud.
        token: Gets a new token along with a new certificate.
        connect: Opens the channel that shows the certificate that is on the disk then.
        clock: Seconds since the epoch.
        spread: A number in [0, 1) that is the device's own.
    """

    def __init__(
        self,
        home: DeviceHome,
        channel: RenewableChannel,
        token: AccessToken,
        connect: Callable[[], grpc.aio.Channel],
        *,
        clock: Callable[[], float],
        spread: float | None = None,
    ) -> None:
        self._home, self._channel, self._token, self._connect = home, channel, token, connect
        self._clock = clock
        self._spread = random.random() if spread is None else spread  # noqa: S311
        self._backoff = Backoff(first_s=1.0, longest_s=600.0)

    def due_at(self) -> datetime:
        """Return when the certificate is to be renewed."""
        certificate = load_certificate(self._home.certificate)
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        return begin + (end - begin) * (_RENEW_AT - _SPREAD * self._spread)

    def connected(self) -> None:
        """Try again at once when the last try failed: the connection has come up."""
        if self._is_due():
            self._backoff.wake()

    async def keep(self) -> None:
        """Renew whenever it is due, until cancelled."""
        while True:
            if not self._is_due():
                await self._backoff.sleep(LOOK_S)
                continue
            try:
                await self.renew()
            except (grpc.aio.AioRpcError, IsthmusError) as error:
                log.warning("certificate not renewed", error=described(error))
                await self._backoff.pause()
                continue
            self._backoff.reset()

    async def renew(self) -> None:
        """Get a new certificate, and change over to a connection that shows it.

        Raises:
            AioRpcError: The cloud cannot be reached, or says no.
            IsthmusError: The device's own files cannot be used.
        """
        await renew_certificate(self._home, self._token)
        fresh = self._connect()
        try:
            await self._token.change_over(fresh, lambda: self._channel.replace(fresh))
        except BaseException:
            await fresh.close()
            raise
        log.info("certificate renewed", until=load_certificate(self._home.certificate).not_valid_after_utc.isoformat())

    def _is_due(self) -> bool:
        if not self._home.enrolment().device_address:  # of a release that had no certificates on connections
            return True
        now = datetime.fromtimestamp(self._clock(), UTC)
        return now >= self.due_at() - timedelta(seconds=1)
