"""The float twin of an integer student as a .tflite file: what LiteRT's speed is compared with.

As `onnx_float`: the same network in float32, batch norms folded and weights dequantized.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lrq_jax.graph import INPUT
from lrq_jax.graph import layers as L
from lrq_jax.passes import Student
from lrq_jax.passes.plan import Operation
from lrq_jax.writers.onnx_model import require_integer
from lrq_jax.writers.tflite_builder import TFLiteBuilder
from lrq_jax.writers.tflite_model import LOGITS
from lrq_jax.writers.tflite_windows import subsampling, window_padding

_FUSED = {"relu": "RELU", "relu6": "RELU6"}


def tflite_float_twin(student: Student, codes: dict[str, Any], *, batch: int = 1) -> bytes:
    """The file, normalised images `[B, H, W, C]` to logits `[B, K]`.

    Args:
      student: of the `integer` placement.
      codes: its arrays, of `writers.codes.student_codes`.
      batch: B; the runtime can resize it.

    Raises:
      ValueError: a layer without a float form in this runtime.
    """
    require_integer(student)
    writer = _FloatWriter(student, codes, batch)
    image = writer.tensors[INPUT] = writer.builder.tensor(INPUT, writer.shape(INPUT), "float32")
    for operation in student.operations:
        _write(operation.layer, operation, writer)
    logits = {LOGITS: writer.tensors[student.operations[-1].output]}
    return writer.builder.serialized({INPUT: image}, logits, {}, f"float {student.graph.name}")


class _FloatWriter:
    """Where in the file each tensor of the network is."""

    def __init__(self, student: Student, codes: dict[str, Any], batch: int) -> None:
        self.student, self.codes = student, codes
        self.builder = TFLiteBuilder(student.graph.name, batch)
        self.tensors: dict[str, int] = {}

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Without the batch."""
        return self.student.graph.shapes[tensor]

    def inputs(self, operation: Operation) -> list[int]:
        return [self.tensors[name] for name in operation.inputs]

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> int:
        return self.builder.constant(name, np.asarray(value, dtype))

    def made(self, name: str, kind: str, inputs: Sequence[int], shape: Sequence[int],
             **options: Any) -> int:  # fmt: skip
        """An operator that makes a tensor."""
        return self.builder.node(
            kind, inputs, self.builder.tensor(name, shape, "float32"), **options
        )

    def result(self, operation: Operation, kind: str, inputs: Sequence[int],
               shape: Sequence[int] | None = None, **options: Any) -> None:  # fmt: skip
        """An operator that makes an operation's output, its activation fused if it can be."""
        output = operation.output
        activation: Any = operation.activation
        fused = "NONE" if activation is None else _FUSED.get(activation.kind)
        shape = self.shape(output) if shape is None else shape
        name = output if fused else f"{output}.linear"
        if fused not in (None, "NONE"):
            options["activation"] = fused
        made = self.made(name, kind, inputs, shape, **options)
        self.tensors[output] = made if fused else self.activated(activation, made, output)

    def activated(self, layer: L.Activation, source: int, name: str) -> int:
        """The tensor behind an activation."""
        shape = self.shape(name)
        if layer.kind in ("relu", "relu6"):
            return self.made(name, _FUSED[layer.kind], [source], shape)
        if layer.kind in ("silu", "sigmoid"):
            gate = self.made(f"{name}.gate", "LOGISTIC", [source], shape)
            return (
                gate if layer.kind == "sigmoid" else self.made(name, "MUL", [source, gate], shape)
            )
        if layer.kind == "hard_swish":
            return self.made(name, "HARD_SWISH", [source], shape)
        if layer.kind == "leaky_relu":
            return self.made(name, "LEAKY_RELU", [source], shape, alpha=layer.negative_slope)
        inputs = [source, self.constant(f"{name}.3", [3])]  # hard sigmoid
        ramp = self.made(f"{name}.ramp", "ADD", inputs, shape, activation="RELU6")
        return self.made(name, "MUL", [ramp, self.constant(f"{name}.sixth", [1 / 6])], shape)

    def padded(self, tensor: str, name: str, pairs: Sequence[tuple[int, int]]) -> int:
        """Zeros around a tensor, by its axes behind the batch."""
        shape = [n + sum(pair) for n, pair in zip(self.shape(tensor), pairs, strict=True)]
        amounts = self.constant(f"{name}.amounts", [(0, 0), *pairs], np.int32)
        return self.made(f"{name}.padded", "PAD", [self.tensors[tensor], amounts], shape)

    def weights(self, operation: Operation, transpose: Callable[[np.ndarray], np.ndarray]) -> list[int]:  # fmt: skip
        """Float weights and bias."""
        name, stored = operation.layer.name, self.codes["weights"][operation.layer.name]
        centred = stored["codes"].astype(np.float32) - stored["zero_point"]
        origin = self.student.origins[operation.inputs[0]]
        units = np.float32(self.codes["tensors"][origin]["scale"]) * stored["scale"]
        return [
            self.constant(f"{name}.weight", transpose(centred * stored["scale"])),
            self.constant(f"{name}.bias", stored["bias"] * units),
        ]

    def reshaped(self, source: int, name: str, shape: Sequence[int]) -> int:
        wanted = np.asarray([-1, *shape], np.int32)
        inputs = [source, self.constant(f"{name}.shape", wanted, np.int32)]
        return self.made(name, "RESHAPE", inputs, shape, newShape=wanted)


