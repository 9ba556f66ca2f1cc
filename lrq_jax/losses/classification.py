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


def soft_cross_entropy(logits: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean of `-sum_k w_k log softmax(logits)_k`; of one-hot weights it is `cross_entropy`.

    Args:
      logits: `[B, K]`.
      weights: `[B, K]`, rows of sum 1.
    """
    return -jnp.mean(jnp.sum(weights * jax.nn.log_softmax(logits), axis=-1))


def focal_cross_entropy(logits: jax.Array, labels: jax.Array, *, focus: float) -> jax.Array:
    """Mean of `(1 - p_y)^focus * cross-entropy`: images the teacher finds hard count for more.

    Source: HAST's synthesis loss (arXiv 2303.13826), gamma 2 at 32 px and 0.5 on
    ImageNet. `1 - p_y` is kept above 1e-7, where its power has a finite gradient; with focus 0
    it is `cross_entropy`.

    Args:
      logits: `[B, K]`.
      labels: `[B]` int.
      focus: gamma >= 0.
    """
    log_probabilities = jax.nn.log_softmax(logits)
    log_right = jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]
    return jnp.mean(-log_right * jnp.maximum(1 - jnp.exp(log_right), 1e-7) ** focus)


def easy_cross_entropy(logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array, *,
                       hardest: float) -> jax.Array:  # fmt: skip
    """`cross_entropy` without the images that the teacher itself finds hard, `1 - p_y > hardest`.

    Source: SynQ (ICLR 2025), tau 0.5 to 0.7: on hard synthetic images the label misleads.
    The mean is over all images, the hard ones counting 0; with `hardest` 1 it is `cross_entropy`.

    Args:
      logits, teacher_logits: `[B, K]`.
      labels: `[B]` int.
      hardest: tau in [0, 1].
    """
    pick = labels[:, None]
    right = jnp.take_along_axis(jax.nn.softmax(teacher_logits), pick, axis=1)[:, 0]
    log_right = jnp.take_along_axis(jax.nn.log_softmax(logits), pick, axis=1)[:, 0]
    return -jnp.mean(jnp.where(1 - right > hardest, 0.0, log_right))


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
