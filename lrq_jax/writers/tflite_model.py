"""A finished integer student as a .tflite file whose XNNPACK kernels give our very codes.

Every tensor of codes is int8. Its scale in the file is its own, or 1: the unit is its own step.

* XNNPACK multiplies a convolution's int32 accumulator by `s_x*s_w/s_y`, computed in float32 in this
  order, and rounds half to even: our formula. Where `s_x` is 1 in the file, the weights' scale
  carries it.
* From tensors with scale 1 `DEQUANTIZE` gives exact integers, so that what has no exact integer
  kernel is computed by float operators in the order of `passes.integer_forward`: products of two
  tensors, pools, the logits.
* A sum of two tensors is XNNPACK's int8 addition, if that is proved to give our codes for every
  pair of input codes, and float operators under proved constants elsewhere (`sum_constants`).

Codes below 8 bits are clipped by int8's own ends: stored so that the highest code is 127, they
saturate at the top, and a fused ReLU stops them at the code of 0.0. Where 0.0 is not code 0, a
second `QUANTIZE` moves the codes to int8's lower end, where they saturate at 0.

Tensor `NAME` of the network is `NAME.codes` in the file, channels last; its code is `int8 - zero
point in the file + zero point in the metadata`. TensorFlow Lite's kernels outside XNNPACK multiply
in fixed point and round ties away from 0: near, not the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from lrq_jax.graph import INPUT
from lrq_jax.graph import layers as L
from lrq_jax.ops.convolution import EXACT_FLOAT32
from lrq_jax.passes import Student
from lrq_jax.passes.float_forward import window_counts
from lrq_jax.passes.integer_forward import QuantizedTensor
from lrq_jax.passes.plan import Operation
from lrq_jax.quantizers.affine import AffineParameters, top_code
from lrq_jax.writers.sum_constants import Sum, int8_sum_is_ours, sum_constants
from lrq_jax.writers.tflite_codes import CodesWriter, codes_name
from lrq_jax.writers.tflite_windows import padded, subsampling, window_padding, window_sum

INPUTS = ("float", "uint8")
LOGITS = "logits"
METADATA = "lrq_jax"
"""Key of the JSON in the file's metadata."""


def tflite_model(student: Student, codes: dict[str, Any], *, metadata: dict[str, Any],
                 input_kind: str = "float",
                 table: Callable[[np.ndarray], np.ndarray] | None = None,
                 batch: int = 1) -> bytes:  # fmt: skip
    """The file of a student.

    Args:
      student: of the `integer` placement.
      codes: its arrays, of `writers.codes.student_codes`.
      metadata: JSON-ready, kept in the file under `METADATA` beside `tensors`: scale and zero
        point of every tensor's codes.
      input_kind: `float`, normalised images `[B, H, W, C]`; or `uint8`, raw pixels, whose
        normalisation becomes a table of codes.
      table: pixels `[256]` of one channel, all channels last `[256, C]`, to normalised values;
        needed for `uint8`.
      batch: images a call; the runtime can resize it.

    Raises:
      ValueError: a student that is not integer, an unknown setting, or numbers of which the
        runtime would not make our codes.
      ImportError: the package ai-edge-litert is missing.
    """
    if input_kind not in INPUTS:
        raise ValueError(f"input_kind: found {input_kind!r}, expected one of {INPUTS}")
    if batch < 1:
        raise ValueError(f"batch: found {batch}, expected 1 or more")
    if not student.is_integer:
        raise ValueError(
            f"found placement {student.spec.placement!r}, expected 'integer': only it is an "
            "integer network; quantize with --config.student.placement=integer"
        )
    writer = CodesWriter(student, codes, batch)
    if input_kind == "float":
        image = writer.float_image()
    else:
        if table is None:
            raise ValueError("found no table of normalised pixels, expected one for input 'uint8'")
        image = writer.pixel_image(table)
    for operation in student.operations:
        _write(operation.layer, operation, writer)
    tensors = {
        name: {"scale": float(scale), "zero_point": zero_point}
        for name in writer.codes
        for scale, zero_point in [writer.parameters(name)]
    }
    return writer.builder.serialized(
        {INPUT: image},
        {LOGITS: writer.logits},
        {METADATA: {**metadata, "tensors": tensors}},
        f"lrq_jax {student.graph.name}",
    )


@functools.singledispatch
def _write(layer: L.Layer, operation: Operation, writer: CodesWriter) -> None:
    raise ValueError(
        f"layer {layer.name!r}: found type {type(layer).__name__}, which has no .tflite form; "
        "expected another target"
    )


# --- layers with weights -------------------------------------------------------------------------


