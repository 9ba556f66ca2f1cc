"""The graph: an immutable, checked, topologically ordered tuple of layers."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable

from lrq_jax.graph.layers import (
    INPUT,
    BatchNorm,
    Conv,
    Dense,
    GlobalPool,
    GraphError,
    Layer,
    Shape,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graph:
    """A network: layers in the order they run, from one image to the logits of the last layer.

    Attributes:
      name: what the network is called, e.g. `resnet20_cifar`.
      input_shape: `(H, W, C)` of one image.
      layers: in topological order; checked when built.

    Raises:
      GraphError: a name used twice, an unknown input, an impossible shape, an unused layer.
    """

    name: str
    input_shape: Shape
    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        if len(self.input_shape) != 3 or min(self.input_shape) < 1:
            raise GraphError(
                f"network {self.name!r}: found input shape {self.input_shape}, "
                "expected (height, width, channels), all positive"
            )
        if not self.layers:
            raise GraphError(f"network {self.name!r}: found no layers, expected at least one")
        unused = set(self.shapes) - self.ancestors([self.output])
        if unused:
            raise GraphError(
                f"network {self.name!r}: found layers that do not reach the output "
                f"{self.output!r}: {sorted(unused)}; expected every layer to be used"
            )

    @functools.cached_property
    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor, batch left out, the input included."""
        shapes: dict[str, Shape] = {INPUT: tuple(self.input_shape)}
        for layer in self.layers:
            if layer.name in shapes or "/" in layer.name or not layer.name:
                raise layer.fail(f"name {layer.name!r}", "a new name without '/'")
            unknown = [name for name in layer.inputs if name not in shapes]
            if unknown:
                raise layer.fail(f"unknown inputs {unknown}", "tensors made by earlier layers")
            layer.check_arity()
            shapes[layer.name] = layer.output_shape(*(shapes[name] for name in layer.inputs))
        return shapes

    @functools.cached_property
    def by_name(self) -> dict[str, Layer]:
        """Layers by name."""
        return {layer.name: layer for layer in self.layers}

    @functools.cached_property
    def consumers(self) -> dict[str, tuple[Layer, ...]]:
        """Layers that read each tensor."""
        readers: dict[str, list[Layer]] = {name: [] for name in self.shapes}
        for layer in self.layers:
            for name in layer.inputs:
                readers[name].append(layer)
        return {name: tuple(layers) for name, layers in readers.items()}

    @property
    def output(self) -> str:
        """Name of the last tensor, the logits."""
        return self.layers[-1].name

    @property
    def num_classes(self) -> int:
        """Length of the logits."""
        return self.shapes[self.output][-1]

    @functools.cached_property
    def batch_norms(self) -> tuple[BatchNorm, ...]:
        """The batch norms, in order: where synthesis matches statistics."""
        return tuple(layer for layer in self.layers if isinstance(layer, BatchNorm))

    @functools.cached_property
    def weighted(self) -> tuple[Conv | Dense, ...]:
        """The layers with a weight matrix, in order."""
        return tuple(layer for layer in self.layers if isinstance(layer, Conv | Dense))

    @property
    def classifier(self) -> Dense:
        """The last layer, which must be dense."""
        last = self.layers[-1]
        if not isinstance(last, Dense):
            raise last.fail("it as the last layer", "a Dense layer that makes the logits")
        return last

    @property
    def features(self) -> str:
        """Name of the pooled (penultimate) features: what the classifier reads."""
        return self.classifier.inputs[0]

    @property
    def last_map(self) -> str:
        """Name of the feature map that the global pool before the classifier reads.

        Raises:
          GraphError: the classifier reads something else.
        """
        pool = self.by_name[self.features]
        if not isinstance(pool, GlobalPool):
            raise self.classifier.fail(
                f"{pool.name!r} ({type(pool).__name__}) before it", "a GlobalPool of the last map"
            )
        return pool.inputs[0]

    @functools.cached_property
    def block_outputs(self) -> tuple[str, ...]:
        """Tensors through which everything after them depends on the image: the network's
        single-tensor cut points, which split it into blocks that can be rebuilt one by one."""
        last_use = {self.output: len(self.layers)}
        for position, layer in enumerate(self.layers):
            last_use.update(dict.fromkeys(layer.inputs, position))
        cuts, live = [], {INPUT}
        for position, layer in enumerate(self.layers):
            live.add(layer.name)
            live = {name for name in live if last_use[name] > position}
            if live == {layer.name}:
                cuts.append(layer.name)
        return tuple(cuts)

    def ancestors(self, names: Iterable[str]) -> set[str]:
        """The named tensors and all they are made of, the input included."""
        wanted = set(names)
        unknown = wanted - set(self.shapes)
        if unknown:
            raise GraphError(
                f"network {self.name!r}: found no tensor named {sorted(unknown)}; "
                f"expected some of {list(self.shapes)}"
            )
        for layer in reversed(self.layers):
            if layer.name in wanted:
                wanted.update(layer.inputs)
        return wanted | {INPUT}

    def variable_shapes(self) -> dict[str, dict[str, dict[str, Shape]]]:
        """Shapes of all variables: `{collection: {layer: {variable: shape}}}`."""
        tree: dict[str, dict[str, dict[str, Shape]]] = {"params": {}, "batch_stats": {}}
        for layer in self.layers:
            shapes = (self.shapes[name] for name in layer.inputs)
            for collection, variables in layer.parameter_shapes(*shapes).items():
                tree[collection][layer.name] = variables
        return tree

    def num_parameters(self) -> int:
        """Number of trainable numbers (running statistics not counted)."""
        return sum(
            math.prod(shape)
            for variables in self.variable_shapes()["params"].values()
            for shape in variables.values()
        )
