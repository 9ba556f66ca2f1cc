"""Convolution and matrix product as the passes need them: plain, and exact over integers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lrq_jax.ops.by_platform import by_platform, platform_form, traced_once
from lrq_jax.ops.depthwise import depthwise_conv
from lrq_jax.ops.kernel_gradient import convolution
from lrq_jax.ops.pointwise import pointwise_product
from lrq_jax.ops.products import product_of_windows
from lrq_jax.ops.straight_through import straight_through

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]

EXACT_FLOAT32 = 2**24
"""Integers below this are exact in float32, and so are sums that stay below it."""


@traced_once(static_argnames=("strides", "padding", "dilation", "groups"))
def conv2d(x: jax.Array, kernel: jax.Array, *, strides: Pair = (1, 1),
           padding: Padding = ((0, 0), (0, 0)), dilation: Pair = (1, 1), groups: int = 1) -> jax.Array:  # fmt: skip
    """2-D convolution, channels last.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[kh, kw, C / groups, F]`.

    Returns:
      `[B, H', W', F]`.
    """
    if groups > 1 and groups == x.shape[-1] == kernel.shape[-1]:
        return depthwise_conv(x, kernel, strides, padding, dilation)

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return convolution(x, kernel, strides, padding, dilation, groups)

    if groups > 1:
        return plain(x, kernel)
    if kernel.shape[:2] == (1, 1):
        # On XLA CPU the gradients of a matrix product are 5-10 times faster than the convolution's;
        # on GPUs XLA (jax 0.11.2) aborts where it compiles products of every other pixel.
        def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return _product_of_pixels(x, kernel, strides, padding)

        every = strides == (1, 1) and padding == ((0, 0), (0, 0))
        gpu = product if every else None
        return by_platform(cpu=product, gpu=gpu, default=plain)(x, kernel)
    if strides == dilation == (1, 1) and kernel.size <= kernel.shape[2] ** 2:
        # A few features of many channels: a fifth of cuDNN's time, gradients included (H200).
        def shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return _shifted_products_of_pixels(x, kernel, padding)

        return by_platform(cpu=plain, gpu=shifted, default=plain)(x, kernel)
    return plain(x, kernel)


def _product_of_pixels(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding) -> jax.Array:  # fmt: skip
    x = jnp.pad(x, ((0, 0), *padding, (0, 0))) if padding != ((0, 0), (0, 0)) else x
    return pointwise_product(x[:, :: strides[0], :: strides[1]], kernel[0, 0])


def _shifted_products_of_pixels(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """Every tap's product with every pixel, one matrix product; then their sums. The products are
    no larger than `x`: as many a pixel as the kernel has taps and features."""
    rows, columns, channels, features = kernel.shape
    taps = jnp.moveaxis(kernel, 2, 0).reshape(channels, -1)
    products = jnp.dot(x, taps).reshape(*x.shape[:3], rows, columns, features)
    products = jnp.pad(products, ((0, 0), *padding, (0, 0), (0, 0), (0, 0)))
    height, width = products.shape[1] - rows + 1, products.shape[2] - columns + 1
    total: Any = 0
    for i in range(rows):
        for j in range(columns):
            total += products[:, i : i + height, j : j + width, i, j]
    return total


def integer_conv2d(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, largest_product: int,
                   strides: Pair = (1, 1), padding: Padding = ((0, 0), (0, 0)),
                   dilation: Pair = (1, 1), groups: int = 1) -> jax.Array:  # fmt: skip
    """Exact `float32(int32 convolution + int32 bias)` of integer-valued float32 arrays.

    Sums that could pass 2^24 are cut along each group's input channels (and, for kernels of
    hundreds of taps, along the rows) into sums that cannot, each a float convolution, added up as
    int32: no backend needs integer convolutions, which GPUs do not have.
    The gradient is that of the plain convolution.

    Args:
      x: `[B, H, W, C]`, integers.
      kernel: `[kh, kw, C / groups, F]`, integers.
      bias: `[F]`, integers.
      largest_product: bound on |x * kernel|, one product.
      strides, padding, dilation, groups: as in `conv2d`.
    """

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return exact_convolution(x, kernel, strides, padding, dilation, groups)

    height, width, channels = kernel.shape[:3]
    if height * width * channels * largest_product < EXACT_FLOAT32:
        return convolve(x, kernel) + bias

    def exact(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        by_group = x.reshape(*x.shape[:3], groups, channels)
        rows = min(_chunk(width * largest_product), height)
        depth = _chunk(rows * width * largest_product)
        total = bias.astype(jnp.int32)
        for c in range(0, channels, depth):
            part = by_group[..., c : c + depth].reshape(*x.shape[:3], -1)
            taps = kernel[:, :, c : c + depth]
            for r in range(0, height, rows):
                some = jnp.zeros_like(taps).at[r : r + rows].set(taps[r : r + rows])
                total += convolve(part, taps if rows == height else some).astype(jnp.int32)
        return total.astype(jnp.float32)

    frozen = (lax.stop_gradient(value) for value in (x, kernel, bias))
    return straight_through(exact(*frozen), convolve(x, kernel) + bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def exact_convolution(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding,
                      dilation: Pair, groups: int) -> jax.Array:  # fmt: skip
    """`conv2d` of integers whose sums stay below `EXACT_FLOAT32`, without rounding.

    On GPUs a matrix product: cuDNN may choose Winograd's algorithm, which goes through fractions
    and so returns sums that are no integers. The gradient is that of `conv2d`.
    """

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return conv2d(x, kernel, strides=strides, padding=padding, dilation=dilation, groups=groups)

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return product_of_windows(x, kernel, strides, padding, dilation, groups)

    return platform_form(x, kernel, cpu=plain, tpu=plain, default=product)


def _exact_forward(x: jax.Array, kernel: jax.Array, *window: Any) -> tuple[jax.Array, Any]:
    return exact_convolution(x, kernel, *window), (x, kernel)


def _exact_backward(strides: Pair, padding: Padding, dilation: Pair, groups: int, residuals: Any,
                    grad: jax.Array) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    plain = functools.partial(
        conv2d, strides=strides, padding=padding, dilation=dilation, groups=groups
    )
    return jax.vjp(plain, *residuals)[1](grad)


exact_convolution.defvjp(_exact_forward, _exact_backward)


def int8_is_fast(kernel: jax.Array, groups: int) -> bool:
    """Whether XLA's CPU backend runs this convolution faster over int8 than over float32: about
    twice, except with few channels, where it is up to eight times slower."""
    channels, features = kernel.shape[2:]
    return groups == 1 and channels > 3 and features > 16


def int8_conv2d(codes: jax.Array, zero_point: jax.Array, kernel: jax.Array, bias: jax.Array, *,
                bits: int, strides: Pair, padding: Padding, dilation: Pair) -> jax.Array:  # fmt: skip
    """`float32(int32 convolution + int32 bias)` over int8, with int32 accumulators.

    Codes of 8 bits become int8 128 lower; what that takes from the sums is given back.

    Args:
      codes: `[B, H, W, C]`, in `[0, 2^bits - 1]`; padded with their zero point.
      zero_point: the code of 0.
      kernel: `[kh, kw, C, F]`, integers that fit int8.
      bias: `[F]`, integers.
    """
    weights = kernel.astype(jnp.int8)
    shift = zero_point if bits < 8 else jnp.float32(128)
    stored = (codes - shift).astype(jnp.int8)
    if bits == 8 and padding != ((0, 0), (0, 0)):
        edge = (zero_point - shift).astype(jnp.int8)
        stored = lax.pad(stored, edge, ((0, 0, 0), *((*pair, 0) for pair in padding), (0, 0, 0)))
        padding = ((0, 0), (0, 0))
    total = lax.conv_general_dilated(
        stored,
        weights,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=jnp.int32,
    )
    given_back = (shift - zero_point).astype(jnp.int32) * jnp.sum(
        weights, axis=(0, 1, 2), dtype=jnp.int32
    )
    return (total + (given_back + bias.astype(jnp.int32))).astype(jnp.float32)


def integer_dense(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, largest_product: int) -> jax.Array:  # fmt: skip
    """Exact `float32(int32 x @ kernel + int32 bias)`; as `integer_conv2d`, `[B, C]`, `[C, F]`."""
    if kernel.shape[0] * largest_product < EXACT_FLOAT32:
        return jnp.dot(x, kernel) + bias
    depth = _chunk(largest_product)
    total = sum(
        jnp.dot(
            lax.stop_gradient(x[:, c : c + depth]), lax.stop_gradient(kernel[c : c + depth])
        ).astype(jnp.int32)
        for c in range(0, x.shape[-1], depth)
    )
    exact = (total + lax.stop_gradient(bias).astype(jnp.int32)).astype(jnp.float32)
    return straight_through(exact, jnp.dot(x, kernel) + bias)


def _chunk(largest_term: int) -> int:
    """Number of terms whose sum stays exact in float32."""
    return max((EXACT_FLOAT32 - 1) // largest_term, 1)
