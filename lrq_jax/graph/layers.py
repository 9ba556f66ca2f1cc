"""The immutable layer types of a network graph.

A layer names itself, the tensors it reads and its static settings; the tensor it makes carries
its own name. Every layer can infer its output shape `(H, W, C)` or `(C,)` (batch left out) from
its inputs' shapes and refuses impossible ones with an error that names the layer. Arithmetic is
not here: it belongs to `lrq_jax.passes`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

Shape = tuple[int, ...]
Pair = tuple[int, int]
Padding = tuple[Pair, Pair]

INPUT = "image"
"""Name of the tensor that enters every graph."""

RECTIFIERS = ("relu", "relu6")
"""Activations that clip: over codes with zero point 0 they need no arithmetic of their own."""

GATES = ("sigmoid", "hard_sigmoid")
"""Activations in [0, 1], which scale a tensor (Multiply) rather than feed a convolution."""

ACTIVATIONS = (*RECTIFIERS, *GATES, "leaky_relu", "silu", "hard_swish")


class GraphError(ValueError):
    """A network definition that cannot be: names the layer, what was found and expected."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One node: `name` is also the name of the tensor it makes, `inputs` those it reads."""

    name: str
    inputs: tuple[str, ...]

    arity: ClassVar[int | None] = 1
    """Number of inputs; None for any number from two up."""

    def output_shape(self, *shapes: Shape) -> Shape:
        """Shape of the output from the shapes of the inputs, batch left out."""
        raise NotImplementedError

    def parameter_shapes(self, *shapes: Shape) -> dict[str, dict[str, Shape]]:
        """Shapes of this layer's variables by collection (`params`, `batch_stats`)."""
        return {}

    def fail(self, found: object, expected: object) -> GraphError:
        """The error to raise for this layer."""
        kind = type(self).__name__
        return GraphError(f"layer {self.name!r} ({kind}): found {found}, expected {expected}")

    def check_arity(self) -> None:
        """Refuses a number of inputs the layer cannot read."""
        arity, found = type(self).arity, len(self.inputs)
        if (arity is None and found < 2) or (arity is not None and found != arity):
            raise self.fail(f"{found} inputs", "two or more" if arity is None else arity)

    def check_image(self, shape: Shape) -> None:
        """Refuses a shape that is not `(H, W, C)`."""
        if len(shape) != 3:
            raise self.fail(f"input shape {shape}", "an image shape (H, W, C)")


