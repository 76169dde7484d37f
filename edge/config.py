"""Settings of the agent, each with its default, unit and meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from edge.trial import Terms
from edge.window import parse_window
from isthmus.settings import Settings
from security.limits import ListenerLimits


def _check_window(text: str) -> str:
    parse_window(text)
    return text


_TRIAL: Final = Terms(soak_s=60.0, max_error_rate=0.02, max_latency_ratio=3.0)


def _over_trial(value: object) -> object:
    """Return a table of a trial with what it does not name as it is by default: naming one limit drops no other."""
    return _TRIAL.model_dump() | value if isinstance(value, dict) else value


def _one_or_more(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class UpdateSettings(BaseModel):
    """When and how versions are brought: the table `[updates]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_bytes_per_s: int = Field(default=0, ge=0, description="Most bytes a second that fetches move; 0 for no limit.")
    metered: bool = Field(default=False, description="Whether bytes cost money here.")
    metered_max_bytes: int = Field(default=0, ge=0, description="What an update may move over a metered link.")
    window: Annotated[str, AfterValidator(_check_window)] | None = Field(
        default=None, description='Local time in which versions may change, "01:00-05:00" or "sat-sun 01:00-05:00".'
    )
    fetch_outside_window: bool = Field(default=True, description="Bring files at any time, change in the window.")
    jitter_s: float = Field(default=0.0, ge=0, le=604_800, description="Longest wait of a device before a fetch.")
    crashes: int = Field(default=3, ge=1, le=100, description="Crashes in a row after which a version is given up.")
    trial: Annotated[Terms, BeforeValidator(_over_trial)] = Field(
        default=_TRIAL, description="How versions prove themselves, where the cloud does not say."
    )


class EdgeListener(ListenerLimits):
    """The limits of a device's listener: `[listener]`."""

    connections: int = Field(default=256, ge=1, le=1 << 20, description="Open connections; more are closed at once.")
    streams: int = Field(default=64, ge=1, le=1 << 16, description="Calls in progress on one connection.")
    caller_calls: int = Field(default=96, ge=1, le=1 << 16, description="Calls in progress of one token's subject.")
    stranger_calls: int = Field(default=16, ge=1, le=1 << 16, description="Calls in progress without a token, in all.")
    peer_calls: int = Field(default=8, ge=1, le=1 << 16, description="Calls in progress of one address, no token.")


class EdgeSettings(Settings):
    """What `isthmus edge run` can be told by file, environment (`ISTHMUS_EDGE_*`) and flags."""

    env_prefix: ClassVar[str] = "ISTHMUS_EDGE_"

    home: Path = Field(default=Path("device"), description="Folder with the device's identity and models.")
    models: tuple[str, ...] = Field(default=(), description="Names of the models to serve.")
    listen: str = Field(default="127.0.0.1:8001", description="HOST:PORT or unix:PATH; TLS and tokens beyond loopback.")
    unix_socket: Path | None = Field(default=None, description="Unix socket to listen on as well as on `listen`.")
    metrics_listen: str | None = Field(default=None, description="HOST:PORT for Prometheus; off when unset.")
    metrics_public: bool = Field(
        default=False, description="Allow metrics_listen beyond loopback, without TLS or tokens."
    )
    variant: str | None = Field(default=None, description="Variant to install, whatever was measured.")
    choose_by: Literal["measure", "order", "install"] = Field(
        default="measure",
        description="Without `variant`: the fastest that was measured; always the bundle's first; or measure first.",
    )
    threads: int = Field(default=1, ge=1, le=256, description="Threads that one light inference may use.")
    queue: int = Field(default=64, ge=1, le=4096, description="Light inferences that may wait for their turn.")
    policy: str = Field(
        default="threshold", description="What decides which requests escalate, NAME or NAME:KEY=VALUE,..."
    )
    audit_share: float = Field(
        default=0.01, ge=0, le=1, description="Share of confident answers that is compared with the cloud's, unseen."
    )
    batch_delay_us: int = Field(
        default=0, ge=0, le=1_000_000, description="Wait for requests that share a batch, microseconds; 0 for none."
    )
    batch_rows: int = Field(default=16, ge=2, le=65536, description="Rows of such a batch.")
    concurrent_calls: int = Field(default=128, ge=1, le=4096, description="Calls in progress; more are refused.")
    model_calls: int = Field(
        default=128, ge=1, le=4096, description="Requests of one model in progress; more are refused."
    )
    listener: EdgeListener = Field(default=EdgeListener(), description="What the listener takes from callers.")
    message_mib: int = Field(default=64, ge=1, le=1024, description="Largest message, MiB.")
    allow_non_finite: bool = Field(default=False, description="Accept NaN and infinity in inputs.")
    stream_requests: int = Field(
        default=32, ge=1, le=4096, description="Requests of one stream in progress; the next ones wait unread."
    )
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
    retry_ratio: float = Field(
        default=0.1, ge=0, le=1, description="Share of escalations that may be sent again after a broken connection."
    )
    retry_burst: float = Field(default=3.0, ge=0, le=100, description="Unspent retries that add up to at most this.")
    hedge: bool = Field(default=False, description="Ask the cloud early where a request will probably escalate.")
    hedge_above: float = Field(
        default=0.5, ge=0, le=1, description="Share of recent escalations above which the next request is hedged."
    )
    response_cache_mib: int = Field(
        default=0, ge=0, le=1 << 16, description="Memory for answers to requests that come again, MiB; 0 for none."
    )
    seal_inputs: Annotated[tuple[str, ...], BeforeValidator(_one_or_more)] = Field(
        default=(),
        description='Inputs that only the gateway may read: "text", "triage/text" for one model, "*" for all.',
    )
    capture: bool = Field(default=False, description="Keep escalated requests with the cloud's answers.")
    capture_mib: int = Field(default=64, ge=1, le=1 << 20, description="Disk space for captures, MiB a model.")
    capture_flush_s: float = Field(default=60.0, gt=0, description="Longest time a capture stays in memory, seconds.")
    capture_late_s: float = Field(
        default=2.0, ge=0, le=60, description="With `capture`: how long after its deadline an answer is still taken."
    )
    defer: bool = Field(default=True, description="Keep hard requests that ask for it until the cloud is back.")
    defer_mib: int = Field(default=64, ge=1, le=1 << 20, description="Disk space for deferred requests, MiB.")
    defer_requests: int = Field(default=10_000, ge=1, le=1_000_000, description="Deferred requests that may wait.")
    defer_ttl_s: int = Field(
        default=86_400, ge=1, le=31_536_000, description="Longest life of a deferred request, seconds."
    )
    defer_concurrency: int = Field(default=2, ge=1, le=64, description="Deferred requests sent at a time.")
    defer_deadline_s: float = Field(
        default=10.0, gt=0, le=3600, description="Deadline of a deferred request in the cloud, seconds."
    )
    defer_key: Path | None = Field(
        default=None, description="File with the key of deferred requests; in the device's folder when unset."
    )
    updates: UpdateSettings = Field(default=UpdateSettings(), description="When and how versions are brought.")
    shutdown_s: float = Field(default=5.0, ge=0, description="Time for requests in progress at shutdown, seconds.")
    ready_file: Path | None = Field(default=None, description="Written when the agent listens: JSON, address and pid.")
