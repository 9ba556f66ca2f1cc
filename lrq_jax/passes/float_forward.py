"""The network in floating point, with any tensor along the way as a tap."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lrq_jax.graph import INPUT, Graph
from lrq_jax.graph import layers as L
from lrq_jax.ops.convolution import conv2d
from lrq_jax.ops.kept import kept

Variables = dict[str, Any]
"""Flax-style collections: `{"params": {layer: {...}}, "batch_stats": {layer: {...}}, ...}`."""

Transform = Callable[[L.Layer, jax.Array], jax.Array]


def unchanged(layer: L.Layer, value: jax.Array) -> jax.Array:
    """The value as it is."""
    return value


def float_forward(graph: Graph, variables: Variables, images: jax.Array, outputs: Iterable[str], *,
                  kernel_transform: Transform = unchanged,
                  activation_transform: Transform = unchanged,
                  input_transform: Transform = unchanged) -> dict[str, jax.Array]:  # fmt: skip
    """Values of the named tensors; layers they do not need are not computed.

    Args:
      graph: the network.
      variables: its `params` and `batch_stats`.
      images: `[B, H, W, C]` in the network's normalised input space.
      outputs: names of tensors: layers' names, or `graph.output`, `graph.features`,
        the inputs of `graph.batch_norms`, `graph.block_outputs`.
      kernel_transform: applied to each kernel, with its layer, before use.
      activation_transform: applied to the value of each Activation layer.
      input_transform: applied to what each Conv layer reads, with the layer; keeps its shape.

    Returns:
      `{name: [B, ...]}` for the names asked for.

    Raises:
      GraphError: a name the network does not have.
    """
    outputs = tuple(outputs)
    needed = graph.ancestors(outputs)
    values = {INPUT: images}
    for layer in graph.layers:
        if layer.name not in needed:
            continue
        params = {
            **variables["params"].get(layer.name, {}),
            **variables["batch_stats"].get(layer.name, {}),
        }
        if "kernel" in params:
            params["kernel"] = kernel_transform(layer, params["kernel"])
        inputs = [values[name] for name in layer.inputs]
        if isinstance(layer, L.Conv):
            inputs = [input_transform(layer, x) for x in inputs]
        value = apply_layer(layer, params, *inputs)
        if isinstance(layer, L.Activation):
            value = activation_transform(layer, value)
        values[layer.name] = value
    return {name: values[name] for name in outputs}


def float_logits(graph: Graph, variables: Variables, images: jax.Array) -> jax.Array:
    """Logits `[B, num_classes]` of the network in floating point."""
    return float_forward(graph, variables, images, (graph.output,))[graph.output]


@functools.singledispatch
def apply_layer(layer: L.Layer, params: dict[str, jax.Array], *inputs: jax.Array) -> jax.Array:
    """The layer's arithmetic in floating point."""
    raise NotImplementedError(f"no float arithmetic for layer type {type(layer).__name__}")


@apply_layer.register
def _conv(layer: L.Conv, params: dict, x: jax.Array) -> jax.Array:
    y = kept(conv2d(x, params["kernel"], strides=layer.strides, padding=layer.padding,
                    dilation=layer.dilation, groups=layer.groups))  # fmt: skip
    return (y + params["bias"]).astype(y.dtype) if layer.use_bias else y


@apply_layer.register
def _dense(layer: L.Dense, params: dict, x: jax.Array) -> jax.Array:
    y = kept(jnp.dot(x, params["kernel"]))
    return (y + params["bias"]).astype(y.dtype) if layer.use_bias else y


def batch_norm_affine(layer: L.BatchNorm, params: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Gain and offset `[C]` of a batch norm with frozen statistics: `y = gain*x + offset`."""
    gain = lax.rsqrt(params["var"] + layer.eps)
    if layer.affine:
        gain = gain * params["scale"]
        return gain, params["bias"] - params["mean"] * gain
    return gain, -params["mean"] * gain


@apply_layer.register
def _batch_norm(layer: L.BatchNorm, params: dict, x: jax.Array) -> jax.Array:
    gain, offset = batch_norm_affine(layer, params)
    return (x * gain + offset).astype(x.dtype)  # a batch norm's vectors may be finer than images


@apply_layer.register
def _activation(layer: L.Activation, params: dict, x: jax.Array) -> jax.Array:
    if layer.kind == "leaky_relu":
        return jax.nn.leaky_relu(x, layer.negative_slope)
    return getattr(jax.nn, layer.kind)(x)


@apply_layer.register
def _add(layer: L.Add, params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    return x + y


@apply_layer.register
def _multiply(layer: L.Multiply, params: dict, x: jax.Array, gate: jax.Array) -> jax.Array:
    return x * gate


@apply_layer.register
def _concat(layer: L.Concat, params: dict, *inputs: jax.Array) -> jax.Array:
    return jnp.concatenate(inputs, axis=-1)


@apply_layer.register
def _pad(layer: L.Pad, params: dict, x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), layer.height, layer.width, layer.channels))


@apply_layer.register
def _slice(layer: L.Slice, params: dict, x: jax.Array) -> jax.Array:
    return x[(slice(None), *layer.slices)]


def _reduce_window(layer: L.MaxPool, x: jax.Array, init: float, combine: Callable) -> jax.Array:
    return lax.reduce_window(
        x, init, combine, (1, *layer.window, 1), (1, *layer.strides, 1),
        ((0, 0), *layer.padding, (0, 0)),
    )  # fmt: skip


@apply_layer.register
def _max_pool(layer: L.MaxPool, params: dict, x: jax.Array) -> jax.Array:
    return _reduce_window(layer, x, -jnp.inf, lax.max)


def window_sums(layer: L.AvgPool, x: jax.Array) -> jax.Array:
    """Sum over each window of an average pool, `[B, H', W', C]`."""
    return _reduce_window(layer, x, 0.0, lax.add)


def window_counts(layer: L.AvgPool, shape: L.Shape) -> jax.Array | float:
    """Number of values each window's mean divides by; an array where padding does not count."""
    if layer.count_include_pad or layer.padding == ((0, 0), (0, 0)):
        return float(layer.window[0] * layer.window[1])
    return window_sums(layer, jnp.ones((1, *shape[:2], 1), jnp.float32))


@apply_layer.register
def _avg_pool(layer: L.AvgPool, params: dict, x: jax.Array) -> jax.Array:
    return window_sums(layer, x) / window_counts(layer, x.shape[1:])


@apply_layer.register
def _global_pool(layer: L.GlobalPool, params: dict, x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=(1, 2))


@apply_layer.register
def _flatten(layer: L.Flatten, params: dict, x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


@apply_layer.register
def _unflatten(layer: L.Unflatten, params: dict, x: jax.Array) -> jax.Array:
    return x[:, None, None, :]


@apply_layer.register
def _channel_shuffle(layer: L.ChannelShuffle, params: dict, x: jax.Array) -> jax.Array:
    *size, channels = x.shape
    split = x.reshape(*size, layer.groups, channels // layer.groups)
    return jnp.swapaxes(split, -1, -2).reshape(x.shape)