@_write.register
def _conv(layer: L.Conv, operation: Operation, writer: CodesWriter) -> None:
    (source,) = operation.inputs
    *size, channels = writer.shape(source)
    reach = [d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    padding, amounts = window_padding(layer, size, reach)
    image = padded(source, layer.name, amounts, writer) if amounts else writer.codes[source]
    options: dict[str, Any] = {
        "padding": padding,
        **dict(zip(("strideH", "strideW"), layer.strides, strict=True)),
        **dict(zip(("dilationHFactor", "dilationWFactor"), layer.dilation, strict=True)),
    }
    if layer.groups == channels > 1:
        kind, options["depthMultiplier"] = "DEPTHWISE_CONV_2D", layer.features // channels
        weights = writer.integer_weights(operation, lambda w: w.transpose(2, 0, 1, 3), 3)
    else:
        kind = "CONV_2D"
        weights = writer.integer_weights(operation, lambda w: w.transpose(3, 0, 1, 2), 0)
    _weighted(kind, operation, [image, *weights], writer, **options)


@_write.register
def _batch_norm(layer: L.BatchNorm, operation: Operation, writer: CodesWriter) -> None:
    """A depthwise convolution of one exact tap; a vector passes as an image of one pixel."""
    (source,) = operation.inputs
    *size, channels = writer.shape(source)
    image = writer.codes[source]
    if not size:
        pixel = (1, 1, channels)
        image = writer.reshaped(image, f"{layer.name}.pixel", pixel, writer.meaning(source))
    weights = writer.integer_weights(operation, lambda w: w.reshape(1, 1, 1, -1), 3)
    _weighted(
        "DEPTHWISE_CONV_2D", operation, [image, *weights], writer, (*(size or (1, 1)), channels),
        padding="VALID", strideH=1, strideW=1, depthMultiplier=1,
    )  # fmt: skip
    if not size:
        output = operation.output
        writer.codes[output] = writer.reshaped(
            writer.codes[output], f"{output}.vector", (channels,), writer.meaning(output)
        )


@_write.register
def _dense(layer: L.Dense, operation: Operation, writer: CodesWriter) -> None:
    if operation.output_bits is None:
        _write_logits(layer, operation, writer)
        return
    weights = writer.integer_weights(operation, np.transpose, 0)
    inputs = [writer.codes[operation.inputs[0]], *weights]
    _weighted("FULLY_CONNECTED", operation, inputs, writer)


def _weighted(kind: str, operation: Operation, inputs: Sequence[int], writer: CodesWriter,
              shape: Sequence[int] | None = None, **options: Any) -> None:  # fmt: skip
    writer.new_codes(
        operation.output,
        lambda codes, activation: writer.node(
            kind, inputs, codes, activation=activation, **options
        ),
        shape,
    )


def _write_logits(layer: L.Dense, operation: Operation, writer: CodesWriter) -> None:
    """A float product of integers, every partial sum of which is exact; bias and scale behind
    it, as a sum and a product that round once each."""
    (source,) = operation.inputs
    centred, bias, scale = writer.weights(operation)
    x, name = writer.parameters(source), layer.name
    lowest, highest = -x.zero_point, top_code(writer.bits(source)) - x.zero_point
    terms = np.stack([lowest * centred, highest * centred]).astype(np.int64)
    largest = max(terms.max(axis=0).sum(axis=0).max(), -terms.min(axis=0).sum(axis=0).min())
    if largest >= EXACT_FLOAT32:
        raise ValueError(
            f"layer {name!r}: found sums up to {largest}, expected less than 2^24, which float32 "
            "holds exactly; quantize its weights or its input to fewer bits"
        )
    stored = writer.builder.constant(
        f"{name}.weight", centred.T.astype(np.int8), scale=np.ones(1, np.float32)
    )
    kernel = writer.builder.unpacked(stored, f"{name}.weight.float")
    shape = writer.shape(operation.output)
    product = writer.floats("FULLY_CONNECTED", [writer.centred(source), kernel, -1],
                            f"{name}.product", shape)  # fmt: skip
    accumulator = writer.floats(
        "ADD", [product, writer.numbers(f"{name}.bias", *bias)], f"{name}.accumulator", shape
    )
    units = writer.numbers(f"{name}.units", *(x.scale * scale))
    writer.logits = writer.floats("MUL", [accumulator, units], LOGITS, shape)


# --- windows -------------------------------------------------------------------------------------


@_write.register
def _max_pool(layer: L.MaxPool, operation: Operation, writer: CodesWriter) -> None:
    (source,) = operation.inputs
    padding, amounts = window_padding(layer, writer.shape(source)[:2], layer.window)
    image = writer.codes[source]
    if amounts:
        image = padded(source, layer.name, amounts, writer, lowest=True)
    writer.moved(
        operation.output, source, "MAX_POOL_2D", [image], padding=padding,
        strideH=layer.strides[0], strideW=layer.strides[1],
        filterHeight=layer.window[0], filterWidth=layer.window[1],
    )  # fmt: skip


@_write.register
def _avg_pool(layer: L.AvgPool, operation: Operation, writer: CodesWriter) -> None:
    """A float sum in our order, over the count, over the scale."""
    (source,), output, name = operation.inputs, operation.output, layer.name
    shape = writer.shape(output)
    total = window_sum(layer, source, shape, writer)
    counts = np.asarray(window_counts(layer, writer.shape(source)), np.float32)
    counts = np.broadcast_to(counts, (1, *shape[:2], 1)) if counts.ndim else counts.reshape(1)
    mean = writer.floats(
        "DIV", [total, writer.builder.constant(f"{name}.counts", counts)], f"{name}.mean", shape
    )
    scale, zero_point = writer.parameters(output)
    inputs = [mean, writer.numbers(f"{output}.scale", scale)]
    if zero_point == 0:
        writer.rounded_codes(output, "DIV", inputs)
        return
    steps = writer.floats("DIV", inputs, f"{name}.from_zero", shape)
    inputs = [steps, writer.numbers(f"{name}.zero_point", zero_point)]
    writer.rounded_with_zero_point(output, writer.floats("ADD", inputs, f"{name}.whole", shape))


@_write.register
def _global_pool(layer: L.GlobalPool, operation: Operation, writer: CodesWriter) -> None:
    """An exact float sum of integers, times `s_x / (s_y*H*W)`."""
    (source,), output = operation.inputs, operation.output
    height, width, channels = writer.shape(source)
    if top_code(writer.bits(source)) * height * width >= EXACT_FLOAT32:
        raise ValueError(
            f"layer {layer.name!r}: found an image of {height} x {width}, expected one whose sum "
            "of codes is below 2^24, which float32 holds exactly"
        )
    axes = writer.integers(f"{layer.name}.axes", [1, 2])
    total = writer.floats("SUM", [writer.centred(source), axes], f"{layer.name}.sum", (channels,),
                          keepDims=False)  # fmt: skip
    scales = [writer.parameters(name).scale for name in (source, output)]
    factor = scales[0] / (scales[1] * np.float32(height * width))
    writer.rounded_codes(output, "MUL", [total, writer.numbers(f"{layer.name}.factor", factor)])


# --- two tensors, and activations ----------------------------------------------------------------


@_write.register
def _add(layer: L.Add, operation: Operation, writer: CodesWriter) -> None:
    """int8 if that gives our codes, else float under constants that do; both proved."""
    output, name = operation.output, layer.name
    a, b = (
        QuantizedTensor(cast(Any, None), AffineParameters(*map(jnp.float32, writer.parameters(tensor))),
                        writer.bits(tensor))
        for tensor in layer.inputs
    )  # fmt: skip
    c = AffineParameters(*map(jnp.float32, writer.parameters(output)))
    addition = Sum(a, b, c, writer.bits(output))
    own_scales = all(
        writer.unit(tensor) == writer.parameters(tensor).scale for tensor in (*layer.inputs, output)
    )
    if own_scales and int8_sum_is_ours(addition):
        inputs = [writer.codes[tensor] for tensor in layer.inputs]
        writer.new_codes(
            output,
            lambda codes, activation: writer.node("ADD", inputs, codes, activation=activation),
        )
        return
    first, second = map(writer.unit, layer.inputs)
    found = sum_constants(addition, (first, second))
    if found is None:
        raise ValueError(
            f"layer {name!r}: found no constants with which float operators add codes as we do, "
            "expected some; override the bits of its output to 7 or fewer, or calibrate again"
        )

    def scaled(kind: str, source: int, part: str, value: Any) -> int:
        inputs = [source, writer.numbers(f"{name}.{part}.constant", value)]
        return writer.floats(kind, inputs, f"{name}.{part}", writer.shape(output))

    left, right = (
        scaled("MUL", writer.dequantized(tensor), part, factor)
        for tensor, part, factor in zip(
            layer.inputs, ("first", "second"), (found.first, found.second), strict=True
        )
    )
    if found.offset is None:
        writer.rounded_codes(output, "ADD", [left, right])
        return
    right = scaled("ADD", right, "second.offset", found.offset)
    total = writer.floats("ADD", [left, right], f"{name}.sum", writer.shape(output))
    writer.rounded_with_zero_point(output, total)


@_write.register
def _multiply(layer: L.Multiply, operation: Operation, writer: CodesWriter) -> None:
    inputs = [writer.real(tensor) for tensor in layer.inputs]
    shape, output = writer.shape(operation.output), operation.output
    product = writer.floats("MUL", inputs, f"{layer.name}.product", shape)
    _divided(output, product, writer)


@_write.register
def _concat(layer: L.Concat, operation: Operation, writer: CodesWriter) -> None:
    inputs = [writer.real(tensor) for tensor in layer.inputs]
    shape, output = writer.shape(operation.output), operation.output
    joined = writer.floats("CONCATENATION", inputs, f"{layer.name}.joined", shape, axis=3)
    _divided(output, joined, writer)


def _divided(output: str, real: int, writer: CodesWriter) -> None:
    scale = writer.numbers(f"{output}.scale", writer.parameters(output).scale)
    writer.rounded_codes(output, "DIV", [real, scale])


@_write.register
def _activation(layer: L.Activation, operation: Operation, writer: CodesWriter) -> None:
    """A table from the input's codes to the output's."""
    (source,) = operation.inputs
    table = writer.stored["tables"][operation.output]
    first_row = writer.parameters(source).zero_point - writer.zeros[source]  # int8 to code
    offset = writer.integers(f"{layer.name}.first_row", [first_row])
    writer.looked_up(operation.output, writer.codes[source], offset, table)


# --- layers that keep the codes ------------------------------------------------------------------


@_write.register
def _pad(layer: L.Pad, operation: Operation, writer: CodesWriter) -> None:
    pairs = [(0, 0), layer.height, layer.width, layer.channels]
    (source,) = operation.inputs
    inputs = [writer.codes[source], writer.integers(f"{layer.name}.amounts", pairs)]
    writer.moved(operation.output, source, "PAD", inputs)


@_write.register
def _slice(layer: L.Slice, operation: Operation, writer: CodesWriter) -> None:
    (source,) = operation.inputs
    if (strides := subsampling(layer, writer.shape(source))) is not None:
        _subsampled(layer, source, strides, writer)
        return
    limits = [s.indices(n) for s, n in zip(layer.slices, writer.shape(source), strict=True)]
    constants = [
        writer.integers(f"{layer.name}.{name}", [first, *values])
        for name, first, values in zip(
            ("begin", "end", "step"), (0, 0, 1), zip(*limits, strict=True), strict=True
        )
    ]
    inputs = [writer.codes[source], *constants]
    writer.moved(operation.output, source, "STRIDED_SLICE", inputs, beginMask=1, endMask=1)


def _subsampled(layer: L.Slice, source: str, strides: tuple[int, int], writer: CodesWriter) -> None:  # fmt: skip
    """A depthwise convolution of one tap of 1, whose multiplier `s_x*1/s_x` is 1: the same codes."""
    ones, channels = np.ones, writer.shape(source)[-1:]
    weight = writer.builder.constant(
        f"{layer.name}.weight", ones((1, 1, 1, *channels), np.int8),
        scale=ones(channels, np.float32), axis=3,
    )  # fmt: skip
    bias = writer.builder.constant(
        f"{layer.name}.bias", np.zeros(channels, np.int32),
        scale=np.full(channels, writer.unit(source)),
    )  # fmt: skip
    writer.moved(
        layer.name, source, "DEPTHWISE_CONV_2D", [writer.codes[source], weight, bias],
        padding="VALID", strideH=strides[0], strideW=strides[1], depthMultiplier=1,
    )  # fmt: skip


@_write.register
@_write.register(L.Unflatten)
def _flatten(layer: L.Flatten, operation: Operation, writer: CodesWriter) -> None:
    (source,), output = operation.inputs, operation.output
    writer.zeros[output] = writer.zeros[source]
    writer.codes[output] = writer.reshaped(
        writer.codes[source], codes_name(output), writer.shape(output), writer.meaning(source)
    )


@_write.register
def _channel_shuffle(layer: L.ChannelShuffle, operation: Operation, writer: CodesWriter) -> None:
    (source,), output = operation.inputs, operation.output
    *size, channels = writer.shape(source)
    split, meaning = (
        [math.prod(size), layer.groups, channels // layer.groups],
        writer.meaning(source),
    )
    parts = writer.reshaped(writer.codes[source], f"{layer.name}.split", split, meaning)
    dealt = writer.builder.tensor(
        f"{layer.name}.dealt", [split[0], split[2], split[1]], "int8", meaning
    )
    order = writer.integers(f"{layer.name}.order", [0, 1, 3, 2])
    writer.node("TRANSPOSE", [parts, order], dealt)
    writer.zeros[output] = writer.zeros[source]
    shape = writer.shape(output)
    writer.codes[output] = writer.reshaped(dealt, codes_name(output), shape, meaning)
