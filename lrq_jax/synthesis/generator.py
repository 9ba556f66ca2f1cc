"""The conditional image generator of GDFQ (arXiv 2003.03603) with LRQ's long-range attention.

Two ways to tell it the class: `embedding` (32 px networks; the class embedding multiplies the
noise) and `batch_norm` (224 px networks; scale and bias of every norm are looked up per class).
Both: dense to a quarter of the size, then two rounds of nearest upsampling, 3x3 convolution,
batch norm and LeakyReLU 0.2, a last 3x3 convolution, tanh and a norm without parameters that
puts the images into the teacher's normalised input space. Norms always use batch statistics.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from lrq_jax.ops.convolution import conv2d
from lrq_jax.ops.kept import kept
from lrq_jax.ops.upsample import upsample_conv3x3, upsample_nearest
from lrq_jax.synthesis.attention import LongRangeAttention
from lrq_jax.synthesis.initializers import (
    affine_init,
    drawn,
    embedding_init,
    scale_and_bias_init,
)

ATTENTION_PLACES = ("none", "before_block1", "after_block1", "replace_block1")
CONDITIONINGS = ("embedding", "batch_norm")
_NORM_EPS = 1e-5
_BLOCK_NORM_EPS = 0.8  # literal in the lineage: PyTorch's BatchNorm2d(channels, 0.8) sets eps
_LEAK = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorSpec:
    """Static description of a generator.

    Attributes:
      image_shape: `(H, W, C)`; images of a size not divisible by 4 are cut out of larger ones.
      num_classes: K.
      conditioning: `embedding` or `batch_norm`.
      attention: where the long-range attention sits: `none`, `before_block1` (after the first
        upsampling), `after_block1`, `replace_block1`.
      latent_dim: length of the noise vector.
      width: channels of the first block; the second has half.

    Raises:
      ValueError: a setting that cannot be, named.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    conditioning: str = "embedding"
    attention: str = "after_block1"
    latent_dim: int = 100
    width: int = 128

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION_PLACES:
            raise ValueError(f"attention: found {self.attention!r}, expected {ATTENTION_PLACES}")
        if self.conditioning not in CONDITIONINGS:
            raise ValueError(f"conditioning: found {self.conditioning!r}, expected {CONDITIONINGS}")


def batch_norm(x: jax.Array, eps: float) -> jax.Array:
    """Normalises `[B, H, W, C]` by the batch's own mean and biased variance."""
    mean = jnp.mean(x, (0, 1, 2))
    variance = jnp.mean(jnp.square(x - mean), (0, 1, 2))
    return (x - mean) * lax.rsqrt(variance + eps)


def of_class(table: jax.Array, labels: jax.Array) -> jax.Array:
    """Rows `[B, D]` of a table `[K, D]`: those of labels `[B]`, or their sums by weights `[B, K]`."""
    return table[labels] if labels.ndim == 1 else labels @ table


class _ClassNorm(nn.Module):
    """Batch norm whose scale and bias are one vector, or one per class."""

    num_classes: int | None
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        shape = (channels,) if self.num_classes is None else (self.num_classes, channels)
        affine = self.param("affine", scale_and_bias_init, shape)
        scale, bias = affine["scale"], affine["bias"]
        if self.num_classes is not None:
            scale, bias = (of_class(x, labels)[:, None, None] for x in (scale, bias))
        return batch_norm(x, self.eps) * scale + bias


class _UpConv(nn.Module):
    """3x3 convolution with bias of the nearest-upsampled map (or, `up=False`, of the map)."""

    features: int
    up: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = self.param("conv", affine_init, (3, 3, x.shape[-1], self.features))
        kernel = conv["kernel"]
        y = upsample_conv3x3(x, kernel) if self.up else conv2d(x, kernel, padding=((1, 1), (1, 1)))
        return kept(y) + conv["bias"]


class Generator(nn.Module):
    """Images `[B, H, W, C]` from noise `[B, latent_dim]` and labels `[B]`, or class weights `[B, K]`
    (`synthesis.superposition`); see the module docstring."""

    spec: GeneratorSpec

    @nn.compact
    def __call__(self, noise: jax.Array, labels: jax.Array) -> jax.Array:
        spec = self.spec
        height, width, channels = spec.image_shape
        by_norm = spec.conditioning == "batch_norm"
        classes = spec.num_classes if by_norm else None
        hidden = noise
        if not by_norm:
            shape = (spec.num_classes, spec.latent_dim)
            hidden = of_class(self.param("embedding", embedding_init, shape), labels) * noise
        grid = (-(-height // 4), -(-width // 4), spec.width)
        dense = self.param("dense", affine_init, (spec.latent_dim, grid[0] * grid[1] * grid[2]))
        x = (kept(jnp.dot(hidden, dense["kernel"])) + dense["bias"]).reshape(-1, *grid)
        x = _ClassNorm(classes, _NORM_EPS, name="norm0")(x, labels)

        merged = spec.attention in ("none", "after_block1")
        if not merged:
            x = upsample_nearest(x)
        if spec.attention in ("before_block1", "replace_block1"):
            x = LongRangeAttention(name="attention")(x)
        if spec.attention != "replace_block1":
            x = _UpConv(spec.width, up=merged, name="block1")(x)
            x = _ClassNorm(classes, _BLOCK_NORM_EPS, name="norm1")(x, labels)
            x = nn.leaky_relu(x, _LEAK)
        if spec.attention == "after_block1":
            x = LongRangeAttention(name="attention")(x)

        x = _UpConv(spec.width // 2, name="block2")(x)
        x = nn.leaky_relu(_ClassNorm(classes, _BLOCK_NORM_EPS, name="norm2")(x, labels), _LEAK)
        x = _UpConv(channels, up=False, name="to_image")(x)
        return batch_norm(jnp.tanh(x[:, :height, :width]), _NORM_EPS)


def init_generator(spec: GeneratorSpec, key: jax.Array) -> dict[str, Any]:
    """Parameters of a generator (a nested dict): as `Generator(spec).init` draws them, in one draw."""
    noise, labels = jnp.zeros((2, spec.latent_dim)), jnp.zeros((2,), jnp.int32)
    return drawn(jax.eval_shape(Generator(spec).init, key, noise, labels)["params"], key)


def generate(spec: GeneratorSpec, params: dict[str, Any], noise: jax.Array, labels: jax.Array) -> jax.Array:  # fmt: skip
    """Images `[B, H, W, C]` in the teacher's normalised input space; a pure function."""
    images = Generator(spec).apply({"params": params}, noise, labels)
    return cast(jax.Array, images)  # no variables beside: `mutable` is not asked for
