"""What all Keras layers need to become layers of a graph: tensors, variables, names, padding."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from lrq_jax.graph import INPUT, GraphBuilder
from lrq_jax.graph.layers import Padding, Pair, Shape
from lrq_jax.readers.errors import ReaderError
from lrq_jax.readers.keras_config import Call
from lrq_jax.readers.keras_file import Weights
from lrq_jax.readers.teacher import Variables

NO_PADDING: Padding = ((0, 0), (0, 0))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Value:
    """A tensor of the Keras model in terms of the graph.

    Attributes:
      tensor: name of a tensor of the graph.
      padding: zeros still to be put around it; a convolution takes them into its own padding.
      scale, offset: what the model did to the image before its first layer, `scale*x + offset`
        a channel; the preprocessing takes it.
      softmax: its softmax was dropped, so that only the model's output may be this.
    """

    tensor: str
    padding: Padding = NO_PADDING
    scale: np.ndarray | None = None
    offset: np.ndarray | None = None
    softmax: bool = False

    @property
    def is_image(self) -> bool:
        """Whether this is the image itself, perhaps normalised, and nothing around it yet."""
        return self.scale is not None and self.padding == NO_PADDING


class Translator:
    """Builds the graph and its variables, layer by layer."""

    def __init__(self, name: str, input_shape: Shape, weights: Weights, version: str) -> None:
        self.net = GraphBuilder(name, input_shape=input_shape)
        self.variables: Variables = {"params": {}, "batch_stats": {}}
        self.left_out: list[str] = []
        self.completed: list[str] = []
        self.keras_2 = not version or int(version.split(".")[0]) < 3
        self._weights = weights
        self._entry: Value | None = None
        self._names: set[str] = set()
        channels = input_shape[2]
        self.image = Value(tensor=INPUT, scale=np.ones(channels), offset=np.zeros(channels))

    def refuse(self, call: Call, found: object, expected: object) -> ReaderError:
        """The error to raise for a layer."""
        return ReaderError(
            f"layer {'/'.join(call.address.names)!r} ({call.kind}): found {found}, expected "
            f"{expected}"
        )

    # --- tensors ---------------------------------------------------------------------------------

    def shape(self, value: Value) -> Shape:
        """`(H, W, C)` or `(C,)`, padding included."""
        shape = self.net.shape(value.tensor)
        if value.padding == NO_PADDING:
            return shape
        return (*(n + sum(p) for n, p in zip(shape, value.padding, strict=False)), shape[2])

    def bare(self, call: Call, value: Value) -> str:
        """Name of the tensor, its padding left to the reader."""
        if value.softmax:
            raise self.refuse(call, "a softmax as its input", "a softmax only as the last layer")
        if value.scale is not None:
            first = self._entry or value
            if not (np.array_equal(first.scale, value.scale)
                    and np.array_equal(first.offset, value.offset)):  # fmt: skip
                raise self.refuse(call, "the image in a second normalisation", "one for all")
            self._entry = value
        return value.tensor

    def tensor(self, call: Call, value: Value) -> str:
        """Name of the tensor, its padding made a layer."""
        name = self.bare(call, value)
        if value.padding == NO_PADDING:
            return name
        height, width = value.padding
        return self.net.pad(name, height=height, width=width, name=self.name(f"{call.name}_pad"))

    @property
    def entry(self) -> Value:
        """The image as the first layers read it."""
        return self._entry or self.image

    def name(self, wanted: str) -> str:
        """A name for a layer of the graph: without `/`, and not yet taken."""
        wanted = wanted.replace("/", "_") or "layer"
        name, count = wanted, 1
        while name in self._names or name == INPUT:
            count += 1
            name = f"{wanted}_{count}"
        self._names.add(name)
        return name

    # --- variables -------------------------------------------------------------------------------

    def weights(self, call: Call, shapes: dict[str, Shape]) -> dict[str, Any]:
        """A layer's variables as float32, of exactly these names and shapes."""
        found = self._weights.of(call.address, tuple(shapes))
        found.pop("count", None)  # a Normalization's number of samples
        for name, array in found.items():
            if array.dtype.kind != "f" or array.shape != shapes[name]:
                raise self.refuse(
                    call, f"{name} {array.dtype} {array.shape}", f"a float one of {shapes[name]}"
                )
            if not np.isfinite(array).all() or ("variance" in name and (array < 0).any()):
                raise self.refuse(
                    call, f"NaN, infinity or a negative variance in {name}", "finite weights"
                )
        return {name: np.ascontiguousarray(array, np.float32) for name, array in found.items()}

    def put(self, layer: str, collection: str = "params", **arrays: np.ndarray) -> None:
        """Sets variables of a layer of the graph."""
        self.variables[collection].setdefault(layer, {}).update(arrays)

    # --- settings --------------------------------------------------------------------------------

    def setting(self, call: Call, name: str, config: dict[str, Any] | None = None) -> Any:
        """A setting that Keras always writes, from the layer's own configuration or from `config`.

        Raises:
          ReaderError: it is not there. A default in its place would make another network of a
            setting whose name is written in a way that is not known here.
        """
        config = call.config if config is None else config
        if name not in config:
            raise self.refuse(call, f"no setting {name!r} among {sorted(config)}",
                              "it: Keras writes every setting of a layer")  # fmt: skip
        return config[name]

    def channels_last(self, call: Call) -> None:
        """Refuses the other layout of images."""
        if (found := self.setting(call, "data_format")) not in ("channels_last", None):
            raise self.refuse(call, f"data_format {found!r}", "'channels_last'")

    def last_axis(self, call: Call, value: Value) -> None:
        """Refuses an axis other than that of the channels."""
        axis = self.setting(call, "axis")
        axes = list(axis) if isinstance(axis, list | tuple) else [axis]
        if axes not in ([-1], [len(self.shape(value))]):
            raise self.refuse(call, f"axis {axis}", "that of the channels, the last")

    def pair(self, call: Call, setting: str) -> Pair:
        """A setting of two whole numbers, or of one for both."""
        value = self.setting(call, setting)
        values = value if isinstance(value, list | tuple) else [value, value]
        if len(values) != 2 or not all(isinstance(n, int) for n in values):
            raise self.refuse(call, f"{setting} {value!r}", "two whole numbers")
        return values[0], values[1]

    def padding(self, call: Call) -> str | int:
        """The padding in the builder's terms."""
        found = self.setting(call, "padding")
        if found not in ("valid", "same"):
            raise self.refuse(call, f"padding {found!r}", "'valid' or 'same'")
        return "tf_same" if found == "same" else 0


def number(value: Any) -> float:
    """A number as Keras writes it: plain, or an array of one."""
    if isinstance(value, dict):
        value = value["config"]["value"] if "config" in value else value["value"]
    while isinstance(value, list) and len(value) == 1:
        (value,) = value
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ReaderError(f"found {value!r}, expected a finite number")
    return float(value)


def numbers(value: Any) -> np.ndarray:
    """A number or a flat list of them, float64; `[1, 1, 1, C]` loses its leading ones."""
    if isinstance(value, dict):
        value = value["config"]["value"] if "config" in value else value["value"]
    array = np.asarray(value, np.float64)
    if array.ndim > 1 and array.size == array.shape[-1]:
        array = array.reshape(-1)
    if array.ndim > 1 or not np.isfinite(array).all():
        raise ReaderError(f"found {value!r}, expected one finite number or one a channel")
    return array
