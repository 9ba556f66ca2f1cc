"""The batch-norm statistics loss."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Moments = tuple[jax.Array, jax.Array]


def batch_norm_statistics(inputs: Sequence[jax.Array], running: Sequence[Moments]) -> jax.Array:
    """Distance of a batch's statistics from those the teacher saw in training.

    `L_BNS = mean_l [ MSE(mu_l, running_mean_l) + MSE(var_l, running_var_l) ]` with mu and the
    biased var over batch (and height and width) at the INPUT of every batch norm l; MSE is the
    mean over channels. Source: GDFQ (arXiv 2003.03603, equation 4), as its code computes it.

    Args:
      inputs: one `[B, H, W, C_l]` or `[B, C_l]` per batch norm.
      running: `(running_mean, running_var)`, `[C_l]` each, per batch norm.

    Returns:
      Scalar.

    Raises:
      ValueError: no batch norms to match.
    """
    if not inputs:
        raise ValueError(
            "found a teacher without batch norms, expected at least one: their running statistics "
            "are what images are matched to; take the network before its batch norms were folded"
        )
    total = jnp.float32(0.0)
    for x, (running_mean, running_var) in zip(inputs, running, strict=True):
        axes = tuple(range(x.ndim - 1))
        mean = jnp.mean(x, axes)
        variance = jnp.mean(jnp.square(x - mean), axes)
        total += jnp.mean(jnp.square(mean - running_mean))
        total += jnp.mean(jnp.square(variance - running_var))
    return total / len(inputs)
