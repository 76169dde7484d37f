"""A registry for tests: the production CloudRepository and manifests by digest, with hooks to corrupt one answer."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from isthmus.digests import sha256_bytes
from isthmus.errors import NotFoundError
from security.repository import CloudRepository, OperatorRepository
from security.trust import TrustedManifests


def wall_clock() -> datetime:
    return datetime.now(UTC)


class Registry:
    """What an operator publishes to and a device fetches from."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.cloud = CloudRepository(workspace / "cloud")
        self.operator = OperatorRepository(workspace / "operator")
        self.manifests: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.change: Callable[[str, bytes], bytes] = lambda _, data: data

    def publish(
        self, model: str, version: int, *, clock: Callable[[], datetime] = wall_clock, rollback_floor: int = 0
    ) -> bytes:
        """Sign and commit a bundle version; return its manifest."""
        manifest = f'{{"name": "{model}", "version": {version}}}'.encode()
        self.manifests[sha256_bytes(manifest)] = manifest
        cloud = CloudRepository(self.workspace / "cloud", clock=clock)
        current = cloud.targets_json()
        cloud.commit(self.operator.sign_manifest(model, version, manifest, current, rollback_floor=rollback_floor))
        return manifest

    def fetch(self, name: str) -> Iterator[bytes]:
        """Answer as the registry's rpc methods do."""
        self.asked.append(name)
        if name.startswith("targets/"):
            if (digest := name.removeprefix("targets/")) not in self.manifests:
                raise NotFoundError(f"there is no blob {digest}")
            data = self.manifests[digest]
        else:
            data = self.cloud.metadata(name)
        yield self.change(name, data)

    def device(self, folder: Path) -> TrustedManifests:
        """Return a device's view, with what it kept in `folder`."""
        return TrustedManifests(folder, (self.workspace / "trust" / "root.json").read_bytes(), self.fetch)
