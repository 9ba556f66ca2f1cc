"""From a file's tree of arrays to the variables of one of our graphs, strictly."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lrq_jax.graph import Graph
from lrq_jax.graph import layers as L
from lrq_jax.readers.errors import ReaderError
from lrq_jax.readers.naming import Naming
from lrq_jax.readers.published import NAMINGS
from lrq_jax.readers.teacher import Variables

Convert = Callable[[np.ndarray], np.ndarray]

WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
)
"""Keys under which checkpoints keep their weights, the first found wins."""

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
"""What wrapper modules put before every name (DataParallel, torch.compile, trainers)."""

_FILE_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias",
               "mean": "running_mean", "var": "running_var"}  # fmt: skip


# --- unwrapping ----------------------------------------------------------------------------------


def unwrap_state_dict(tree: Any) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The flat state dict in a checkpoint, and a sentence for everything that was done to it.

    Descends into the wrappers of `WRAPPERS`, removes the `PREFIXES` that all names share, drops
    counters (`num_batches_tracked`, `n_averaged`) and what is no array, and brings every
    floating dtype to float32.

    Raises:
      ReaderError: no dict of arrays where one is expected.
    """
    notes: list[str] = []
    tree = _descend(tree, notes)
    state = {str(name): value for name, value in tree.items() if isinstance(value, np.ndarray)}
    others = [str(name) for name in tree if str(name) not in state]
    if others:
        notes.append(f"left out what is no array: {', '.join(others)}")
    counters = [n for n in state if n.split(".")[-1] in ("num_batches_tracked", "n_averaged")]
    if counters:
        notes.append(f"left out {len(counters)} counters (num_batches_tracked, n_averaged)")
    state = {name: value for name, value in state.items() if name not in counters}
    while prefix := next((p for p in PREFIXES if state and all(n.startswith(p) for n in state)), None):  # fmt: skip
        notes.append(f"removed the prefix {prefix!r} from every name")
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    kinds = collections.Counter(
        str(value.dtype) for value in state.values() if _is_float(value) and value.dtype != "f4"
    )
    for kind, count in kinds.items():
        verb = "rounded" if kind == "float64" else "widened"
        notes.append(f"{verb} {count} arrays from {kind} to float32")
    return {n: v.astype(np.float32) if _is_float(v) else v for n, v in state.items()}, tuple(notes)


def _is_float(array: np.ndarray) -> bool:
    # ml_dtypes' bfloat16 has the kind "V" in numpy: its name tells.
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def _descend(tree: Any, notes: list[str]) -> Mapping[Any, Any]:
    """The innermost dict of arrays; a wrapper is followed even where arrays lie beside it."""
    while isinstance(tree, Mapping):
        inner = {key: value for key, value in tree.items() if isinstance(value, Mapping)}
        found = [key for key in WRAPPERS if key in inner]
        if not found and any(isinstance(v, np.ndarray) and v.ndim for v in tree.values()):
            return tree
        if not found and len(inner) == 1:
            found = list(inner)
        if not found:
            raise ReaderError(
                f"found a dict of {[str(key) for key in tree][:12]} without arrays, expected a "
                f"state dict, by itself or under one of {WRAPPERS}"
            )
        arrays = [str(key) for key, value in tree.items() if isinstance(value, np.ndarray)]
        unused = [*map(str, found[1:]), *arrays]
        beside = f" (also there, not used: {', '.join(unused)})" if unused else ""
        notes.append(f"took the weights under {str(found[0])!r}{beside}")
        tree = inner[found[0]]
    raise ReaderError(
        f"found {type(tree).__name__}, expected a dict of arrays: save the model's state_dict()"
    )


# --- matching ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One variable of ours and the array in the file that it is made of."""

    collection: str
    layer: str
    variable: str
    name: str
    shape: tuple[int, ...]
    convert: Convert

    @property
    def ours(self) -> str:
        return f"{self.layer}/{self.variable}"


def _flat_images(graph: Graph) -> dict[str, L.Shape]:
    """Vectors that are flattened images, with the image's `(H, W, C)`: PyTorch flattens C, H, W."""
    flat: dict[str, L.Shape] = {}
    for layer in graph.layers:
        shapes = [graph.shapes[name] for name in layer.inputs]
        if isinstance(layer, L.Flatten) and len(shapes[0]) == 3:
            flat[layer.name] = shapes[0]
        elif isinstance(layer, L.Activation | L.BatchNorm | L.Add) and layer.inputs[0] in flat:
            flat[layer.name] = flat[layer.inputs[0]]
        elif isinstance(layer, L.Concat) and any(name in flat for name in layer.inputs):
            raise layer.fail("a concatenation of flattened images", "a dense layer after Flatten")
    return flat


def _channels_last(image: L.Shape) -> Convert:
    """Reorders the last axis from C, H, W to H, W, C."""
    height, width, channels = image

    def reorder(values: np.ndarray) -> np.ndarray:
        split = values.reshape(*values.shape[:-1], channels, height, width)
        return np.moveaxis(split, -3, -1).reshape(values.shape)

    return reorder


