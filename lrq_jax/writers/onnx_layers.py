"""How each layer of a network is spelled in ONNX; `onnx_writer.OnnxWriter` collects the nodes.

The same spelling serves two writers: of integers (`onnx_model`), where a result is quantized and
layers that only move codes work on uint8, and of the float twin (`onnx_float`).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from lrq_jax.graph import layers as L
from lrq_jax.passes.plan import Operation
from lrq_jax.writers.onnx_writer import LOGITS, OnnxWriter, codes_name


@functools.singledispatch
def write_layer(layer: L.Layer, operation: Operation, writer: OnnxWriter) -> None:
    """Adds the nodes of one operation; each kind of layer is registered below."""
    raise NotImplementedError(f"no ONNX form of layer type {type(layer).__name__}")


def _group_output(operation: Operation) -> str:
    return LOGITS if operation.output_bits is None else f"{operation.output}.unquantized"


@write_layer.register
def _conv(layer: L.Conv, operation: Operation, writer: OnnxWriter) -> None:
    inputs = writer.weighted(operation, lambda w: np.transpose(w, (3, 2, 0, 1)), axis=0)
    (top, bottom), (left, right) = layer.padding
    real = writer.node(
        "Conv",
        inputs,
        _group_output(operation),
        kernel_shape=layer.kernel_size,
        strides=layer.strides,
        pads=(top, left, bottom, right),
        dilations=layer.dilation,
        group=layer.groups,
    )
    writer.finish(operation, real)


@write_layer.register
def _dense(layer: L.Dense, operation: Operation, writer: OnnxWriter) -> None:
    inputs = writer.weighted(operation, lambda w: w, axis=1)
    writer.finish(operation, writer.node("Gemm", inputs, _group_output(operation)))


@write_layer.register
def _batch_norm(layer: L.BatchNorm, operation: Operation, writer: OnnxWriter) -> None:
    """A depthwise convolution of one exact tap; a vector passes as an image of one pixel."""
    (source,) = operation.inputs
    *image, channels = writer.shape(source)
    inputs = writer.weighted(operation, lambda w: w.reshape(-1, 1, 1, 1), axis=0)
    if not image:
        inputs[0] = writer.reshape(inputs[0], f"{layer.name}.pixel", [channels, 1, 1])
    real = writer.node(
        "Conv", inputs, f"{operation.output}.unquantized", kernel_shape=[1, 1], group=channels
    )
    if not image:
        real = writer.reshape(real, f"{layer.name}.vector", [channels])
    writer.finish(operation, real)


@write_layer.register
def _add(layer: L.Add, operation: Operation, writer: OnnxWriter) -> None:
    inputs = [writer.real(name) for name in operation.inputs]
    writer.finish(operation, writer.node("Add", inputs, f"{operation.output}.unquantized"))


@write_layer.register
def _multiply(layer: L.Multiply, operation: Operation, writer: OnnxWriter) -> None:
    inputs = [writer.real(name) for name in operation.inputs]
    writer.finish(operation, writer.node("Mul", inputs, f"{operation.output}.unquantized"))


@write_layer.register
def _concat(layer: L.Concat, operation: Operation, writer: OnnxWriter) -> None:
    inputs = [writer.real(name) for name in operation.inputs]
    real = writer.node("Concat", inputs, f"{operation.output}.unquantized", axis=1)
    writer.finish(operation, real)


@write_layer.register
def _global_pool(layer: L.GlobalPool, operation: Operation, writer: OnnxWriter) -> None:
    """Quantized as an image of one pixel, so that pool and quantizer stay one group."""
    (source,) = operation.inputs
    real = writer.node("GlobalAveragePool", [writer.real(source)], f"{layer.name}.unquantized")
    writer.finish(operation, real)
    codes = writer.names[operation.output]
    vector = writer.reshape(codes, f"{layer.name}.vector", [writer.shape(layer.name)[0]])
    writer.names[operation.output] = vector


@write_layer.register
def _avg_pool(layer: L.AvgPool, operation: Operation, writer: OnnxWriter) -> None:
    real = writer.node(
        "AveragePool",
        [writer.real(operation.inputs[0])],
        f"{operation.output}.unquantized",
        count_include_pad=int(layer.count_include_pad),
        **_window(layer),
    )
    writer.finish(operation, real)


@write_layer.register
def _activation(layer: L.Activation, operation: Operation, writer: OnnxWriter) -> None:
    writer.lone_activation(layer, operation)


def _window(layer: L.MaxPool) -> dict[str, Any]:
    (top, bottom), (left, right) = layer.padding
    return {
        "kernel_shape": layer.window,
        "strides": layer.strides,
        "pads": (top, left, bottom, right),
    }


# --- layers that keep the codes ------------------------------------------------------------------


def _moves(kind: str, operation: Operation, writer: OnnxWriter, *constants: str, **attributes: Any) -> None:  # fmt: skip
    """A node on uint8 codes."""
    (source,) = operation.inputs
    writer.node(
        kind, [writer.names[source], *constants], codes_name(operation.output), **attributes
    )
    writer.names[operation.output] = codes_name(operation.output)


@write_layer.register
def _max_pool(layer: L.MaxPool, operation: Operation, writer: OnnxWriter) -> None:
    _moves("MaxPool", operation, writer, **_window(layer))


@write_layer.register
def _pad(layer: L.Pad, operation: Operation, writer: OnnxWriter) -> None:
    """Real zeros: codes of the zero point."""
    pairs = [(0, 0), layer.channels, layer.height, layer.width]
    amounts = np.array([list(ends) for ends in zip(*pairs, strict=True)], np.int64).reshape(-1)
    constants = [
        writer.constant(f"{layer.name}.amounts", amounts),
        writer.constant(f"{layer.name}.value", writer.real_zero(operation.inputs[0])),
    ]
    _moves("Pad", operation, writer, *constants)


@write_layer.register
def _slice(layer: L.Slice, operation: Operation, writer: OnnxWriter) -> None:
    order = (2, 0, 1)  # C, H, W
    limits = {
        "start": [layer.start[i] for i in order],
        "stop": [np.iinfo(np.int64).max if layer.stop[i] is None else layer.stop[i] for i in order],
        "axes": [1, 2, 3],
        "step": [layer.step[i] for i in order],
    }
    constants = [
        writer.constant(f"{layer.name}.{name}", np.array(values, np.int64))
        for name, values in limits.items()
    ]
    _moves("Slice", operation, writer, *constants)


@write_layer.register
def _flatten(layer: L.Flatten, operation: Operation, writer: OnnxWriter) -> None:
    """In channels-last order, as the dense weights behind it."""
    (source,) = operation.inputs
    shape, codes = writer.shape(source), writer.names[source]
    if len(shape) == 3 and shape[:2] != (1, 1):
        codes = writer.node("Transpose", [codes], f"{layer.name}.nhwc", perm=[0, 2, 3, 1])
    writer.reshape(codes, codes_name(operation.output), writer.shape(layer.name))
    writer.names[operation.output] = codes_name(operation.output)


@write_layer.register
def _unflatten(layer: L.Unflatten, operation: Operation, writer: OnnxWriter) -> None:
    (source,) = operation.inputs
    (channels,) = writer.shape(source)
    writer.reshape(writer.names[source], codes_name(operation.output), [channels, 1, 1])
    writer.names[operation.output] = codes_name(operation.output)


@write_layer.register
def _channel_shuffle(layer: L.ChannelShuffle, operation: Operation, writer: OnnxWriter) -> None:
    (source,) = operation.inputs
    height, width, channels = writer.shape(source)
    groups = layer.groups
    split = writer.reshape(
        writer.names[source], f"{layer.name}.split", [groups, channels // groups, height, width]
    )
    dealt = writer.node("Transpose", [split], f"{layer.name}.dealt", perm=[0, 2, 1, 3, 4])
    writer.reshape(dealt, codes_name(operation.output), [channels, height, width])
    writer.names[operation.output] = codes_name(operation.output)
