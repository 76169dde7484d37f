"""A real workspace, a tiny real bundle, and a cloud that serves them, for the tests of the cloud."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from safetensors.numpy import save_file

from cloud.bootstrap import Cloud, start_cloud
from cloud.client import Address, CloudClient
from cloud.config import CloudSettings
from isthmus.bundle import (
    Calibration,
    CalibrationData,
    CurvePoint,
    Heavy,
    Manifest,
    OperatingPoint,
    Provenance,
    TensorSpec,
    Variant,
    VariantCalibration,
    index_files,
)
from isthmus.digests import tree_digest
from security.tls import channel_credentials
from security.tokens import TokenIssuer
from security.workspace import init_workspace
from tests.cloud.conftest import write_heavy


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folders that `isthmus keys init` makes."""

    root: Path

    @property
    def home(self) -> Path:
        return self.root / "cloud"

    @property
    def operator(self) -> Path:
        return self.root / "operator"

    @property
    def trust(self) -> Path:
        return self.root / "trust"

    def token(
        self, role: str, subject: str = "somebody", models: tuple[str, ...] = ("*",), tenant: str = "default"
    ) -> str:
        issuer = TokenIssuer.load(self.home)
        return issuer.mint(subject, role, models=models, ttl=timedelta(hours=1), tenant=tenant)[0]

    def token_file(self, models: tuple[str, ...] = ("*",)) -> Path:
        file = self.root / "operator.token"
        file.write_text(self.token("operator", models=models))
        return file

    def client(self, cloud: Cloud, models: tuple[str, ...] = ("*",)) -> CloudClient:
        return CloudClient(Address(cloud.address, self.trust, self.token_file(models)), timeout_s=20.0)

    def channel(self, cloud: Cloud) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(cloud.address, channel_credentials(self.trust / "ca.pem"))


def make_workspace(root: Path) -> Workspace:
    init_workspace(root, ["localhost", "127.0.0.1"], "test", datetime.now(UTC))
    return Workspace(root)


def make_bundle(folder: Path, version: int, *, factor: float = 10.0, light: bytes = b"", model: str = "triage") -> Path:
    """Make a bundle whose light model is any bytes and whose heavy model multiplies by `factor`."""
    variant = folder / "variants" / "onnxruntime-fp32"
    variant.mkdir(parents=True)
    (variant / "model.onnx").write_bytes(light or b"light model of this bundle")
    write_heavy(folder / "heavy", factor)
    golden = {"input.x": np.ones((8, 4), np.float32), "output.logits": np.ones((8, 3), np.float32)}
    save_file(golden, folder / "golden.safetensors")
    (folder / "calibration.json").write_bytes(_calibration(model, version).to_json())
    (folder / "report.json").write_bytes(b"{}\n")
    write_manifest(folder, model, version)
    return folder


def write_manifest(folder: Path, model: str, version: int, *, classes: int = 3) -> None:
    """Write the manifest of what lies in the folder; `classes` other than 3 is a lie about the heavy model."""
    files = index_files(folder)
    heavy = {path: entry.sha256 for path, entry in files.items() if path.startswith("heavy/")}
    entry = "variants/onnxruntime-fp32/model.onnx"
    manifest = Manifest(
        name=model,
        version=version,
        labels=("a", "b", "c"),
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 4)),),
        outputs=(TensorSpec(name="logits", datatype="FP32", shape=(-1, classes)),),
        max_batch=8,
        variants=(Variant(id="onnxruntime-fp32", runtime="onnxruntime", precision="fp32", entry=entry, tolerance=0.1),),
        heavy=Heavy(platform="python", digest=tree_digest(heavy)),
        provenance=Provenance(sources={"light": "0" * 64}, recipe="0" * 64, tools={}),
        files=files,
    )
    (folder / "manifest.json").write_bytes(manifest.to_json())


def _calibration(model: str, version: int) -> Calibration:
    measured = VariantCalibration(
        temperature=1.0,
        threshold=0.5,
        escalation_rate=0.2,
        accuracy=0.9,
        edge_accuracy=0.8,
        agreement=0.9,
        ece_before=0.1,
        ece_after=0.05,
        curve=(CurvePoint(threshold=0.5, escalation_rate=0.2, accuracy=0.9),),
    )
    return Calibration(
        model=model,
        version=version,
        operating_point=OperatingPoint(value=0.3, delta=0.1),
        data=CalibrationData(sha256="0" * 64, samples=100),
        heavy_accuracy=0.95,
        variants={"onnxruntime-fp32": measured},
    )


@asynccontextmanager
async def serving(workspace: Workspace, **settings: Any) -> AsyncIterator[Cloud]:
    """Run a real cloud, with a real Triton, on a free port."""
    # A Triton with models takes two seconds to leave by itself; tests/cloud/test_heavy.py sees that it does.
    wanted: dict[str, Any] = {"home": workspace.home, "listen": "127.0.0.1:0", "triton_stop_s": 0.2, "drain_s": 1.0}
    cloud = await start_cloud(CloudSettings(**wanted | settings))
    try:
        yield cloud
    finally:
        await cloud.stop()
