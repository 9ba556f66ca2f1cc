"""Losses that align what the student sees inside with what the teacher sees."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

_SMALLEST_NORM = 1e-12


def channel_attention(features: jax.Array) -> jax.Array:
    """Which channels of each image are active: mean squares, scaled to length 1.

    Args:
      features: `[B, H, W, C]`.

    Returns:
      `[B, C]`, each row of Euclidean length 1 (0 where all features are 0).
    """
    energy = jnp.mean(jnp.square(features), (1, 2))
    square = jnp.sum(jnp.square(energy), -1, keepdims=True)
    return energy * jax.lax.rsqrt(jnp.maximum(square, _SMALLEST_NORM))


def channel_attention_alignment(student: Sequence[jax.Array], teacher: Sequence[jax.Array]) -> jax.Array:  # fmt: skip
    """`sum_l mean_bc (a_l(student) - a_l(teacher))^2`, a_l the channel attention of block l.

    Source: HAST's feature alignment (arXiv 2303.13826), which weighs it by 1000 at
    32 px and 4000 on ImageNet.

    Args:
      student, teacher: outputs of the same blocks, `[B, H_l, W_l, C_l]` each.

    Returns:
      Scalar.

    Raises:
      ValueError: no blocks.
    """
    if not student:
        raise ValueError("channel attention: found no blocks, expected at least one")
    differences = [
        jnp.mean(jnp.square(channel_attention(a) - channel_attention(b)))
        for a, b in zip(student, teacher, strict=True)
    ]
    return sum(differences, jnp.float32(0))


def class_activation_map(features: jax.Array, classifier: jax.Array, labels: jax.Array) -> jax.Array:  # fmt: skip
    """Where an image shows its class: `relu(sum_c w_yc A_c)`, scaled to a largest value of 1.

    Behind an average pool and a dense layer this is Grad-CAM (arXiv 1610.02391) of the last
    feature map exactly, up to that scale: the gradient of logit y is `w_y` everywhere.

    Args:
      features: A, `[B, H, W, C]`, what the global pool reads.
      classifier: kernel `[C, K]` of the dense layer behind it.
      labels: y, `[B]`.

    Returns:
      `[B, H, W]` in [0, 1]; all 0 where nothing speaks for the class.
    """
    heat = jax.nn.relu(jnp.einsum("bhwc,bc->bhw", features, classifier.T[labels]))
    return heat / jnp.maximum(jnp.max(heat, (1, 2), keepdims=True), _SMALLEST_NORM)


def class_activation_alignment(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean squared difference of class activation maps `[B, H, W]` (SynQ, ICLR 2025, its
    class-activation-map alignment)."""
    return jnp.mean(jnp.square(student - teacher))
