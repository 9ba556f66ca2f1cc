"""Updates made large enough to change a share of the integer codes."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def inundated(update: jax.Array, weight: jax.Array, step: jax.Array, share: float) -> jax.Array:
    """A weight's update, scaled up until `share` of its codes change; never scaled down.

    Near convergence a learning rate moves hardly any weight over the next rounding threshold, so
    the integer network stops learning. Gradient inundation (AIT, arXiv 2203.17008)
    raises a tensor's rate until a share T of its codes change. The factor at which weight i
    crosses is `(distance to its threshold in the update's direction) / |update_i|`; the k-th
    smallest of them, `k = ceil(T n)`, is the answer in closed form where AIT searches.

    Args:
      update: what the optimiser wants to add to the weight, any shape.
      weight: same shape; its code is `round(weight / step)` plus a zero point.
      step: size of a code, broadcastable to `weight`.
      share: T in [0, 1]; 1e-3 at 32 px and 1e-4 on ImageNet in the paper.

    Returns:
      Same shape as `update`.
    """
    count = -int(-share * update.size // 1)
    if count < 1:
        return update
    place = weight / step
    offset = place - jnp.rint(place)  # in [-1/2, 1/2] of a code
    distance = (0.5 - jnp.sign(update) * offset) * step
    factors = jnp.where(update == 0, jnp.inf, distance / jnp.abs(update))
    needed = -jax.lax.top_k(-factors.reshape(-1), count)[0][-1]
    # a hair beyond the threshold, where rounding to even would keep the code
    factor = jnp.maximum(1.0, needed * (1 + 1e-5))
    return update * jnp.where(jnp.isfinite(factor), factor, 1.0)
