"""Publishing through the real door: signed metadata, blobs, deltas, heavy models, restarts, refusals."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from operator import methodcaller
from pathlib import Path
from typing import Any

import grpc
import pytest

from benchmarks.devices import LightDevice
from cloud.blobs import Blobs
from cloud.bootstrap import Cloud
from cloud.client import CloudClient, Progress
from cloud.heavy import HeavyId
from isthmus.bundle import open_bundle
from isthmus.delta import apply_delta
from isthmus.digests import sha256_bytes, sha256_file
from isthmus.errors import BundleError, ConflictError, InputError, IsthmusError, NotFoundError, TrustError
from isthmus.stick import Index, Stick, blob_name, delta_name, metadata_name
from isthmus.v1 import fleet_pb2, registry_pb2
from security.ceremony import Ceremony, load_public_key, new_publisher
from security.repository import CloudRepository, OperatorRepository
from security.trust import TrustedManifests
from tests.cloud.conftest import eventually
from tests.cloud.workspaces import Workspace, make_bundle, make_workspace, serving, write_manifest

pytestmark = pytest.mark.slow


class Stage:
    """A cloud, and a way to call it with the blocking client while its event loop runs."""

    def __init__(self, runner: asyncio.Runner, workspace: Workspace, cloud: Cloud) -> None:
        self.runner, self.workspace, self.cloud = runner, workspace, cloud

    def ask(self, question: Callable[[CloudClient], Any], models: tuple[str, ...] = ("*",)) -> Any:
        def work() -> Any:
            with self.workspace.client(self.cloud, models) as client:
                return question(client)

        return self.runner.run(asyncio.to_thread(work))

    def publish(self, bundle: Path, *, release: bool = True) -> Any:
        return self.ask(lambda client: client.publish(bundle, self.workspace.operator, release=release))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    workspace = make_workspace(tmp_path_factory.mktemp("registry") / "workspace")
    with asyncio.Runner() as runner:
        running = serving(workspace, heavy_versions=2)
        cloud = runner.run(running.__aenter__())
        yield Stage(runner, workspace, cloud)
        runner.run(running.__aexit__(None, None, None))


def weights(seed: int) -> bytes:
    return random.Random(seed).randbytes(200_000)


def changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def rows(stage: Stage, model: str) -> dict[int, dict[str, Any]]:
    return {row["version"]: row for row in stage.ask(CloudClient.list_versions) if row["model"] == model}


def test_published_versions_are_verifiable_with_small_deltas_between_them(stage: Stage, tmp_path: Path) -> None:
    old, new = weights(1), changed(weights(1), 77_777)
    first = stage.publish(make_bundle(tmp_path / "v1", 1, light=old))
    assert (first["heavy_version"], first["deltas"]) == (1, [])
    second = stage.publish(make_bundle(tmp_path / "v2", 2, light=new), release=False)
    (delta,) = [row for row in second["deltas"] if row["file"].endswith("model.onnx")]
    assert (delta["from_version"], delta["full_bytes"]) == (1, 200_000)
    assert delta["delta_bytes"] < 2_000
    assert second["heavy_version"] == 1  # the heavy folder is the same
    listed = rows(stage, "triage")
    assert [listed[version]["released"] for version in (1, 2)] == [True, False]

    def fetch(client: CloudClient) -> None:
        asked = registry_pb2.FetchDeltaRequest(from_sha256=sha256_bytes(old), to_sha256=sha256_bytes(new))
        (tmp_path / "delta").write_bytes(b"".join(part.data for part in client._registry.FetchDelta(asked, timeout=10)))

        def fetch_any(name: str) -> Iterator[bytes]:
            if name.startswith("targets/"):
                asked = registry_pb2.FetchBlobRequest(sha256=name.removeprefix("targets/"))
                return iter([part.data for part in client._registry.FetchBlob(asked, timeout=10)])
            return iter([client.metadata(name)])

        root = (stage.workspace.trust / "root.json").read_bytes()
        trusted = TrustedManifests(tmp_path / "tuf", root, fetch_any)
        for version in (1, 2):
            assert trusted.manifest("triage", version) == (tmp_path / f"v{version}" / "manifest.json").read_bytes()

    stage.ask(fetch)
    (tmp_path / "old").write_bytes(old)
    apply_delta(
        tmp_path / "old", tmp_path / "delta", tmp_path / "new", sha256=sha256_bytes(new), length=len(new)
    )  # raises when it gives other bytes


def test_blobs_resume_from_an_offset(stage: Stage, tmp_path: Path) -> None:
    light = weights(2)
    stage.publish(make_bundle(tmp_path / "v1", 1, light=light, model="resume"))

    def fetch(client: CloudClient) -> bytes:
        asked = registry_pb2.FetchBlobRequest(sha256=sha256_bytes(light), offset=123_456)
        return b"".join(part.data for part in client._registry.FetchBlob(asked, timeout=10))

    assert stage.ask(fetch) == light[123_456:]


def test_heavy_versions_flip_with_releases_and_old_ones_are_retired(stage: Stage, tmp_path: Path) -> None:
    for version in (1, 2, 3):
        stage.publish(make_bundle(tmp_path / f"v{version}", version, factor=version, model="flip"), release=version < 3)
    loaded = [heavy.version for heavy in stage.cloud.pool.loaded if heavy.model == "flip"]
    assert loaded == [2, 3]
    stage.ask(lambda client: client.release("flip", 1))  # a rollback loads what it needs first
    assert HeavyId("flip", 1) in stage.cloud.pool.loaded
    assert [version for version, row in rows(stage, "flip").items() if row["released"]] == [1]


def test_a_version_is_published_once_and_never_backwards(stage: Stage, tmp_path: Path) -> None:
    stage.publish(make_bundle(tmp_path / "v2", 2, model="once"))
    for version in (1, 2):
        bundle = make_bundle(tmp_path / f"again{version}", version, model="once", light=b"other")
        with pytest.raises(InputError, match="the newest is 2") as raised:
            stage.publish(bundle)
        assert "version = 3" in raised.value.hint


def raw_publish(
    stage: Stage,
    bundle: Path,
    model: str,
    version: int,
    *,
    upload: bool = True,
    targets: bytes = b"",
    manifest: bytes = b"",
) -> Any:
    """Publish without the client's own checks."""

    def work(client: CloudClient) -> Any:
        if upload:
            for path in bundle.rglob("*"):
                if path.is_file():
                    messages = iter(
                        [
                            registry_pb2.UploadBlobRequest(sha256=sha256_file(path), length=path.stat().st_size),
                            registry_pb2.UploadBlobRequest(data=path.read_bytes()),
                        ]
                    )
                    client._registry.UploadBlob(messages, timeout=10)
        data = (bundle / "manifest.json").read_bytes()
        signed = targets or OperatorRepository(stage.workspace.operator).sign_manifest(
            model, version, data, client.current_targets()
        )
        request = registry_pb2.PublishRequest(
            model=model, version=version, targets_json=signed, manifest_json=manifest or data
        )
        return client._call("publish", client._registry.Publish, request, 60.0)

    return stage.ask(work)


