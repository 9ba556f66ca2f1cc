"""Graphs as plain JSON values, so that a checkpoint carries its own architecture."""

from __future__ import annotations

import dataclasses
from typing import Any

from lrq_jax.graph import layers
from lrq_jax.graph.layers import GraphError, Layer
from lrq_jax.graph.network import Graph

_TYPES: dict[str, type[Layer]] = {
    kind.__name__: kind
    for kind in vars(layers).values()
    if isinstance(kind, type) and issubclass(kind, Layer) and kind is not Layer
}


def _tuples(value: Any) -> Any:
    """JSON lists back to the tuples the frozen layers hold."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def graph_to_dict(graph: Graph) -> dict[str, Any]:
    """JSON-ready description of a graph; `graph_from_dict` reads it back equal."""
    return {
        "name": graph.name,
        "input_shape": list(graph.input_shape),
        "layers": [
            {"type": type(layer).__name__, **dataclasses.asdict(layer)} for layer in graph.layers
        ],
    }


def graph_from_dict(description: dict[str, Any]) -> Graph:
    """The graph of a description; raises GraphError on an unknown kind or setting."""
    made = []
    for entry in description["layers"]:
        settings = {key: _tuples(value) for key, value in entry.items() if key != "type"}
        kind = _TYPES.get(entry.get("type"))
        if kind is None:
            raise GraphError(
                f"layer {entry.get('name')!r}: found type {entry.get('type')!r}, "
                f"expected one of {sorted(_TYPES)}"
            )
        expected = {field.name for field in dataclasses.fields(kind)}
        if set(settings) != expected:
            raise GraphError(
                f"layer {entry.get('name')!r} ({entry['type']}): found settings "
                f"{sorted(settings)}, expected {sorted(expected)}"
            )
        made.append(kind(**settings))
    return Graph(
        name=description["name"],
        input_shape=_tuples(description["input_shape"]),
        layers=tuple(made),
    )
