"""How weights become codes: each weight to its nearest code, or so that errors cancel.

A rounding is a pure function of a weight and its quantizer. What it chose is written back into
the weight itself (`weight_at_codes`), so that every forward, every export and later training
need only ever round to nearest.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lrq_jax.ops.division import divide
from lrq_jax.quantizers.affine import AffineParameters, quantize_weight, weight_code_limits

Rounding = Callable[[jax.Array, AffineParameters, int], jax.Array]
"""(weight `[..., C_out]`, scale and zero point `[C_out]`, bits) -> codes of the weight's shape."""

CODE_MARGIN = 0.05
"""A weight moved to another code ends this far, in codes, inside that code's cell: further than
float32 errs, and near to where it was, so that training can still take it back."""


def nearest(weight: jax.Array, parameters: AffineParameters, bits: int) -> jax.Array:
    """The nearest code of each weight, half to even."""
    return quantize_weight(weight, parameters, bits)


def squant(weight: jax.Array, parameters: AffineParameters, bits: int) -> jax.Array:
    """Codes whose errors cancel in each kernel and each output channel (SQuant, arXiv 2202.07471).

    With `d` the rounding error of each weight in codes, SQuant approximates the Hessian of the
    loss by three terms: `sum d^2` over weights, `(sum d)^2` over each kernel of kh*kw taps, and
    `(sum d)^2` over each output channel. From nearest codes on, with `e` the sum over a kernel,
    the `rint(|e|)` weights with the largest error of e's sign go to the code on their other
    side, which leaves `|e| <= 1/2`. Then, with `e` the sum over a channel, `rint(|e|)` of its
    kernels whose sum has e's sign flip their one largest such error, which leaves the channel's
    `|e| <= 1/2` and every kernel's at most 1. Weights beyond the codes' range stay saturated and
    count as without error: clipping them was the range's decision.

    Args:
      weight: `[kh, kw, C_in, C_out]` or `[C_in, C_out]` (a kernel of one tap each).
      parameters: scale and zero point, `[C_out]` or scalars.
      bits: of the codes.

    Returns:
      Codes, integers in float32, each the floor or the ceiling of its weight.
    """
    low, high = weight_code_limits(bits)
    zero_point = parameters.zero_point
    value = jnp.clip(divide(weight, parameters.scale), low - zero_point, high - zero_point)
    value = value.reshape(-1, *weight.shape[-2:])  # taps, C_in, C_out
    codes = jnp.rint(value)
    codes = _flip_in_kernels(value, codes)
    codes = _flip_in_channels(value, codes)
    return (codes + zero_point).reshape(weight.shape)


def _flip_in_kernels(value: jax.Array, codes: jax.Array) -> jax.Array:
    error = codes - value
    total = jnp.sum(error, 0)
    sign = jnp.sign(total)
    flip = _rank(error * sign, 0) < jnp.rint(jnp.abs(total))
    return codes - jnp.where(flip, sign, 0.0)


def _flip_in_channels(value: jax.Array, codes: jax.Array) -> jax.Array:
    error = codes - value
    kernels = jnp.sum(error, 0)
    total = jnp.sum(kernels, 0)
    sign = jnp.sign(total)
    gain = error * sign
    largest = jnp.max(gain, 0)
    # A kernel whose own sum has the other sign would only get worse.
    offered = jnp.where(kernels * sign > 0, largest, -jnp.inf)
    chosen = _rank(offered, 0) < jnp.rint(jnp.abs(total))
    flip = chosen & (_rank(gain, 0) == 0)
    return codes - jnp.where(flip, sign, 0.0)


def _rank(x: jax.Array, axis: int) -> jax.Array:
    """Place of each value when sorted along an axis, the largest first; equal ones in order."""
    return jnp.argsort(jnp.argsort(x, axis, descending=True, stable=True), axis)


def weight_at_codes(weight: jax.Array, codes: jax.Array, parameters: AffineParameters, bits: int) -> jax.Array:  # fmt: skip
    """The weight nearest to `weight` that rounds to `codes`, by `CODE_MARGIN`.

    Weights that round to their code already are returned as they are. The quantizer's range must
    not be searched again on the result: it may depend on the weight.

    Args:
      weight: `[..., C_out]`.
      codes: of that shape, in the codes' range.
      parameters, bits: of the quantizer.
    """
    scale, zero_point = parameters
    target, reach = codes - zero_point, 0.5 - CODE_MARGIN
    moved = jnp.clip(divide(weight, scale), target - reach, target + reach) * scale
    return jnp.where(quantize_weight(weight, parameters, bits) == codes, weight, moved)


ROUNDINGS: dict[str, Rounding] = {"nearest": nearest, "squant": squant}
"""Roundings that need no images, by the name a config gives them; add one here to plug it in."""
