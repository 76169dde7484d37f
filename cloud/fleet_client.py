"""Calls about devices and rollouts: one method for each thing to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from cloud.client_calls import LONG_S, Address, CloudCalls
from cloud.fleet_rows import device_record, device_rows, moment
from isthmus.errors import InputError
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc

MAX_INVITE_S: Final = 2**32 - 1  # what the message can say; the cloud allows less


class FleetCalls(CloudCalls):
    """The fleet and rollout services."""

    def __init__(self, address: Address, *, timeout_s: float = 30.0) -> None:
        super().__init__(address, timeout_s=timeout_s)
        self._fleet: Any = self.stub(fleet_pb2_grpc.FleetServiceStub)
        self._rollouts: Any = self.stub(fleet_pb2_grpc.RolloutServiceStub)

    def invite(self, device_id: str, *, ttl_s: int = 0) -> dict[str, Any]:
        """Return a one-time enrolment code for a device."""
        if not 0 <= ttl_s <= MAX_INVITE_S:
            raise InputError(
                f"expected a time to live of at most {MAX_INVITE_S} seconds, got {ttl_s}",
                hint="an invitation is used within hours; a new one costs nothing",
            )
        request = fleet_pb2.InviteRequest(device_id=device_id, ttl_s=ttl_s)
        answer = self._call(f"invite {device_id}", self._fleet.Invite, request)
        return {"device": device_id, "code": answer.code, "expires_at": moment(answer.expires_at)}

    def list_devices(self, selector: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """Return one row for each device with these labels and model that it runs or reported on."""
        request = fleet_pb2.ListDevicesRequest(selector=selector)
        answer = self._call("list devices", self._fleet.ListDevices, request)
        return [row for device in answer.devices for row in device_rows(device)]

    def device(self, device_id: str) -> dict[str, Any]:
        """Return what is known of one device."""
        request = fleet_pb2.GetDeviceRequest(device_id=device_id)
        answer = self._call(f"show device {device_id}", self._fleet.GetDevice, request)
        return device_record(answer.device, answer.events)

    def set_labels(self, device_id: str, labels: Mapping[str, str], remove: Sequence[str] = ()) -> dict[str, str]:
        """Set and remove labels of a device; return all that it has then."""
        request = fleet_pb2.SetLabelsRequest(device_id=device_id, set=labels, remove=remove)
        return dict(self._call(f"label device {device_id}", self._fleet.SetLabels, request).labels)

    def pin(self, device_id: str, model: str, version: int) -> None:
        """Hold a device at a version of a model."""
        request = fleet_pb2.PinRequest(device_id=device_id, model=model, version=version)
        self._call(f"pin device {device_id}", self._fleet.Pin, request)

    def unpin(self, device_id: str, model: str) -> None:
        """Let a device follow releases and rollouts of a model again."""
        self._call(
            f"unpin device {device_id}", self._fleet.Unpin, fleet_pb2.UnpinRequest(device_id=device_id, model=model)
        )

    def retry(self, device_id: str, model: str) -> int:
        """Ask a device to try again what failed on it; return the number of the attempt."""
        request = fleet_pb2.RetryDeviceRequest(device_id=device_id, model=model)
        return int(self._call(f"have device {device_id} retry", self._fleet.RetryDevice, request).attempt)

    def revoke(self, device_id: str, *, key_sha256: str = "", reason: str = "") -> dict[str, Any]:
        """Refuse a device and its key, or one key, from now on."""
        request = fleet_pb2.RevokeDeviceRequest(device_id=device_id, key_sha256=key_sha256, reason=reason)
        answer = self._call(f"revoke {device_id or 'the key'}", self._fleet.RevokeDevice, request)
        return {
            "device": answer.device_id or None,
            "key_sha256": answer.key_sha256,
            "revoked_at": moment(answer.revoked_at),
        }

    def start_rollout(self, request: Any) -> Any:
        """Start a rollout, or tell what it would do."""
        return self._call(f"roll out {request.model}@{request.version}", self._rollouts.StartRollout, request, LONG_S)

    def change_rollout(self, change: str, name: str, reason: str = "") -> Any:
        """Pause, resume or abort a rollout; return it."""
        calls: dict[str, tuple[Any, Any]] = {
            "pause": (self._rollouts.PauseRollout, fleet_pb2.PauseRolloutRequest(id=name)),
            "resume": (self._rollouts.ResumeRollout, fleet_pb2.ResumeRolloutRequest(id=name)),
            "abort": (self._rollouts.AbortRollout, fleet_pb2.AbortRolloutRequest(id=name, reason=reason)),
        }
        return self._call(f"{change} rollout {name}", *calls[change]).rollout

    def rollout(self, name: str) -> Any:
        """Return a rollout and its history."""
        return self._call(f"show rollout {name}", self._rollouts.GetRollout, fleet_pb2.GetRolloutRequest(id=name))

    def rollouts(self, model: str = "") -> list[Any]:
        """Return all rollouts, newest first."""
        request = fleet_pb2.ListRolloutsRequest(model=model)
        return list(self._call("list rollouts", self._rollouts.ListRollouts, request).rollouts)
