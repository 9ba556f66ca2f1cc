"""Augmentations of a batch of images, inside jit, one draw per image."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

SHIFT = 1 / 8
"""`random_shift_flip` moves an image by at most this share of its side: 4 pixels of 32."""


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


def random_shift_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Moves each image by up to `SHIFT` of its sides, reflected at the edges, and flips half.

    The usual augmentation of CIFAR training (pad by 4, crop 32 x 32, flip), in whole pixels.

    Args:
      key: PRNG key.
      images: `[B, H, W, C]`.

    Returns:
      `[B, H, W, C]`; differentiable in `images`.
    """
    batch, height, width, _ = images.shape
    rows, columns = max(1, round(height * SHIFT)), max(1, round(width * SHIFT))
    place_key, flip_key = jax.random.split(key)
    most = jnp.asarray([2 * rows + 1, 2 * columns + 1])
    corner = jax.random.randint(place_key, (batch, 2), 0, most)
    flip = jax.random.bernoulli(flip_key, 0.5, (batch, 1, 1, 1))
    images = jnp.where(flip, images[:, :, ::-1], images)
    padded = jnp.pad(images, ((0, 0), (rows, rows), (columns, columns), (0, 0)), mode="reflect")

    def one(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return jax.vmap(one)(padded, corner)


def swing(key: jax.Array, images: jax.Array, *, reach: int) -> jax.Array:
    """Moves a batch, all of it alike, by up to `reach` pixels along each side, reflected at the edges.

    Source: the swing convolution of Genie (arXiv 2212.04780), reach 1: what a strided convolution
    reads is padded by reflection and cropped back at random, so that images are not optimised for
    the pixels on its grid alone.

    Args:
      key: PRNG key.
      images: maps `[B, H, W, C]`.
      reach: at least 0.

    Returns:
      `[B, H, W, C]`; differentiable in `images`.
    """
    corner = jax.random.randint(key, (2,), 0, 2 * reach + 1)
    edge = (reach, reach)
    padded = jnp.pad(images, ((0, 0), edge, edge, (0, 0)), mode="reflect")
    return jax.lax.dynamic_slice(padded, (0, corner[0], corner[1], 0), images.shape)


def mixup(key: jax.Array, images: jax.Array, others: jax.Array, *, probability: float) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Weighted means of pairs of images, `share * image + (1 - share) * other`.

    Source: mixup (arXiv 1710.09412) with Beta(1, 1); in distillation, where the teacher is asked
    again about the mixed image, arXiv 2106.05237.

    Args:
      key: PRNG key.
      images, others: `[B, H, W, C]`.
      probability: of an image being mixed; the rest stay as they are.

    Returns:
      Images `[B, H, W, C]`, and the share `[B]` that each has of its first image.
    """
    coin_key, share_key = jax.random.split(key)
    mixed = jax.random.bernoulli(coin_key, probability, images.shape[:1])
    share = jnp.where(mixed, jax.random.uniform(share_key, images.shape[:1]), 1.0)
    weight = share[:, None, None, None]
    return weight * images + (1 - weight) * others, share


def unchanged(key: jax.Array, images: jax.Array) -> jax.Array:
    """The images as they are."""
    return images


AUGMENTATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "none": unchanged,
    "crop_flip": random_resized_crop_flip,
    "shift_flip": random_shift_flip,
}
"""`(key, images) -> images`, by the name a method gives them."""
