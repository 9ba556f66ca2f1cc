"""The same network with TensorFlow's padding, which Flax and Keras share."""

from __future__ import annotations

from collections.abc import Collection

from lrq_jax.graph import Graph, GraphBuilder
from lrq_jax.graph import layers as L


def with_tf_same(graph: Graph, *, keep: Collection[str] = ()) -> Graph:
    """A graph whose convolutions and max pools that keep the size, or divide it by their stride,
    do so as padding "SAME" does: on an even size at stride 2 a 3x3 window pads 0 before and 1
    after, where PyTorch's networks pad 1 on each side.

    Args:
      keep: names of layers to leave as they are.
    """
    net = GraphBuilder(graph.name, input_shape=graph.input_shape)
    for layer in graph.layers:
        if layer.name in keep:
            net.add_layer(layer)
        elif isinstance(layer, L.Conv) and _centred(layer.padding, layer.kernel_size, layer.dilation):  # fmt: skip
            net.conv(layer.inputs[0], layer.features, layer.kernel_size, strides=layer.strides,
                     padding="tf_same", dilation=layer.dilation, groups=layer.groups,
                     use_bias=layer.use_bias, name=layer.name)  # fmt: skip
        elif type(layer) is L.MaxPool and _centred(layer.padding, layer.window, (1, 1)):
            net.max_pool(layer.inputs[0], layer.window, strides=layer.strides, padding="tf_same",
                         name=layer.name)  # fmt: skip
        else:
            net.add_layer(layer)
    return net.build()


def _centred(padding: L.Padding, window: L.Pair, dilation: L.Pair) -> bool:
    """Whether this is PyTorch's padding of half the window on each side."""
    half = tuple(d * (k - 1) // 2 for k, d in zip(window, dilation, strict=True))
    return padding == ((half[0], half[0]), (half[1], half[1]))
