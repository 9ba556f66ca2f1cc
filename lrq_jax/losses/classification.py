"""Losses that tie an image to its class."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean of `-log softmax(logits)[label]`.

    Args:
      logits: `[B, K]`.
      labels: `[B]` int.

    Returns:
      Scalar, in nats.
    """
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[:, None], axis=1))


def sample_targets(key: jax.Array, batch: int, *, lowest: float, probability: float = 0.5) -> jax.Array:  # fmt: skip
    """Targets of `squared_target_error` `[B]`: 1 with `probability`, else U(lowest, 1).

    Source: IntraQ's marginal-distance images (arXiv 2111.09136), soft inception targets.
    """
    hard_key, soft_key = jax.random.split(key)
    soft = jax.random.uniform(soft_key, (batch,), minval=lowest, maxval=1.0)
    return jnp.where(jax.random.bernoulli(hard_key, probability, (batch,)), 1.0, soft)


def squared_target_error(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean of `(p_y - t)^2` with `p = softmax(logits)`; the class loss of noise images.

    Args:
      logits: `[B, K]`.
      labels: `[B]` int.
      targets: `[B]` in [0, 1]; see `sample_targets`.
    """
    probability = jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None], axis=1)[:, 0]
    return jnp.mean(jnp.square(probability - targets))
