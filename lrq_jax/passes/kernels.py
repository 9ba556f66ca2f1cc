"""The quantizers of a student's kernels: where their ranges come from, what they are."""

from __future__ import annotations

from typing import NamedTuple

import jax

from lrq_jax.passes.float_forward import Variables
from lrq_jax.passes.plan import Operation, QuantSpec
from lrq_jax.quantizers.affine import (
    SYMMETRIC_BITS,
    AffineParameters,
    dequantize,
    lineage_fake_quant,
    lineage_parameters,
    quantize_weight,
    weight_code_limits,
    weight_parameters,
)
from lrq_jax.quantizers.ranges import OBSERVERS, Range, stretched


def weight_ranges(spec: QuantSpec, operations: tuple[Operation, ...], params: Variables) -> dict[str, Range]:  # fmt: skip
    """Range `[C_out]` of each kernel's output channels, by layer, as the observer finds it: what
    `quant["weights"]` holds where ranges no longer follow the weights."""
    return {
        op.layer.name: _observed_range(spec, params[op.layer.name]["kernel"], op.weight_bits)
        for op in operations
        if op.weight_bits
    }


def kernel_range(spec: QuantSpec, variables: Variables, operation: Operation) -> Range:
    """Range `[C_out]` of each output channel's weights: the one held, where one is (learned steps,
    rounded weights), or else that of the weights as they are now; stretched. Gradients reach the
    stretch alone."""
    quant, name = variables["quant"], operation.layer.name
    limits = quant["weights"].get(name)
    if limits is None:
        kernel = variables["params"][name]["kernel"]
        limits = _observed_range(spec, jax.lax.stop_gradient(kernel), operation.weight_bits)
    return stretched(jax.lax.stop_gradient(limits), quant["stretch"]["weights"][name])


def kernel_parameters(spec: QuantSpec, variables: Variables, operation: Operation) -> AffineParameters:  # fmt: skip
    """Scale and zero point `[C_out]` of an operation's kernel, its batch norm left out."""
    limits = kernel_range(spec, variables, operation)
    return weight_parameters(**limits, bits=operation.weight_bits)


def coarse_kernel(spec: QuantSpec, variables: Variables, operation: Operation) -> jax.Array:
    """Real values that the codes of an operation's kernel stand for, its batch norm left out.
    Gradients are those of the `integer` placement's forward pass."""
    kernel = variables["params"][operation.layer.name]["kernel"]
    parameters = kernel_parameters(spec, variables, operation)
    clip_mask = spec.learns_weight_steps
    codes = quantize_weight(kernel, parameters, operation.weight_bits, clip_mask=clip_mask)
    return dequantize(codes, parameters)


def lineage_kernel(spec: QuantSpec, variables: Variables, operation: Operation) -> jax.Array:
    """An operation's kernel as the `paper` placement's forward pass sees it."""
    kernel = variables["params"][operation.layer.name]["kernel"]
    limits = kernel_range(spec, variables, operation)
    return lineage_fake_quant(
        kernel, **limits, bits=operation.weight_bits, clip_mask=spec.learns_weight_steps
    )


class KernelSteps(NamedTuple):
    """What values a kernel can have: multiples of `step` from the `lowest` to the `highest`, each
    `[C_out]`."""

    step: jax.Array
    lowest: jax.Array
    highest: jax.Array


def kernel_steps(spec: QuantSpec, variables: Variables, operation: Operation) -> KernelSteps:
    """What values an operation's kernel can have, its batch norm left out."""
    bits = operation.weight_bits
    if spec.placement == "integer":
        step, zero_point = kernel_parameters(spec, variables, operation)
        lowest, highest = weight_code_limits(bits)
        return KernelSteps(step, lowest - zero_point, highest - zero_point)
    limits = kernel_range(spec, variables, operation)
    scale, offset = lineage_parameters(limits["low"], limits["high"], bits)
    half = 2 ** (bits - 1)
    return KernelSteps(1 / scale, offset - half, offset + half - 1)


def _observed_range(spec: QuantSpec, kernel: jax.Array, bits: int) -> Range:
    symmetric = spec.placement == "integer" and bits >= SYMMETRIC_BITS
    observe = OBSERVERS[spec.weight_observer]
    return observe(kernel, tuple(range(kernel.ndim - 1)), bits, symmetric=symmetric)
