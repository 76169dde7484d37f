"""The Triton repositories of the heavy model: read with Triton's own schema, and served by the real Triton."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper

from cloud.supervisor import TritonServer
from cloud.triton import TritonClient, read_config
from compiler.capture import CapturedModel, capture
from compiler.sources import SourceOptions
from compiler.targets import BuildOptions, Serving, Target, UnsupportedModelError
from compiler.targets.tensorrt import TENSORRT_RTX, Library
from compiler.targets.triton_onnxruntime import TritonOnnxRuntimeTarget
from compiler.targets.triton_openvino import TritonOpenVinoTarget
from compiler.targets.triton_python import TritonPythonTarget
from compiler.targets.triton_tensorrt import TritonTensorRtTarget
from isthmus.digests import sha256_file
from isthmus.errors import BundleError, InputError
from isthmus.oip import model_config_pb2 as pb
from isthmus.oip import service_pb2
from isthmus.tensors import decode_outputs, encode_request
from tests.compiler import models

Array = np.ndarray[Any, Any]
CPU, GPU = pb.ModelInstanceGroup.KIND_CPU, pb.ModelInstanceGroup.KIND_GPU
ON_GPUS = Serving(instances=2, gpus=(1, 0))
TENSORRT = TritonTensorRtTarget(replace(TENSORRT_RTX, capabilities=("SM86",)))  # the same builder, without a GPU


def write_bag(path: Path, *, batch: str | int = "batch", ranks: str = "") -> Path:
    """Write a model that scores as many words as there are; `ranks` names an output without a second axis."""
    node = helper.make_node
    nodes = [
        node("Gather", ["words", "tokens"], ["embedded"], name="embed"),
        node("ReduceMean", ["embedded"], ["mean"], name="mean", axes=[1], keepdims=0),
        node("MatMul", ["mean", "head"], ["logits"], name="head_matmul"),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, models.CLASSES])]
    if ranks:
        nodes.append(node("ReduceMax", ["logits"], [ranks], name="best", axes=[1], keepdims=0))
        outputs.append(helper.make_tensor_value_info(ranks, TensorProto.FLOAT, [batch]))
    weights = [numpy_helper.from_array(models.encoder_weights()[name], name) for name in ("words", "head")]
    inputs = [helper.make_tensor_value_info("tokens", TensorProto.INT64, [batch, "sequence"])]
    graph = helper.make_graph(nodes, "bag", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def captured(folder: Path, **changes: Any) -> CapturedModel:
    source = write_bag(folder / "bag.onnx", **changes)
    return capture(source, folder / "captured.onnx", SourceOptions(lengths={"sequence": (2, 12)}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CapturedModel:
    return captured(tmp_path_factory.mktemp("bag"))


def build(target: Target, model: CapturedModel, folder: Path, **changes: Any) -> Any:
    """Build the folder, and return its configuration as Triton reads it: an unknown field would be an error."""
    folder.mkdir()
    target.build(model, folder, replace(BuildOptions(name="bag", max_batch=16), **changes))
    return text_format.Parse((folder / "config.pbtxt").read_text(), pb.ModelConfig())


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def shapes(config: Any) -> dict[str, list[int]]:
    return {tensor.name: list(tensor.dims) for tensor in (*config.input, *config.output)}


def parameters(config: Any) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


def test_the_python_form_batches_on_the_processor(model: CapturedModel, tmp_path: Path) -> None:
    serving = Serving(instances=3, threads=4, max_queue_delay_us=700, preferred_batch=(8, 4, 4))

    config = build(TritonPythonTarget(), model, tmp_path / "heavy", serving=serving)

    assert files(tmp_path / "heavy") == ["1/model.onnx", "1/model.py", "config.pbtxt"]
    assert (config.name, config.backend, config.platform, config.max_batch_size) == ("bag", "python", "", 16)
    assert shapes(config) == {"tokens": [-1], "logits": [models.CLASSES]}
    assert [tensor.data_type for tensor in (*config.input, *config.output)] == [pb.TYPE_INT64, pb.TYPE_FP32]
    assert config.dynamic_batching.max_queue_delay_microseconds == 700
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert [(group.kind, group.count) for group in config.instance_group] == [(CPU, 3)]
    assert parameters(config) == {"threads": "4", "runtime": "onnxruntime", "model": "model.onnx"}
    assert not config.response_cache.enable
    assert not config.model_warmup
    assert not config.HasField("version_policy")


def test_the_python_form_holds_an_ir_for_openvino(model: CapturedModel, tmp_path: Path) -> None:
    config = build(TritonPythonTarget(), model, tmp_path / "heavy", serving=Serving(runtime="openvino"))

    assert files(tmp_path / "heavy") == ["1/model.bin", "1/model.py", "1/model.xml", "config.pbtxt"]
    assert parameters(config) == {"threads": "2", "runtime": "openvino", "model": "model.xml"}


def test_the_onnxruntime_form_runs_on_the_processor_without_gpus(model: CapturedModel, tmp_path: Path) -> None:
    config = build(TritonOnnxRuntimeTarget(), model, tmp_path / "heavy", serving=Serving(threads=3))

    assert files(tmp_path / "heavy") == ["1/model.onnx", "config.pbtxt"]
    assert (config.backend, config.platform, config.max_batch_size) == ("onnxruntime", "onnxruntime_onnx", 16)
    assert [(group.kind, list(group.gpus)) for group in config.instance_group] == [(CPU, [])]
    assert parameters(config) == {"intra_op_thread_count": "3", "inter_op_thread_count": "1"}
    assert not config.HasField("optimization")


def test_the_onnxruntime_form_lets_tensorrt_take_the_graph_on_gpus(model: CapturedModel, tmp_path: Path) -> None:
    config = build(TritonOnnxRuntimeTarget(), model, tmp_path / "heavy", serving=ON_GPUS, precision="fp16")

    assert [(group.kind, group.count, list(group.gpus)) for group in config.instance_group] == [(GPU, 2, [0, 1])]
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    options = dict(accelerator.parameters)
    assert accelerator.name == "tensorrt"
    assert options["precision_mode"] == "FP16"
    assert int(options["max_workspace_size_bytes"]) == 1 << 30
    assert (options["trt_engine_cache_enable"], options["trt_engine_cache_path"]) == ("1", "tensorrt-engines")
    assert [options[f"trt_profile_{end}_shapes"] for end in ("min", "opt", "max")] == [
        "tokens:1x2", "tokens:16x12", "tokens:16x12"
    ]  # fmt: skip
    weights = onnx.load(tmp_path / "heavy" / "1" / "model.onnx").graph.initializer
    assert {tensor.data_type for tensor in weights if tensor.name == "head"} == {TensorProto.FLOAT16}


def test_the_openvino_form_leaves_batches_to_the_request(model: CapturedModel, tmp_path: Path) -> None:
    config = build(TritonOpenVinoTarget(), model, tmp_path / "heavy", serving=Serving(instances=2, threads=3))

    assert files(tmp_path / "heavy") == ["1/model.bin", "1/model.xml", "config.pbtxt"]
    assert (config.backend, config.max_batch_size) == ("openvino", 0)
    assert shapes(config) == {"tokens": [-1, -1], "logits": [-1, models.CLASSES]}
    assert not config.HasField("dynamic_batching")
    assert parameters(config) == {"INFERENCE_NUM_THREADS": "6", "NUM_STREAMS": "2"}


@pytest.mark.slow
def test_the_tensorrt_form_holds_a_plan(model: CapturedModel, tmp_path: Path) -> None:
    config = build(TENSORRT, model, tmp_path / "heavy", serving=ON_GPUS, precision="fp16")

    assert files(tmp_path / "heavy") == ["1/model.plan", "config.pbtxt"]
    assert (config.backend, config.platform, config.max_batch_size) == ("tensorrt", "tensorrt_plan", 16)
    assert shapes(config) == {"tokens": [-1], "logits": [models.CLASSES]}
    assert config.HasField("dynamic_batching")
    assert [(group.kind, list(group.gpus)) for group in config.instance_group] == [(GPU, [0, 1])]


def test_without_tensorrt_there_is_no_tensorrt_form() -> None:
    with pytest.raises(ImportError) as raised:
        TritonTensorRtTarget(Library("TensorRT", ("no_such_tensorrt",), ahead=False))
    assert raised.value.name == "no_such_tensorrt"


def test_a_plan_is_not_run_here(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.plan cannot be run here: it needs an NVIDIA GPU"):
        TENSORRT.open(tmp_path / "model.plan", threads=1)


FORMS = [
    (TritonPythonTarget(), Serving()),
    (TritonPythonTarget(), Serving(runtime="openvino")),
    (TritonOnnxRuntimeTarget(), Serving()),
    (TritonOnnxRuntimeTarget(), ON_GPUS),
    (TritonOpenVinoTarget(), Serving()),
]
NAMES = ["python", "python-openvino", "onnxruntime", "onnxruntime-gpu", "openvino"]


@pytest.mark.parametrize(("target", "serving"), FORMS, ids=NAMES)
def test_warm_up_cache_and_versions_are_what_the_recipe_says(
    model: CapturedModel, tmp_path: Path, target: Target, serving: Serving
) -> None:
    wanted = replace(serving, warm_up=True, response_cache=True, keep_versions=2)

    config = build(target, model, tmp_path / "heavy", serving=wanted)

    assert config.response_cache.enable
    assert config.version_policy.latest.num_versions == 2
    inputs = [(request.batch_size, request.inputs["tokens"]) for request in config.model_warmup]
    assert all(entry.zero_data and entry.data_type == pb.TYPE_INT64 for _, entry in inputs)
    rows = [[*([size] if size else []), *entry.dims] for size, entry in inputs]
    assert rows == [[1, 2], [16, 12]]


@pytest.mark.parametrize(("target", "serving"), FORMS, ids=NAMES)
def test_equal_models_and_settings_give_equal_folders(
    model: CapturedModel, tmp_path: Path, target: Target, serving: Serving
) -> None:
    digests = []
    for run in ("first", "second"):
        build(target, model, tmp_path / run, serving=replace(serving, warm_up=True))
        digests.append({name: sha256_file(tmp_path / run / name) for name in files(tmp_path / run)})

    assert digests[0] == digests[1]


@pytest.mark.parametrize(("target", "serving"), FORMS, ids=NAMES)
def test_what_is_built_gives_the_sources_answers(
    model: CapturedModel, tmp_path: Path, target: Target, serving: Serving
) -> None:
    (tmp_path / "heavy").mkdir()
    built = target.build(model, tmp_path / "heavy", BuildOptions(name="bag", serving=serving))

    outputs = target.open(tmp_path / "heavy" / built.entry, threads=1).infer({"tokens": models.tokens(5)})

    np.testing.assert_allclose(outputs["logits"], source_answers(model, models.tokens(5))["logits"], atol=1e-5)


@pytest.mark.slow
def test_pictures_warm_up_with_random_bytes(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["picture"], ["y"], name="cast", to=TensorProto.FLOAT)
    ends = [
        helper.make_tensor_value_info(name, datatype, ["batch", 3])
        for name, datatype in (("picture", TensorProto.UINT8), ("y", TensorProto.FLOAT))
    ]
    graph = helper.make_graph([node], "picture", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    model = capture(tmp_path / "m.onnx", tmp_path / "c.onnx")

    config = build(TritonPythonTarget(), model, tmp_path / "heavy", serving=Serving(warm_up=True))

    assert all(request.inputs["picture"].random_data for request in config.model_warmup)


@pytest.mark.slow
def test_a_fixed_batch_is_an_axis_like_any_other(tmp_path: Path) -> None:
    config = build(TritonPythonTarget(), captured(tmp_path, batch=1), tmp_path / "heavy", serving=Serving(warm_up=True))

    assert config.max_batch_size == 0
    assert shapes(config) == {"tokens": [1, -1], "logits": [1, models.CLASSES]}
    assert not config.HasField("dynamic_batching")
    assert [list(request.inputs["tokens"].dims) for request in config.model_warmup] == [[1, 2], [1, 12]]


@pytest.mark.slow
def test_a_tensor_with_no_axis_besides_the_batch_is_said_whole(tmp_path: Path) -> None:
    """With max_batch_size, Triton would want [n, 1] where the model, the device and the manifest have [n]."""
    config = build(TritonPythonTarget(), captured(tmp_path, ranks="best"), tmp_path / "heavy")

    assert config.max_batch_size == 0
    assert shapes(config) == {"tokens": [-1, -1], "logits": [-1, models.CLASSES], "best": [-1]}


def test_a_scalar_is_refused(model: CapturedModel, tmp_path: Path) -> None:
    scalar = model.outputs[0].model_copy(update={"name": "sum", "shape": ()})

    with pytest.raises(UnsupportedModelError, match="no tensors without an axis, and 'sum' is one") as raised:
        build(TritonPythonTarget(), replace(model, outputs=(scalar,)), tmp_path / "heavy")

    assert "constants" in raised.value.hint


@pytest.mark.parametrize(
    ("target", "serving", "message"),
    [
        (TritonPythonTarget(), Serving(gpus=(0,)), r"'triton-python' runs on the processor, gpus \[0\] cannot be used"),
        (TritonOpenVinoTarget(), Serving(gpus=(1,)), "'triton-openvino' runs on the processor"),
        (TritonOpenVinoTarget(), Serving(preferred_batch=(4,)), "'triton-openvino' cannot batch requests"),
        (TritonPythonTarget(), Serving(preferred_batch=(4, 32)), r"sizes of 1 to max_batch \(16\), got 32"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    model: CapturedModel, tmp_path: Path, target: Target, serving: Serving, message: str
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        build(target, model, tmp_path / "heavy", serving=serving)

    assert raised.value.hint


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_precision_that_the_runtime_lacks_is_refused(model: CapturedModel, tmp_path: Path, runtime: Any) -> None:
    with pytest.raises(InputError, match=f"runtime '{runtime}' has no 'int3'; it has fp32"):
        build(TritonPythonTarget(), model, tmp_path / "heavy", serving=Serving(runtime=runtime), precision="int3")


@pytest.mark.slow
def test_openvino_in_the_python_form_can_be_int8(model: CapturedModel, tmp_path: Path) -> None:
    (tmp_path / "heavy").mkdir()
    tokens = models.tokens(60)
    wanted = BuildOptions(name="bag", precision="int8", samples={"tokens": tokens}, serving=Serving(runtime="openvino"))

    built = TritonPythonTarget().build(model, tmp_path / "heavy", wanted)

    assert built.entry == "1/model.xml"
    want = source_answers(model, tokens[:9])["logits"]
    got = TritonPythonTarget().open(tmp_path / "heavy" / built.entry, threads=1).infer({"tokens": tokens[:9]})["logits"]
    assert 0 < np.abs(got - want).max() < 0.1 * np.ptp(want)


def source_answers(model: CapturedModel, tokens: Array) -> dict[str, Array]:
    session = onnxruntime.InferenceSession(str(model.path))
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"tokens": tokens}), strict=True))


class CachingServer(TritonServer):
    """Triton with room for answers; without it, Triton passes over what a model says of its cache."""

    def _command(self) -> list[str]:
        caches = self._installation.server.parents[1] / "caches"
        return [*super()._command(), f"--cache-directory={caches}", "--cache-config=local,size=1048576"]


@asynccontextmanager
async def serving(folder: Path, python: Path | None = None) -> AsyncIterator[TritonClient]:
    """Run Triton over the model folders in `folder`; `python` has the packages of its models."""
    server = CachingServer(folder, log_file=folder.parent / "triton.log", stop_s=0.2)
    if python is not None:
        server._installation = replace(server._installation, python=python)
    client = TritonClient(server.address)

    async def nothing() -> None:
        return

    await server.start(nothing)
    try:
        yield client
    finally:
        await client.close()
        await server.stop()


async def load(client: TritonClient, folder: Path) -> None:
    config, _ = read_config((folder / "config.pbtxt").read_text(), name=folder.name, what="config.pbtxt")
    await client.load(folder.name, config, timeout_s=30.0)


async def ask(client: TritonClient, name: str, tokens: Array) -> dict[str, Array]:
    answer = await client.infer(encode_request(name, {"tokens": tokens}).SerializeToString(), timeout_s=20.0)
    return decode_outputs(service_pb2.ModelInferResponse.FromString(answer))


def assert_same(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> None:
    assert sorted(ours) == sorted(theirs)
    for name, array in ours.items():
        assert array.shape == theirs[name].shape
        np.testing.assert_allclose(array, theirs[name], atol=1e-5)


@pytest.mark.slow
def test_triton_serves_both_runtimes_as_the_recipe_says(model: CapturedModel, tmp_path: Path) -> None:
    """Dynamic batching, warm-up and response cache, all on; requests of several lengths, one by one and at once."""
    repository = tmp_path / "repository"
    repository.mkdir()
    common = Serving(max_queue_delay_us=100_000, preferred_batch=(4,), warm_up=True, response_cache=True)
    for runtime in ("onnxruntime", "openvino"):
        build(TritonPythonTarget(), model, repository / runtime, serving=replace(common, runtime=runtime))
    several = [models.tokens(rows, seed=rows)[:, :length] for rows in (1, 2, 16) for length in (2, 5)]
    at_once = [models.tokens(1, seed=100 + row) for row in range(4)]

    async def story() -> None:
        async with serving(repository) as client:
            for runtime in ("onnxruntime", "openvino"):
                await load(client, repository / runtime)
                warmed = await figures(client, runtime)
                assert (warmed.inference_count, warmed.execution_count) == (1 + 16, 2)
                for tokens in several:
                    assert_same(await ask(client, runtime, tokens), source_answers(model, tokens))
                answers = await asyncio.gather(*(ask(client, runtime, tokens) for tokens in at_once))
                for tokens, answer in zip(at_once, answers, strict=True):
                    assert_same(answer, source_answers(model, tokens))
                batched = await figures(client, runtime)
                assert batched.execution_count - warmed.execution_count < len(several) + len(at_once)
                assert batched.inference_stats.cache_hit.count == 0
                assert_same(await ask(client, runtime, several[-1]), source_answers(model, several[-1]))
                cached = await figures(client, runtime)
                assert cached.inference_stats.cache_hit.count == 1
                assert cached.execution_count == batched.execution_count

    asyncio.run(story())


async def figures(client: TritonClient, name: str) -> Any:
    (found,) = [entry for entry in await client.statistics() if entry.name == name]
    return found


@pytest.mark.slow
def test_triton_serves_models_that_it_cannot_batch(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    (tmp_path / "ranked").mkdir()
    forms: dict[Literal["onnxruntime", "openvino"], CapturedModel] = {
        "onnxruntime": captured(tmp_path / "ranked", ranks="best"),
        "openvino": captured(tmp_path, batch=1),
    }
    for runtime, model in forms.items():
        build(TritonPythonTarget(), model, repository / runtime, serving=Serving(runtime=runtime, warm_up=True))

    async def story() -> None:
        async with serving(repository) as client:
            for name, model in forms.items():
                await load(client, repository / name)
                for rows in (1, 3) if name == "onnxruntime" else (1,):
                    tokens = models.tokens(rows)
                    assert_same(await ask(client, name, tokens), source_answers(model, tokens))

    asyncio.run(story())


@pytest.mark.slow
def test_a_triton_without_openvino_names_the_extra(model: CapturedModel, tmp_path: Path) -> None:
    """Its models get a Python with numpy and nothing else."""
    repository = tmp_path / "repository"
    repository.mkdir()
    build(TritonPythonTarget(), model, repository / "bag", serving=Serving(runtime="openvino"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    installed = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs"):
        (packages / name).symlink_to(installed / name)

    async def story() -> None:
        async with serving(repository, python=tmp_path / "venv" / "bin") as client:
            with pytest.raises(BundleError, match=r"needs openvino, .*pip install 'isthmus\[cloud,edge-openvino\]'"):
                await load(client, repository / "bag")

    asyncio.run(story())
