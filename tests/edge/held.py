"""A real light model behind a gate, for tests that need to say when an inference ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from edge.runtimes import Runtime, Worker
from isthmus.tensors import Array
from tests.edge.serving import MODEL, Serving, computed_by


@dataclass
class Held:
    """Computes when `open` is set, and not in less than `takes_s`; remembers what it was asked."""

    runtime: Runtime
    takes_s: float = 0.0
    open: threading.Event = field(default_factory=threading.Event)
    seen: list[dict[str, Array]] = field(default_factory=list)
    begins: Callable[[], None] = lambda: None

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.seen.append(dict(inputs))
        self.begins()
        assert self.open.wait(20)
        time.sleep(self.takes_s)
        return self.runtime.infer(inputs)

    def close(self) -> None:
        self.runtime.close()


def hold(agent: Serving, *, queue: int = 64, takes_s: float = 0.0) -> Held:
    """Put the agent's light model behind a gate that is shut."""
    whole = agent.models.find(MODEL)
    assert isinstance(whole._worker, Worker)
    held = Held(whole._worker._runtime, takes_s)
    agent.models._live[MODEL] = computed_by(whole, Worker(held, queue=queue))  # not swapped: the runtime stays open
    return held
