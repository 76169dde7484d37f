"""Settings of the agent, each with its default, unit and meaning."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from isthmus.settings import Settings


class EdgeSettings(Settings):
    """What `isthmus edge run` can be told by file, environment (`ISTHMUS_EDGE_*`) and flags."""

    env_prefix: ClassVar[str] = "ISTHMUS_EDGE_"

    home: Path = Field(default=Path("device"), description="Folder with the device's identity and models.")
    models: tuple[str, ...] = Field(default=(), description="Names of the models to serve.")
    listen: str = Field(default="127.0.0.1:8001", description="HOST:PORT or unix:PATH; TLS and tokens beyond loopback.")
    variant: str | None = Field(default=None, description="Variant to install, whatever was measured.")
    choose_by: Literal["measure", "order"] = Field(
        default="measure",
        description="Without `variant`: the one that `isthmus edge bench` found fastest, or always the bundle's first.",
    )
    threads: int = Field(default=1, ge=1, le=256, description="Threads that one light inference may use.")
    queue: int = Field(default=64, ge=1, le=4096, description="Light inferences that may wait for their turn.")
    concurrent_calls: int = Field(default=128, ge=1, le=4096, description="Calls in progress; more are refused.")
    message_mib: int = Field(default=64, ge=1, le=1024, description="Largest message, MiB.")
    default_deadline_s: float = Field(
        default=1.0, gt=0, le=3600, description="Deadline of requests that come without one, seconds."
    )
    longest_escalation_s: float = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="Longest wait for the cloud whatever the caller allows, seconds.",
    )
    guard_s: float = Field(
        default=0.05,
        gt=0,
        le=10,
        description="Part of the deadline kept for returning the light answer, seconds.",
    )
    breaker_failures: int = Field(default=3, ge=1, le=1000, description="Failures in a row that open the breaker.")
    breaker_first_wait_s: float = Field(default=1.0, gt=0, description="Wait before the first probe, seconds.")
    breaker_longest_wait_s: float = Field(default=30.0, gt=0, description="Longest wait before a probe, seconds.")
    capture: bool = Field(default=False, description="Keep escalated requests with the cloud's answers.")
    capture_mib: int = Field(default=64, ge=1, le=1 << 20, description="Disk space for captures, MiB a model.")
    capture_flush_s: float = Field(default=60.0, gt=0, description="Longest time a capture stays in memory, seconds.")
    shutdown_s: float = Field(default=5.0, ge=0, description="Time for requests in progress at shutdown, seconds.")
    ready_file: Path | None = Field(default=None, description="Written when the agent listens: JSON, address and pid.")
