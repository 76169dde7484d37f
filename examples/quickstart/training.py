"""The training loop that all stories share, and the way from a trained model to an ONNX file.

Rules:
* Targets are always distributions over the classes. A gold label is one with all its mass on one class, a heavy
  model's answer is a soft one: both can be mixed in one training set.
* The same seed on the same machine gives the same weights: batches, dropout and thread count are fixed.
* One schedule for all: AdamW under a one-cycle learning rate, the head with a rate of its own.
"""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from examples.quickstart.datasets import Array

OPSET = 18
# Batches of one bucket of this many are sorted by length together: wide enough to save most padding, narrow
# enough to leave batches random.
BUCKET = 50


class TrainingError(Exception):
    """The model cannot be trained or exported with what was given."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long, how fast and from which seed to train."""

    epochs: int
    batch: int
    body_rate: float
    head_rate: float
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.01
    smoothing: float = 0.0  # share of each target's mass that is spread over all classes
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Examples:
    """Training samples: inputs by tensor name, one distribution over the classes per sample."""

    inputs: Mapping[str, Tensor]
    targets: Tensor
    lengths: Tensor | None = None
    """Tokens per sample where inputs are sequences: batches are then formed of like lengths and cut to the longest."""

    def __post_init__(self) -> None:
        """Refuse parts that do not describe the same samples."""
        count = len(self.targets)
        if self.targets.ndim != 2 or count == 0:
            raise TrainingError(f"expected targets [samples, classes], got {list(self.targets.shape)}")
        sizes = {name: len(tensor) for name, tensor in self.inputs.items()}
        if self.lengths is not None:
            sizes["lengths"] = len(self.lengths)
        wrong = {name: size for name, size in sizes.items() if size != count}
        if wrong:
            raise TrainingError(f"expected {count} samples everywhere, got {wrong}")


def gold_targets(labels: npt.NDArray[np.int64], classes: int) -> Tensor:
    """Turn labels into distributions.

    Raises:
        TrainingError: a label is not a class.
    """
    if len(labels) and not (labels.min() >= 0 and labels.max() < classes):
        raise TrainingError(f"expected labels from 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
    return functional.one_hot(torch.from_numpy(labels), classes).to(torch.float32)


def soft_targets(logits: npt.NDArray[np.float32], classes: int) -> Tensor:
    """Turn a teacher's logits into distributions.

    Raises:
        TrainingError: wrong shape, or a value is not finite.
    """
    if logits.ndim != 2 or logits.shape[1] != classes:
        raise TrainingError(f"expected logits of shape [samples, {classes}], got {list(logits.shape)}")
    if not np.isfinite(logits).all():
        raise TrainingError("captured logits hold values that are not finite")
    return torch.from_numpy(np.ascontiguousarray(logits, dtype=np.float32)).softmax(dim=1)


def to_tensors(inputs: Mapping[str, Array]) -> dict[str, Tensor]:
    """View arrays as tensors."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}


def join(first: Examples, second: Examples) -> Examples:
    """Put two training sets together.

    Raises:
        TrainingError: their inputs differ.
    """
    shapes = [{name: list(t.shape[1:]) for name, t in part.inputs.items()} for part in (first, second)]
    if shapes[0] != shapes[1]:
        raise TrainingError(f"expected the same inputs in both, got {shapes[0]} and {shapes[1]}")
    lengths = None
    if first.lengths is not None and second.lengths is not None:
        lengths = torch.cat([first.lengths, second.lengths])
    return Examples(
        {name: torch.cat([tensor, second.inputs[name]]) for name, tensor in first.inputs.items()},
        torch.cat([first.targets, second.targets]),
        lengths,
    )


def fix_seed(seed: int) -> None:
    """Make what follows repeatable on this machine."""
    torch.manual_seed(seed)
    torch.set_num_threads(os.cpu_count() or 1)


def fit(model: nn.Module, examples: Examples, schedule: Schedule, progress: Progress, title: str) -> None:
    """Train every weight of ``model`` that wants a gradient; leave the model in evaluation mode.

    Raises:
        TrainingError: the loss became infinite or not a number.
    """
    fix_seed(schedule.seed)
    steps = -(-len(examples.targets) // schedule.batch) * schedule.epochs
    optimizer, rates = _optimizer(model, schedule, steps)
    order = torch.Generator().manual_seed(schedule.seed)
    task = progress.add_task(title, total=steps)
    model.train()
    for epoch in range(1, schedule.epochs + 1):
        for rows, cut in _batches(examples, schedule.batch, order):
            loss = _step(model, examples, rows, cut, schedule.smoothing)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves this one without annotations
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rates.step()
            progress.update(
                task,
                advance=1,
                description=f"{title}: epoch {epoch} of {schedule.epochs}, loss {_finite(loss):.2f}",
            )
    model.eval()


def _optimizer(
    model: nn.Module, schedule: Schedule, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.OneCycleLR]:
    """Give the head its own rate, for it alone starts from nothing."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if not name.startswith("head.")], "lr": schedule.body_rate},
        {"params": [p for name, p in trained if name.startswith("head.")], "lr": schedule.head_rate},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise TrainingError("no weight of the model wants a gradient: nothing to train")
    optimizer = torch.optim.AdamW(groups, weight_decay=schedule.weight_decay)
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=peaks, total_steps=steps + 1, pct_start=schedule.warmup, cycle_momentum=False
    )
    return optimizer, rates


