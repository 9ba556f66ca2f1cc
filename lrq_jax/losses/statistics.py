"""The batch-norm statistics loss, in its forms, and that of images themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Moments = tuple[jax.Array, jax.Array]

SMALLEST_VARIANCE = 1e-3
"""Added to variances that are divided by: channels that are all but constant weigh no more."""
_SMALLEST_SQUARE = 1e-6
"""Added to variances whose root is taken; Genie's."""


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

    def distance(mean: jax.Array, variance: jax.Array, running: Moments) -> jax.Array:
        running_mean, running_var = running
        return jnp.square(mean - running_mean) + jnp.square(variance - running_var)

    return _mean_distance(inputs, running, distance)


def relative_batch_norm_statistics(inputs: Sequence[jax.Array], running: Sequence[Moments]) -> jax.Array:  # fmt: skip
    """As `batch_norm_statistics`, in units of each channel's running standard deviation.

    `mean_l mean_c [ ((mu - running_mean) / s)^2 + (sigma / s - 1)^2 ]` with sigma and s the
    batch's and the running standard deviation, `SMALLEST_VARIANCE` added under both roots. So no
    layer or channel outweighs another by the scale of its activations, which in the plain form
    decides alone: squared variances of a wide-ranging layer. Source: ours; standard deviations
    instead of variances as in Genie (arXiv 2212.04780).

    Args, Returns, Raises: as `batch_norm_statistics`.
    """

    def distance(mean: jax.Array, variance: jax.Array, running: Moments) -> jax.Array:
        running_mean, running_var = running
        whole = running_var + SMALLEST_VARIANCE
        shift = jnp.square(mean - running_mean) / whole
        return shift + jnp.square(jnp.sqrt((variance + SMALLEST_VARIANCE) / whole) - 1)

    return _mean_distance(inputs, running, distance)


def batch_norm_deviations(inputs: Sequence[jax.Array], running: Sequence[Moments]) -> jax.Array:
    """As `batch_norm_statistics`, of standard deviations instead of variances, summed over layers.

    `sum_l mean_c [ (mu - running_mean)^2 + (sigma - s)^2 ]` with sigma and s the batch's and the
    running standard deviation, `_SMALLEST_SQUARE` added under both roots. Source: Genie
    (arXiv 2212.04780), whose sigma of the batch is the unbiased one: no difference that matters.

    Args, Returns, Raises: as `batch_norm_statistics`.
    """

    def distance(mean: jax.Array, variance: jax.Array, running: Moments) -> jax.Array:
        running_mean, running_var = running
        return jnp.square(mean - running_mean) + jnp.square(
            _deviation(variance) - _deviation(running_var)
        )

    return _mean_distance(inputs, running, distance) * len(inputs)


def image_statistics(images: jax.Array) -> jax.Array:
    """Distance of each image's own statistics from those of normalised pixels, 0 and 1.

    `mean_b sum_c [ mu_bc^2 + (sigma_bc - 1)^2 ]` over height and width. Source: Genie
    (arXiv 2212.04780), which adds it to `batch_norm_deviations` with weight 1.

    Args:
      images: `[B, H, W, C]` in the teacher's normalised input space.
    """
    mean = jnp.mean(images, (1, 2))
    variance = jnp.mean(jnp.square(images - mean[:, None, None]), (1, 2))
    return jnp.mean(jnp.sum(jnp.square(mean) + jnp.square(_deviation(variance) - 1), -1))


STATISTICS = {
    "variance": batch_norm_statistics,
    "relative": relative_batch_norm_statistics,
    "deviation": batch_norm_deviations,
}
"""Forms of the loss, by the name a method gives them."""


def _deviation(variance: jax.Array) -> jax.Array:
    """Its root, with a finite gradient at 0."""
    return jnp.sqrt(variance + _SMALLEST_SQUARE)


def _mean_distance(inputs: Sequence[jax.Array], running: Sequence[Moments],
                   distance: Callable[[jax.Array, jax.Array, Moments], jax.Array]) -> jax.Array:  # fmt: skip
    """Mean over layers of the mean over channels of `distance(mean, variance, running)`."""
    if not inputs:
        raise ValueError(
            "found a teacher without batch norms, expected at least one: their running statistics "
            "are what images are matched to; take the network before its batch norms were folded"
        )
    total = jnp.float32(0.0)
    for x, moments in zip(inputs, running, strict=True):
        axes = tuple(range(x.ndim - 1))
        mean = jnp.mean(x, axes)
        variance = jnp.mean(jnp.square(x - mean), axes)
        total += jnp.mean(distance(mean, variance, moments))
    return total / len(inputs)
