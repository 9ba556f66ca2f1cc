"""XLA's convolution with a kernel gradient of our own on CPUs.

On XLA CPU the gradient to the kernel takes five times its forward convolution at batch 64 and
eighteen times at batch 200: what it rearranges no longer fits a processor's cache. Here it is the
sum of the gradients of a few images at a time, the same products; elsewhere it is XLA's.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lrq_jax.ops.by_platform import platform_form, traced_once
from lrq_jax.ops.divisors import largest_divisor, shares_of

CACHED_VALUES = 2**18
"""Of the images and the gradients of a part: 1 MiB."""
IMAGES = 8
"""The most images of a part; more are slower on small maps, which the cache would hold."""
WHOLE_VALUES = 2**20
"""Of images and gradients below which XLA's own is as fast."""
MOST_PARTS = 16
"""Each is compiled for itself: a loop is ten times slower, since XLA runs its convolutions on one
thread and without Eigen."""

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def convolution(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding, dilation: Pair,
                groups: int) -> jax.Array:  # fmt: skip
    """`lax.conv_general_dilated`, channels last.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[kh, kw, C / groups, F]`.
      strides, padding, dilation, groups: as there, padding explicit.

    Returns:
      `[B, H', W', F]`.
    """
    return _convolve(x, kernel, strides, padding, dilation, groups)


def _convolve(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding, dilation: Pair,
              groups: int) -> jax.Array:  # fmt: skip
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _forward(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding, dilation: Pair,
             groups: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:  # fmt: skip
    return convolution(x, kernel, strides, padding, dilation, groups), (x, kernel)


@traced_once(static_argnums=(0, 1, 2, 3))
def _backward(strides: Pair, padding: Padding, dilation: Pair, groups: int,
              residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    x, kernel = residuals

    window = (strides, padding, dilation, groups)

    def of_images(x: jax.Array) -> jax.Array:
        return _convolve(x, kernel, *window)

    def by_parts(x: jax.Array, kernel: jax.Array, grad: jax.Array) -> jax.Array:
        return _by_parts(x, kernel, grad, *window)

    def by_xla(x: jax.Array, kernel: jax.Array, grad: jax.Array) -> jax.Array:
        return _plain(x, kernel, grad, *window)

    (to_images,) = jax.vjp(of_images, x)[1](grad)
    to_kernel = platform_form(x, kernel, grad, cpu=by_parts, default=by_xla)
    return to_images, to_kernel


convolution.defvjp(_forward, _backward)


def _plain(x: jax.Array, kernel: jax.Array, grad: jax.Array, strides: Pair, padding: Padding,
           dilation: Pair, groups: int) -> jax.Array:  # fmt: skip
    def of_kernel(kernel: jax.Array) -> jax.Array:
        return _convolve(x, kernel, strides, padding, dilation, groups)

    return jax.vjp(of_kernel, kernel)[1](grad)[0]


def _exchanged(x: jax.Array, kernel: jax.Array, grad: jax.Array, padding: Padding,
               dilation: Pair) -> jax.Array:  # fmt: skip
    """With images and gradient in each other's place: the same sums, the kernel turned round."""
    turned = jnp.swapaxes(kernel, 2, 3)
    reach = (dilation[0] * (kernel.shape[0] - 1), dilation[1] * (kernel.shape[1] - 1))
    (top, bottom), (left, right) = padding
    across = ((reach[0] - top, reach[0] - bottom), (reach[1] - left, reach[1] - right))
    found = _plain(grad, turned, x, (1, 1), across, dilation, 1)
    return jnp.swapaxes(found[::-1, ::-1], 2, 3)


def _by_parts(x: jax.Array, kernel: jax.Array, grad: jax.Array, strides: Pair, padding: Padding,
              dilation: Pair, groups: int) -> jax.Array:  # fmt: skip
    """The sum of the gradients of a few images at a time."""
    # XLA is slow where a kernel makes few features of many channels, not the other way round.
    exchanged = groups == 1 and strides == (1, 1) and grad.shape[-1] < x.shape[-1]
    batch, parts = x.shape[0], _number_of_parts(x.shape[0], x.size + grad.size)
    # Every n-th image is in one part: of a batch split over devices each holds some of all parts.
    xs, grads = (a.reshape(batch // parts, parts, *a.shape[1:]) for a in (x, grad))
    total: Any = None
    for i in range(parts):
        part = (xs[:, i], kernel, grads[:, i])
        if exchanged:
            term = _exchanged(*part, padding, dilation)
        else:
            term = _plain(*part, strides, padding, dilation, groups)
        total = term if total is None else total + term
    return total


def _number_of_parts(batch: int, values: int) -> int:
    """A divisor of what one device holds: near one part for each `CACHED_VALUES` and each `IMAGES`
    of it."""
    shares = shares_of(batch)
    batch, values = batch // shares, values // shares
    if values < WHOLE_VALUES:
        return 1
    wanted = max(-(-values // CACHED_VALUES), -(-batch // IMAGES))
    return largest_divisor(batch, min(wanted, MOST_PARTS))
