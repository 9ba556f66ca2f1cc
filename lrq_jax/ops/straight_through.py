"""The straight-through estimator (Bengio et al., arXiv 1308.3432)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_jvp
def straight_through(exact: jax.Array, surrogate: jax.Array) -> jax.Array:
    """The value of `exact`, bit for bit, with the derivative of `surrogate`.

    Unlike `surrogate + stop_gradient(exact - surrogate)` no rounding enters the value, which
    integer arithmetic could not bear.

    Args:
      exact: the value, any shape; gets no gradient.
      surrogate: same shape; its value is never computed unless something else needs it.
    """
    del surrogate
    return exact


@straight_through.defjvp
def _straight_through_jvp(primals: tuple, tangents: tuple) -> tuple:
    exact, surrogate = primals
    return straight_through(exact, surrogate), tangents[1]


def round_through(x: jax.Array) -> jax.Array:
    """Rounds half to even; the gradient is that of the identity."""
    return straight_through(jnp.rint(x), x)


def clip_inclusive(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """`clip(x, low, high)` with the whole gradient at the ends themselves, where jnp.clip halves
    it: a min-max range has values exactly there."""
    return jnp.where(x < low, low, jnp.where(x > high, high, x))
