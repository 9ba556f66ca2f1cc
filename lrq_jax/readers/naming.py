"""How published files name the layers of our networks: one table for each naming.

A rule reads "our layer name (a regular expression) -> module name in the file". The expression's
named groups carry over; `{block+1}` is the group `block` counted from one instead of zero. Two
more are the network's: `{unit}` counts blocks through all stages, `{position}` all layers. Every
array has its one name: nothing is matched by its order or its shape. A further family is a further
`Naming` in `published.NAMINGS`; nothing else has to change.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

from lrq_jax.graph import Graph

Rules = tuple[tuple[str, str], ...]

UNIT = r"stage(?P<stage>\d+)_block(?P<block>\d+)_"
"""How the names of all layers of a block begin."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
    """One way of naming layers.

    Attributes:
      name: what it is called in notes and errors.
      rules: (regular expression over our layer names, module name in the file); the first that
        fits counts.
      archs: regular expression of the architectures that have such files.
      marks: arrays that every such file has: where one is missing, the naming is not tried.
      settings: builder settings of these networks where no shape tells them.
      ignored: regular expression of arrays that are left out, such as auxiliary classifiers.
    """

    name: str
    rules: Rules
    archs: str
    marks: tuple[str, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored: str | None = None

    def modules(self, graph: Graph) -> dict[str, str | None]:
        """Name in the file of each layer with variables; None where no rule knows it."""
        units = _units(graph)
        positions = {layer.name: index for index, layer in enumerate(graph.layers)}
        names = dict.fromkeys(
            name for layers in graph.variable_shapes().values() for name in layers
        )
        return {name: self._module(name, units.get(_prefix(name), 0), positions[name])
                for name in names}  # fmt: skip

    def _module(self, layer: str, unit: int, position: int) -> str | None:
        for pattern, template in self.rules:
            if match := _compiled(pattern).fullmatch(layer):
                values = {**match.groupdict(), "unit": str(unit), "position": str(position)}
                return re.sub(r"\{(\w+)([+-]\d+)?\}", functools.partial(_filled, values), template)
        return None


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _filled(values: Mapping[str, str], field: re.Match[str]) -> str:
    value, offset = values[field[1]], field[2]
    return str(int(value) + int(offset)) if offset else value


def _prefix(layer: str) -> str:
    match = _compiled(r"stage\d+_block\d+").match(layer)
    return match[0] if match else ""


def _units(graph: Graph) -> dict[str, int]:
    """Number of each block, counted through all stages in the order they run."""
    found = dict.fromkeys(_prefix(layer.name) for layer in graph.layers)
    return {prefix: index for index, prefix in enumerate(filter(None, found))}
