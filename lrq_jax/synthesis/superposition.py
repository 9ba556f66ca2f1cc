"""Class inputs of the generator that lie between classes."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def superposed_labels(key: jax.Array, labels: jax.Array, *, num_classes: int, count: int,
                      probability: float) -> jax.Array:  # fmt: skip
    """Class weights `[B, K]` of a batch: one class each, or, with `probability`, several.

    A superposed image mixes `count` random classes by `softmax(N(0, 1))` weights; the generator
    gets its embedding of those weights, and the losses get them as soft labels, so that some
    images lie at the student's decision boundaries. The coin is thrown once a batch. Source:
    Qimera (arXiv 2111.02625): probability 0.4; count 2 for CIFAR-10, 10 for CIFAR-100.

    Args:
      key: PRNG key.
      labels: `[B]` int, the classes of a batch that is not superposed.
      num_classes: K.
      count: classes an image mixes, drawn without repetition.
      probability: of a superposed batch.

    Returns:
      Rows of sum 1.

    Raises:
      ValueError: more classes to mix than there are.
    """
    if not 1 <= count <= num_classes:
        raise ValueError(f"superposed classes: found {count}, expected 1 to {num_classes}")
    coin_key, class_key, weight_key = jax.random.split(key, 3)
    ranks = jax.random.uniform(class_key, (labels.shape[0], num_classes))
    _, classes = jax.lax.top_k(ranks, count)
    weights = jax.nn.softmax(jax.random.normal(weight_key, classes.shape))
    mixed = jnp.einsum("bn,bnk->bk", weights, jax.nn.one_hot(classes, num_classes))
    coin = jax.random.bernoulli(coin_key, probability)
    return jnp.where(coin, mixed, jax.nn.one_hot(labels, num_classes))
