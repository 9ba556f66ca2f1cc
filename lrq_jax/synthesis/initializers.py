"""PyTorch's default initialisation, which the generator of this line of work was tuned with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erfinv

Params = dict[str, jax.Array]


def drawn(shapes: Any, key: jax.Array) -> Any:
    """Initial values of a tree of parameters, all in one draw: XLA takes a second to compile each.

    Args:
      shapes: nested dicts; leaves have a `shape`. A dict of `kernel` and `bias` is drawn from
        U(-1/sqrt(fan_in), 1/sqrt(fan_in)), fan_in being the product of all of the kernel's
        dimensions but the last; one of `scale` and `bias` is ones and zeros; any other leaf is an
        embedding, N(0, 1).
    """
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    lowest = np.nextafter(np.float32(-1), np.float32(0))  # whose normal value is finite
    values = jax.random.uniform(key, (total,), minval=lowest, maxval=1.0)
    used = 0

    def uniform(shape: tuple[int, ...]) -> jax.Array:
        nonlocal used
        start, used = used, used + math.prod(shape)
        return values[start:used].reshape(shape)

    def fill(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return math.sqrt(2) * erfinv(uniform(node.shape))
        if "scale" in node:
            return scale_and_bias_init(key, node["scale"].shape)
        if "kernel" in node:
            bound = 1.0 / math.sqrt(math.prod(node["kernel"].shape[:-1]))
            return {name: bound * uniform(node[name].shape) for name in sorted(node)}
        return {name: fill(node[name]) for name in sorted(node)}

    return fill(shapes)


def affine_init(key: jax.Array, kernel_shape: tuple[int, ...]) -> Params:
    """`{"kernel", "bias"}`, both U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    Args:
      kernel_shape: `[..., C_in / groups, features]`; fan_in is the product of all but the last.
    """
    shapes = {"kernel": kernel_shape, "bias": kernel_shape[-1:]}
    return drawn({name: _of(shape) for name, shape in shapes.items()}, key)


def scale_and_bias_init(key: jax.Array, shape: tuple[int, ...]) -> Params:
    """`{"scale": ones, "bias": zeros}`: `[C]`, or `[K, C]` for a class-conditional norm."""
    del key
    return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}


def embedding_init(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """`[K, D]`, N(0, 1)."""
    return drawn(_of(shape), key)


def _of(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
