"""The state of a translation from ONNX to our graph: layers made so far, and where tensors are.

An ONNX tensor is a constant (numpy) or a `Value`: one of our tensors, the arrangement of its
indices in ONNX's axes (`onnx_axes`), and a per-channel `scale*x + shift` not yet applied. The
latter waits for its reader: at the image it is the teacher's normalisation, behind a convolution
without bias it is the bias, inside `relu6(x + 3) / 6` it belongs to the activation.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np

from lrq_jax.graph import INPUT, Graph
from lrq_jax.graph import layers as L
from lrq_jax.readers import onnx_axes as ax
from lrq_jax.readers.errors import ReaderError
from lrq_jax.readers.onnx_axes import Axes, AxesError

_CLOSE = 1e-6
_MAY_FOLLOW_SOFTMAX = ("Identity", "Reshape", "Flatten", "Squeeze", "Cast")


Numbers = np.ndarray | np.float64
"""One number for all channels, or one for each `[C]`; float64."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
    """One ONNX operator: attributes as Python and numpy values, `place` counted from one."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    place: str

    def fail(self, found: object, expected: object) -> ReaderError:
        """The error to raise for this operator."""
        return ReaderError(
            f"{self.kind} (node {self.name!r}, {self.place}, reading {', '.join(self.inputs)}): "
            f"found {found}, expected {expected}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Value:
    """An ONNX tensor as one of ours.

    Attributes:
      tensor: name in our graph.
      axes: where its indices sit in ONNX's axes.
      scale, shift: still to be applied, float64 `()` or `[C]`, in our channel order.
      alone: nothing else reads `tensor`, so that its layer may take scale and shift in.
      probabilities: behind a softmax: nothing but the output may follow.
    """

    tensor: str
    axes: Axes
    scale: Numbers = dataclasses.field(default_factory=lambda: np.float64(1))
    shift: Numbers = dataclasses.field(default_factory=lambda: np.float64(0))
    alone: bool = True
    probabilities: bool = False

    @property
    def is_plain(self) -> bool:
        """No scale or shift is left to apply."""
        return bool(
            np.allclose(self.scale, 1, rtol=0, atol=_CLOSE)
            and np.allclose(self.shift, 0, rtol=0, atol=_CLOSE)
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the ONNX tensor."""
        return ax.sizes(self.axes)


