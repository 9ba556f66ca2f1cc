"""Depthwise convolution with its own gradient.

On XLA CPU a grouped `conv_general_dilated` is 5-50 times slower than the same sum written as
shifted products, and its kernel gradient slower still; elsewhere XLA's own is used. Both forms
are chosen when a program is lowered, so one function serves every platform.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lrq_jax.ops.divisors import largest_divisor

CACHED_VALUES = 2**18
"""Of each of two arrays that are multiplied again and again: 1 MiB each."""

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def depthwise_conv(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding,
                   dilation: Pair) -> jax.Array:  # fmt: skip
    """One filter per channel, as `lax.conv_general_dilated` with `feature_group_count=C`.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[kh, kw, 1, C]`.
      strides, padding, dilation: as in `lax.conv_general_dilated`, padding explicit and >= 0.

    Returns:
      `[B, H', W', C]`.
    """
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: shifted_products(x, kernel, strides, padding, dilation),
        default=lambda x, kernel: _grouped(x, kernel, strides, padding, dilation),
    )


def _grouped(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding, dilation: Pair) -> jax.Array:  # fmt: skip
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _pad(x: jax.Array, padding: Padding) -> jax.Array:
    return jnp.pad(x, ((0, 0), *padding, (0, 0)))


def _offsets(kernel_shape: tuple[int, ...]) -> list[Pair]:
    return [(i, j) for i in range(kernel_shape[0]) for j in range(kernel_shape[1])]


def windows(padded: jax.Array, kernel_shape: tuple[int, ...], strides: Pair, dilation: Pair) -> list[jax.Array]:  # fmt: skip
    """What each tap of a kernel `[kh, kw, ...]` sees of `[B, H, W, C]`: kh*kw times `[B, H', W', C]`."""
    height, width = (
        (padded.shape[1 + axis] - dilation[axis] * (kernel_shape[axis] - 1) - 1) // strides[axis]
        for axis in range(2)
    )
    return [
        padded[
            :,
            top : top + height * strides[0] + 1 : strides[0],
            left : left + width * strides[1] + 1 : strides[1],
        ]
        for top, left in ((i * dilation[0], j * dilation[1]) for i, j in _offsets(kernel_shape))
    ]


def shifted_products(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding,
                      dilation: Pair) -> jax.Array:  # fmt: skip
    """Sum over offsets of (shifted input * one tap per channel)."""
    # XLA would repeat whatever made the input (an exact GELU, say) at every offset.
    padded = lax.optimization_barrier(_pad(x, padding))
    taps = kernel.reshape(-1, kernel.shape[3])
    total: Any = None
    for tap, window in enumerate(windows(padded, kernel.shape, strides, dilation)):
        term = window * taps[tap]
        total = term if total is None else total + term
    return total


def _forward(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding,
             dilation: Pair) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:  # fmt: skip
    return depthwise_conv(x, kernel, strides, padding, dilation), (x, kernel)


def _backward(strides: Pair, padding: Padding, dilation: Pair,
              residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    def by_hand(x: jax.Array, kernel: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (
            _input_gradient(x.shape, kernel, grad, strides, padding, dilation),
            _kernel_gradient(x, kernel.shape, grad, strides, padding, dilation),
        )

    def by_xla(x: jax.Array, kernel: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
        pullback = jax.vjp(lambda x, k: _grouped(x, k, strides, padding, dilation), x, kernel)[1]
        return pullback(grad)

    return lax.platform_dependent(*residuals, grad, cpu=by_hand, default=by_xla)


def _input_gradient(shape: tuple[int, ...], kernel: jax.Array, grad: jax.Array, strides: Pair,
                    padding: Padding, dilation: Pair) -> jax.Array:  # fmt: skip
    """The transposed convolution: the flipped kernel over the gradient, spread by the strides."""
    edges = []
    for axis in range(2):
        reach = dilation[axis] * (kernel.shape[axis] - 1)
        spread = (grad.shape[1 + axis] - 1) * strides[axis] + 1
        before = reach - padding[axis][0]
        edges.append((before, shape[1 + axis] + reach - before - spread, strides[axis] - 1))
    zero = jnp.zeros((), grad.dtype)
    grad = lax.pad(grad, zero, ((0, 0, 0), *edges, (0, 0, 0)))
    return shifted_products(grad, kernel[::-1, ::-1], (1, 1), ((0, 0), (0, 0)), dilation)


def _kernel_gradient(x: jax.Array, kernel_shape: tuple[int, ...], grad: jax.Array, strides: Pair,
                     padding: Padding, dilation: Pair) -> jax.Array:  # fmt: skip
    """Per offset, ones @ (shifted input * gradient): a matrix product sums faster than a reduce.

    All offsets of a part that stays in a processor's cache before the next part: 4 times faster
    than offset by offset over the whole.
    """
    batch, height, width, channels = grad.shape
    images = largest_divisor(batch, CACHED_VALUES // (height * width * channels))
    rows = largest_divisor(height, CACHED_VALUES // (images * width * channels))
    # Every n-th image is in one part: of a batch split over devices each holds some of all parts.
    padded = _pad(x, padding)
    padded = padded.reshape(images, batch // images, *padded.shape[1:])
    grad = grad.reshape(images, batch // images, height, width, channels)
    ones = jnp.ones((1, images * rows * width), grad.dtype)
    extent = ((rows - 1) * strides[0] + 1, (width - 1) * strides[1] + 1)

    def tap(place: jax.Array) -> jax.Array:
        number, top, i, j = place
        start = (0, number, top * strides[0] + i * dilation[0], j * dilation[1], 0)
        window = lax.dynamic_slice(padded, start, (images, 1, *extent, channels))
        shifted = window[:, :, :: strides[0], :: strides[1]]
        part = lax.dynamic_slice(grad, (0, number, top, 0, 0), (images, 1, rows, width, channels))
        return jnp.dot(ones, (shifted * part).reshape(-1, channels))[0]

    offsets = _offsets(kernel_shape)
    places = [
        (number, top, i, j)
        for number in range(batch // images)
        for top in range(0, height, rows)
        for i, j in offsets
    ]
    taps = lax.map(tap, jnp.asarray(places)).reshape(-1, len(offsets), channels)
    return taps.sum(0).reshape(*kernel_shape[:2], 1, channels)


depthwise_conv.defvjp(_forward, _backward)
