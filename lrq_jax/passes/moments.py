"""Mean and variance of a network's tensors, read off its batch norms: no image needed."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from lrq_jax.graph import Graph
from lrq_jax.graph import layers as L
from lrq_jax.passes.float_forward import Variables, batch_norm_affine

_CEILING = {"relu": jnp.inf, "relu6": 6.0}


class Moments(NamedTuple):
    """Mean and variance `[C]` of each channel of a tensor, over images and pixels."""

    mean: jax.Array
    variance: jax.Array

    def reach(self, sigmas: float) -> jax.Array:
        """`|mean| + sigmas * standard deviation`, `[C]`."""
        return jnp.abs(self.mean) + sigmas * jnp.sqrt(self.variance)


def tensor_moments(graph: Graph, variables: Variables) -> dict[str, Moments]:
    """Moments of the tensors they can be told of.

    A batch norm's output has mean beta and variance `gamma^2 var/(var + eps)` on the data its
    statistics are of. From there on tensors count as normal and terms of a sum as independent
    (Nagel et al., arXiv 1906.04721, section 4.2.1). A pool's variance is its input's, an upper
    bound. Tensors without an entry, such as convolution outputs that no batch norm reads, depend
    on more than the statistics.
    """
    known: dict[str, Moments] = {}
    for layer in graph.layers:
        inputs = [known.get(name) for name in layer.inputs]
        if isinstance(layer, L.BatchNorm):
            stats = variables["batch_stats"][layer.name]
            gain, offset = batch_norm_affine(
                layer, {**variables["params"].get(layer.name, {}), **stats}
            )
            mean, variance = gain * stats["mean"] + offset, gain**2 * stats["var"]
            known[layer.name] = Moments(mean, variance)
        elif None in inputs:
            continue
        elif isinstance(layer, L.Activation) and layer.kind in L.RECTIFIERS:
            known[layer.name] = clipped_normal(*inputs[0], 0.0, _CEILING[layer.kind])
        elif isinstance(layer, L.Add):
            known[layer.name] = Moments(*(a + b for a, b in zip(*inputs, strict=True)))
        elif isinstance(layer, L.AvgPool | L.GlobalPool | L.Unflatten):
            known[layer.name] = inputs[0]
        elif isinstance(layer, L.Concat):
            known[layer.name] = Moments(*(jnp.concatenate(p) for p in zip(*inputs, strict=True)))
    return known


def clipped_normal(mean: jax.Array, variance: jax.Array, low: float, high: float) -> Moments:
    """Moments of `clip(x, low, high)` for normal x (arXiv 1906.04721, appendix C).

    Args:
      mean, variance: of x, any shape.
      low: finite.
      high: may be infinite.
    """
    sigma = jnp.sqrt(jnp.maximum(variance, 1e-12))
    alpha, beta = (low - mean) / sigma, (high - mean) / sigma
    inside = norm.cdf(beta) - norm.cdf(alpha)
    below, above = norm.cdf(alpha), 1 - norm.cdf(beta)
    top = high if math.isfinite(high) else 0.0  # its probability is 0
    first = mean * inside + sigma * (norm.pdf(alpha) - norm.pdf(beta))
    second = (mean**2 + sigma**2) * inside
    second += sigma * ((mean + low) * norm.pdf(alpha) - (mean + top) * norm.pdf(beta))
    clipped = first + low * below + top * above
    square = second + low**2 * below + top**2 * above
    return Moments(clipped, jnp.maximum(square - clipped**2, 0.0))
