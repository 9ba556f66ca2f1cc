"""Affine quantization of arrays: `x ~ scale * (code - zero_point)`, codes in [0, 2^bits - 1].

Codes are float32 arrays that hold integers, so that one function serves training (with
straight-through gradients) and exact evaluation. Rounding is half to even throughout.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lrq_jax.ops.division import divide
from lrq_jax.ops.straight_through import clip_inclusive, round_through, straight_through

SMALLEST_RANGE = 1e-8
"""Ranges are widened to this, so that a constant tensor has a scale (the lineage's value)."""

SYMMETRIC_BITS = 7
"""Weights of at least so many bits have symmetric codes; see `weight_parameters`."""

LARGEST_BIAS = float(2**30)
"""Bias codes end here, so that accumulator plus bias stays inside int32, where integer runtimes
wrap around."""


class AffineParameters(NamedTuple):
    """Scale (> 0, real units per code) and zero point (the code of 0.0), broadcastable."""

    scale: Any  # jax arrays in a program, numpy numbers where files are written
    zero_point: Any


def top_code(bits: int) -> int:
    """The largest code, `2^bits - 1`."""
    return 2**bits - 1


def affine_parameters(low: jax.Array, high: jax.Array, bits: int) -> AffineParameters:
    """Scale and zero point of the range [low, high], widened to contain 0.

    The zero point is an integer in [0, 2^bits - 1], as integer runtimes demand; it is 0 where
    low >= 0, so saturation at code 0 is ReLU.
    """
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    scale = divide(jnp.maximum(high - low, SMALLEST_RANGE), top_code(bits))
    return AffineParameters(scale, jnp.clip(jnp.rint(divide(-low, scale)), 0, top_code(bits)))


def weight_parameters(low: jax.Array, high: jax.Array, bits: int) -> AffineParameters:
    """Scale and zero point of weights: as `affine_parameters`, but symmetric from 7 bits up.

    Integer convolutions take one zero point a tensor, so weights ship as `code - zero_point` in
    int8. Below 7 bits every such difference fits; symmetric codes do, between `-(2^(k-1) - 1)`
    and `2^(k-1) - 1`. At 7 bits the sum of two products with 8-bit activations then stays
    inside int16 too, where x86 CPUs without VNNI saturate.
    """
    if bits < SYMMETRIC_BITS:
        return affine_parameters(low, high, bits)
    half = 2 ** (bits - 1)
    reach = jnp.maximum(jnp.maximum(-low, high), SMALLEST_RANGE)
    return AffineParameters(divide(reach, half - 1), jnp.full_like(reach, half))


def quantize(x: jax.Array, parameters: AffineParameters, bits: int, *, clip_mask: bool = False) -> jax.Array:  # fmt: skip
    """Codes of `x`; straight-through gradient to `x` and to the scale (LSQ, arXiv 1902.08153).

    `clip_mask` stops the gradient to `x` where the code saturates, as LSQ does.
    """
    return _quantize(x, parameters, 0, top_code(bits), clip_mask)


def quantize_weight(x: jax.Array, parameters: AffineParameters, bits: int, *, clip_mask: bool = False) -> jax.Array:  # fmt: skip
    """Codes of weights under `weight_parameters`; otherwise as `quantize`."""
    return _quantize(x, parameters, *weight_code_limits(bits), clip_mask)


def weight_code_limits(bits: int) -> tuple[int, int]:
    """Smallest and largest code of weights: symmetric codes leave 0 out."""
    return int(bits >= SYMMETRIC_BITS), top_code(bits)


def _quantize(x: jax.Array, parameters: AffineParameters, lowest: int, highest: int, clip_mask: bool) -> jax.Array:  # fmt: skip
    scale, zero_point = parameters
    value = divide(x, scale)
    exact = jnp.clip(jnp.rint(value) + zero_point, lowest, highest)
    if clip_mask:
        value = clip_inclusive(value, lowest - zero_point, highest - zero_point)
    return straight_through(exact, value + zero_point)


def dequantize(codes: jax.Array, parameters: AffineParameters) -> jax.Array:
    """Real values of codes."""
    return (codes - parameters.zero_point) * parameters.scale


def lineage_parameters(low: jax.Array, high: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Scale S (codes per real unit) and offset Z of the lineage's affine code.

    n = 2^k - 1; S = n / max(high - low, 1e-8); Z = round(S*low) + 2^(k-1). Unlike
    `affine_parameters` the range need not contain 0. (Yao et al.'s ZeroQ, arXiv 2001.00281,
    asymmetric mode; the formula GDFQ's line of work shares.)
    """
    scale = top_code(bits) / jnp.maximum(high - low, SMALLEST_RANGE)
    return scale, jnp.rint(scale * low) + 2 ** (bits - 1)


def lineage_codes(x: jax.Array, scale: jax.Array, offset: jax.Array, bits: int) -> jax.Array:
    """`q = clip(round(S*x - Z), -2^(k-1), 2^(k-1) - 1)`; its real value is (q + Z) / S."""
    half = 2 ** (bits - 1)
    return jnp.clip(jnp.rint(scale * x - offset), -half, half - 1)


def lineage_fake_quant(x: jax.Array, low: jax.Array, high: jax.Array, bits: int, *,
                       clip_mask: bool = False) -> jax.Array:  # fmt: skip
    """Quantize-dequantize as GDFQ, Qimera, IntraQ and LRQ compute it.

    Args:
      x: any shape.
      low, high: ends of the range, broadcastable to `x`.
      bits: k.
      clip_mask: zero the gradient outside the range, as LSQ does; the lineage does not.

    Returns:
      Same shape as `x`, with the straight-through gradient to `x` and to the range's width.
    """
    scale, offset = lineage_parameters(low, high, bits)
    value, half = scale * x - offset, 2 ** (bits - 1)
    if clip_mask:
        value = clip_inclusive(value, -half, half - 1)
    return (straight_through(lineage_codes(x, scale, offset, bits), value) + offset) / scale


def bias_codes(bias: jax.Array, scale: jax.Array) -> jax.Array:
    """int32 codes of a bias in units of the accumulator's scale, held in float32.

    Larger values than `LARGEST_BIAS` saturate.
    """
    return round_through(jnp.clip(divide(bias, scale), -LARGEST_BIAS, LARGEST_BIAS))
