"""PyTorch's default initialisation, which the generator of this line of work was tuned with."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

Params = dict[str, jax.Array]


def affine_init(key: jax.Array, kernel_shape: tuple[int, ...]) -> Params:
    """`{"kernel", "bias"}`, both U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    Args:
      kernel_shape: `[..., C_in / groups, features]`; fan_in is the product of all but the last.
    """
    bound = 1.0 / math.sqrt(math.prod(kernel_shape[:-1]))
    kernel_key, bias_key = jax.random.split(key)
    return {
        "kernel": jax.random.uniform(kernel_key, kernel_shape, minval=-bound, maxval=bound),
        "bias": jax.random.uniform(bias_key, kernel_shape[-1:], minval=-bound, maxval=bound),
    }


def scale_and_bias_init(key: jax.Array, shape: tuple[int, ...]) -> Params:
    """`{"scale": ones, "bias": zeros}`: `[C]`, or `[K, C]` for a class-conditional norm."""
    del key
    return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}


def embedding_init(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """`[K, D]`, N(0, 1)."""
    return jax.random.normal(key, shape)
