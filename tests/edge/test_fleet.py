"""Reports reach the cloud, and one that it does not want holds up no other."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from edge.audit import ALARM
from edge.fleet import Desired, FleetLink
from edge.outcome import Outcome
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc


class Fleet(fleet_pb2_grpc.FleetServiceServicer):
    """Refuses the reports of one model; is away for the first reports of another."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.last = fleet_pb2.ReportRequest()
        self.done = asyncio.Event()

    async def Report(self, request: fleet_pb2.ReportRequest, context: Any) -> fleet_pb2.ReportResponse:  # noqa: N802
        self.seen.append(request.model)
        self.last = request
        if request.model == "unknown":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "there is no such model")
        if self.seen.count("late") == 1:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        self.done.set()
        return fleet_pb2.ReportResponse()


def test_refused_report_is_dropped_and_an_interrupted_one_comes_again() -> None:
    async def token() -> str:
        return "t"

    async def scenario() -> None:
        fleet = Fleet()  # type: ignore[abstract]
        server = grpc.aio.server()
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(fleet, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            link = FleetLink(channel, token, ("unknown", "late"), Desired(("unknown", "late")))
            for model in ("unknown", "late"):
                link.report(Outcome(model, 0, 1))
            sending = asyncio.ensure_future(link.send_reports())
            async with asyncio.timeout(10):
                await fleet.done.wait()
            sending.cancel()
        await server.stop(None)
        assert fleet.seen == ["unknown", "late", "late"]

    asyncio.run(scenario())


def test_an_alarm_is_reported_as_what_it_is() -> None:
    async def token() -> str:
        return "t"

    async def scenario() -> None:
        fleet = Fleet()  # type: ignore[abstract]
        server = grpc.aio.server()
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(fleet, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            link = FleetLink(channel, token, ("triage",), Desired(("triage",)))
            link.report(Outcome("triage", 3, 3, "openvino-int8", reason=ALARM, detail="30 % disagree"))
            sending = asyncio.ensure_future(link.send_reports())
            async with asyncio.timeout(10):
                await fleet.done.wait()
            sending.cancel()
        await server.stop(None)
        told = fleet.last
        assert (told.version, told.serving_version, told.reason, told.detail) == (3, 3, "audit-alarm", "30 % disagree")
        assert told.state == fleet_pb2.UPDATE_STATE_ACTIVE

    asyncio.run(scenario())