def refusal(stage: Stage, kind: type[IsthmusError], call: Callable[[], Any], model: str) -> IsthmusError:
    with pytest.raises(kind) as raised:
        call()
    assert rows(stage, model) == {}  # nothing is visible
    assert not [heavy for heavy in stage.cloud.pool.loaded if heavy.model == model]
    return raised.value


def test_missing_blobs_are_refused_and_a_second_try_works(stage: Stage, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "v1", 1, model="gaps", light=b"never uploaded by anyone")
    error = refusal(stage, NotFoundError, lambda: raw_publish(stage, bundle, "gaps", 1, upload=False), "gaps")
    assert error.reason == "missing-blobs"
    assert stage.publish(bundle)["version"] == 1


def test_a_manifest_that_nobody_signed_is_refused(stage: Stage, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "v1", 1, model="forged")
    honest = (bundle / "manifest.json").read_bytes()
    forged = honest.replace(b'"max_batch": 8', b'"max_batch": 9')
    assert forged != honest
    error = refusal(stage, TrustError, lambda: raw_publish(stage, bundle, "forged", 1, manifest=forged), "forged")
    assert error.reason == "digest-mismatch"


def test_tampered_metadata_is_refused(stage: Stage, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "v1", 1, model="tampered")
    data = (bundle / "manifest.json").read_bytes()
    operator = OperatorRepository(stage.workspace.operator)
    signed = stage.ask(lambda client: operator.sign_manifest("tampered", 1, data, client.current_targets()))
    document = json.loads(signed)
    document["signed"]["targets"]["tampered/1/manifest.json"]["length"] += 1
    tampered = json.dumps(document).encode()
    refusal(stage, TrustError, lambda: raw_publish(stage, bundle, "tampered", 1, targets=tampered), "tampered")
    assert raw_publish(stage, bundle, "tampered", 1, targets=signed).heavy_version == 1


