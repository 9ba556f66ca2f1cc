"""Convolution and matrix product as the passes need them: plain, and exact over integers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from lrq_jax.ops.depthwise import depthwise_conv
from lrq_jax.ops.straight_through import straight_through

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]

EXACT_FLOAT32 = 2**24
"""Integers below this are exact in float32, and so are sums that stay below it."""


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
    if kernel.shape[:2] == (1, 1) and groups == 1:
        # A matrix product: on XLA CPU its gradients are 5-10 times faster than the convolution's.
        x = jnp.pad(x, ((0, 0), *padding, (0, 0))) if padding != ((0, 0), (0, 0)) else x
        return jnp.einsum("bhwc,cf->bhwf", x[:, :: strides[0], :: strides[1]], kernel[0, 0])
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def integer_conv2d(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, largest_product: int,
                   groups: int = 1, **window: Pair | Padding) -> jax.Array:  # fmt: skip
    """Exact `float32(int32 convolution + int32 bias)` of integer-valued float32 arrays.

    Sums that could pass 2^24 are cut along the input channels into sums that cannot, each an
    ordinary float convolution, added up as int32: no backend needs fast integer convolutions.
    The gradient is that of the plain convolution.

    Args:
      x: `[B, H, W, C]`, integers.
      kernel: `[kh, kw, C / groups, F]`, integers.
      bias: `[F]`, integers.
      largest_product: bound on |x * kernel|, one product.
      **window: strides, padding, dilation of `conv2d`.
    """
    if math.prod(kernel.shape[:3]) * largest_product < EXACT_FLOAT32:
        return conv2d(x, kernel, groups=groups, **window) + bias

    def exact(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        if groups > 1:
            total = lax.conv_general_dilated(
                x.astype(jnp.int32),
                kernel.astype(jnp.int32),
                window["strides"],
                window["padding"],
                rhs_dilation=window["dilation"],
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )
        else:
            depth = _chunk(kernel.shape[0] * kernel.shape[1] * largest_product)
            total = sum(
                conv2d(x[..., c : c + depth], kernel[:, :, c : c + depth], **window).astype(
                    jnp.int32
                )
                for c in range(0, x.shape[-1], depth)
            )
        return (total + bias.astype(jnp.int32)).astype(jnp.float32)

    frozen = (lax.stop_gradient(value) for value in (x, kernel, bias))
    return straight_through(exact(*frozen), conv2d(x, kernel, groups=groups, **window) + bias)


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


def _chunk(largest_sum_per_channel: int) -> int:
    """Input channels whose partial sum stays exact in float32."""
    return max((EXACT_FLOAT32 - 1) // largest_sum_per_channel, 1)
