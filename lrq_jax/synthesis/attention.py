"""Large-kernel attention (Guo et al., Visual Attention Network, arXiv 2202.09741), as LRQ uses it.

    attention = conv1x1(dw7x7 dilated 3(dw5x5(x)));  LKA(x) = x * attention
    block(x) = x + conv1x1(LKA(gelu(conv1x1(x))))

All convolutions have a bias; no sigmoid, no norm; GELU is exact. 59,264 parameters at 128 channels.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from lrq_jax.ops.convolution import conv2d
from lrq_jax.ops.depthwise import depthwise_conv
from lrq_jax.ops.kept import kept
from lrq_jax.synthesis.initializers import affine_init


def large_kernel_attention(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """`x * attention(x)` in place of a 21x21 convolution; it sees 23x23 (VAN, equations 1 and 2).

    Args:
      params: `{"local", "dilated", "mix"}`, each `{"kernel", "bias"}`.
      x: `[B, H, W, C]`.

    Returns:
      `[B, H, W, C]`.
    """
    local, dilated = params["local"], params["dilated"]
    y = kept(depthwise_conv(x, local["kernel"], (1, 1), ((2, 2), (2, 2)), (1, 1))) + local["bias"]
    y = kept(depthwise_conv(y, dilated["kernel"], (1, 1), ((9, 9), (9, 9)), (3, 3)))
    y += dilated["bias"]
    return x * _pointwise(params["mix"], y)


def attention_block(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """`x + conv1x1(LKA(gelu(conv1x1(x))))`, `[B, H, W, C]` to the same."""
    y = jax.nn.gelu(_pointwise(params["expand"], x), approximate=False)
    return x + _pointwise(params["project"], large_kernel_attention(params, y))


def _pointwise(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return kept(conv2d(x, params["kernel"])) + params["bias"]


class LongRangeAttention(nn.Module):
    """Owns the parameters of `attention_block`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        shapes = {
            "expand": (1, 1, channels, channels),
            "local": (5, 5, 1, channels),
            "dilated": (7, 7, 1, channels),
            "mix": (1, 1, channels, channels),
            "project": (1, 1, channels, channels),
        }
        params = {name: self.param(name, affine_init, shape) for name, shape in shapes.items()}
        return attention_block(params, x)