def test_stale_metadata_loses_against_another_publish(stage: Stage, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "stale", 1, model="stale")
    data = (bundle / "manifest.json").read_bytes()
    operator = OperatorRepository(stage.workspace.operator)
    signed = stage.ask(lambda client: operator.sign_manifest("stale", 1, data, client.current_targets()))
    stage.publish(make_bundle(tmp_path / "faster", 1, model="faster"))
    error = refusal(stage, ConflictError, lambda: raw_publish(stage, bundle, "stale", 1, targets=signed), "stale")
    assert error.reason == "stale-metadata"


def test_a_heavy_model_that_does_not_load_is_refused_and_mended(stage: Stage, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "v1", 1, model="broken")
    model = bundle / "heavy" / "1" / "model.py"
    good = model.read_text()
    model.write_text("raise RuntimeError('does not start')")
    write_manifest(bundle, "broken", 1)
    error = refusal(stage, BundleError, lambda: raw_publish(stage, bundle, "broken", 1), "broken")
    assert error.reason == "heavy-not-loadable"
    model.write_text(good)
    write_manifest(bundle, "broken", 1)
    assert stage.publish(bundle)["heavy_version"] == 1


def test_a_heavy_model_with_other_outputs_than_declared_is_refused(stage: Stage, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "v1", 1, model="liar")
    write_manifest(bundle, "liar", 1, classes=5)
    error = refusal(stage, BundleError, lambda: raw_publish(stage, bundle, "liar", 1), "liar")
    assert error.reason == "heavy-wrong"
    assert "[4, 5]" in error.message


def test_a_calibration_record_of_another_version_is_refused(stage: Stage, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "v1", 1, model="mixed")
    write_manifest(bundle, "mixed", 2)
    error = refusal(stage, BundleError, lambda: raw_publish(stage, bundle, "mixed", 2), "mixed")
    assert error.reason == BundleError.reason


