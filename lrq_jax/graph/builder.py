"""A builder that reads like a network definition.

    net = GraphBuilder("tiny", input_shape=(32, 32, 3))
    x = net.conv(net.image, 16, 3, name="conv1")
    x = net.relu(net.batch_norm(x))
    net.dense(net.global_pool(x), 10, name="classifier")
    graph = net.build()

Every method returns the name of the tensor it made; names not given are derived from the kind.
"""

from __future__ import annotations

from typing import Any, cast

from lrq_jax.graph import layers as L
from lrq_jax.graph.layers import INPUT, Padding, Pair, Shape
from lrq_jax.graph.network import Graph

PaddingLike = int | Pair | Padding | str


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _padding(name: str, padding: PaddingLike, size: Shape, kernel: Pair, strides: Pair,
             dilation: Pair = (1, 1)) -> Padding:  # fmt: skip
    """Explicit padding from an int, a pair, two pairs, 'same' (symmetric, PyTorch's habit of
    `reach // 2`) or 'tf_same' (TensorFlow's: the output is ceil(size / stride), odd rest after).
    What is no image gets none: the layer's own checks refuse it by name."""
    reach = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    if padding == "same":
        padding = (reach[0] // 2, reach[1] // 2)
    elif padding == "tf_same":
        if len(size) != 3 or min(strides) < 1:
            return (0, 0), (0, 0)
        totals = [
            max((-(-n // s) - 1) * s + r - n, 0)
            for n, s, r in zip(size[:2], strides, reach, strict=True)
        ]
        height, width = ((total // 2, total - total // 2) for total in totals)
        return height, width
    elif isinstance(padding, str):
        raise L.GraphError(
            f"layer {name!r}: found padding {padding!r}, expected numbers, 'same' or 'tf_same'"
        )
    rows, columns = cast(tuple[Any, Any], _pair(cast(Any, padding)))  # numbers or pairs of them
    return _pair(rows), _pair(columns)


class GraphBuilder:
    """Collects layers; `build` returns the immutable, checked graph. See the module docstring."""

    def __init__(self, name: str, *, input_shape: Shape) -> None:
        self.name = name
        self.input_shape = tuple(input_shape)
        self.image = INPUT
        self._layers: list[L.Layer] = []
        self._shapes: dict[str, Shape] = {INPUT: self.input_shape}

    def add_layer(self, layer: L.Layer) -> str:
        """Appends any layer, its shape checked at once; returns the name of its output."""
        unknown = [name for name in layer.inputs if name not in self._shapes]
        if unknown:
            raise layer.fail(f"unknown inputs {unknown}", f"some of {list(self._shapes)}")
        if layer.name in self._shapes:
            raise layer.fail("its name in use already", "a new name")
        layer.check_arity()
        shapes = (self._shapes[name] for name in layer.inputs)
        self._shapes[layer.name] = layer.output_shape(*shapes)
        self._layers.append(layer)
        return layer.name

    def shape(self, tensor: str) -> Shape:
        """Shape of a tensor made so far, batch left out."""
        return self._shapes[tensor]

    def _name(self, name: str | None, kind: str) -> str:
        if name is not None:
            return name
        taken = sum(1 for layer in self._layers if layer.name.startswith(kind))
        while f"{kind}{taken}" in self._shapes:
            taken += 1
        return f"{kind}{taken}"

    def conv(self, x: str, features: int, kernel_size: int | Pair, *, strides: int | Pair = 1,
             padding: PaddingLike = "same", dilation: int | Pair = 1, groups: int = 1,
             use_bias: bool = False, name: str | None = None) -> str:  # fmt: skip
        """2-D convolution; `padding` is a number, pairs, 'same' or 'tf_same'."""
        kernel, stride, rate = _pair(kernel_size), _pair(strides), _pair(dilation)
        name, size = self._name(name, "conv"), self._shapes.get(x, ())
        return self.add_layer(
            L.Conv(
                name=name,
                inputs=(x,),
                features=features,
                kernel_size=kernel,
                strides=stride,
                padding=_padding(name, padding, size, kernel, stride, rate),
                dilation=rate,
                groups=groups,
                use_bias=use_bias,
            )
        )

    def dense(self, x: str, features: int, *, use_bias: bool = True, name: str | None = None) -> str:  # fmt: skip
        """Matrix product of a vector."""
        return self.add_layer(
            L.Dense(
                name=self._name(name, "dense"), inputs=(x,), features=features, use_bias=use_bias
            )
        )

    def batch_norm(self, x: str, *, eps: float = 1e-5, affine: bool = True, name: str | None = None) -> str:  # fmt: skip
        """Batch normalisation over channels."""
        return self.add_layer(
            L.BatchNorm(name=self._name(name, "bn"), inputs=(x,), eps=eps, affine=affine)
        )

    def activation(self, x: str, kind: str, *, negative_slope: float = 0.01, name: str | None = None) -> str:  # fmt: skip
        """One of `layers.ACTIVATIONS`."""
        return self.add_layer(
            L.Activation(
                name=self._name(name, kind), inputs=(x,), kind=kind, negative_slope=negative_slope
            )
        )

    def relu(self, x: str, *, name: str | None = None) -> str:
        """`max(x, 0)`."""
        return self.activation(x, "relu", name=name)

    def relu6(self, x: str, *, name: str | None = None) -> str:
        """`min(max(x, 0), 6)`."""
        return self.activation(x, "relu6", name=name)

    def add(self, x: str, y: str, *, name: str | None = None) -> str:
        """Residual sum."""
        return self.add_layer(L.Add(name=self._name(name, "add"), inputs=(x, y)))

    def multiply(self, x: str, gate: str, *, name: str | None = None) -> str:
        """Element-wise product with a tensor of the same shape or of one value a channel."""
        return self.add_layer(L.Multiply(name=self._name(name, "multiply"), inputs=(x, gate)))

    def concat(self, *tensors: str, name: str | None = None) -> str:
        """Concatenation along channels."""
        return self.add_layer(L.Concat(name=self._name(name, "concat"), inputs=tensors))

    def pad(self, x: str, *, height: Pair = (0, 0), width: Pair = (0, 0), channels: Pair = (0, 0),
            name: str | None = None) -> str:  # fmt: skip
        """Zeros around an image."""
        return self.add_layer(
            L.Pad(
                name=self._name(name, "pad"),
                inputs=(x,),
                height=height,
                width=width,
                channels=channels,
            )
        )

    def slice(self, x: str, *, start: tuple[int, int, int] = (0, 0, 0),
              stop: tuple[int | None, int | None, int | None] = (None, None, None),
              step: tuple[int, int, int] = (1, 1, 1), name: str | None = None) -> str:  # fmt: skip
        """`x[start:stop:step]` over height, width, channels."""
        return self.add_layer(
            L.Slice(name=self._name(name, "slice"), inputs=(x,), start=start, stop=stop, step=step)
        )

    def max_pool(self, x: str, window: int | Pair, *, strides: int | Pair | None = None,
                 padding: PaddingLike = 0, name: str | None = None) -> str:  # fmt: skip
        """Maximum over a window; strides default to the window."""
        return self._pool(L.MaxPool, "maxpool", x, window, strides, padding, name)

    def avg_pool(self, x: str, window: int | Pair, *, strides: int | Pair | None = None,
                 padding: PaddingLike = 0, count_include_pad: bool = True,
                 name: str | None = None) -> str:  # fmt: skip
        """Mean over a window; strides default to the window."""
        return self._pool(L.AvgPool, "avgpool", x, window, strides, padding, name,
                          count_include_pad=count_include_pad)  # fmt: skip

    def _pool(self, kind: type[L.MaxPool], prefix: str, x: str, window: int | Pair,
              strides: int | Pair | None, padding: PaddingLike, name: str | None,
              **settings: bool) -> str:  # fmt: skip
        reach = _pair(window)
        stride = reach if strides is None else _pair(strides)
        name, size = self._name(name, prefix), self._shapes.get(x, ())
        return self.add_layer(
            kind(
                name=name,
                inputs=(x,),
                window=reach,
                strides=stride,
                padding=_padding(name, padding, size, reach, stride),
                **settings,
            )
        )

    def global_pool(self, x: str, *, name: str | None = None) -> str:
        """Mean over height and width."""
        return self.add_layer(L.GlobalPool(name=self._name(name, "pool"), inputs=(x,)))

    def flatten(self, x: str, *, name: str | None = None) -> str:
        """Row-major vector of a channels-last image."""
        return self.add_layer(L.Flatten(name=self._name(name, "flatten"), inputs=(x,)))

    def unflatten(self, x: str, *, name: str | None = None) -> str:
        """A vector as an image of one pixel."""
        return self.add_layer(L.Unflatten(name=self._name(name, "unflatten"), inputs=(x,)))

    def channel_shuffle(self, x: str, groups: int, *, name: str | None = None) -> str:
        """Channels of `groups` groups dealt out in turn."""
        return self.add_layer(
            L.ChannelShuffle(name=self._name(name, "shuffle"), inputs=(x,), groups=groups)
        )

    def build(self) -> Graph:
        """The checked graph; its last layer makes the logits."""
        return Graph(name=self.name, input_shape=self.input_shape, layers=tuple(self._layers))
