"""Depthwise convolution with its own gradient.

On XLA CPU a grouped `conv_general_dilated` is 5-50 times slower than the same sum written as
shifted products, and its kernel gradient slower still. On GPUs cuDNN has no fast kernels for
dilated ones: the kernel gradient of the attention's takes 40 times what sums of products do, the
rest 4 times what it takes over every third row and column (H200, float32). On TPUs XLA's own is
used. The forms are chosen when a program is lowered, so one function serves every platform.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lrq_jax.ops.by_platform import platform_form
from lrq_jax.ops.computed_once import computed_once
from lrq_jax.ops.divisors import largest_divisor, shares_of

CACHED_VALUES = 2**15
"""Of each of two arrays that are multiplied again and again: 128 KiB each. With 1 MiB the attention's
and MobileNets' 3x3 gradients at 32 px take twice the time, with 32 KiB slightly longer (Intel Xeon)."""

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]
Gradients = tuple[jax.Array, jax.Array]
"""To the images, to the kernel."""


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

    def shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return shifted_products(x, kernel, strides, padding, dilation)

    def shifted_once(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return computed_once(shifted(x, kernel))

    def grouped(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _grouped(x, kernel, strides, padding, dilation)

    def on_gpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if _is_dilated_inside(kernel.shape, strides, padding, dilation):
            return _over_phases(x, kernel, dilation)
        return shifted(x, kernel)

    return platform_form(x, kernel, cpu=shifted_once, gpu=on_gpu, default=grouped)


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


def _is_dilated_inside(kernel_shape: tuple[int, ...], strides: Pair, padding: Padding,
                       dilation: Pair) -> bool:  # fmt: skip
    """Whether it is dilated and gives every pixel one of its own: what `_over_phases` can do."""
    edges = tuple((d * (k // 2),) * 2 for d, k in zip(dilation, kernel_shape[:2], strict=True))
    odd = all(size % 2 for size in kernel_shape[:2])
    return odd and dilation != (1, 1) and strides == (1, 1) and padding == edges


def _over_phases(x: jax.Array, kernel: jax.Array, dilation: Pair) -> jax.Array:
    """A dilated convolution that keeps the size: pixels of one phase (row and column modulo the
    dilation) see only each other, so that phases are images of a convolution without dilation."""
    batch, height, width, channels = x.shape
    d, e = dilation
    rows, columns = -(-height // d), -(-width // e)
    x = jnp.pad(x, ((0, 0), (0, rows * d - height), (0, columns * e - width), (0, 0)))
    x = x.reshape(batch, rows, d, columns, e, channels).transpose(0, 2, 4, 1, 3, 5)
    (top, left) = (size // 2 for size in kernel.shape[:2])
    y = _grouped(
        x.reshape(-1, rows, columns, channels), kernel, (1, 1), ((top, top), (left, left)), (1, 1)
    )
    y = y.reshape(batch, d, e, rows, columns, channels).transpose(0, 3, 1, 4, 2, 5)
    return y.reshape(batch, rows * d, columns * e, channels)[:, :height, :width]


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
    taps = _summable(kernel).reshape(-1, kernel.shape[3])
    total: Any = None
    for tap, window in enumerate(windows(padded, kernel.shape, strides, dilation)):
        term = _summable(window) * taps[tap]
        total = term if total is None else total + term
    return total.astype(x.dtype)


def _summable(x: jax.Array) -> jax.Array:
    """In a type whose sums of products do not lose what the products say."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _forward(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding,
             dilation: Pair) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:  # fmt: skip
    return depthwise_conv(x, kernel, strides, padding, dilation), (x, kernel)


def _backward(strides: Pair, padding: Padding, dilation: Pair,
              residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    x, kernel = residuals
    window = (strides, padding, dilation)

    def by_hand(x: jax.Array, kernel: jax.Array, grad: jax.Array) -> Gradients:
        return (
            computed_once(_input_gradient(x.shape, kernel, grad, *window)),
            _kernel_gradient(x, kernel.shape, grad, *window),
        )

    def by_xla(x: jax.Array, kernel: jax.Array, grad: jax.Array) -> Gradients:
        pullback = jax.vjp(lambda x, k: _grouped(x, k, *window), x, kernel)[1]
        return pullback(grad)

    def on_gpu(x: jax.Array, kernel: jax.Array, grad: jax.Array) -> Gradients:
        if _is_dilated_inside(kernel.shape, *window):
            to_x = _over_phases(grad, kernel[::-1, ::-1], dilation)
        else:
            to_x = _input_gradient(x.shape, kernel, grad, *window)
        if dilation == (1, 1):
            return to_x, by_xla(x, kernel, grad)[1]
        return to_x, _kernel_gradient_by_taps(x, kernel.shape, grad, *window)

    return platform_form(x, kernel, grad, cpu=by_hand, gpu=on_gpu, default=by_xla)


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


def _kernel_gradient_by_taps(x: jax.Array, kernel_shape: tuple[int, ...], grad: jax.Array,
                             strides: Pair, padding: Padding, dilation: Pair) -> jax.Array:  # fmt: skip
    """Per offset, the sum of (shifted input * gradient) over all pixels."""
    grad = _summable(grad)
    taps = [
        jnp.sum(_summable(window) * grad, (0, 1, 2))
        for window in windows(_pad(x, padding), kernel_shape, strides, dilation)
    ]
    return jnp.stack(taps).reshape(*kernel_shape[:2], 1, -1).astype(x.dtype)


def _kernel_gradient(x: jax.Array, kernel_shape: tuple[int, ...], grad: jax.Array, strides: Pair,
                     padding: Padding, dilation: Pair) -> jax.Array:  # fmt: skip
    """Per offset, ones @ (shifted input * gradient): a matrix product sums faster than a reduce.

    All offsets of a part that stays in a processor's cache before the next part: several times
    faster than offset by offset over the whole.
    """
    batch, height, width, channels = grad.shape
    shares = shares_of(batch)
    share = largest_divisor(batch // shares, CACHED_VALUES // (height * width * channels))
    rows = largest_divisor(height, CACHED_VALUES // (share * width * channels))
    images = shares * share
    # Every n-th image is in one part: of a batch split over devices each holds some of all parts.
    padded = _pad(x, padding)
    padded = padded.reshape(images, batch // images, *padded.shape[1:])
    grad = grad.reshape(images, batch // images, height, width, channels)
    ones = jnp.ones((shares, share * rows * width), grad.dtype)
    extent = ((rows - 1) * strides[0] + 1, (width - 1) * strides[1] + 1)

    def tap(place: jax.Array) -> jax.Array:
        number, top, i, j = place
        start = (0, number, top * strides[0] + i * dilation[0], j * dilation[1], 0)
        window = lax.dynamic_slice(padded, start, (images, 1, *extent, channels))
        shifted = window[:, :, :: strides[0], :: strides[1]]
        part = lax.dynamic_slice(grad, (0, number, top, 0, 0), (images, 1, rows, width, channels))
        products = (shifted * part).reshape(shares, -1, channels)
        return jnp.einsum("sn,snc->sc", ones, products)

    offsets = _offsets(kernel_shape)
    parts = itertools.product(range(batch // images), range(0, height, rows), offsets)
    places = np.asarray([(number, top, i, j) for number, top, (i, j) in parts])
    taps = lax.map(tap, jnp.asarray(places)).reshape(-1, len(offsets), shares, channels)
    return taps.sum((0, 2)).reshape(*kernel_shape[:2], 1, channels)


depthwise_conv.defvjp(_forward, _backward)
