"""Arithmetic that XLA's CPU backend does not repeat inside the loops of all its readers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_ABOVE_ALL = 0xFFFFFFFF
"""Larger than the bits of any number; of a NaN that arithmetic makes too."""


def computed_once(x: jax.Array) -> jax.Array:
    """The same numbers, to the bit, for programs of the CPU; without a gradient of its own.

    XLA CPU computes what it takes for cheap, the sums of products of a depthwise convolution too,
    again in every loop that reads it, an optimization barrier or not. An integer remainder counts
    as dear to it: here that of the numbers' bits by more than they are.

    Args:
      x: float32, any shape; of other types it is returned as it is.
    """
    if x.dtype != jnp.float32:
        return x
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type(lax.rem(bits, jnp.uint32(_ABOVE_ALL)), jnp.float32)
