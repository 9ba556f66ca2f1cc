"""Updates made large enough to change a share of the integer codes."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def inundated(update: jax.Array, weight: jax.Array, step: jax.Array, lowest: jax.Array,
              highest: jax.Array, share: float) -> jax.Array:  # fmt: skip
    """A weight's update, scaled up until `share` of its codes change; never scaled down.

    Near convergence a learning rate moves hardly any weight over the next rounding threshold, so
    the integer network stops learning. Gradient inundation (AIT, arXiv 2203.17008)
    raises a tensor's rate until a share T of its codes change. The factor at which weight i
    crosses is `(distance to its threshold in the update's direction) / |update_i|`; the k-th
    smallest of them, `k = ceil(T n)`, is the answer in closed form where AIT searches.

    Args:
      update: what the optimiser wants to add to the weight, any shape.
      weight: same shape; its code is `round(weight / step)`, held between the limits, plus a
        zero point.
      step: size of a code, broadcastable to `weight`.
      lowest, highest: limits of the codes less their zero point, broadcastable to `weight`. A
        weight that is beyond them has further to go, and none at all if it goes farther.
      share: T in [0, 1]; 1e-3 at 32 px and 1e-4 on ImageNet in the paper.

    Returns:
      Same shape as `update`.
    """
    count = -int(-share * update.size // 1)
    if count < 1:
        return update
    place, direction = weight / step, jnp.sign(update)
    code = jnp.clip(jnp.rint(place), lowest, highest)
    distance = (0.5 - direction * (place - code)) * step
    follows = (lowest <= code + direction) & (code + direction <= highest)
    factors = jnp.where((update != 0) & follows, distance / jnp.abs(update), jnp.inf)
    needed = -jax.lax.top_k(-factors.reshape(-1), count)[0][-1]
    # a hair beyond the threshold, where rounding to even would keep the code
    factor = jnp.maximum(1.0, needed * (1 + 1e-5))
    return update * jnp.where(jnp.isfinite(factor), factor, 1.0)
