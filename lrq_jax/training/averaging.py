"""A running average of the student's weights, which generalises better than the last of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Average(NamedTuple):
    """An average of weights: their tree (empty when nothing is averaged), and how many went in."""

    weights: Any
    updates: jax.Array


def initial_average(weights: Any, *, decay: float) -> Average:
    """Nothing averaged yet; with `decay` 0, and for good, nothing kept either."""
    copied = jax.tree.map(jnp.array, weights) if decay else {}
    return Average(copied, jnp.int32(0))


def update_average(average: Average, weights: Any, *, decay: float) -> Average:
    """One step of an exponential moving average: `a <- d*a + (1 - d)*w`.

    `d = min(decay, n / (n + 9))` with n the number of weights averaged so far: the first weights
    replace what was there, and a short run is averaged over a part of itself. (Polyak and Juditsky,
    SIAM J. Control Optim. 30, 1992; the warm-up is TensorFlow's `(1 + n) / (10 + n)`, shifted to
    start from 0.)

    Args:
      average: of `initial_average`.
      weights: tree of arrays, after an update.
      decay: largest d, in [0, 1); with 0 nothing is done.
    """
    if not decay:
        return average
    count = average.updates.astype(jnp.float32)
    d = jnp.minimum(decay, count / (count + 9.0))
    mixed = jax.tree.map(lambda a, w: d * a + (1 - d) * w, average.weights, weights)
    return Average(mixed, average.updates + 1)
