"""Frequencies of images, against transforms of numpy and scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from lrq_jax.synthesis.spectrum import coloured, low_pass

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(("height", "width", "cutoff"), [(8, 8, 1.5), (9, 12, 3.0)])
def test_low_pass_is_the_filter_in_the_frequency_domain(rng, height, width, cutoff):
    images = rng.standard_normal((3, height, width, 2)).astype(np.float32)
    spectrum = np.fft.fftshift(np.fft.fft2(np.float64(images), axes=(1, 2)), axes=(1, 2))
    for i in range(height):
        for j in range(width):
            square = (i - height // 2) ** 2 + (j - width // 2) ** 2
            spectrum[:, i, j] *= np.exp(-square / (2 * cutoff**2))
    expected = np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(1, 2)), axes=(1, 2))
    assert np.abs(expected.imag).max() < 1e-9
    found = jax.jit(low_pass, static_argnums=1)(jnp.asarray(images), cutoff)
    np.testing.assert_allclose(found, expected.real, atol=1e-5)
    np.testing.assert_allclose(low_pass(jnp.ones((1, 8, 8, 1)), cutoff), 1, rtol=1e-5)


@pytest.mark.parametrize(("height", "width", "exponent"), [(8, 8, 1.0), (9, 12, 1.5), (6, 5, 0.0)])
def test_coloured_noise_falls_with_the_frequency(rng, height, width, exponent):
    noise = rng.standard_normal((2, height, width, 3)).astype(np.float32)
    gains = np.empty((height, width))
    for i in range(height):
        for j in range(width):
            gains[i, j] = max(np.sqrt(i**2 + j**2) / 2, 1) ** -exponent
    gains /= np.sqrt(np.mean(gains**2))
    expected = scipy.fft.idctn(noise * gains[..., None], axes=(1, 2), norm="ortho")
    found = jax.jit(coloured, static_argnums=1)(jnp.asarray(noise), exponent)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_coloured_noise_has_the_variance_of_white_noise(rng):
    white = rng.standard_normal((300, 16, 16, 1)).astype(np.float32)
    assert np.var(coloured(jnp.asarray(white), 1.0)) == pytest.approx(1, abs=0.05)