def _entries(graph: Graph, naming: Naming) -> list[_Entry]:
    flat, modules = _flat_images(graph), naming.modules(graph)
    entries = []
    for collection, layers in graph.variable_shapes().items():
        for name, variables in layers.items():
            layer = graph.by_name[name]
            for variable, shape in variables.items():
                file_name = f"{modules[name]}.{_FILE_NAMES[variable]}"
                layout = _layout(layer, variable, shape, flat.get(layer.inputs[0]))
                entries.append(_Entry(collection, name, variable, file_name, *layout))
    return entries


def _layout(layer: L.Layer, variable: str, shape: L.Shape,
            image: L.Shape | None) -> tuple[L.Shape, Convert]:  # fmt: skip
    """PyTorch's shape of one of our variables, and how to bring its array to ours.

    `image` is the `(H, W, C)` of the image whose flattened form the layer reads, if it does.
    """
    reorder: Convert = _channels_last(image) if image else _unchanged
    if isinstance(layer, L.Conv) and variable == "kernel":
        height, width, inputs, outputs = shape
        return (outputs, inputs, height, width), lambda values: values.transpose(2, 3, 1, 0)
    if isinstance(layer, L.Dense) and variable == "kernel":
        return shape[::-1], lambda values: reorder(values).T
    return shape, reorder if isinstance(layer, L.BatchNorm) else _unchanged


def _unchanged(values: np.ndarray) -> np.ndarray:
    return values


def _as_expected(entry: _Entry, state: Mapping[str, np.ndarray]) -> np.ndarray:
    """The array of an entry; a convolution over the whole image is a dense layer's matrix, its
    input channels, rows and columns in PyTorch's order."""
    array = state[entry.name]
    return array.reshape(len(array), -1) if len(entry.shape) == 2 and array.ndim == 4 else array


def differences(graph: Graph, naming: Naming, state: Mapping[str, np.ndarray]) -> list[str]:
    """A line for each array that is missing, left over or of the wrong shape or dtype."""
    entries, lines = _entries(graph, naming), []
    for entry in entries:
        if entry.name not in state:
            lines.append(f"missing in the file: {entry.name!r} {entry.shape}, for {entry.ours!r}")
            continue
        array = _as_expected(entry, state)
        if array.shape != entry.shape:
            lines.append(
                f"wrong shape: {entry.name!r} is {state[entry.name].shape} in the file, expected "
                f"{entry.shape} for {entry.ours!r}"
            )
        elif array.dtype.kind != "f":
            lines.append(f"wrong dtype: {entry.name!r} is {array.dtype}, expected a float")
    wanted = {entry.name for entry in entries}
    lines += [
        f"in the file only: {name!r} {array.shape}"
        for name, array in state.items()
        if name not in wanted and not (naming.ignored and re.fullmatch(naming.ignored, name))
    ]
    return lines


def find_naming(graph: Graph, state: Mapping[str, np.ndarray], *,
                namings: tuple[Naming, ...] = NAMINGS) -> Naming:  # fmt: skip
    """The naming under which a state dict differs least from a graph.

    Raises:
      ReaderError: no naming knows the graph's layers.
    """
    known = [naming for naming in namings if None not in naming.modules(graph).values()]
    if not known:
        raise ReaderError(
            f"found no naming for the layers of network {graph.name!r}, expected one of "
            f"{[naming.name for naming in namings]} to know them: add its table to NAMINGS"
        )
    return min(known, key=lambda naming: len(differences(graph, naming, state)))


def match_variables(graph: Graph, state: Mapping[str, np.ndarray], *,
                    namings: tuple[Naming, ...] = NAMINGS) -> Variables:  # fmt: skip
    """A graph's variables from a state dict, each array used exactly once.

    Args:
      graph: the network; kernels become `[kh, kw, C_in / groups, C_out]` and `[C_in, C_out]`,
        with C, H, W reordered to H, W, C where a dense layer reads a flattened image.
      state: PyTorch's names and layouts, see `unwrap_state_dict`.
      namings: the tables to try.

    Returns:
      `{"params": {layer: {...}}, "batch_stats": {layer: {...}}}` of float32 numpy arrays.

    Raises:
      ReaderError: names every missing, left-over and wrong-shaped array, the file's name and
        ours; or arrays with NaN, infinity or a negative variance.
    """
    naming = find_naming(graph, state, namings=namings)
    entries = _entries(graph, naming)
    if lines := differences(graph, naming, state):
        raise ReaderError(
            f"found {len(lines)} differences between the file (read with {naming.name} names) and "
            f"network {graph.name!r}, expected none; check the architecture and number of classes:"
            + "".join(f"\n  {line}" for line in lines)
        )
    variables: Variables = {"params": {}, "batch_stats": {}}
    broken = []
    for entry in entries:
        values = np.ascontiguousarray(entry.convert(_as_expected(entry, state)), np.float32)
        if not np.isfinite(values).all() or (entry.variable == "var" and (values < 0).any()):
            broken.append(f"{entry.name!r} ({entry.ours!r})")
        variables[entry.collection].setdefault(entry.layer, {})[entry.variable] = values
    if broken:
        raise ReaderError(
            "found NaN, infinity or a negative variance, expected finite weights, in "
            + ", ".join(broken)
        )
    return variables
