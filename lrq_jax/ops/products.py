"""A convolution as one matrix product: sums of products and nothing else, whatever the backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from lrq_jax.ops.depthwise import shifted_products, windows

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]


def product_of_windows(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding,
                       dilation: Pair, groups: int) -> jax.Array:  # fmt: skip
    """`conv2d` of what the kernel's taps see, side by side: kh*kw times the memory of the output's
    pixels. Exact over integers whose sums are.

    Args:
      x: `[B, H, W, C]`.
      kernel: `[kh, kw, C / groups, F]`.

    Returns:
      `[B, H', W', F]`.
    """
    if groups > 1 and groups == x.shape[-1] == kernel.shape[-1]:
        return shifted_products(x, kernel, strides, padding, dilation)
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    seen = jnp.stack(windows(padded, kernel.shape, strides, dilation), axis=3)
    seen = seen.reshape(*seen.shape[:4], groups, -1)  # [B, H', W', kh*kw, groups, C / groups]
    # XLA (jax 0.11.2) aborts on GPUs where it merges a product with some of what makes its operand.
    seen = lax.optimization_barrier(seen)
    taps = kernel.reshape(seen.shape[3], seen.shape[5], groups, -1)
    found = jnp.einsum("bhwtgc,tcgf->bhwgf", seen, taps)
    return found.reshape(*found.shape[:3], kernel.shape[3])
