"""Losses that tie an image to its class."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean of `-log softmax(logits)[label]`.

    Args:
      logits: `[B, K]`.
      labels: `[B]` int, or class weights `[B, K]` with rows of sum 1; so in all of this module.

    Returns:
      Scalar, in nats.
    """
    return -jnp.mean(_of_label(jax.nn.log_softmax(logits), labels))


def focal_cross_entropy(logits: jax.Array, labels: jax.Array, *, focus: float) -> jax.Array:
    """Mean of `(1 - p_y)^focus * cross-entropy`: images the teacher finds hard count for more.

    Source: HAST's synthesis loss (arXiv 2303.13826), gamma 2 at 32 px and 0.5 on ImageNet.
    `1 - p_y` is kept above 1e-7, where its power has a finite gradient; with focus 0 it is
    `cross_entropy`.

    Args:
      logits: `[B, K]`.
      labels: `[B]` int.
      focus: gamma >= 0.
    """
    if not focus:
        return cross_entropy(logits, labels)
    wrong = jnp.maximum(1 - _of_label(jax.nn.softmax(logits), labels), 1e-7)
    return -jnp.mean(wrong**focus * _of_label(jax.nn.log_softmax(logits), labels))


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
    if hardest >= 1:
        return cross_entropy(logits, labels)
    hard = 1 - _of_label(jax.nn.softmax(teacher_logits), labels) > hardest
    return -jnp.mean(jnp.where(hard, 0.0, _of_label(jax.nn.log_softmax(logits), labels)))


def _of_label(values: jax.Array, labels: jax.Array) -> jax.Array:
    """`[B]`: of values `[B, K]` the label's, or their mean by class weights."""
    if labels.ndim == 2:
        return jnp.sum(labels * values, axis=-1)
    return jnp.take_along_axis(values, labels[:, None], axis=1)[:, 0]


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
    probability = _of_label(jax.nn.softmax(logits), labels)
    return jnp.mean(jnp.square(probability - targets))