def test_a_caller_who_leaves_during_the_commit_has_published(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit goes on to its end, so its heavy model must stay loaded, too."""
    bundle = make_bundle(tmp_path / "v1", 1, model="leaver")
    committing = threading.Event()
    commit = CloudRepository.commit

    def slow_commit(repository: CloudRepository, targets: bytes, role: str) -> None:
        committing.set()
        assert left.wait(10)
        commit(repository, targets, role)

    left = threading.Event()
    monkeypatch.setattr(CloudRepository, "commit", slow_commit)

    def leave(client: CloudClient) -> None:
        data = (bundle / "manifest.json").read_bytes()
        client._upload_missing(bundle, open_bundle(bundle), Progress())
        signed = OperatorRepository(stage.workspace.operator).sign_manifest("leaver", 1, data, client.current_targets())
        request = registry_pb2.PublishRequest(model="leaver", version=1, targets_json=signed, manifest_json=data)
        call = client._registry.Publish.future(request, timeout=30)
        assert committing.wait(10)
        call.cancel()

    stage.ask(leave)

    async def is_told() -> bool:
        return any(task.cancelling() for task in asyncio.all_tasks())

    stage.runner.run(eventually(is_told, "the cloud hears that the caller has gone"))
    left.set()
    stage.publish(make_bundle(tmp_path / "v2", 2, factor=20, model="leaver"))  # waits for the first one to be over
    assert [heavy.version for heavy in stage.cloud.pool.loaded if heavy.model == "leaver"] == [1, 2]


def test_the_flush_of_an_upload_does_not_hold_up_the_event_loop(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    flush = os.fsync

    def watched(descriptor: int) -> None:
        threads.append(threading.current_thread())
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", watched)

    def upload(client: CloudClient) -> None:
        messages = iter(
            [
                registry_pb2.UploadBlobRequest(sha256=sha256_bytes(b"flushed"), length=7),
                registry_pb2.UploadBlobRequest(data=b"flushed"),
            ]
        )
        client._call("upload", client._registry.UploadBlob, messages)

    stage.ask(upload)
    assert threads
    assert threading.main_thread() not in threads  # where the event loop of the cloud runs


@pytest.mark.parametrize(("data", "kind"), [(b"more", TrustError), (b"", InputError)])
def test_an_upload_without_end_is_ended(stage: Stage, data: bytes, kind: type[Exception]) -> None:
    def upload(client: CloudClient) -> None:
        first = registry_pb2.UploadBlobRequest(sha256=sha256_bytes(b"right"), length=5)
        messages = itertools.chain([first], itertools.repeat(registry_pb2.UploadBlobRequest(data=data)))
        client._call("upload", client._registry.UploadBlob, messages)

    with pytest.raises(kind):
        stage.ask(upload)


def test_an_upload_of_other_bytes_is_refused(stage: Stage) -> None:
    def upload(client: CloudClient) -> None:
        messages = iter(
            [
                registry_pb2.UploadBlobRequest(sha256=sha256_bytes(b"right"), length=5),
                registry_pb2.UploadBlobRequest(data=b"wrong"),
            ]
        )
        client._call("upload", client._registry.UploadBlob, messages)

    with pytest.raises(TrustError) as raised:
        stage.ask(upload)
    assert raised.value.reason == "digest-mismatch"


def test_operators_see_and_change_only_their_models(stage: Stage, tmp_path: Path) -> None:
    stage.publish(make_bundle(tmp_path / "v1", 1, model="mine"))
    assert {row["model"] for row in stage.ask(CloudClient.list_versions, models=("mine",))} == {"mine"}
    request = registry_pb2.ReleaseRequest(model="mine", version=1)
    with pytest.raises(NotFoundError) as raised:
        stage.ask(lambda client: client._call("release", client._registry.Release, request), models=("other",))
    assert raised.value.reason == "unknown-model"


def test_typing_errors_get_a_hint(stage: Stage, tmp_path: Path) -> None:
    stage.publish(make_bundle(tmp_path / "v1", 1, model="digits"))
    with pytest.raises(NotFoundError) as raised:
        stage.ask(lambda client: client.release("digts", 1))
    assert "digits" in raised.value.hint
    with pytest.raises(NotFoundError) as raised:
        stage.ask(lambda client: client.release("digits", 7))
    assert raised.value.hint == "published versions: 1"


def test_names_that_could_leave_the_folder_are_not_found(stage: Stage) -> None:
    for name in ("../snapshot.key", "/etc/passwd", "1.root.json/../../server.key", ""):
        with pytest.raises(NotFoundError):
            stage.ask(methodcaller("metadata", name))
    asked = registry_pb2.FetchBlobRequest(sha256="../../server.key")
    with pytest.raises(grpc.RpcError) as raised:
        stage.ask(lambda client: list(client._registry.FetchBlob(asked, timeout=10)))
    assert isinstance(raised.value, grpc.Call)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_restarted_cloud_serves_what_was_published(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")

    async def publish() -> None:
        async with serving(workspace) as cloud:
            with workspace.client(cloud) as client:
                for version in (1, 2):
                    bundle = make_bundle(tmp_path / f"v{version}", version, factor=version)
                    await asyncio.to_thread(client.publish, bundle, workspace.operator)
                await asyncio.to_thread(client.release, "triage", 1)

    async def restart() -> list[dict[str, Any]]:
        async with serving(workspace) as cloud:
            assert cloud.pool.loaded == (HeavyId("triage", 1), HeavyId("triage", 2))
            with workspace.client(cloud) as client:
                return await asyncio.to_thread(client.list_versions)

    asyncio.run(publish())
    assert [(row["version"], row["released"]) for row in asyncio.run(restart())] == [(1, True), (2, False)]


def test_the_rollback_floor_is_what_was_released(stage: Stage, tmp_path: Path) -> None:
    floors = [
        stage.publish(make_bundle(tmp_path / f"v{version}", version, model="floors"), release=version < 3)[
            "rollback_floor"
        ]
        for version in (1, 2, 3)
    ]
    assert floors == [None, 1, 2]
    listed = rows(stage, "floors")
    assert [listed[version]["rollback_floor"] for version in (1, 2, 3)] == [None, 1, 2]

    def publish(client: CloudClient, version: int, floor: int) -> Any:
        bundle = make_bundle(tmp_path / f"w{version}-{floor}", version, model="floors")
        return client.publish(bundle, stage.workspace.operator, rollback_floor=floor)

    assert stage.ask(lambda client: publish(client, 4, 0))["rollback_floor"] is None
    with pytest.raises(InputError):
        stage.ask(lambda client: publish(client, 5, 5))


def test_a_withdrawn_version_is_not_released(stage: Stage, tmp_path: Path) -> None:
    for version in (1, 2):
        stage.publish(make_bundle(tmp_path / f"v{version}", version, model="withdrawn"))
    told = stage.ask(lambda client: client.withdraw("withdrawn", 2, "NaN at night", stage.workspace.operator))
    assert told["released"]  # still, until another one is
    assert rows(stage, "withdrawn")[2]["withdrawn"] == "NaN at night"
    with pytest.raises(ConflictError) as refusal:
        stage.ask(lambda client: client.release("withdrawn", 2))
    assert refusal.value.reason == "withdrawn"
    stage.ask(lambda client: client.release("withdrawn", 1))
    with pytest.raises(NotFoundError):
        stage.ask(lambda client: client.withdraw("withdrawn", 9, "why", stage.workspace.operator))


def test_an_open_rollout_of_a_withdrawn_version_stops_and_its_devices_are_told_the_one_before(
    stage: Stage, tmp_path: Path
) -> None:
    ca = stage.workspace.trust / "ca.pem"
    devices = {name: LightDevice(name, tmp_path, "leaky", soak=lambda _seconds: 0.0) for name in ("one", "two")}
    share = [fleet_pb2.RolloutStage(count=1, soak_s=3600), fleet_pb2.RolloutStage(share=1.0, soak_s=3600)]
    ask = fleet_pb2.StartRolloutRequest(model="leaky", version=2, stages=share)

    def serving_versions(*wanted: int) -> Callable[[], Any]:
        async def holds() -> bool:
            return sorted(device.serving for device in devices.values()) == [*wanted]

        return holds

    async def enrol(codes: dict[str, str]) -> list[asyncio.Task[None]]:
        async with stage.workspace.channel(stage.cloud) as channel:
            for name, code in codes.items():
                await devices[name].enrol(channel, code)
        running = [asyncio.create_task(d.run(lambda: stage.cloud.address, ca)) for d in devices.values()]
        await eventually(serving_versions(1, 1), "both run version 1")
        return running

    for version in (1, 2):
        bundle = make_bundle(tmp_path / f"v{version}", version, model="leaky", light=weights(version))
        stage.publish(bundle, release=version == 1)
    codes = {name: str(stage.ask(methodcaller("invite", name))["code"]) for name in devices}
    running = stage.runner.run(enrol(codes))
    assert not stage.ask(methodcaller("start_rollout", ask)).warnings  # the signed floor lets them go back
    stage.runner.run(eventually(serving_versions(1, 2), "the first stage runs version 2"))
    stage.ask(lambda client: client.withdraw("leaky", 2, "it leaks", stage.workspace.operator))
    rollout = stage.ask(methodcaller("rollout", "leaky")).rollout  # at once, not at the next look
    assert (rollout.state, rollout.reason, rollout.stage) == (fleet_pb2.ROLLOUT_STATE_ABORTED, "withdrawn", 0)
    assert "it leaks" in rollout.detail
    stage.runner.run(eventually(serving_versions(1, 1), "it is back"))
    assert sorted(device.served for device in devices.values()) == [[1], [1, 2, 1]]
    with pytest.raises(InputError) as refused:
        stage.ask(methodcaller("start_rollout", ask))
    assert refused.value.reason == "withdrawn"
    for task in running:
        task.cancel()
    stage.runner.run(_gathered(running))


def test_the_start_of_a_rollout_says_what_the_signed_floor_forbids(stage: Stage, tmp_path: Path) -> None:
    """The warning is that of the metadata that devices will read, whatever the database may say."""
    for version in (1, 2):
        stage.publish(make_bundle(tmp_path / f"v{version}", version, model="floored", light=weights(version)))
    bundles = {version: make_bundle(tmp_path / f"v{version}", version, model="floored") for version in (3, 4, 5)}
    for version, floor in ((3, 0), (4, 3), (5, 1)):
        publish = methodcaller(
            "publish", bundles[version], stage.workspace.operator, release=False, rollback_floor=floor
        )
        stage.ask(publish)
        ask = fleet_pb2.StartRolloutRequest(
            model="floored", version=version, stages=[fleet_pb2.RolloutStage(share=1.0)], dry_run=True
        )
        warnings = list(stage.ask(methodcaller("start_rollout", ask)).warnings)
        told = {3: ": its signed metadata permit no way back", 4: ": its signed metadata permit no way back below 3"}
        expected = (
            [f"devices that take floored@{version} cannot be sent back to 2{told[version]}"] if version < 5 else []
        )
        assert warnings == expected


def test_a_publisher_publishes_with_a_key_of_its_own(stage: Stage, tmp_path: Path) -> None:
    public = new_publisher(tmp_path / "alice", "alice", (stage.workspace.trust / "root.json").read_bytes())
    # The operator's copy of the targets metadata is that of the last publish, whichever test did it.
    file = Ceremony(stage.workspace.operator).delegate("line-*", "alice", [load_public_key(public)])
    stage.ask(lambda client: client.submit({file.name: file.read_bytes()}))
    for version in (1, 2):
        bundle = make_bundle(tmp_path / f"v{version}", version, model="line-1")
        stage.ask(methodcaller("publish", bundle, tmp_path / "alice"))
    assert rows(stage, "line-1")[2]["released"]
    other = make_bundle(tmp_path / "other", 1, model="alices-other")
    with pytest.raises(InputError) as refusal:
        stage.ask(lambda client: client.publish(other, tmp_path / "alice"))
    assert refusal.value.reason == "not-delegated"
    stage.ask(lambda client: client.withdraw("line-1", 1, "old", tmp_path / "alice"))
    assert rows(stage, "line-1")[1]["withdrawn"] == "old"


def test_a_version_is_exported_with_deltas_and_everything_signed(stage: Stage, tmp_path: Path) -> None:
    old, new = weights(7), changed(weights(7), 50_000)
    stage.publish(make_bundle(tmp_path / "v1", 1, light=old, model="travels"))
    stage.publish(make_bundle(tmp_path / "v2", 2, light=new, model="travels"))
    for output in (tmp_path / "stick", tmp_path / "stick.tar"):
        told = stage.ask(methodcaller("export", "travels", 2, output, bases=(1,)))
        assert told["deltas"] >= 1
        with Stick(output) as stick:
            assert stick.index == Index("travels", 2, (1,))
            assert b"".join(stick.read(blob_name(sha256_bytes(new)))) == new
            assert stick.has(delta_name(sha256_bytes(old), sha256_bytes(new)))

            def fetch(name: str, stick: Stick = stick) -> Iterator[bytes]:
                is_target = name.startswith("targets/")
                return stick.read(blob_name(name.removeprefix("targets/")) if is_target else metadata_name(name))

            root = (stage.workspace.trust / "root.json").read_bytes()
            trusted = TrustedManifests(tmp_path / f"tuf-{output.name}", root, fetch)
            assert trusted.manifest("travels", 2) == (tmp_path / "v2" / "manifest.json").read_bytes()
    with pytest.raises(ConflictError):
        stage.ask(lambda client: client.export("travels", 2, tmp_path / "stick"))
    for version, variants in ((9, ()), (2, ("gpu",))):
        with pytest.raises(NotFoundError):
            stage.ask(methodcaller("export", "travels", version, tmp_path / "none", variants=variants))
    stage.ask(lambda client: client.withdraw("travels", 2, "it leaks", stage.workspace.operator))
    with pytest.raises(ConflictError, match="it leaks") as refused:
        stage.ask(methodcaller("export", "travels", 2, tmp_path / "none"))
    assert refused.value.reason == "withdrawn"
    assert not (tmp_path / "none").exists()
    assert not list(tmp_path.glob(".*.new"))


def test_a_publish_that_was_killed_after_the_commit_is_finished_at_the_next_start(tmp_path: Path) -> None:
    """The disk as SIGKILL leaves it between steps 6 and 7: blobs and signed metadata are there, no row is."""
    workspace = make_workspace(tmp_path / "workspace")

    async def run(work: Callable[[CloudClient], Any]) -> Any:
        async with serving(workspace) as cloud:

            def ask() -> Any:
                with workspace.client(cloud, ("*",)) as client:
                    return work(client)

            return await asyncio.to_thread(ask)

    def upload(client: CloudClient) -> None:
        client.publish(make_bundle(tmp_path / "v1", 1), workspace.operator)
        for version in (2, 3):
            bundle = make_bundle(tmp_path / f"v{version}", version, factor=version)
            client._upload_missing(bundle, open_bundle(bundle), Progress())

    asyncio.run(run(upload))
    operator, repository = OperatorRepository(workspace.operator), CloudRepository(workspace.home)
    blobs = Blobs(str(workspace.home / "state" / "blobs"))
    for version in (2, 3):
        data = (tmp_path / f"v{version}" / "manifest.json").read_bytes()
        repository.commit(operator.sign_manifest("triage", version, data, repository.targets_json()))
        if version == 2:
            blobs.store(data)  # version 3 never got so far: metadata vouches for it, and its manifest is missing

    listed = asyncio.run(run(CloudClient.list_versions))
    assert [(row["version"], row["released"]) for row in listed] == [(1, True), (2, False)]
    asyncio.run(run(lambda client: client.release("triage", 2)))  # it is whole: its heavy model loads
    again = asyncio.run(run(lambda client: client.publish(tmp_path / "v3", workspace.operator)))
    assert again["version"] == 3


def test_a_publish_that_was_killed_before_the_commit_left_nothing_visible(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")

    async def run(work: Callable[[CloudClient], Any]) -> Any:
        async with serving(workspace) as cloud:

            def ask() -> Any:
                with workspace.client(cloud, ("*",)) as client:
                    return work(client)

            return await asyncio.to_thread(ask)

    bundle = make_bundle(tmp_path / "v1", 1)

    def upload(client: CloudClient) -> None:
        client._upload_missing(bundle, open_bundle(bundle), Progress())

    asyncio.run(run(upload))
    Blobs(str(workspace.home / "state" / "blobs")).store((bundle / "manifest.json").read_bytes())
    assert asyncio.run(run(CloudClient.list_versions)) == []
    assert asyncio.run(run(lambda client: client.publish(bundle, workspace.operator)))["released"]


def test_the_heavy_model_is_loaded_before_the_version_is_visible(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = CloudRepository.commit
    seen: list[tuple[bool, list[Any]]] = []

    def watched(repository: CloudRepository, targets: bytes, role: str) -> None:
        loaded = any(heavy.model == "ordered" for heavy in stage.cloud.pool.loaded)
        seen.append((loaded, [path for path in repository.listed() if path.startswith("ordered/")]))
        commit(repository, targets, role)

    monkeypatch.setattr(CloudRepository, "commit", watched)
    stage.publish(make_bundle(tmp_path / "v1", 1, model="ordered"))
    assert seen == [(True, [])]


def test_bundles_are_kept_where_the_setting_says(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")

    async def run() -> None:
        async with serving(workspace, blobs=str(tmp_path / "elsewhere")) as cloud:

            def work() -> None:
                with workspace.client(cloud, ("*",)) as client:
                    client.publish(make_bundle(tmp_path / "v1", 1), workspace.operator)

            await asyncio.to_thread(work)

    asyncio.run(run())
    manifest = (tmp_path / "v1" / "manifest.json").read_bytes()
    assert Blobs(str(tmp_path / "elsewhere" / "blobs")).has(sha256_bytes(manifest))
    assert not (workspace.home / "state" / "blobs").exists()


def test_deltas_come_from_what_devices_run_and_an_open_rollout_keeps_releases_back(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    ca = workspace.trust / "ca.pem"
    device = LightDevice("camera-1", tmp_path, "triage", soak=lambda _seconds: 0.0)

    async def meet(cloud: Cloud, code: str, version: int) -> None:
        async with workspace.channel(cloud) as channel:
            await device.enrol(channel, code)
        running = asyncio.create_task(device.run(lambda: cloud.address, ca))
        await eventually(lambda: _serves(device, version), f"it runs version {version}")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    with asyncio.Runner() as runner:
        running = serving(workspace, delta_bases=1)
        stage = Stage(runner, workspace, runner.run(running.__aenter__()))
        light = weights(7)
        stage.publish(make_bundle(tmp_path / "v1", 1, light=light))
        runner.run(meet(stage.cloud, str(stage.ask(lambda client: client.invite("camera-1"))["code"]), 1))
        for version in (2, 3):
            bundle = make_bundle(tmp_path / f"v{version}", version, light=changed(light, version))
            record = stage.publish(bundle, release=False)
        # Version 2 is the newest earlier one, and version 1 is what the device runs.
        assert {delta["from_version"] for delta in record["deltas"]} == {1, 2}

        ask = fleet_pb2.StartRolloutRequest(model="triage", version=3, stages=[fleet_pb2.RolloutStage(share=1.0)])
        stage.ask(lambda client: client.start_rollout(ask))
        changes: tuple[Callable[[], Any], ...] = (
            lambda: stage.publish(make_bundle(tmp_path / "v4", 4, light=changed(light, 4))),
            lambda: stage.ask(methodcaller("release", "triage", 2)),
        )
        for change in changes:
            with pytest.raises(ConflictError) as refused:
                change()
            assert refused.value.reason == "rollout-active"
        assert set(rows(stage, "triage")) == {1, 2, 3}  # the refused publish left nothing behind
        stage.ask(lambda client: client.change_rollout("abort", "triage"))
        stage.ask(methodcaller("release", "triage", 2))
        runner.run(running.__aexit__(None, None, None))


async def _gathered(tasks: list[asyncio.Task[None]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


async def _serves(device: LightDevice, version: int) -> bool:
    return device.serving == version and device.reports >= 2  # that it does is known to the cloud
