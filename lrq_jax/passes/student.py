"""The student: a network whose forward is quantized, in one of two placements.

`integer` executes the arithmetic that ships (`passes.integer_forward`); `paper` fake-quantizes
weights and ReLU outputs and computes the rest in floating point, as LRQ's line of work does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from lrq_jax.graph import INPUT, Graph
from lrq_jax.graph import layers as L
from lrq_jax.passes.float_forward import Variables, batch_norm_affine, float_forward
from lrq_jax.passes.integer_forward import (
    QuantizedWeights,
    Source,
    activation_table,
    execute,
    integer_forward,
)
from lrq_jax.passes.kernels import (
    kernel_parameters,
    kernel_range,
    lineage_kernel,
    weight_ranges,
)
from lrq_jax.passes.plan import (
    LEARNED_STEPS,
    Operation,
    QuantSpec,
    fixed_tensors,
    origins_of_codes,
    plan_quantization,
    tracked_tensors,
)
from lrq_jax.quantizers.affine import (
    LARGEST_BIAS,
    AffineParameters,
    affine_parameters,
    bias_codes,
    lineage_codes,
    lineage_fake_quant,
    lineage_parameters,
    quantize_weight,
    top_code,
)
from lrq_jax.quantizers.ranges import OBSERVERS, initial_ranges, stretched, track


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
    """Everything static about a student.

    Attributes:
      graph: the teacher's network.
      spec: how it is quantized.
      input_range: (low, high) of normalised images: known from the normalisation of [0, 1]
        pixels, so it needs no data. Only the `integer` placement quantizes the image.
    """

    graph: Graph
    spec: QuantSpec
    input_range: tuple[float, float]

    @functools.cached_property
    def operations(self) -> tuple[Operation, ...]:
        """What an integer runtime executes, in order."""
        return plan_quantization(self.graph, self.spec)

    @functools.cached_property
    def code_bits(self) -> dict[str, int]:
        """Bits of every tensor that has codes of its own, the image first."""
        made = {op.output: op.output_bits for op in self.operations if op.output_bits}
        return {INPUT: self.spec.boundary_bits, **made}

    @functools.cached_property
    def origins(self) -> dict[str, str]:
        """Every tensor of codes -> the tensor whose scale and zero point they have."""
        return origins_of_codes(self.operations)

    @property
    def is_integer(self) -> bool:
        """True in the `integer` placement."""
        return self.spec.placement == "integer"

    def initial_variables(self, teacher_variables: Variables) -> Variables:
        """The teacher's variables plus the `quant` collection: activation ranges not yet seen,
        weight ranges where they are learned, nothing stretched yet."""
        fixed = dict.fromkeys(fixed_tensors(self.spec), self.input_range)
        tracked = tracked_tensors(self.graph, self.spec)
        kernels = teacher_variables["params"]
        stretch = {
            "activations": {name: jnp.float32(0) for name in tracked},
            "weights": {
                layer.name: jnp.zeros(kernels[layer.name]["kernel"].shape[-1])
                for layer in self.graph.weighted
            },
        }
        held = (
            weight_ranges(self.spec, self.operations, kernels)
            if self.spec.learns_weight_steps
            else {}
        )
        return {
            "params": teacher_variables["params"],
            "batch_stats": teacher_variables["batch_stats"],
            "quant": {**initial_ranges(tracked, fixed), "weights": held, "stretch": stretch},
        }

    def trainable(self, variables: Variables) -> Variables:
        """What gradients change: `params`, and the `stretch` of the ranges that are learned."""
        stretch = variables["quant"]["stretch"]
        learned = LEARNED_STEPS[self.spec.learned_steps]
        return {
            "params": variables["params"],
            "stretch": {kind: stretch[kind] for kind in learned},
        }

    def with_trainable(self, variables: Variables, trainable: Variables) -> Variables:
        """The variables with other values of what `trainable` returned."""
        quant = variables["quant"]
        stretch = {**quant["stretch"], **trainable["stretch"]}
        return {
            **variables,
            "params": trainable["params"],
            "quant": {**quant, "stretch": stretch},
        }


def student_forward(student: Student, variables: Variables, images: jax.Array,
                    outputs: Iterable[str]) -> dict[str, jax.Array]:  # fmt: skip
    """Real values of the named tensors, with straight-through gradients.

    Args:
      student: static description.
      variables: `params`, `batch_stats` (frozen running statistics), `quant` (ranges).
      images: `[B, H, W, C]` in the teacher's normalised input space.
      outputs: names of tensors; in the `integer` placement those its operations make.

    Returns:
      `{name: [B, ...]}`; the logits are float32 under `student.graph.output`.
    """
    if student.is_integer:
        return execute(
            student.operations,
            _training_source(student, variables),
            images,
            outputs,
            input_bits=student.spec.boundary_bits,
            clip_mask=student.spec.clip_mask,
        )
    return _paper_forward(student, variables, images, outputs, _ranges_of(variables))


def calibrate(student: Student, variables: Variables, images: jax.Array) -> tuple[jax.Array, Variables]:  # fmt: skip
    """One forward that also updates the activation ranges, each before it is used.

    Returns:
      Logits `[B, num_classes]` and the variables with the updated `quant` collection.
    """
    quant = variables["quant"]
    observe = OBSERVERS[student.spec.act_observer]
    ranges = dict(quant["activations"])

    def update(name: str, values: jax.Array, bits: int) -> dict[str, jax.Array]:
        observed = observe(jax.lax.stop_gradient(values), tuple(range(values.ndim)), bits)
        ranges[name] = track(ranges[name], observed, quant["updates"], student.spec.range_decay)
        return ranges[name]

    output = student.graph.output
    if student.is_integer:

        def tensor(name: str, bits: int, real: Any) -> AffineParameters:
            known = name == INPUT
            return _parameters(ranges[name] if known else update(name, real(), bits), bits)

        source = Source(
            weights=lambda op, scale: quantize_weights(op, variables, student.spec, scale),
            tensor=tensor,
        )
        logits = execute(student.operations, source, images, (output,),
                         input_bits=student.spec.boundary_bits)[output]  # fmt: skip
    else:
        logits = _paper_forward(student, variables, images, (output,), update)[output]
    new_quant = {**quant, "activations": ranges, "updates": quant["updates"] + 1}
    return logits, {**variables, "quant": new_quant}


def quantize_weights(operation: Operation, variables: Variables, spec: QuantSpec,
                     input_scale: jax.Array) -> QuantizedWeights:  # fmt: skip
    """Codes of a layer's weights with the batch norm behind it folded into scale and bias.

    The integers are those of the unfolded weight: `s_w' = s_w*|gain|`,
    `b' = offset + bias*gain`; where the gain is negative the code book is reflected
    (`q' = 2^k-1-q`, `z' = 2^k-1-z`); where it is 0, or the scale so small that int32 cannot
    hold the bias (a channel that is all but constant), `q = z` and `s = 1`.
    """
    layer, batch_norm, params = operation.layer, operation.batch_norm, variables["params"]
    if isinstance(layer, L.BatchNorm):  # on its own: one exact tap per channel
        batch_norm, bits = layer, 1
        channels = variables["batch_stats"][layer.name]["mean"].shape
        codes, zero_point = jnp.ones(channels), jnp.zeros(channels)
        scale, bias = jnp.ones(channels), jnp.zeros(channels)
    else:
        bits, kernel = operation.weight_bits, params[layer.name]["kernel"]
        parameters = kernel_parameters(spec, variables, operation)
        codes = quantize_weight(kernel, parameters, bits, clip_mask=spec.learns_weight_steps)
        scale, zero_point = parameters
        with_bias = "bias" in params[layer.name]
        bias = params[layer.name]["bias"] if with_bias else jnp.zeros(scale.shape)
    if batch_norm is not None:
        gain, offset = batch_norm_affine(
            batch_norm,
            {**params.get(batch_norm.name, {}), **variables["batch_stats"][batch_norm.name]},
        )
        negative = gain < 0
        codes = jnp.where(negative, top_code(bits) - codes, codes)
        zero_point = jnp.where(negative, top_code(bits) - zero_point, zero_point)
        scale = scale * jnp.abs(gain)
        bias = bias * gain + offset
    constant = jnp.abs(bias) >= LARGEST_BIAS * (input_scale * scale)
    codes = jnp.where(constant, zero_point, codes)
    scale = jnp.where(constant, 1.0, scale)
    return QuantizedWeights(codes, zero_point, scale, bias_codes(bias, input_scale * scale))


def freeze(student: Student, variables: Variables) -> dict[str, Any]:
    """The integer network: codes, scales, zero points and biases, all there is at inference.

    Evaluation and export use this very tree, so what is measured is what ships.

    Returns:
      `{"weights": {layer: QuantizedWeights}, "tensors": {tensor: AffineParameters},
      "tables": {tensor: codes of an activation on its own, for every code of its input}}`.

    Raises:
      ValueError: the student is not of the `integer` placement.
    """
    if not student.is_integer:
        raise ValueError(
            f"found placement {student.spec.placement!r}, expected 'integer': only it is an "
            "integer network; set student.placement='integer'"
        )
    tensors = tensor_parameters(student, variables)
    source = _training_source(student, variables)
    weights = {
        op.layer.name: source.weights(op, tensors[student.origins[op.inputs[0]]].scale)
        for op in student.operations
        if op.has_weights
    }
    tables = activation_tables(student, tensors)
    return {"weights": weights, "tensors": tensors, "tables": tables}


def activation_tables(student: Student, tensors: dict[str, AffineParameters]) -> dict[str, jax.Array]:  # fmt: skip
    """For each activation on its own, by the tensor it makes: the code of every input code.

    Args:
      student: whose operations they are.
      tensors: parameters of every tensor with codes of its own.
    """

    def no_weights(operation: Operation, scale: jax.Array) -> QuantizedWeights:
        raise TypeError(f"{operation.output}: an activation has no weights")

    source = Source(weights=no_weights, tensor=lambda name, bits, real: tensors[name])
    tables = {}
    for operation in student.operations:
        if isinstance(operation.layer, L.Activation):
            origin = student.origins[operation.inputs[0]]
            tables[operation.output] = activation_table(
                operation, source, tensors[origin], student.code_bits[origin]
            )
    return tables


def frozen_logits(student: Student, frozen: dict[str, Any], images: jax.Array) -> jax.Array:
    """Logits `[B, num_classes]` of a frozen integer network."""
    output = student.graph.output
    return integer_forward(student.operations, frozen, images, (output,),
                           input_bits=student.spec.boundary_bits)[output]  # fmt: skip


def paper_weight_codes(student: Student, variables: Variables) -> dict[str, dict[str, jax.Array]]:
    """Weight codes of a `paper` student: `{layer: {"codes", "scale", "offset"}}`.

    Codes are uint8 in [0, 2^k - 1]; the weight is `(code - 2^(k-1) + offset) / scale`, with
    float32 scale and int32 offset `[C_out]`.
    """
    stored = {}
    for operation in student.operations:
        if operation.weight_bits is None:
            continue
        bits, kernel = operation.weight_bits, variables["params"][operation.layer.name]["kernel"]
        limits = kernel_range(student.spec, variables, operation)
        scale, offset = lineage_parameters(limits["low"], limits["high"], bits)
        codes = lineage_codes(kernel, scale, offset, bits) + 2 ** (bits - 1)
        stored[operation.layer.name] = {
            "codes": codes.astype(jnp.uint8),
            "scale": scale,
            "offset": offset.astype(jnp.int32),
        }
    return stored


def _activation_range(variables: Variables, name: str) -> dict[str, jax.Array]:
    """Range of a tensor as calibrated, stretched as learned; the image's is known and fixed."""
    quant = variables["quant"]
    limits = quant["activations"][name]
    return limits if name == INPUT else stretched(limits, quant["stretch"]["activations"][name])


