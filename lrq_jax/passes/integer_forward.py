"""The integer network: the arithmetic ONNX Runtime, LiteRT and we execute alike.

Codes are integers held in float32: every product and sum below is exact there (or cut into
pieces that are), so CPU, GPU and TPU give the same codes. The one function `execute` serves
training (gradients pass straight through every rounding), calibration and evaluation of frozen
codes; the docstring of each operation states the formula it must equal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from lrq_jax.graph import INPUT
from lrq_jax.graph import layers as L
from lrq_jax.ops.by_platform import platform_form, traced_once
from lrq_jax.ops.computed_once import computed_once
from lrq_jax.ops.convolution import int8_conv2d, int8_is_fast, integer_conv2d, integer_dense
from lrq_jax.ops.division import divide
from lrq_jax.ops.kept import kept
from lrq_jax.ops.straight_through import clip_inclusive, straight_through
from lrq_jax.passes.float_forward import apply_layer, window_counts, window_sums
from lrq_jax.passes.plan import Operation
from lrq_jax.quantizers.affine import AffineParameters, dequantize, quantize, top_code


class QuantizedTensor(NamedTuple):
    """Codes `[B, ...]` (integers in float32), their meaning, and their bits (static)."""

    codes: jax.Array
    parameters: AffineParameters
    bits: int

    @property
    def centred(self) -> jax.Array:
        """Codes minus zero point: the integers that multiply weights."""
        return self.codes - self.parameters.zero_point

    @property
    def scale(self) -> jax.Array:
        """Real units per code."""
        return self.parameters.scale


class QuantizedWeights(NamedTuple):
    """Weight codes, per output channel `zero_point` and `scale` (batch norm folded in), and the
    bias in units of input scale times weight scale; codes and bias are integers in float32."""

    codes: Any  # jax arrays in a program, numpy ones or dtypes where files are written
    zero_point: Any
    scale: Any
    bias: Any


class Source(NamedTuple):
    """Where `execute` takes its numbers from.

    Attributes:
      weights: (operation, scale of its input) -> QuantizedWeights.
      tensor: (name, bits, thunk of the tensor's unquantized real values) -> AffineParameters.
      table: operation of an activation on its own -> its output's code for every code of its
        input, or None where there is no such table yet.
      frozen: no gradient is wanted, so that convolutions may run over int8.
    """

    weights: Callable[[Operation, jax.Array], QuantizedWeights]
    tensor: Callable[[str, int, Callable[[], jax.Array]], AffineParameters]
    table: Callable[[Operation], jax.Array | None] = lambda operation: None
    frozen: bool = False


def integer_forward(operations: tuple[Operation, ...], frozen: dict[str, Any], images: jax.Array,
                    outputs: Iterable[str], *, input_bits: int) -> dict[str, jax.Array]:  # fmt: skip
    """Real values of the named tensors of a frozen integer network.

    Args:
      operations: of `plan_quantization`.
      frozen: of `freeze`: `{"weights": {layer: QuantizedWeights}, "tensors": {tensor:
        AffineParameters}, "tables": {tensor: codes}}`.
      images: `[B, H, W, C]` in the network's normalised input space.
      outputs: tensors that operations make; the last operation's are float logits.
      input_bits: bits of the image's codes.
    """
    return execute(operations, _frozen_source(frozen), images, outputs, input_bits=input_bits)


def integer_codes(operations: tuple[Operation, ...], frozen: dict[str, Any], images: jax.Array,
                  tensors: Iterable[str], *, input_bits: int) -> dict[str, jax.Array]:  # fmt: skip
    """Codes (integers in float32) of tensors of a frozen network; as `integer_forward`."""
    values = _execute(operations, _frozen_source(frozen), images, input_bits, clip_mask=False)
    return {name: values[name].codes for name in tensors}


def _frozen_source(frozen: dict[str, Any]) -> Source:
    return Source(
        weights=lambda operation, _: frozen["weights"][operation.layer.name],
        tensor=lambda name, bits, real: frozen["tensors"][name],
        table=lambda operation: frozen.get("tables", {}).get(operation.output),
        frozen=True,
    )


def execute(operations: tuple[Operation, ...], source: Source, images: jax.Array,
            outputs: Iterable[str], *, input_bits: int, clip_mask: bool = False) -> dict[str, jax.Array]:  # fmt: skip
    """Runs the operations; see `integer_forward` for the arguments, `Source` for the numbers.

    `clip_mask` stops the gradient of saturated activations.
    """
    outputs = tuple(outputs)
    values = _execute(operations, source, images, input_bits, clip_mask)
    missing = [name for name in outputs if name not in values]
    if missing:
        raise ValueError(
            f"found no tensor {missing} in the integer network, expected some of {list(values)} "
            "(batch norms and ReLUs run inside the convolution before them)"
        )
    return {
        name: dequantize(value.codes, value.parameters)
        if isinstance(value := values[name], QuantizedTensor)
        else value
        for name in outputs
    }


def _execute(operations: tuple[Operation, ...], source: Source, images: jax.Array,
             input_bits: int, clip_mask: bool) -> dict[str, Any]:  # fmt: skip
    """Every tensor of the network: a QuantizedTensor, or float logits."""
    image_parameters = source.tensor(INPUT, input_bits, lambda: images)
    image_codes = quantize(images, image_parameters, input_bits)
    values: dict[str, Any] = {INPUT: QuantizedTensor(image_codes, image_parameters, input_bits)}
    for operation in operations:
        inputs = [values[name] for name in operation.inputs]
        run = _run_weighted if operation.has_weights else _run
        values[operation.output] = run(operation.layer, operation, source, clip_mask, *inputs)
    return values


def _activate(operation: Operation, real: jax.Array) -> jax.Array:
    """The operation's own activation, in real units."""
    return real if operation.activation is None else apply_layer(operation.activation, {}, real)


def _requantize(operation: Operation, source: Source, clip_mask: bool, scaled: Callable,
                real: Callable[[], jax.Array]) -> QuantizedTensor:  # fmt: skip
    """`clip(rint(clip(v, -z, 255 - z)) + z, 0, 2^k - 1)` with `v = scaled(s_y)`.

    ReLU needs no arithmetic of its own: its zero point is 0, where codes saturate. Its
    gradient does: the surrogate is masked as the float activation's.

    Args:
      scaled: output scale -> value in units of it.
      real: thunk of the value in real units, before the activation.
    """
    bits = operation.output_bits
    parameters = source.tensor(operation.output, bits, lambda: _activate(operation, real()))
    value, zero_point = scaled(parameters.scale), parameters.zero_point
    inner = jnp.rint(jnp.clip(value, -zero_point, 255 - zero_point)) + zero_point
    exact = jnp.clip(inner, 0, top_code(bits))
    return QuantizedTensor(
        straight_through(exact, _surrogate(operation, value, parameters, clip_mask)),
        parameters,
        bits,
    )


def _surrogate(operation: Operation, value: jax.Array, parameters: AffineParameters,
               clip_mask: bool) -> jax.Array:  # fmt: skip
    """What the gradient sees of a requantized value, in codes."""
    scale, zero_point = parameters
    if operation.activation is not None:
        value = jax.nn.relu(value)
        if operation.activation.kind == "relu6":
            # Of a minimum jax would store two masks of the size of the map.
            ceiling = 6.0 / scale
            value = jnp.where(value >= ceiling, ceiling, value)
    if clip_mask:
        top = top_code(operation.output_bits)
        value = clip_inclusive(value, -zero_point, top - zero_point)
    return value + zero_point


def _run_weighted(layer: L.Layer, operation: Operation, source: Source, clip_mask: bool,
                  x: QuantizedTensor) -> QuantizedTensor | jax.Array:  # fmt: skip
    """`acc = sum((q_x - z_x)(q_w - z_w)) + bias`, exact; then `M = s_x*s_w/s_y`, requantized;
    or float logits `acc * (s_x*s_w)`."""
    weights = source.weights(operation, x.scale)
    kernel = weights.codes - weights.zero_point
    largest = top_code(x.bits) * top_code(operation.weight_bits or 1)
    if isinstance(layer, L.Conv):
        accumulator = _convolved(layer, x, kernel, weights.bias, largest, source.frozen)
    elif isinstance(layer, L.Dense):
        accumulator = integer_dense(x.centred, kernel, weights.bias, largest_product=largest)
    else:
        accumulator = x.centred * kernel + weights.bias
    accumulator = kept(accumulator)
    units = x.scale * weights.scale
    if operation.output_bits is None:
        return _activate(operation, accumulator * units)
    return _requantize(
        operation,
        source,
        clip_mask,
        lambda scale: accumulator * divide(units, scale),
        lambda: accumulator * units,
    )


def _convolved(layer: L.Conv, x: QuantizedTensor, kernel: jax.Array, bias: jax.Array,
               largest: int, frozen: bool) -> jax.Array:  # fmt: skip
    """The accumulators of a convolution: int8 where the platform is fast at it, and the same
    numbers from float convolutions elsewhere. GPUs have no integer convolutions in XLA."""
    window: dict[str, Any] = {
        "strides": layer.strides,
        "padding": layer.padding,
        "dilation": layer.dilation,
    }

    def over_floats(x: QuantizedTensor, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return integer_conv2d(
            x.centred, kernel, bias, largest_product=largest, groups=layer.groups, **window
        )

    def over_int8(x: QuantizedTensor, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        codes, zero_point = x.codes, x.parameters.zero_point
        return int8_conv2d(codes, zero_point, kernel, bias, bits=bits, **window)

    bits = x.bits
    if not frozen or not int8_is_fast(kernel, layer.groups):
        return over_floats(x, kernel, bias)
    return platform_form(x, kernel, bias, cpu=over_int8, default=over_floats)


@functools.singledispatch
def _run(layer: L.Layer, operation: Operation, source: Source, clip_mask: bool,
         *inputs: QuantizedTensor) -> QuantizedTensor:  # fmt: skip
    raise NotImplementedError(f"no integer arithmetic for layer type {type(layer).__name__}")


@_run.register(L.MaxPool)
@_run.register(L.Pad)
@_run.register(L.Slice)
@_run.register(L.Flatten)
@_run.register(L.Unflatten)
@_run.register(L.ChannelShuffle)
def _keep_codes(layer: L.Layer, operation: Operation, source: Source, clip_mask: bool,
                x: QuantizedTensor) -> QuantizedTensor:  # fmt: skip
    codes = apply_layer(layer, {}, x.centred) + x.parameters.zero_point
    return QuantizedTensor(codes, x.parameters, x.bits)


@traced_once()
def fused_multiply_add(code: jax.Array, factor: jax.Array, addend: jax.Array) -> jax.Array:
    """`code*factor + addend` in float32 with one rounding, for integers |code| <= 256.

    The product is split so that both halves are exact and the addition's rounding error is
    added back, so the value does not depend on whether a compiler contracts to fma. What is
    added back is rounded to odd, so that rounding twice is rounding once (Boldo and
    Melquiond, IEEE TC 57, 2008). The addend must not itself be a bare product, which a
    compiler may fuse.
    """
    bits = lax.bitcast_convert_type(factor, jnp.uint32) & jnp.uint32(0xFFFFFF00)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    product, rest = code * high, code * (factor - high)
    total = product + addend
    tail = total - product
    error = (product - (total - tail)) + (addend - tail)
    correction = error + rest
    tail = correction - error
    lost = (error - (correction - tail)) + (rest - tail)
    bits = lax.bitcast_convert_type(correction, jnp.int32)
    odd = bits + jnp.where((lost > 0) == (correction > 0), 1, -1)
    bits = jnp.where((lost != 0) & (bits & 1 == 0), odd, bits)
    return total + lax.bitcast_convert_type(bits, jnp.float32)


def sum_of_codes(a: QuantizedTensor, b: QuantizedTensor, parameters: AffineParameters,
                 bits: int) -> jax.Array:  # fmt: skip
    """Codes of `a + b` under the output's parameters: `clip(rint(fma(a, s_a/s_c, fma(b, s_b/s_c,
    off))))`, `off = z_c - fma(s_a/s_c, z_a, s_b/s_c * z_b)`: ONNX Runtime's order, in which 4e-6
    of outputs depend on the fma."""
    ratio_a, ratio_b = divide(a.scale, parameters.scale), divide(b.scale, parameters.scale)
    offset = parameters.zero_point - fused_multiply_add(
        a.parameters.zero_point,
        ratio_a,
        fused_multiply_add(b.parameters.zero_point, ratio_b, jnp.float32(0)),
    )
    exact = fused_multiply_add(a.codes, ratio_a, fused_multiply_add(b.codes, ratio_b, offset))
    return jnp.clip(jnp.rint(exact), 0, top_code(bits))


@_run.register
def _add(layer: L.Add, operation: Operation, source: Source, clip_mask: bool, a: QuantizedTensor,
         b: QuantizedTensor) -> QuantizedTensor:  # fmt: skip
    """See `sum_of_codes`."""
    bits = operation.output_bits
    parameters = source.tensor(
        operation.output,
        bits,
        lambda: _activate(operation, a.centred * a.scale + b.centred * b.scale),
    )
    # A residual sum has several readers.
    exact = computed_once(sum_of_codes(a, b, parameters, bits))
    ratio_a, ratio_b = divide(a.scale, parameters.scale), divide(b.scale, parameters.scale)
    value = a.centred * ratio_a + b.centred * ratio_b
    codes = straight_through(exact, _surrogate(operation, value, parameters, clip_mask))
    return QuantizedTensor(codes, parameters, bits)


@_run.register
def _global_pool(layer: L.GlobalPool, operation: Operation, source: Source, clip_mask: bool,
                 x: QuantizedTensor) -> QuantizedTensor:  # fmt: skip
    """`v = sum(q_x - z_x) * (s_x / (s_y * H*W))`, ONNX Runtime's QLinearGlobalAveragePool."""
    count = float(x.codes.shape[1] * x.codes.shape[2])
    total = jnp.sum(x.centred, axis=(1, 2))
    return _requantize(
        operation,
        source,
        clip_mask,
        lambda scale: total * divide(x.scale, scale * count),
        lambda: total * (x.scale / count),
    )


@_run.register
def _avg_pool(layer: L.AvgPool, operation: Operation, source: Source, clip_mask: bool,
              x: QuantizedTensor) -> QuantizedTensor:  # fmt: skip
    """`clip(rint(sum(s_x*(q_x - z_x)) / n / s_y + z_y))`, ONNX Runtime's QLinearAveragePool: a
    float32 sum, row by row, and the zero point added before rounding."""
    bits = operation.output_bits
    count = window_counts(layer, x.codes.shape[1:])
    mean = divide(_window_sums_in_order(layer, x), count)
    parameters = source.tensor(operation.output, bits, lambda: mean)
    exact = divide(mean, parameters.scale) + parameters.zero_point
    exact = jnp.clip(jnp.rint(exact), 0, top_code(bits))
    value = window_sums(layer, x.centred) * (x.scale / (parameters.scale * count))
    codes = straight_through(exact, _surrogate(operation, value, parameters, clip_mask))
    return QuantizedTensor(codes, parameters, bits)


def _window_sums_in_order(layer: L.AvgPool, x: QuantizedTensor) -> jax.Array:
    """Sum of real values over each window, added up in row order."""
    # The product ends in an addition, so that no compiler fuses it with the sum's.
    real = fused_multiply_add(x.centred, x.scale, jnp.float32(0))
    real = jnp.pad(real, ((0, 0), *layer.padding, (0, 0)))
    rows, columns = (
        [slice(i, n - k + i + 1, s) for i in range(k)]
        for n, k, s in zip(real.shape[1:3], layer.window, layer.strides, strict=True)
    )
    return cast(jax.Array, sum(real[:, row, column] for row in rows for column in columns))


@_run.register
def _activation(layer: L.Activation, operation: Operation, source: Source, clip_mask: bool,
                x: QuantizedTensor) -> QuantizedTensor:  # fmt: skip
    """An activation on its own: a table over the input's codes, so that a frozen network needs
    no exponential, which devices compute differently."""
    table = source.table(operation)
    if table is not None:
        parameters = source.tensor(operation.output, operation.output_bits, lambda: x.codes)
        codes = jnp.take(table, x.codes.astype(jnp.int32), mode="clip")
        return QuantizedTensor(codes, parameters, operation.output_bits)
    real = apply_layer(layer, {}, dequantize(x.codes, x.parameters))
    return _requantize(
        operation, source, clip_mask, lambda scale: divide(real, scale), lambda: real
    )


def activation_table(operation: Operation, source: Source, parameters: AffineParameters,
                     bits: int) -> jax.Array:  # fmt: skip
    """Codes `[2^bits]` that an activation on its own makes of every code of its input.

    Args:
      operation: whose layer is an `Activation`.
      source: of the output's parameters; has no table itself.
      parameters, bits: of the input.
    """
    codes = jnp.arange(top_code(bits) + 1, dtype=jnp.float32)
    return _run(
        operation.layer, operation, source, False, QuantizedTensor(codes, parameters, bits)
    ).codes


@_run.register
def _multiply(layer: L.Multiply, operation: Operation, source: Source, clip_mask: bool,
              x: QuantizedTensor, gate: QuantizedTensor) -> QuantizedTensor:  # fmt: skip
    """A float product of the two real tensors, quantized."""
    real = dequantize(x.codes, x.parameters) * dequantize(gate.codes, gate.parameters)
    return _requantize(
        operation, source, clip_mask, lambda scale: divide(real, scale), lambda: real
    )


@_run.register
def _concat(layer: L.Concat, operation: Operation, source: Source, clip_mask: bool,
            *inputs: QuantizedTensor) -> QuantizedTensor:  # fmt: skip
    """Every input brought to the output's scale."""
    real = jnp.concatenate([dequantize(x.codes, x.parameters) for x in inputs], axis=-1)
    return _requantize(
        operation, source, clip_mask, lambda scale: divide(real, scale), lambda: real
    )
