"""Keeps the device's certificate current, and the connection that shows it where the cloud asks for it.

The certificate lives for 90 days and is renewed when a third of that is left, for the same key, on the strength of an
assertion: so a device that was offline for longer than that comes back by itself. The new connection has a token of
its own before anybody uses it; no call is lost. A cloud that is away is asked again, with growing pauses, and when it
stays away, at the address of enrolment: the one for devices may have moved.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import grpc
import structlog

from edge.access import AccessToken, described
from edge.backoff import Backoff
from edge.channel import RenewableChannel
from edge.identity import ENROL_TIMEOUT_S, UNNAMED, DeviceHome
from edge.store import write_atomically
from edge.uplink import open_channel
from isthmus.errors import IsthmusError
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc
from security.authority import load_certificate
from security.enrolment import hosts_of, make_csr
from security.keyfiles import load_ec_key

LOOK_S: Final = 3600.0  # clocks are set, and machines sleep
_REST_S: Final = 60.0  # after a renewal, whatever the clocks say
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
        spread: A number in [0, 1) that is the device's own.
    """

    def __init__(
        self,
        home: DeviceHome,
        channel: RenewableChannel,
        token: AccessToken,
        connect: Callable[[], grpc.aio.Channel],
        *,
        spread: float | None = None,
    ) -> None:
        self._home, self._channel, self._token, self._connect = home, channel, token, connect
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
            await self._backoff.sleep(_REST_S)

    async def follow(self) -> None:
        """Find the cloud again when it is not where it was, until cancelled."""
        backoff = Backoff(first_s=2.0, longest_s=300.0)
        while True:
            await self._until_lost(backoff)
            try:
                await self._token.ask_where()
            except (grpc.aio.AioRpcError, IsthmusError) as error:
                log.info("the cloud is away", error=described(error))
            await backoff.pause()

    async def _until_lost(self, backoff: Backoff) -> None:
        while (state := self._channel.get_state()) is not grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            if state is grpc.ChannelConnectivity.READY:
                backoff.reset()
            await self._channel.wait_for_state_change(state)

    async def renew(self) -> None:
        """Get a new certificate, and change over to a connection that shows it.

        Raises:
            AioRpcError: The cloud cannot be reached, or says no.
            IsthmusError: The device's own files cannot be used.
        """
        await _renew_certificate(self._home, self._token)
        fresh = self._connect()
        try:
            await self._token.change_over(fresh, lambda: self._channel.replace(fresh))
        except BaseException:
            await fresh.close()
            raise
        log.info("certificate renewed", until=load_certificate(self._home.certificate).not_valid_after_utc.isoformat())

    def _is_due(self) -> bool:
        return datetime.fromtimestamp(self._token.now(), UTC) >= self.due_at()


async def _renew_certificate(home: DeviceHome, token: AccessToken) -> None:
    """Get a new certificate for the device's key, on a connection that needs none; an expired one is no obstacle.

    Raises:
        AioRpcError: The cloud cannot be reached, or says no.
        ConfigError: The device's own files cannot be used.
    """
    enrolment = home.enrolment()
    hosts = hosts_of(load_certificate(home.certificate))
    csr = make_csr(load_ec_key(home.key), UNNAMED, hosts)
    async with open_channel(enrolment.cloud, home.ca) as channel:
        stub = fleet_pb2_grpc.FleetServiceStub(channel)
        request = fleet_pb2.RenewCertificateRequest(assertion=token.assertion(), csr_pem=csr)
        response = await token.oriented(stub.RenewCertificate(request, timeout=ENROL_TIMEOUT_S))
    write_atomically(home.certificate, response.certificate_chain_pem)
