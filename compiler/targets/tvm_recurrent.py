"""LSTM, GRU and RNN for TVM, whose ONNX frontend has none: one kernel for all steps of one direction.

What the inputs add to the gates is one matrix product for all steps, and TVM's business. The rest is a loop that keeps
the state in memory of its own: for each step one product of state and recurrence, whose weights are packed so that they
are read in order, and a few vectors of element-wise work. Formulas and the order of the gates are those of the ONNX
operators' documentation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from compiler.schedules.transcendental import logistic
from isthmus.tensors import Array

GATES: Final[Mapping[str, int]] = {"LSTM": 4, "GRU": 3, "RNN": 1}
_ACTIVATIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "LSTM": ("Sigmoid", "Tanh", "Tanh"),
    "GRU": ("Sigmoid", "Tanh"),
    "RNN": ("Tanh",),
}
_BACKWARDS: Final[Mapping[str, tuple[bool, ...]]] = {
    "forward": (False,), "reverse": (True,), "bidirectional": (False, True),
}  # fmt: skip
_LANES: Final = (64, 32, 16, 8, 4, 2, 1)  # gates that one pass over the state computes


class CannotConvertError(ValueError):
    """The node does what no framework exports."""


@dataclass(slots=True)
class Recurrences:
    """Converts recurrent nodes; what it calls by name from Relax is in `kernels`."""

    kernels: dict[str, Any] = field(default_factory=dict)  # name -> tvm.tirx.PrimFunc

    def convert(self, builder: Any, operator: str, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
        """Return Y and the last states of an ONNX node as a Relax tuple.

        Args:
            builder: Relax's block builder.
            operator: "LSTM", "GRU" or "RNN".
            inputs: The node's inputs; None where one is left out.
            attributes: The node's attributes by name.

        Raises:
            CannotConvertError: The node has weights that are computed, rows of different lengths, peepholes or
                activations of its own.
        """
        from tvm import relax

        given = [*inputs, *[None] * (8 - len(inputs))]
        layer = _Layer.read(operator, given, attributes)
        sequence, states = given[0], given[5:7] if operator == "LSTM" else given[5:6]
        every, last = [], []
        for direction, backwards in enumerate(layer.backwards):
            gates = relax.op.matmul(sequence, relax.const(layer.weights[direction].T))
            gates = builder.emit(relax.op.add(gates, relax.const(layer.input_bias(direction))))
            first = [self._initial(layer, state, direction) for state in states]
            constants = [relax.const(array) for array in layer.constants(direction)]
            row = relax.TensorType((1, layer.batch, layer.hidden), "float32")
            whole = relax.TensorType((layer.steps, layer.batch, layer.hidden), "float32")
            name = f"recurrence_{len(self.kernels)}"
            self.kernels[name] = _kernel(name, layer, backwards=backwards)
            call = relax.call_dps_packed(name, [gates, *constants, *first], out_ty=[whole, *[row for _ in first]])
            results = builder.emit(call)
            every.append(relax.op.expand_dims(builder.emit(relax.TupleGetItem(results, 0)), 1))
            last.append([builder.emit(relax.TupleGetItem(results, 1 + index)) for index in range(len(first))])
        outputs = [relax.op.concat(every, 1), *(relax.op.concat(states, 0) for states in zip(*last, strict=True))]
        return relax.Tuple([builder.emit(output) for output in outputs])

    def _initial(self, layer: _Layer, state: Any, direction: int) -> Any:
        from tvm import relax

        if state is None:
            return relax.const(np.zeros((1, layer.batch, layer.hidden), np.float32))
        return relax.op.strided_slice(state, [0], [direction], [direction + 1])


@dataclass(frozen=True, slots=True)
class _Layer:
    """One recurrent node; weights are [directions, gates * hidden, ...] as ONNX has them."""

    operator: str
    steps: int
    batch: int
    hidden: int
    backwards: tuple[bool, ...]  # of each direction
    weights: Array
    recurrence: Array
    biases: Array  # [directions, 2 * gates * hidden]: of the input, then of the state
    reset_after: bool  # GRU: the reset gate is applied after the product

    @classmethod
    def read(cls, operator: str, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> _Layer:
        directions = attributes.get("direction", b"forward").decode()
        backwards = _BACKWARDS[directions]
        _check(operator, inputs, attributes, len(backwards))
        steps, batch, _ = (int(size) for size in inputs[0].ty.shape.values)
        weights, recurrence = (given.value.numpy() for given in inputs[1:3])
        hidden = int(recurrence.shape[2])
        biases = np.zeros((len(backwards), 2 * GATES[operator] * hidden), np.float32)
        if inputs[3] is not None:
            biases = inputs[3].value.numpy()
        if inputs[4] is not None and (inputs[4].value.numpy() != steps).any():
            raise CannotConvertError("its rows have lengths of their own")
        after = bool(attributes.get("linear_before_reset", 0))
        return cls(operator, steps, batch, hidden, backwards, weights, recurrence, biases, after)

    @property
    def width(self) -> int:
        return GATES[self.operator] * self.hidden

    def input_bias(self, direction: int) -> Array:
        """Return what is added to the gates of every step; a GRU's last gate may want the state's part apart."""
        own, of_state = self.biases[direction, : self.width].copy(), self.biases[direction, self.width :]
        split = 2 * self.hidden if self.operator == "GRU" and self.reset_after else self.width
        own[:split] += of_state[:split]
        return own

    def constants(self, direction: int) -> list[Array]:
        """Return what the kernel takes after the gates: packed recurrence, and what a GRU has besides."""
        whole = self.recurrence[direction]
        if self.operator != "GRU":
            return [_packed(whole)]
        if self.reset_after:
            return [_packed(whole), self.biases[direction, 5 * self.hidden :].copy()]
        return [_packed(whole[: 2 * self.hidden]), _packed(whole[2 * self.hidden :])]


def _check(operator: str, inputs: Sequence[Any], attributes: Mapping[str, Any], directions: int) -> None:
    from tvm.ir import GenericConst

    constants = [given for given in inputs[1:5] if given is not None]
    if not all(isinstance(given, GenericConst) for given in constants):
        raise CannotConvertError("its weights or lengths are computed")
    if inputs[1].value.dtype != "float32":
        raise CannotConvertError(f"expected float32 weights, got {inputs[1].value.dtype}")
    activations = tuple(name.decode() for name in attributes.get("activations", ()))
    if activations not in {(), _ACTIVATIONS[operator] * directions}:
        raise CannotConvertError(f"activations {', '.join(activations)}")
    other = [name for name in ("clip", "input_forget", "layout") if attributes.get(name)]
    if inputs[7] is not None or other:
        raise CannotConvertError(f"attribute {other[0]}" if other else "peephole connections")


def _lanes(width: int) -> int:
    return next(lanes for lanes in _LANES if width % lanes == 0)


def _packed(weights: Array) -> Array:
    """Return [width, hidden] as [blocks, hidden, lanes]: one pass over the state reads it from front to back."""
    width, hidden = weights.shape
    lanes = _lanes(width)
    return np.ascontiguousarray(weights.reshape(width // lanes, lanes, hidden).transpose(0, 2, 1))


def _kernel(name: str, layer: _Layer, *, backwards: bool) -> Any:
    """Return the loop over the steps as a PrimFunc: gates, constants, first states; then every state, last states."""
    from tvm.script import tirx as t
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder.tirx import prim_func

    steps, batch, hidden = layer.steps, layer.batch, layer.hidden
    states = 2 if layer.operator == "LSTM" else 1
    with IRBuilder() as builder, prim_func(s_tir=True):
        t.func_name(name)
        t.func_attr({"global_symbol": name, "tirx.noalias": True, "tirx.is_scheduled": True})
        gates = t.arg("gates", t.Buffer((steps, batch, layer.width), "float32"))
        constants = [
            t.arg(f"constant_{index}", t.Buffer(array.shape, "float32"))
            for index, array in enumerate(layer.constants(0))
        ]
        first = [t.arg(f"first_{index}", t.Buffer((1, batch, hidden), "float32")) for index in range(states)]
        every = t.arg("every", t.Buffer((steps, batch, hidden), "float32"))
        last = [t.arg(f"last_{index}", t.Buffer((1, batch, hidden), "float32")) for index in range(states)]
        step = _Step(t, layer, gates, constants, [t.sblock_alloc_buffer((hidden,)) for _ in range(states)])
        with t.serial(0, batch) as row:
            for state, start in zip(step.states, first, strict=True):
                step.each(state, lambda v, start=start: start[0, row, v])
            with t.serial(0, steps) as count:
                at = steps - 1 - count if backwards else count
                {"LSTM": step.lstm, "GRU": step.gru, "RNN": step.rnn}[layer.operator](at, row)
                step.store(every, (at, row), step.states[0])
            for end, state in zip(last, step.states, strict=True):
                step.store(end, (0, row), state)
    return builder.get()


class _Step:
    """Writes what one step does, into the function that is being built."""

    def __init__(self, t: Any, layer: _Layer, gates: Any, constants: Sequence[Any], states: Sequence[Any]) -> None:
        self._t = t
        self._hidden = layer.hidden
        self._reset_after = layer.reset_after
        self._gates = gates
        self._constants = constants
        self.states = states
        self._sums = t.sblock_alloc_buffer((layer.width,))
        self._pass = t.sblock_alloc_buffer((_lanes(layer.width),))
        if layer.operator == "GRU":
            self._reset = t.sblock_alloc_buffer((layer.hidden,))
            self._narrow = t.sblock_alloc_buffer((_lanes(layer.hidden),))

    def each(self, target: Any, value: Any, offset: int = 0) -> None:
        """target[offset + v] = value(v) for all v of the hidden width."""
        t, lanes = self._t, _lanes(self._hidden)
        with t.serial(0, self._hidden // lanes) as block, t.vectorized(0, lanes) as v:
            t.buffer_store(target, value(block * lanes + v), [offset + block * lanes + v])

    def store(self, target: Any, place: tuple[Any, ...], state: Any) -> None:
        t, lanes = self._t, _lanes(self._hidden)
        with t.serial(0, self._hidden // lanes) as block, t.vectorized(0, lanes) as v:
            t.buffer_store(target, state[block * lanes + v], [*place, block * lanes + v])

    def _multiply(self, state: Any, packed: Any, start: Any, accumulator: Any, offset: int = 0) -> None:
        """sums[offset + n] = start(n) + state . packed[n] for all n of the packed width; no start is 0."""
        t, (blocks, depth, lanes) = self._t, (int(size) for size in packed.shape)
        with t.serial(0, blocks) as block:
            with t.vectorized(0, lanes) as v:
                t.buffer_store(accumulator, start(block * lanes + v) if start else t.float32(0), [v])
            with t.serial(0, depth) as k, t.vectorized(0, lanes) as v:
                t.buffer_store(accumulator, accumulator[v] + state[k] * packed[block, k, v], [v])
            with t.vectorized(0, lanes) as v:
                t.buffer_store(self._sums, accumulator[v], [offset + block * lanes + v])

    def _sum(self, gate: int, v: Any) -> Any:
        return self._sums[gate * self._hidden + v]

    def lstm(self, at: Any, row: Any) -> None:
        output, cell = self.states
        self._multiply(output, self._constants[0], lambda n: self._gates[at, row, n], self._pass)
        self.each(
            cell,
            lambda v: logistic(self._sum(2, v)) * cell[v] + logistic(self._sum(0, v)) * _tanh(self._sum(3, v)),
        )
        self.each(output, lambda v: logistic(self._sum(1, v)) * _tanh(cell[v]))

    def gru(self, at: Any, row: Any) -> None:
        (state,) = self.states
        hidden, sums = self._hidden, self._sums
        if self._reset_after:
            bias = self._constants[1]
            self._multiply(state, self._constants[0], None, self._pass)
            self.each(
                sums,
                lambda v: (
                    self._gates[at, row, 2 * hidden + v]
                    + logistic(self._sum(1, v) + self._gates[at, row, hidden + v]) * (self._sum(2, v) + bias[v])
                ),
                2 * hidden,
            )
            self.each(sums, lambda v: self._sum(0, v) + self._gates[at, row, v])
        else:
            self._multiply(state, self._constants[0], lambda n: self._gates[at, row, n], self._pass)
            self.each(self._reset, lambda v: logistic(self._sum(1, v)) * state[v])
            start = 2 * hidden
            self._multiply(
                self._reset, self._constants[1], lambda n: self._gates[at, row, start + n], self._narrow, start
            )
        # (1 - update) * candidate + update * state
        self.each(
            state,
            lambda v: _tanh(self._sum(2, v)) + logistic(self._sum(0, v)) * (state[v] - _tanh(self._sum(2, v))),
        )

    def rnn(self, at: Any, row: Any) -> None:
        (state,) = self.states
        self._multiply(state, self._constants[0], lambda n: self._gates[at, row, n], self._pass)
        self.each(state, lambda v: _tanh(self._sum(0, v)))


def _tanh(value: Any) -> Any:
    return 2.0 * logistic(2.0 * value) - 1.0
