"""Where quantization ranges come from: observers of one tensor, and their running average."""

from __future__ import annotations

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from lrq_jax.ops.by_platform import traced_once
from lrq_jax.quantizers.affine import (
    affine_parameters,
    dequantize,
    quantize,
    quantize_weight,
    weight_parameters,
)

Range = dict[str, jax.Array]
"""`{"low": ..., "high": ...}`, scalars for activations, `[C]` for weights."""


class Observer(Protocol):
    """Finds the range of a tensor's values."""

    def __call__(self, x: jax.Array, axes: tuple[int, ...], bits: int, *, symmetric: bool = False) -> Range:  # fmt: skip
        """Range of `x` over `axes`, for codes of `bits`, symmetric ones (`weight_parameters`) or not."""
        ...


SMALLEST_RATIO, RATIOS = 0.02, 50
"""`smallest_error` tries this many shares of the whole range, from 1 down to the smallest."""

LARGEST_SAMPLE = 2**16
"""`smallest_error` judges a tensor by about so many of its values; larger ones are thinned out."""

ERROR_POWER = 2.4
"""Between squared and largest error; BRECQ's and QDrop's value."""


def min_max(x: jax.Array, axes: tuple[int, ...], bits: int, *, symmetric: bool = False) -> Range:
    """Smallest and largest value over `axes`."""
    return {"low": jnp.min(x, axes), "high": jnp.max(x, axes)}


def percentile(x: jax.Array, axes: tuple[int, ...], bits: int, *, symmetric: bool = False,
               tail: float = 1e-3) -> Range:  # fmt: skip
    """Range that leaves a fraction `tail` of the values outside at each end."""
    return {"low": jnp.quantile(x, tail, axes), "high": jnp.quantile(x, 1 - tail, axes)}


@traced_once(static_argnames=("axes", "bits", "symmetric"))
def smallest_error(x: jax.Array, axes: tuple[int, ...], bits: int, *, symmetric: bool = False) -> Range:  # fmt: skip
    """The share of the min-max range with the smallest mean `|x - dequantized|^2.4`.

    Clipping outliers buys finer steps for the rest; a search over `RATIOS` shares finds how many
    are worth it (BRECQ, arXiv 2102.05426, and QDrop, arXiv 2203.05740).

    Args:
      axes: the leading axes of `x`, so that what is left broadcasts against it.
      symmetric: codes of weights of 7 and more bits.
    """
    whole = min_max(x, axes, bits)
    x, axes = _thinned(x, axes)
    parameters_of = weight_parameters if symmetric else affine_parameters
    codes_of = quantize_weight if symmetric else quantize

    def error(ratio: jax.Array) -> jax.Array:
        parameters = parameters_of(ratio * whole["low"], ratio * whole["high"], bits)
        wrong = jnp.abs(dequantize(codes_of(x, parameters, bits), parameters) - x)
        return jnp.mean(wrong**ERROR_POWER, axes)

    ratios = jnp.linspace(1.0, SMALLEST_RATIO, RATIOS)
    best = ratios[jnp.argmin(jax.lax.map(error, ratios), axis=0)]
    return {end: best * value for end, value in whole.items()}


def _thinned(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
    """Every n-th value of a tensor that has one range, all channels alike."""
    step = -(-x.size // LARGEST_SAMPLE)
    if step == 1 or len(axes) < x.ndim:
        return x, axes
    while math.gcd(step, x.shape[-1]) > 1:
        step += 1
    return x.reshape(-1)[::step], (0,)


OBSERVERS: dict[str, Observer] = {
    "min_max": min_max,
    "percentile": percentile,
    "smallest_error": smallest_error,
}
"""Observers by the name a config gives them; add one here to plug it in."""


def initial_ranges(tensors: tuple[str, ...], fixed: dict[str, tuple[float, float]]) -> dict[str, Any]:  # fmt: skip
    """State of the range tracker: `{"activations": {tensor: Range}, "updates": int32}`.

    Args:
      tensors: names of the tensors to track.
      fixed: ranges known beforehand (the input image's), not tracked.
    """
    known = {name: fixed.get(name, (0.0, 0.0)) for name in (*tensors, *fixed)}
    return {
        "activations": {
            name: {"low": jnp.float32(low), "high": jnp.float32(high)}
            for name, (low, high) in known.items()
        },
        "updates": jnp.int32(0),
    }


def stretched(limits: Range, stretch: jax.Array) -> Range:
    """The range times `exp(stretch)`: a learned step size that keeps its zero point."""
    return {end: jnp.exp(stretch) * value for end, value in limits.items()}


def track(previous: Range, observed: Range, updates: jax.Array, decay: float) -> Range:
    """One step of a plain exponential moving average, started from the first batch.

    `new = decay * previous + (1 - decay) * observed`, `new = observed` while `updates == 0`.
    No bias correction: the lineage corrects an already corrected state and overshoots.
    """
    return jax.tree.map(
        lambda old, new: jnp.where(updates == 0, new, decay * old + (1 - decay) * new),
        previous,
        observed,
    )
