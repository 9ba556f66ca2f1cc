"""Affine quantization of arrays: `x ~ scale * (code - zero_point)`, codes in [0, 2^bits - 1].

Codes are float32 arrays that hold integers, so that one function serves training (with
straight-through gradients) and exact evaluation. Rounding is half to even throughout.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lrq_jax.ops.straight_through import round_through, straight_through

SMALLEST_RANGE = 1e-8
"""Ranges are widened to this, so that a constant tensor has a scale (the lineage's value)."""


class AffineParameters(NamedTuple):
    """Scale (> 0, real units per code) and zero point (the code of 0.0), broadcastable."""

    scale: jax.Array
    zero_point: jax.Array


def top_code(bits: int) -> int:
    """The largest code, `2^bits - 1`."""
    return 2**bits - 1


def affine_parameters(low: jax.Array, high: jax.Array, bits: int) -> AffineParameters:
    """Scale and zero point of the range [low, high], widened to contain 0.

    The zero point is an integer in [0, 2^bits - 1], as integer runtimes demand; it is 0 where
    low >= 0, so saturation at code 0 is ReLU.
    """
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    scale = jnp.maximum(high - low, SMALLEST_RANGE) / top_code(bits)
    return AffineParameters(scale, jnp.clip(jnp.rint(-low / scale), 0, top_code(bits)))


def quantize(x: jax.Array, parameters: AffineParameters, bits: int) -> jax.Array:
    """Codes of `x`; straight-through gradient, not masked where the code saturates."""
    scale, zero_point = parameters
    value = x / scale + zero_point
    exact = jnp.clip(jnp.rint(x / scale) + zero_point, 0, top_code(bits))
    return straight_through(exact, value)


def dequantize(codes: jax.Array, parameters: AffineParameters) -> jax.Array:
    """Real values of codes."""
    return (codes - parameters.zero_point) * parameters.scale


def lineage_fake_quant(x: jax.Array, low: jax.Array, high: jax.Array, bits: int, *,
                       clip_mask: bool = False) -> jax.Array:  # fmt: skip
    """Quantize-dequantize as GDFQ, Qimera, IntraQ and LRQ compute it.

    n = 2^k - 1; S = n / max(high - low, 1e-8); Z = round(S*low) + 2^(k-1);
    q = clip(round(S*x - Z), -2^(k-1), 2^(k-1) - 1); result (q + Z) / S.
    Unlike `affine_parameters` the range need not contain 0. (Yao et al.'s ZeroQ,
    arXiv 2001.00281, asymmetric mode; the formula GDFQ's line of work shares.)

    Args:
      x: any shape.
      low, high: ends of the range, broadcastable to `x`.
      bits: k.
      clip_mask: zero the gradient outside the range, as LSQ does; the lineage does not.

    Returns:
      Same shape as `x`, with the straight-through gradient.
    """
    half = 2 ** (bits - 1)
    scale = top_code(bits) / jnp.maximum(high - low, SMALLEST_RANGE)
    offset = jnp.rint(scale * low) + half
    codes = jnp.clip(jnp.rint(scale * x - offset), -half, half - 1)
    surrogate = jnp.clip(x, low, high) if clip_mask else x
    return straight_through((codes + offset) / scale, surrogate)


def bias_codes(bias: jax.Array, scale: jax.Array) -> jax.Array:
    """int32 codes of a bias in units of the accumulator's scale, held in float32.

    Values beyond int32 (a nearly dead channel's) saturate at the largest float32 inside it.
    """
    limit = float(2**31 - 128)
    return round_through(jnp.clip(bias / scale, -limit, limit))