def _window_size(layer: Layer, shape: Shape, kernel: Pair, strides: Pair, padding: Padding,
                 dilation: Pair = (1, 1)) -> Pair:  # fmt: skip
    """Output (H, W) of a sliding window; refuses a window larger than its padded input."""
    for setting, values, smallest in (
        ("window", kernel, 1), ("strides", strides, 1), ("dilation", dilation, 1),
        ("padding", (*padding[0], *padding[1]), 0),
    ):  # fmt: skip
        if min(values) < smallest:
            raise layer.fail(f"{setting} {values}", f"numbers from {smallest} up")
    sizes = []
    for axis in range(2):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        padded = shape[axis] + sum(padding[axis])
        if padded < reach:
            raise layer.fail(
                f"a padded input of {padded} along axis {'HW'[axis]}",
                f"at least the window's reach of {reach}",
            )
        sizes.append((padded - reach) // strides[axis] + 1)
    return sizes[0], sizes[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conv(Layer):
    """2-D convolution; kernel `[kh, kw, C_in / groups, features]`, explicit zero padding."""

    features: int
    kernel_size: Pair
    strides: Pair = (1, 1)
    padding: Padding = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1
    use_bias: bool = False

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        self.check_image(shape)
        if self.groups < 1 or self.features < 1:
            raise self.fail(f"{self.features} features, {self.groups} groups", "at least one each")
        if shape[2] % self.groups or self.features % self.groups:
            raise self.fail(
                f"{shape[2]} input and {self.features} output channels",
                f"both divisible by groups={self.groups}",
            )
        size = _window_size(
            self, shape, self.kernel_size, self.strides, self.padding, self.dilation
        )
        return (*size, self.features)

    def parameter_shapes(self, *shapes: Shape) -> dict[str, dict[str, Shape]]:
        (shape,) = shapes
        params: dict[str, Shape] = {
            "kernel": (*self.kernel_size, shape[2] // self.groups, self.features)
        }
        if self.use_bias:
            params["bias"] = (self.features,)
        return {"params": params}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(Layer):
    """Matrix product over the last axis of a vector; kernel `[C_in, features]`."""

    features: int
    use_bias: bool = True

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        if len(shape) != 1:
            raise self.fail(f"input shape {shape}", "a vector (C,): put a pool or flatten before")
        if self.features < 1:
            raise self.fail(f"{self.features} features", "at least one")
        return (self.features,)

    def parameter_shapes(self, *shapes: Shape) -> dict[str, dict[str, Shape]]:
        (shape,) = shapes
        params: dict[str, Shape] = {"kernel": (shape[0], self.features)}
        if self.use_bias:
            params["bias"] = (self.features,)
        return {"params": params}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchNorm(Layer):
    """Batch normalisation with frozen running statistics: `scale*(x - mean)/sqrt(var + eps) + bias`."""

    eps: float = 1e-5
    affine: bool = True

    def output_shape(self, *shapes: Shape) -> Shape:
        return shapes[0]

    def parameter_shapes(self, *shapes: Shape) -> dict[str, dict[str, Shape]]:
        channels: Shape = (shapes[0][-1],)
        collections = {"batch_stats": {"mean": channels, "var": channels}}
        if self.affine:
            collections["params"] = {"scale": channels, "bias": channels}
        return collections


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activation(Layer):
    """Element-wise non-linearity, one of `ACTIVATIONS`; `negative_slope` is `leaky_relu`'s.

    `hard_sigmoid` is `relu6(x + 3) / 6`, `silu` is `x * sigmoid(x)` and `hard_swish` is
    `x * hard_sigmoid(x)`.
    """

    kind: str = "relu"
    negative_slope: float = 0.01

    def output_shape(self, *shapes: Shape) -> Shape:
        if self.kind not in ACTIVATIONS:
            raise self.fail(f"kind {self.kind!r}", f"one of {ACTIVATIONS}")
        return shapes[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Add(Layer):
    """Element-wise sum of two tensors of one shape."""

    arity: ClassVar[int | None] = 2

    def output_shape(self, *shapes: Shape) -> Shape:
        first, second = shapes
        if first != second:
            raise self.fail(
                f"shapes {first} ({self.inputs[0]!r}) and {second} ({self.inputs[1]!r})",
                "two equal shapes",
            )
        return first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiply(Layer):
    """Element-wise product; the second tensor has the first's shape or is `(1, 1, C)`, one gate a
    channel (squeeze-and-excitation)."""

    arity: ClassVar[int | None] = 2

    def output_shape(self, *shapes: Shape) -> Shape:
        first, second = shapes
        if second not in (first, (1, 1, first[-1])):
            raise self.fail(
                f"shapes {first} ({self.inputs[0]!r}) and {second} ({self.inputs[1]!r})",
                f"the second to be {first} or {(1, 1, first[-1])}",
            )
        return first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Concat(Layer):
    """Concatenation along channels."""

    arity: ClassVar[int | None] = None

    def output_shape(self, *shapes: Shape) -> Shape:
        if any(shape[:-1] != shapes[0][:-1] for shape in shapes):
            raise self.fail(f"shapes {shapes}", "equal shapes but for the channels")
        return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pad(Layer):
    """Zeros around an image: `(before, after)` for height, width and channels."""

    height: Pair = (0, 0)
    width: Pair = (0, 0)
    channels: Pair = (0, 0)

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        self.check_image(shape)
        amounts = (self.height, self.width, self.channels)
        if min(min(pair) for pair in amounts) < 0:
            raise self.fail(f"amounts {amounts}", "no negative one: use Slice to crop")
        return tuple(n + sum(pair) for n, pair in zip(shape, amounts, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice(Layer):
    """`x[start:stop:step]` for height, width and channels; stop None runs to the end."""

    start: tuple[int, int, int] = (0, 0, 0)
    stop: tuple[int | None, int | None, int | None] = (None, None, None)
    step: tuple[int, int, int] = (1, 1, 1)

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """The three slices, in H, W, C order."""
        height, width, channels = zip(self.start, self.stop, self.step, strict=True)
        return slice(*height), slice(*width), slice(*channels)

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        self.check_image(shape)
        size: Shape = (0,)
        if min(self.start) >= 0 and min(self.step) >= 1:
            size = tuple(len(range(n)[s]) for n, s in zip(shape, self.slices, strict=True))
        if min(size) < 1:
            raise self.fail(f"{self.slices} of {shape}", "start >= 0, step >= 1 and something left")
        return size


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaxPool(Layer):
    """Maximum over a window; padding counts as minus infinity."""

    window: Pair
    strides: Pair
    padding: Padding = ((0, 0), (0, 0))

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        self.check_image(shape)
        size = _window_size(self, shape, self.window, self.strides, self.padding)
        if any(max(pair) >= reach for pair, reach in zip(self.padding, self.window, strict=True)):
            raise self.fail(
                f"padding {self.padding}", f"less than the window {self.window}, to pool an image"
            )
        return (*size, shape[2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class AvgPool(MaxPool):
    """Mean over a window; padded zeros count in the mean unless `count_include_pad` is false."""

    count_include_pad: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlobalPool(Layer):
    """Mean over height and width: `(H, W, C)` to `(C,)`."""

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        self.check_image(shape)
        return (shape[2],)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flatten(Layer):
    """Row-major vector of a channels-last image: `(H, W, C)` to `(H*W*C,)`."""

    def output_shape(self, *shapes: Shape) -> Shape:
        return (math.prod(shapes[0]),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unflatten(Layer):
    """A vector as an image of one pixel: `(C,)` to `(1, 1, C)`."""

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        if len(shape) != 1:
            raise self.fail(f"input shape {shape}", "a vector (C,)")
        return (1, 1, shape[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelShuffle(Layer):
    """Channels of `groups` groups dealt out in turn: output channel `k*groups + g` is channel
    `g*C/groups + k` of the input (ShuffleNet, arXiv 1707.01083)."""

    groups: int

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = shapes
        self.check_image(shape)
        if self.groups < 1 or shape[2] % self.groups:
            raise self.fail(f"{shape[2]} channels", f"a multiple of groups={self.groups}")
        return shape