def _batches(examples: Examples, batch: int, order: torch.Generator) -> Iterator[tuple[Tensor, int | None]]:
    """Yield the rows of each batch of one epoch and the length to which it can be cut."""
    shuffled = torch.randperm(len(examples.targets), generator=order)
    if examples.lengths is None:
        for rows in torch.split(shuffled, batch):
            yield rows, None
        return
    batches: list[Tensor] = []
    for bucket in torch.split(shuffled, batch * BUCKET):
        batches += torch.split(bucket[examples.lengths[bucket].argsort(stable=True)], batch)
    for index in torch.randperm(len(batches), generator=order).tolist():
        rows = batches[index]
        yield rows, int(examples.lengths[rows].max())


def _step(model: nn.Module, examples: Examples, rows: Tensor, cut: int | None, smoothing: float) -> Tensor:
    inputs = {name: tensor[rows] if cut is None else tensor[rows, :cut] for name, tensor in examples.inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=_quick_bfloat16()):
        logits = model(**inputs)
    return functional.cross_entropy(logits.float(), examples.targets[rows], label_smoothing=smoothing)


def _quick_bfloat16() -> bool:
    """Tell whether this processor multiplies bfloat16 itself; emulated, it would be slow."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _finite(loss: Tensor) -> float:
    value = loss.item()
    if not np.isfinite(value):
        raise TrainingError(f"the loss became {value}; the learning rate is too high for this data")
    return value


def predict(model: nn.Module, inputs: Mapping[str, Array], batch: int = 256) -> npt.NDArray[np.float32]:
    """Return the logits of ``model`` for all samples, in full precision."""
    tensors = to_tensors(inputs)
    count = len(next(iter(tensors.values())))
    model.eval()
    with torch.inference_mode():
        parts = [
            model(**{name: tensor[start : start + batch] for name, tensor in tensors.items()})
            for start in range(0, count, batch)
        ]
    return np.asarray(torch.cat(parts).numpy(), dtype=np.float32)


def export_onnx(model: nn.Module, sample: Mapping[str, Array], out: Path) -> None:
    """Write ``model`` as one ONNX file: inputs named as in ``sample``, batch symbolic, output ``logits``.

    Two models of one class and size give the same graph, node for node and name for name.

    Raises:
        TrainingError: the exported graph is not what this promises.
    """
    model.eval()
    # By name, in the model's own order: a sample read back from a file may hold its arrays in another.
    # Two rows: with one, the exporter would take the batch for a constant.
    tensors = to_tensors(sample)
    inputs = {name: tensors[name][:2] for name in _input_names(model, tensors)}
    batch = torch.export.Dim("batch", min=1)
    with _quiet_exporter():
        program = torch.onnx.export(
            model,
            kwargs=inputs,
            input_names=list(inputs),
            output_names=["logits"],
            opset_version=OPSET,
            dynamic_shapes={name: {0: batch} for name in inputs},
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise TrainingError("the exporter returned no program")
    out.parent.mkdir(parents=True, exist_ok=True)
    program.save(str(out), external_data=False)
    _check_graph(onnx.load(str(out)), tuple(inputs), out)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's remarks on its own internals and on absent torchvision off the console."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _input_names(model: nn.Module, found: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the model's inputs, which must be those of the sample."""
    wanted = list(inspect.signature(model.forward).parameters)
    if sorted(wanted) != sorted(found):
        raise TrainingError(f"the model takes the inputs {wanted}, the sample holds {sorted(found)}")
    return wanted


def _check_graph(exported: onnx.ModelProto, names: tuple[str, ...], out: Path) -> None:
    """Refuse a graph whose interface is not the promised one."""
    onnx.checker.check_model(exported)
    ends = [value.name for value in (*exported.graph.input, *exported.graph.output)]
    if ends != [*names, "logits"]:
        raise TrainingError(f"{out}: expected inputs {list(names)} and output logits, got {ends}")
    for value in (*exported.graph.input, *exported.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise TrainingError(f"{out}: the batch axis of {value.name} is fixed")


def save_checkpoint(model: nn.Module, path: Path) -> None:
    """Write the weights in full precision."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Read the weights that :func:`save_checkpoint` wrote.

    Raises:
        TrainingError: unreadable, or of another model.
    """
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise TrainingError(f"cannot take the weights of {path}: {error}") from error
