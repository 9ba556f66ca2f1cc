"""Arithmetic that XLA's CPU backend does not repeat inside the loops of all its readers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_LARGEST = 0xFFFFFFFF
"""Of 32 bits: a NaN's, as are the next smaller ones."""


@jax.custom_jvp
def computed_once(x: jax.Array) -> jax.Array:
    """The same numbers, to the bit (of a NaN: a NaN), and the same derivatives.

    XLA CPU computes what it takes for cheap, the sums of products of a depthwise convolution too,
    again in every loop that reads it, an optimization barrier or not. An integer remainder it takes
    for dear: here of the numbers' bits, by something larger. Elsewhere it is only more work.

    Args:
      x: float32, any shape; of other types it is returned as it is.
    """
    if x.dtype != jnp.float32:
        return x
    bits = jnp.minimum(lax.bitcast_convert_type(x, jnp.uint32), jnp.uint32(_LARGEST - 1))
    return lax.bitcast_convert_type(lax.rem(bits, jnp.uint32(_LARGEST)), jnp.float32)


@computed_once.defjvp
def _computed_once_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    return computed_once(*primals), tangents[0]