@functools.singledispatch
def _write(layer: L.Layer, operation: Operation, writer: _FloatWriter) -> None:
    raise ValueError(
        f"layer {layer.name!r}: found type {type(layer).__name__}, which has no float form in a "
        "float .tflite file; expected another runtime"
    )


@_write.register
def _conv(layer: L.Conv, operation: Operation, writer: _FloatWriter) -> None:
    (source,) = operation.inputs
    *size, channels = writer.shape(source)
    reach = [d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    padding, amounts = window_padding(layer, size, reach)
    image = writer.tensors[source]
    if amounts:
        image = writer.padded(source, layer.name, [*amounts, (0, 0)])
    options: dict[str, Any] = {
        "padding": padding,
        **dict(zip(("strideH", "strideW"), layer.strides, strict=True)),
        **dict(zip(("dilationHFactor", "dilationWFactor"), layer.dilation, strict=True)),
    }
    if layer.groups == channels > 1:
        options["depthMultiplier"] = layer.features // channels
        weights = writer.weights(operation, lambda w: w.transpose(2, 0, 1, 3))
        writer.result(operation, "DEPTHWISE_CONV_2D", [image, *weights], **options)
    else:
        weights = writer.weights(operation, lambda w: w.transpose(3, 0, 1, 2))
        writer.result(operation, "CONV_2D", [image, *weights], **options)


@_write.register
def _batch_norm(layer: L.BatchNorm, operation: Operation, writer: _FloatWriter) -> None:
    scale, bias = writer.weights(operation, lambda w: w.reshape(-1))
    shape = writer.shape(operation.output)
    scaled = writer.made(f"{layer.name}.scaled", "MUL", [*writer.inputs(operation), scale], shape)
    writer.result(operation, "ADD", [scaled, bias])


@_write.register
def _dense(layer: L.Dense, operation: Operation, writer: _FloatWriter) -> None:
    inputs = [*writer.inputs(operation), *writer.weights(operation, np.transpose)]
    writer.result(operation, "FULLY_CONNECTED", inputs)


@_write.register
def _add(layer: L.Add, operation: Operation, writer: _FloatWriter) -> None:
    writer.result(operation, "ADD", writer.inputs(operation))


@_write.register
def _multiply(layer: L.Multiply, operation: Operation, writer: _FloatWriter) -> None:
    writer.result(operation, "MUL", writer.inputs(operation))


@_write.register
def _concat(layer: L.Concat, operation: Operation, writer: _FloatWriter) -> None:
    writer.result(operation, "CONCATENATION", writer.inputs(operation), axis=3)


@_write.register
def _global_pool(layer: L.GlobalPool, operation: Operation, writer: _FloatWriter) -> None:
    axes = writer.constant(f"{layer.name}.axes", [1, 2], np.int32)
    writer.result(operation, "MEAN", [*writer.inputs(operation), axes], keepDims=False)


@_write.register
def _max_pool(layer: L.MaxPool, operation: Operation, writer: _FloatWriter) -> None:
    _pool("MAX_POOL_2D", layer, operation, writer)


@_write.register
def _avg_pool(layer: L.AvgPool, operation: Operation, writer: _FloatWriter) -> None:
    _pool("AVERAGE_POOL_2D", layer, operation, writer)


def _pool(kind: str, layer: L.MaxPool, operation: Operation, writer: _FloatWriter) -> None:
    """Zeros stand for what lies outside where the runtime has no name for the padding: of a
    maximum, whose input is no negative number behind a ReLU, and of a mean that counts them."""
    (source,) = operation.inputs
    amounts: Any
    padding, amounts = window_padding(layer, writer.shape(source)[:2], layer.window)
    image = writer.tensors[source]
    counted = getattr(layer, "count_include_pad", False)
    if counted and any(map(any, layer.padding)):
        padding, amounts = "VALID", layer.padding
    if amounts:
        image = writer.padded(source, layer.name, [*amounts, (0, 0)])
    writer.result(
        operation, kind, [image], padding=padding,
        strideH=layer.strides[0], strideW=layer.strides[1],
        filterHeight=layer.window[0], filterWidth=layer.window[1],
    )  # fmt: skip


@_write.register
def _activation(layer: L.Activation, operation: Operation, writer: _FloatWriter) -> None:
    (source,) = writer.inputs(operation)
    writer.tensors[operation.output] = writer.activated(layer, source, operation.output)


@_write.register
def _pad(layer: L.Pad, operation: Operation, writer: _FloatWriter) -> None:
    pairs = [layer.height, layer.width, layer.channels]
    writer.tensors[operation.output] = writer.padded(operation.inputs[0], layer.name, pairs)


@_write.register
def _slice(layer: L.Slice, operation: Operation, writer: _FloatWriter) -> None:
    (source,) = operation.inputs
    if (strides := subsampling(layer, writer.shape(source))) is not None:
        channels = writer.shape(source)[-1]
        inputs = [
            writer.tensors[source],
            writer.constant(f"{layer.name}.weight", np.ones((1, 1, 1, channels))),
            writer.constant(f"{layer.name}.bias", np.zeros(channels)),
        ]
        writer.result(
            operation, "DEPTHWISE_CONV_2D", inputs, padding="VALID",
            strideH=strides[0], strideW=strides[1], depthMultiplier=1,
        )  # fmt: skip
        return
    limits = [s.indices(n) for s, n in zip(layer.slices, writer.shape(source), strict=True)]
    constants = [
        writer.constant(f"{layer.name}.{name}", [first, *values], np.int32)
        for name, first, values in zip(
            ("begin", "end", "step"), (0, 0, 1), zip(*limits, strict=True), strict=True
        )
    ]
    inputs = [writer.tensors[source], *constants]
    writer.result(operation, "STRIDED_SLICE", inputs, beginMask=1, endMask=1)


@_write.register
@_write.register(L.Unflatten)
def _flatten(layer: L.Flatten, operation: Operation, writer: _FloatWriter) -> None:
    (source,), output = writer.inputs(operation), operation.output
    writer.tensors[output] = writer.reshaped(source, output, writer.shape(output))


@_write.register
def _channel_shuffle(layer: L.ChannelShuffle, operation: Operation, writer: _FloatWriter) -> None:
    (source,), name = operation.inputs, layer.name
    height, width, channels = writer.shape(source)
    split = [height * width, layer.groups, channels // layer.groups]
    parts = writer.reshaped(writer.tensors[source], f"{name}.split", split)
    order = writer.constant(f"{name}.order", [0, 1, 3, 2], np.int32)
    dealt = writer.made(
        f"{name}.dealt", "TRANSPOSE", [parts, order], [split[0], split[2], split[1]]
    )
    output = operation.output
    writer.tensors[output] = writer.reshaped(dealt, output, writer.shape(output))
