"""The teacher: a network, its variables and all that is needed to run it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from lrq_jax.data import Preprocessing
from lrq_jax.graph import Graph, graph_to_dict

Variables = dict[str, dict[str, dict[str, np.ndarray]]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """A trained float classifier and all that is needed to run it.

    Attributes:
      graph: the network.
      variables: float32 numpy arrays in Flax's collections,
        `{"params": {layer: {name: array}}, "batch_stats": {layer: {name: array}}}`.
      preprocessing: how images become the network's input.
      arch: name of the architecture, e.g. `resnet20_cifar`.
      class_names: one name a class, or None where they are not known.
      source: name of the file it was read from, without its folder.
      source_sha256: SHA-256 of that file, 64 hexadecimal digits; empty where there is none.
      notes: sentences on what was done to the file's arrays and where the settings come from.
      top1: accuracy published for this very file, percent; None where none is known.
      path: where `load_teacher` was told to find it, so that the same command finds it again;
        empty for one made otherwise.

    Raises:
      ValueError: variables that are not those of the graph, images of another size or number of
        channels, or not one name for each class.
    """

    graph: Graph
    variables: Variables
    preprocessing: Preprocessing
    arch: str
    class_names: tuple[str, ...] | None = None
    source: str = ""
    source_sha256: str = ""
    notes: tuple[str, ...] = ()
    top1: float | None = None
    path: str = ""

    def __post_init__(self) -> None:
        expected = flatten_variables(self.graph.variable_shapes())
        found = flatten_variables(self.variables)
        wrong = [
            f"{name}: found {describe_array(found.get(name))}, expected float32 {shape}"
            for name, shape in expected.items()
            if describe_array(found.get(name)) != f"float32 {shape}"
        ]
        wrong += [f"{name}: found, expected not to be there" for name in found.keys() - expected]
        if wrong:
            raise ValueError(
                f"variables do not fit network {self.graph.name!r}: {'; '.join(wrong)}"
            )
        how = self.preprocessing
        image = (how.size, how.size, how.channels)
        if image != self.graph.input_shape:
            raise ValueError(
                f"found preprocessing to images {image}, expected the {self.graph.input_shape} of "
                f"network {self.graph.name!r}"
            )
        if self.class_names is not None and len(self.class_names) != self.graph.num_classes:
            raise ValueError(
                f"found {len(self.class_names)} class names, expected {self.graph.num_classes}"
            )


def describe_array(array: Any) -> str:
    """Dtype and shape of an array, or `nothing` for None."""
    return "nothing" if array is None else f"{array.dtype} {tuple(array.shape)}"


def flatten_variables(tree: dict[str, Any]) -> dict[str, Any]:
    """`{collection/layer/name: leaf}`, sorted by name."""
    return {
        f"{collection}/{layer}/{name}": leaf
        for collection, layers in sorted(tree.items())
        for layer, leaves in sorted(layers.items())
        for name, leaf in sorted(leaves.items())
    }


def teacher_hash(teacher: Teacher) -> str:
    """SHA-256 over the graph and every variable's name, shape and float32 bytes."""
    digest = hashlib.sha256(
        json.dumps(graph_to_dict(teacher.graph), sort_keys=True, separators=(",", ":")).encode()
    )
    for name, array in flatten_variables(teacher.variables).items():
        digest.update(f"{name} {tuple(array.shape)}\n".encode())
        digest.update(np.ascontiguousarray(array, "<f4").tobytes())
    return digest.hexdigest()