class Translation:
    """Layers, arrays and values so far; see the module docstring."""

    def __init__(self, input_name: str, shape: tuple[int, ...], constants: dict[str, np.ndarray],
                 nodes: list[Node]) -> None:  # fmt: skip
        channel_axis = 1 if shape[1] in (1, 3) else 3
        sides = (2, 3) if channel_axis == 1 else (1, 2)
        self.batch = shape[0]
        self.input_shape = (shape[sides[0]], shape[sides[1]], shape[channel_axis])
        self.constants = constants
        self.layers: dict[str, L.Layer] = {}
        self.shapes: dict[str, tuple[int, ...]] = {INPUT: self.input_shape}
        self.arrays: dict[str, dict[str, dict[str, np.ndarray]]] = {}
        self.values = {
            input_name: Value(
                tensor=INPUT, axes=ax.image_axes(self.batch, self.input_shape, channel_axis)
            )
        }
        self.sequences: dict[str, list[Value]] = {}
        self.readers = Counter(name for node in nodes for name in node.inputs)
        self.normalisation: tuple[np.ndarray, np.ndarray] | None = None
        self.notes: list[str] = []
        self._made: dict[tuple, str] = {}
        self._stems: dict[str, str] = {}

    # --- layers ----------------------------------------------------------------------------------

    def add(self, type_: type[L.Layer], *inputs: str, hint: str | None = None,
            arrays: dict[str, dict[str, np.ndarray]] | None = None, **settings: Any) -> str:  # fmt: skip
        """Appends a layer; the name of its tensor. Without arrays, one alike is used again."""
        key = (type_, inputs, tuple(sorted(settings.items())))
        if arrays is None and key in self._made:
            return self._made[key]
        stem = re.sub(r"\W+", "_", hint or settings.get("kind") or type_.__name__.lower())
        stem = stem.strip("_") or type_.__name__.lower()
        layer = type_(name=_free(stem, self.shapes), inputs=inputs, **settings)
        self._stems[layer.name] = stem
        layer.check_arity()
        shapes = [self.shapes[name] for name in inputs]
        self.shapes[layer.name] = tuple(map(int, layer.output_shape(*shapes)))
        self.layers[layer.name] = layer
        if arrays is not None:
            self._check_shapes(layer, layer.parameter_shapes(*shapes), arrays)
            self.arrays[layer.name] = arrays
        else:
            self._made[key] = layer.name
        return layer.name

    @staticmethod
    def _check_shapes(layer: L.Layer, expected: dict, arrays: dict) -> None:
        found = {c: {n: a.shape for n, a in named.items()} for c, named in arrays.items() if named}
        if found != {c: named for c, named in expected.items() if named}:
            raise layer.fail(f"weights {found}", expected)

    # --- operands --------------------------------------------------------------------------------

    def constant(self, node: Node, position: int, meaning: str) -> np.ndarray | None:
        """A constant operand; None where the file leaves it out."""
        if position >= len(node.inputs) or not node.inputs[position]:
            return None
        name = node.inputs[position]
        if name not in self.constants:
            raise node.fail(f"{meaning} {name!r} computed from the image", f"a constant {meaning}")
        return self.constants[name]

    def required(self, node: Node, position: int, meaning: str) -> np.ndarray:
        """A constant operand of floats that must be there, as float32."""
        found = self.constant(node, position, meaning)
        if found is None:
            raise node.fail(f"no {meaning}", "one")
        if found.dtype != np.float32:
            raise node.fail(f"a {meaning} of {found.dtype}", "float32: export in float32")
        return found

    def raw(self, node: Node, position: int = 0) -> Value:
        """An operand made from the image, as it is."""
        name = node.inputs[position] if position < len(node.inputs) else ""
        if name not in self.values:
            raise node.fail(f"a constant as input {position}", "a tensor made from the image")
        value = self.values[name]
        if value.probabilities and node.kind not in _MAY_FOLLOW_SOFTMAX:
            raise node.fail("it behind a softmax", "nothing but the output there")
        return value

    def passed(self, node: Node) -> Value:
        """The first operand, for an operator that only looks at it in another way."""
        value = self.raw(node)
        return dataclasses.replace(value, alone=value.alone and self.readers[node.inputs[0]] == 1)

    def value(self, node: Node, position: int = 0) -> Value:
        """An operand made from the image, scale and shift applied."""
        return self.applied(self.raw(node, position))

    def image(self, node: Node, position: int = 0, channel_axis: int = 1) -> str:
        """Our tensor of an operand that must be an image with its channels in that axis."""
        value = self.settled(self.value(node, position))
        tensor = value.tensor
        if len(self.shapes[tensor]) == 1:
            tensor = self.add(L.Unflatten, tensor)
        expected = ax.image_axes(self.batch, self.shapes[tensor], channel_axis)
        if value.axes != expected:
            raise node.fail(f"axes {ax.describe(value.axes)}", f"an image {ax.describe(expected)}")
        return tensor

    def image_value(self, tensor: str, channel_axis: int = 1) -> Value:
        """An image, or a vector as one of a single pixel."""
        return Value(
            tensor=tensor, axes=ax.image_axes(self.batch, self.shapes[tensor], channel_axis)
        )

    def features(self, node: Node, value: Value) -> tuple[str, np.ndarray]:
        """Our vector behind an operand `[N, F]`, and our index for each of its features."""
        shape = self.shapes[value.tensor]
        tensor, axes = value.tensor, value.axes
        if len(shape) == 3:
            tensor, axes = self.add(L.Flatten, tensor), ax.flattened(axes, shape)
        kept = [axis for axis in axes[1:] if axis]
        if len(kept) > 1 or value.shape[1] != self.shapes[tensor][0]:
            raise node.fail(f"axes {ax.describe(value.axes)}", "a matrix (N, features)")
        return tensor, ax.channel_order(kept[0] if kept else ())

    # --- what waits ------------------------------------------------------------------------------

    def settled(self, value: Value) -> Value:
        """The value with its channels in one run: a permuted axis becomes a channel shuffle."""
        for position, axis in enumerate(value.axes):
            groups = ax.shuffle_groups(axis, self.shapes[value.tensor][-1])
            if groups is None:
                continue
            value = self.applied(value)
            tensor = value.tensor
            if len(self.shapes[tensor]) == 1:
                tensor = self.add(L.Unflatten, tensor)
            tensor = self.add(L.ChannelShuffle, tensor, groups=groups)
            axes = list(value.axes)
            axes[position] = ax.whole("C", self.shapes[tensor][-1])
            return Value(tensor=tensor, axes=tuple(axes))
        return value

    def applied(self, value: Value) -> Value:
        """The value with scale and shift in a layer, or in the teacher's normalisation."""
        tensor = value.tensor
        if tensor == INPUT:
            channels = self.input_shape[2]
            scale, shift = (np.broadcast_to(v, channels) for v in (value.scale, value.shift))
            wanted = scale, shift
            if self.normalisation is None:
                self.normalisation = wanted
            if not all(map(np.allclose, wanted, self.normalisation)):
                raise ReaderError(
                    "found two normalisations of the image in one network, expected one for all "
                    f"its readers: {self.normalisation} and {wanted}"
                )
        elif not value.is_plain:
            key = (tensor, value.scale.tobytes(), value.shift.tobytes())
            if key not in self._made:
                self._made[key] = self._affine(value)
            tensor = self._made[key]
        return Value(tensor=tensor, axes=self._axes_of(value, tensor), alone=value.alone)

    def _axes_of(self, value: Value, tensor: str) -> Axes:
        before, after = self.shapes[value.tensor], self.shapes[tensor]
        if len(before) == 3 and len(after) == 1:
            return ax.flattened(value.axes, before)
        return value.axes

    def _affine(self, value: Value) -> str:
        """The tensor `scale*x + shift`: inside the layer that makes x, where nothing else reads
        it, else a depthwise 1x1 convolution (whose one tap a channel is exact at any bits)."""
        tensor, channels = value.tensor, self.shapes[value.tensor][-1]
        scale, shift = (np.broadcast_to(v, channels) for v in (value.scale, value.shift))
        layer = self.layers[tensor]
        if isinstance(layer, L.Conv | L.Dense | L.BatchNorm) and value.alone:
            arrays, changed = _taken_in(layer, self.arrays[tensor], scale, shift)
            settings = {
                field.name: getattr(layer, field.name)
                for field in dataclasses.fields(layer)
                if field.name not in ("name", "inputs")
            }
            # A layer of its own: whoever reads the tensor without scale and shift still can.
            return self.add(type(layer), *layer.inputs, hint=self._stems[tensor], arrays=arrays,
                            **settings | changed)  # fmt: skip
        flat = len(self.shapes[tensor]) == 1
        source = self.add(L.Unflatten, tensor) if flat else tensor
        params: dict[str, Any] = {"kernel": np.float32(scale).reshape(1, 1, 1, channels)}
        if np.any(shift):
            params["bias"] = np.float32(shift)
        made = self.add(L.Conv, source, hint="affine", arrays={"params": params},
                        features=channels, kernel_size=(1, 1), groups=channels,
                        use_bias="bias" in params)  # fmt: skip
        return self.add(L.Flatten, made) if flat else made

    # --- the end ---------------------------------------------------------------------------------

    def graph(self, name: str, output: str) -> tuple[Graph, dict[str, dict]]:
        """The graph that makes our tensor `output`, what nothing reads left out, and variables."""
        needed = {output}
        for layer in reversed(self.layers.values()):
            if layer.name in needed:
                needed.update(layer.inputs)
        names: dict[str, str] = {INPUT: INPUT}
        order: list[L.Layer] = []
        variables: dict[str, dict] = {"params": {}, "batch_stats": {}}
        for old, layer in self.layers.items():
            if old not in needed:
                continue
            new = names[old] = _free(self._stems[old], names.values())
            inputs = tuple(names[read] for read in layer.inputs)
            order.append(dataclasses.replace(layer, name=new, inputs=inputs))
            for collection, named in self.arrays.get(old, {}).items():
                if named:
                    variables[collection][new] = {
                        key: np.ascontiguousarray(array, np.float32) for key, array in named.items()
                    }
        return Graph(name=name, input_shape=self.input_shape, layers=tuple(order)), variables


def _free(stem: str, taken: Collection[str]) -> str:
    """The stem, numbered where it is taken."""
    name, count = stem, 0
    while name in taken:
        count += 1
        name = f"{stem}_{count}"
    return name


def _taken_in(layer: L.Layer, arrays: dict[str, dict], scale: np.ndarray, shift: np.ndarray) -> tuple:  # fmt: skip
    """Arrays and settings of a layer whose output is scaled and shifted, computed in float64."""
    params = dict(arrays["params"])
    weight, settings = ("scale", {}) if isinstance(layer, L.BatchNorm) else ("kernel", {})
    if isinstance(layer, L.Conv | L.Dense):
        settings = {"use_bias": layer.use_bias or bool(np.any(shift != 0))}
    bias = params.get("bias", np.zeros(scale.shape)) * scale + shift
    params[weight] = np.float32(params[weight] * scale)
    if settings.get("use_bias", True):
        params["bias"] = np.float32(bias)
    return {**arrays, "params": params}, settings


__all__ = ["AxesError", "Node", "Translation", "Value"]
