"""Frequencies of images: a low-pass filter, and the spectrum of photographs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np


def low_pass(images: jax.Array, cutoff: float) -> jax.Array:
    """Images with high frequencies damped: `F^-1(exp(-D^2 / (2 D0^2)) F(x))`.

    D is the distance from frequency 0 in cycles an image. The filter is a product of one over
    rows and one over columns, so it runs as two matrix products, which every backend and every
    gradient has; images go on periodically at their edges, as in any FFT. Source: SynQ (ICLR
    2025), against the noise in synthetic images; D0 about 80 at 224 px, 4 to 16 at 32 px.

    Args:
      images: `[B, H, W, C]`.
      cutoff: D0 > 0, cycles an image.
    """
    _, height, width, _ = images.shape
    rows, columns = (jnp.asarray(_filter(size, cutoff)) for size in (height, width))
    return jnp.einsum("ij,bjkc,lk->bilc", rows, images, columns)


@functools.lru_cache(maxsize=16)
def _filter(size: int, cutoff: float) -> np.ndarray:
    """The filter of one axis as a circulant matrix `[size, size]`."""
    gain = np.exp(-((np.fft.fftfreq(size) * size) ** 2) / (2 * cutoff**2))
    response = np.fft.ifft(gain[:, None] * np.fft.fft(np.eye(size), axis=0), axis=0)
    return response.real.astype(np.float32)


def coloured(noise: jax.Array, exponent: float) -> jax.Array:
    """Images of white noise over frequencies: amplitudes fall as `max(D, 1)^-exponent`.

    D is the distance from frequency 0 in cycles an image. Amplitudes of photographs fall as about
    1 / D (Field, JOSA A 1987): what is optimised over frequencies weighted so starts as a blurred
    picture, and moves large areas before single pixels. Feature visualisations become natural
    this way (Olah et al., Distill 2017, preconditioning), there over the Fourier basis; this is
    the cosine basis, whose images do not go on at their other edge.

    Args:
      noise: `[B, H, W, C]`, coefficients of cosines; N(0, 1) gives images of variance 1.
      exponent: at least 0, where images are white.

    Returns:
      `[B, H, W, C]`.
    """
    _, height, width, _ = noise.shape
    rows, columns = (jnp.asarray(_cosines(size)) for size in (height, width))
    spectrum = noise * jnp.asarray(_fall(height, width, exponent))[..., None]
    return jnp.einsum("ki,bklc,lj->bijc", rows, spectrum, columns)


@functools.lru_cache(maxsize=16)
def _cosines(size: int) -> np.ndarray:
    """The orthonormal cosine transform (DCT-II) as a matrix `[frequency, pixel]`."""
    angles = np.pi * np.arange(size)[:, None] * (np.arange(size) + 0.5) / size
    matrix = np.sqrt(2 / size) * np.cos(angles)
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)


@functools.lru_cache(maxsize=16)
def _fall(height: int, width: int, exponent: float) -> np.ndarray:
    """Gain `[H, W]` of each pair of cosines, the n-th of which has n / 2 cycles; mean square 1."""
    distance = np.hypot(np.arange(height)[:, None] / 2, np.arange(width) / 2)
    gain = np.maximum(distance, 1) ** -exponent
    return (gain / np.sqrt(np.mean(np.square(gain)))).astype(np.float32)
