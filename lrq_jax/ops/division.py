"""Division as IEEE 754 and integer runtimes define it: correctly rounded, on every backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from lrq_jax.ops.by_platform import platform_form, traced_once
from lrq_jax.ops.straight_through import straight_through


@traced_once()  # networks divide hundreds of times
def divide(a: jax.Array, b: jax.Array | float) -> jax.Array:
    """The float32 nearest to `a / b`.

    XLA's own quotient is not: it turns `a / broadcast(b)` into `a * (1 / b)`, and on GPU it
    uses an approximate division; either is one unit in the last place off in a quarter of all
    cases and moves codes across rounding boundaries. On CPU a barrier hides the operands;
    elsewhere the quotient's remainder, which is computed exactly, corrects it.

    Args:
      a, b: float32, broadcastable; quotients that are normal numbers, `|a|` above 1e-24.

    Returns:
      The quotient, with the gradient of ordinary division.
    """
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    exact = platform_form(
        lax.stop_gradient(a), lax.stop_gradient(b), cpu=_hidden_operands, default=_nearest
    )
    return straight_through(exact, a / b)


def _hidden_operands(a: jax.Array, b: jax.Array) -> jax.Array:
    # Both, or XLA makes `a / (b * c)` of `(a / b) / c` and `a * c / b` of `a / (b / c)`.
    b = jnp.broadcast_to(b, jnp.broadcast_shapes(a.shape, b.shape))
    return jnp.divide(*lax.optimization_barrier((a, b)))


def _nearest(a: jax.Array, b: jax.Array) -> jax.Array:
    first = a / b
    near = first + _remainder(a, b, first) / b  # within one unit in the last place now
    rest = _remainder(a, b, near)
    step = jnp.where((rest > 0) == (a > 0), 1, -1)
    bits = lax.bitcast_convert_type(near, jnp.int32) + step
    neighbour = lax.bitcast_convert_type(bits, jnp.float32)
    closer = jnp.abs(_remainder(a, b, neighbour)) < jnp.abs(rest)
    near = jnp.where((rest != 0) & closer, neighbour, near)
    return jnp.where(jnp.isfinite(first), near, first)


def _remainder(a: jax.Array, b: jax.Array, quotient: jax.Array) -> jax.Array:
    """`a - quotient*b` for a quotient within some units in the last place.

    Every product and every difference below is exact, so it does not matter which of them a
    compiler fuses.
    """
    quotient_high, b_high = _high_half(quotient), _high_half(b)
    quotient_low, b_low = quotient - quotient_high, b - b_high
    rest = a - quotient_high * b_high
    return ((rest - quotient_high * b_low) - quotient_low * b_high) - quotient_low * b_low


def _high_half(x: jax.Array) -> jax.Array:
    """`x` with the last 12 of its 24 binary digits cleared."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    return lax.bitcast_convert_type(bits, jnp.float32)
