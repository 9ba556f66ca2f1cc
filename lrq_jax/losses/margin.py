"""AMA, LRQ's adversarial margin add: an angular margin inside two hinges.

theta is the angle between an image's pooled teacher feature and the centre of its class;
`phi = cos(theta + m) = c*cos(m) - sqrt(1 - c^2)*sin(m)`. Features closer than one hinge are
pushed away and farther than the other pulled in, so classes spread instead of collapsing onto
their centres. Sources: LRQ's released code; hinges of IntraQ (arXiv 2111.09136, equation 6).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

_SMALLEST_SQUARE = 1e-7
"""Floor of 1 - c^2: the derivative of its root is infinite at |cos| = 1."""
_SMALLEST_NORM = 1e-12


class Centers(NamedTuple):
    """Running mean of each class's features: sums `[K, D]` and counts `[K]`."""

    sums: jax.Array
    counts: jax.Array

    @property
    def means(self) -> jax.Array:
        """`[K, D]`; zero for a class without features."""
        return self.sums / jnp.maximum(self.counts, 1.0)[:, None]


def initial_centers(num_classes: int, dim: int) -> Centers:
    """No features seen yet."""
    return Centers(jnp.zeros((num_classes, dim)), jnp.zeros((num_classes,)))


def update_centers(centers: Centers, features: jax.Array, labels: jax.Array) -> Centers:
    """Adds a batch of features `[B, D]` of classes `[B]`; no gradient flows."""
    one_hot = jax.nn.one_hot(labels, centers.counts.shape[0], dtype=features.dtype)
    sums = jnp.dot(one_hot.T, jax.lax.stop_gradient(features))
    return Centers(centers.sums + sums, centers.counts + jnp.sum(one_hot, axis=0))


def cosine_to_centers(features: jax.Array, centers: jax.Array, labels: jax.Array) -> jax.Array:
    """Cosine `[B]` between features `[B, D]` and their class's row of centers `[K, D]`."""

    def unit(x: jax.Array) -> jax.Array:
        square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.maximum(square, _SMALLEST_NORM))

    return jnp.sum(unit(features) * unit(centers[labels]), axis=-1)


def angular_margin_hinge(cosine: jax.Array, mask: jax.Array, *, margin: float, lower: float,
                         upper: float) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`L_low = mean [lower - (1 - phi)]_+` and `L_up = mean [(1 - phi) - upper]_+`.

    Args:
      cosine: `[B]`, of `cosine_to_centers`.
      mask: `[B]`, 1 for images whose class has a centre; the means are over those.
      margin: m, radians.
      lower, upper: hinges on the distance 1 - phi, in [0, 2].

    Returns:
      `(L_low, L_up)`, scalars; 0 where no image counts.
    """
    sine = jnp.sqrt(jnp.maximum(1.0 - jnp.square(cosine), _SMALLEST_SQUARE))
    distance = 1.0 - (cosine * math.cos(margin) - sine * math.sin(margin))
    count = jnp.maximum(jnp.sum(mask), 1.0)
    low = jnp.sum(mask * jax.nn.relu(lower - distance)) / count
    up = jnp.sum(mask * jax.nn.relu(distance - upper)) / count
    return low, up