def _parameters(limits: dict[str, jax.Array], bits: int) -> AffineParameters:
    return affine_parameters(limits["low"], limits["high"], bits)


def tensor_parameters(student: Student, variables: Variables) -> dict[str, AffineParameters]:
    """Scale and zero point of every tensor with codes of its own, from the ranges as they are."""
    return {
        name: _parameters(_activation_range(variables, name), bits)
        for name, bits in student.code_bits.items()
    }


def _training_source(student: Student, variables: Variables) -> Source:
    tensors = tensor_parameters(student, variables)
    return Source(
        weights=lambda op, scale: quantize_weights(op, variables, student.spec, scale),
        tensor=lambda name, bits, real: tensors[name],
    )


def _ranges_of(variables: Variables) -> Any:
    return lambda name, values, bits: _activation_range(variables, name)


def _paper_forward(student: Student, variables: Variables, images: jax.Array,
                   outputs: Iterable[str], range_of: Any) -> dict[str, jax.Array]:  # fmt: skip
    """Float forward with fake-quantized kernels and activations (the lineage's placement)."""
    spec = student.spec
    weighted = {op.layer.name: op for op in student.operations if op.weight_bits}
    act_bits = {op.output: op.output_bits for op in student.operations}

    def kernel_transform(layer: L.Layer, kernel: jax.Array) -> jax.Array:
        return lineage_kernel(spec, variables, weighted[layer.name])

    def activation_transform(layer: L.Layer, values: jax.Array) -> jax.Array:
        bits = act_bits[layer.name]
        limits = range_of(layer.name, values, bits)
        return lineage_fake_quant(values, **limits, bits=bits, clip_mask=spec.clip_mask)

    return float_forward(
        student.graph,
        variables,
        images,
        outputs,
        kernel_transform=kernel_transform,
        activation_transform=activation_transform,
    )
