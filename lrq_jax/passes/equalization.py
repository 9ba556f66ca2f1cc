"""Cross-layer equalization: the same float network with channels of more equal size."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lrq_jax.graph import INPUT, Graph
from lrq_jax.graph import layers as L
from lrq_jax.passes.float_forward import Variables
from lrq_jax.passes.moments import Moments, tensor_moments

SIGMAS = 3.0
"""A channel is taken to reach so many standard deviations beyond its mean."""

RELU6_SIGMAS = 6.0
"""A channel of which so many stay below 6 is one that ReLU6 never clips."""

LARGEST_FACTOR = 10.0
"""No channel is scaled by more, up or down, against the others."""


def equalized(graph: Graph, variables: Variables) -> Variables:
    """Variables of the same float function whose tensors have channels of more equal size.

    Positive factors s pass through ReLU, sums and pools: `w2 relu(w1 x) = (w2 s) relu((w1/s) x)`
    (Nagel et al., arXiv 1906.04721, section 4.1). Every set of tensors that such layers tie
    together, a whole residual stream too, gets one s a channel: `s = sqrt(a / w)`, where `a` is
    the channel's reach, by the batch norms' statistics, and `w` the largest weight that reads it,
    as a share of its output channel's largest; then `a/s = w*s` up to a common factor. Kernels
    here have a step an output channel, so depthwise readers do not care (`w = 1`, `s = a`), nor
    do the kernels that make the tensor.

    ReLU6 clips at one height for all channels. Only those whose statistics keep them below it,
    `mean + 6 sigma <= 6` before and after, are scaled. Tensors that anything else reads or makes,
    such as a gate, a concatenation, the image or the logits, stay as they are.

    Args:
      graph: the network.
      variables: `params`, `batch_stats`; statistics of the data.
    """
    moments = tensor_moments(graph, variables)
    params = {name: dict(entry) for name, entry in variables["params"].items()}
    stats = {name: dict(entry) for name, entry in variables["batch_stats"].items()}
    for tensors in _tied(graph):
        factor = _factor(graph, params, moments, tensors)
        if factor is None:
            continue
        for name in tensors:
            _divide_made(graph.by_name[name], params, factor)
            for reader in graph.consumers[name]:
                _multiply_read(reader, params, stats, factor)
    return {**variables, "params": params, "batch_stats": stats}


def _passes_factors(layer: L.Layer) -> bool:
    """Whether positive factors of the input's channels are factors of the output's."""
    if isinstance(layer, L.Activation):
        return layer.kind in (*L.RECTIFIERS, "leaky_relu")
    if isinstance(layer, L.Pad):
        return layer.channels == (0, 0)
    return isinstance(layer, L.Add | L.MaxPool | L.GlobalPool | L.Unflatten)


def _tied(graph: Graph) -> list[list[str]]:
    """Sets of tensors that have their factors in common, those that admit factors only."""
    group = {name: {name} for name in graph.shapes}
    for layer in graph.layers:
        if _passes_factors(layer):
            joined = set().union(*(group[name] for name in (layer.name, *layer.inputs)))
            group.update(dict.fromkeys(joined, joined))
    found: list[Any] = []
    seen: set[Any] = set()
    for layer in graph.layers:
        tensors = group[layer.name]
        if not tensors & seen and all(_admits(graph, name) for name in tensors):
            found.append(sorted(tensors))
        seen |= tensors
    return found


def _admits(graph: Graph, name: str) -> bool:
    """Whether what makes and what reads a tensor can take a factor over."""
    if name in (INPUT, graph.output):
        return False
    maker, channels = graph.by_name[name], graph.shapes[name][-1]
    made = isinstance(maker, L.Conv | L.Dense) or (isinstance(maker, L.BatchNorm) and maker.affine)
    if not (made or _passes_factors(maker)):
        return False
    return all(
        isinstance(reader, L.Dense)
        or (isinstance(reader, L.BatchNorm) and reader.affine)
        or (isinstance(reader, L.Conv) and reader.groups in (1, channels))
        or _passes_factors(reader)
        for reader in graph.consumers[name]
    )


def _factor(graph: Graph, params: Variables, moments: dict[str, Moments], tensors: list[str]) -> jax.Array | None:  # fmt: skip
    """`s` of a set of tensors; None where there is nothing to gain or no statistics."""
    readers = {r.name: r for name in tensors for r in graph.consumers[name]
               if isinstance(r, L.Conv | L.Dense)}  # fmt: skip
    makers = [graph.by_name[name] for name in tensors]
    clipped = [
        layer.inputs[0]
        for layer in makers
        if isinstance(layer, L.Activation) and layer.kind == "relu6"
    ]
    reaches = [moments[name].reach(SIGMAS) for name in tensors if name in moments]
    if not readers or not reaches or not all(name in moments for name in clipped):
        return None
    reach = jnp.max(jnp.stack(reaches), 0)
    reach = jnp.maximum(reach, jnp.max(reach) / LARGEST_FACTOR**2)
    shares = [
        _share(params[reader.name]["kernel"])
        for reader in readers.values()
        if not _is_depthwise(reader)
    ]
    factor = reach
    if shares:
        factor = jnp.sqrt(reach / jnp.maximum(jnp.max(jnp.stack(shares), 0), LARGEST_FACTOR**-2))
    factor = factor / jnp.exp(jnp.mean(jnp.log(factor)))
    factor = jnp.clip(factor, 1 / LARGEST_FACTOR, LARGEST_FACTOR)
    if clipped:
        top = jnp.max(jnp.stack([moments[name].reach(RELU6_SIGMAS) for name in clipped]), 0)
        factor = jnp.where(top < 6.0, jnp.maximum(factor, top / 6.0), 1.0)
    return factor


def _is_depthwise(layer: L.Layer) -> bool:
    return isinstance(layer, L.Conv) and layer.groups > 1


def _share(kernel: jax.Array) -> jax.Array:
    """Largest weight `[C_in]` that reads each channel, as a share of its output channel's."""
    by_channel = jnp.max(jnp.abs(kernel).reshape(-1, *kernel.shape[-2:]), 0)
    return jnp.max(by_channel / jnp.maximum(jnp.max(by_channel, 0), 1e-12), 1)


def _divide_made(maker: L.Layer, params: Variables, factor: jax.Array) -> None:
    """Divides, in place, what makes a tensor; layers that pass factors on have nothing to."""
    if isinstance(maker, L.Conv | L.Dense | L.BatchNorm):
        params[maker.name] = {name: value / factor for name, value in params[maker.name].items()}


def _multiply_read(reader: L.Layer, params: Variables, stats: Variables, factor: jax.Array) -> None:  # fmt: skip
    """Multiplies, in place, what reads a tensor."""
    if isinstance(reader, L.BatchNorm):  # gain*(x - mean) = (gain*s)*(x/s - mean/s)
        entry, var = stats[reader.name], stats[reader.name]["var"] / factor**2
        same = jnp.sqrt((var + reader.eps) / (entry["var"] + reader.eps))
        params[reader.name]["scale"] = params[reader.name]["scale"] * factor * same
        stats[reader.name] = {**entry, "mean": entry["mean"] / factor, "var": var}
    elif _is_depthwise(reader):
        kernel = params[reader.name]["kernel"]
        params[reader.name]["kernel"] = kernel * jnp.repeat(factor, kernel.shape[-1] // len(factor))
    elif isinstance(reader, L.Conv | L.Dense):
        params[reader.name]["kernel"] = params[reader.name]["kernel"] * factor[:, None]
