"""Random resized crop and flip, inside jit, one draw per image."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def random_resized_crop_flip(key: jax.Array, images: jax.Array, *, smallest_area: float = 0.5) -> jax.Array:  # fmt: skip
    """Crops a random part of each image, resizes it back (bilinear), flips half of them.

    As torchvision's RandomResizedCrop with area in (smallest_area, 1) and log-uniform aspect
    ratio in (3/4, 4/3) clipped to the image, then RandomHorizontalFlip.

    Args:
      key: PRNG key.
      images: `[B, H, W, C]`.

    Returns:
      `[B, H, W, C]`; differentiable in `images`.
    """
    batch, height, width, _ = images.shape
    area_key, ratio_key, place_key, flip_key = jax.random.split(key, 4)
    area = jax.random.uniform(area_key, (batch,), minval=smallest_area, maxval=1.0)
    ratio = jnp.exp(
        jax.random.uniform(ratio_key, (batch,), minval=jnp.log(3 / 4), maxval=jnp.log(4 / 3))
    )
    # The ratio is of pixels: an image's own shape is divided out of the fractions of its sides.
    share = jnp.stack([area / ratio * (width / height), area * ratio * (height / width)], axis=1)
    fraction = jnp.minimum(jnp.sqrt(share), 1.0)  # [B, 2]: of height and width
    size = jnp.asarray([height, width], images.dtype)
    corner = jax.random.uniform(place_key, (batch, 2)) * (1 - fraction) * size
    flip = jax.random.bernoulli(flip_key, 0.5, (batch,))

    def one(image: jax.Array, fraction: jax.Array, corner: jax.Array, flip: jax.Array) -> jax.Array:
        scale = 1.0 / fraction
        image = jax.image.scale_and_translate(
            image, image.shape, (0, 1), scale, -corner * scale, method="linear", antialias=False
        )
        return jnp.where(flip, image[:, ::-1], image)

    return jax.vmap(one)(images, fraction, corner, flip)
