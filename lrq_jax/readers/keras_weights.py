"""Keras files of weights only, matched with a named architecture by order and shapes.

Such a file knows neither connections nor settings. Layers of one kernel shape are matched in
order where the network runs them one after the other; where two of them run side by side (a
shortcut's batch norm and the block's last) only names can tell, and without such names the file
is refused. Padding and epsilon are taken to be Keras' defaults.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any, cast

import numpy as np

from lrq_jax.graph import INPUT, Graph
from lrq_jax.graph import layers as L
from lrq_jax.networks import build_network
from lrq_jax.readers.errors import ReaderError
from lrq_jax.readers.keras_file import NESTED, KerasFile, ListedWeights, numbered
from lrq_jax.readers.keras_model import Triple, image_preprocessing
from lrq_jax.readers.keras_translator import Value
from lrq_jax.readers.padding import with_tf_same
from lrq_jax.readers.teacher import Teacher, Variables

_EPSILON = 1e-3
_WHOLE = "save the whole model, model.save('model.keras'), which tells them apart"
_KIND_WORDS = re.compile(r"batch_?normalization|batch_?norm|norm|bn|conv2d|conv", re.IGNORECASE)
_NORM = ("gamma", "beta", "moving_mean", "moving_variance")
_OURS = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}

Signature = tuple[int, ...]
"""Shape of a kernel as Keras keeps it, or of a batch norm's statistics."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Stored:
    """One layer of the file: its name and its variables."""

    name: str
    arrays: dict[str, np.ndarray]

    @property
    def signature(self) -> Signature:
        """What it is matched by; biases do not count."""
        return self.arrays.get("kernel", self.arrays.get("moving_mean", np.zeros(()))).shape


def read_keras_weights(file: KerasFile, arch: str | None, *, num_classes: int | None = None,
                       mean: Triple | None = None, std: Triple | None = None,
                       size: int | None = None) -> Teacher:  # fmt: skip
    """The teacher of a named architecture with a file's weights; as `read_keras_model`.

    Raises:
      ReaderError: no architecture named, layers that do not fit it, or that could be matched in
        several ways.
      ValueError: an unknown architecture.
    """
    if arch is None:
        raise ReaderError(f"found weights only, expected --arch with them: or {_WHOLE}")
    stored = list(_listed(file.weights) if isinstance(file.weights, ListedWeights)
                  else _numbered(file))  # fmt: skip
    heads = [layer.signature[1] for layer in stored if len(layer.signature) == 2]
    if not heads:
        raise ReaderError("found no Dense layer, expected a whole classifier with its top")
    if num_classes not in (None, heads[-1]):
        raise ReaderError(
            f"found {heads[-1]} classes in the file, expected the {num_classes} asked for: leave "
            "--num-classes out or choose another file"
        )
    settings: dict[str, Any] = {"num_classes": heads[-1]}
    settings |= {} if size is None else {"input_shape": (size, size, 3)}
    graph = with_tf_same(build_network(arch, **settings))
    matched = _match(graph, stored)
    graph = dataclasses.replace(
        graph, layers=tuple(_as_stored(layer, matched) for layer in graph.layers)
    )
    image = Value(tensor=INPUT, scale=np.ones(graph.input_shape[2]),
                  offset=np.zeros(graph.input_shape[2]))  # fmt: skip
    how, origin = image_preprocessing(image, mean, std, graph.input_shape[0])
    notes = (
        f"weights only, matched with {arch} by order and shapes",
        "taken to have Keras' defaults, which such a file does not say: padding 'same' "
        f"(asymmetric at strides) and epsilon {_EPSILON:g}; where that is not so, {_WHOLE}",
        origin,
    )
    return Teacher(graph=graph, variables=_variables(graph, matched), preprocessing=how, arch=arch,
                   notes=notes)  # fmt: skip


# --- what the file holds -------------------------------------------------------------------------


def _listed(weights: ListedWeights) -> Iterator[_Stored]:
    """Layers of the older layout, in order; a nested model's are taken apart by their scopes."""
    for layer in weights.tree.names(weights.root, "layer_names") or []:
        scopes: dict[str, dict[str, np.ndarray]] = {}
        for name, array in weights.variables(layer).items():
            scope, _, variable = name.removesuffix(":0").rpartition("/")
            variable = "kernel" if variable == "depthwise_kernel" else variable
            scopes.setdefault(scope or layer, {})[variable] = array
        for scope, arrays in scopes.items():
            expected = {"kernel", "bias"} if "kernel" in arrays else set(_NORM)
            needed = {"kernel"} if "kernel" in arrays else set(_NORM[2:])
            if not needed <= set(arrays) <= expected:
                raise ReaderError(
                    f"found layer {scope!r} with {sorted(arrays)}, expected convolutions, batch "
                    "norms and dense layers only: save the whole model"
                )
            yield _Stored(scope, arrays)


def _numbered(file: KerasFile) -> Iterator[_Stored]:
    """Layers of the newer layout; their order is known only among those of one class."""
    folders = {name.rpartition("/vars/")[0] for name in file.tree.arrays if "/vars/" in name}
    found: list[tuple[str, str, int, str]] = []
    for folder in folders:
        container, _, name = folder.rpartition("/")
        if container.rpartition("/")[2] not in NESTED:
            raise ReaderError(f"found weights under the attribute {folder!r} of a class of its own, "
                              f"whose order is not in the file: {_WHOLE}")  # fmt: skip
        kind, count = re.fullmatch(r"(.+?)(?:_(\d+))?", name).groups()
        found.append((container, kind, int(count or 0), folder))
    places: dict[str, str] = {}
    for container, kind, _, _ in found:
        if places.setdefault(kind, container) != container:
            raise ReaderError(f"found {kind!r} layers in two models of the file, whose order is "
                              f"not in it: {_WHOLE}")  # fmt: skip
    for _, _, _, folder in sorted(found):
        arrays = numbered(file.tree, folder)
        names = {4: _NORM, 2: _NORM[2:]}.get(len(arrays)) if arrays[0].ndim == 1 else ("kernel", "bias")  # fmt: skip
        if names is None or len(arrays) > len(names):
            raise ReaderError(f"found {len(arrays)} variables in {folder!r}, which could be several "
                              f"things: {_WHOLE}")  # fmt: skip
        name = file.tree.text(f"{folder}/vars", "name") or folder
        yield _Stored(name, dict(zip(names, arrays, strict=False)))


# --- matching ------------------------------------------------------------------------------------


def _signature(graph: Graph, layer: L.Layer) -> Signature:
    shapes = layer.parameter_shapes(*(graph.shapes[name] for name in layer.inputs))
    if isinstance(layer, L.BatchNorm):
        return shapes["batch_stats"]["mean"]
    height, width, *rest = shapes["params"]["kernel"]
    if isinstance(layer, L.Conv) and rest[0] == 1 and layer.groups > 1:  # depthwise
        return (height, width, layer.groups, rest[1] // layer.groups)
    return (height, width, *rest)


def _match(graph: Graph, stored: list[_Stored]) -> dict[str, _Stored]:
    """The file's layer for each of ours with variables."""
    ours: dict[Signature, list[L.Layer]] = {}
    for layer in graph.layers:
        if isinstance(layer, L.Conv | L.Dense | L.BatchNorm):
            ours.setdefault(_signature(graph, layer), []).append(layer)
    theirs: dict[Signature, list[_Stored]] = {}
    for entry in stored:
        theirs.setdefault(entry.signature, []).append(entry)
    lines = [
        f"shape {shape}: {len(theirs.get(shape, []))} in the file, expected {len(ours.get(shape, []))}"
        for shape in sorted({*ours, *theirs}, key=lambda shape: (len(shape), shape))
        if len(ours.get(shape, [])) != len(theirs.get(shape, []))
    ]
    if lines:
        raise ReaderError(
            f"found layers other than those of {graph.name!r}, by shape of kernel or statistics; "
            "check the architecture:" + "".join(f"\n  {line}" for line in lines)
        )
    matched: dict[str, _Stored] = {}
    unclear: list[str] = []
    for shape, layers in ours.items():
        pairs = itertools.pairwise(layers)
        if all(first.name in graph.ancestors([second.name]) for first, second in pairs):
            matched |= {o.name: t for o, t in zip(layers, theirs[shape], strict=True)}
        else:
            unclear += [layer.name for layer in layers]
    by_conv = _paired_by_name(stored)
    for name in unclear:
        source = matched.get(graph.by_name[name].inputs[0])
        partner = by_conv.get(source.name) if source is not None else None
        if partner is None or partner.signature != _signature(graph, graph.by_name[name]):
            raise ReaderError(
                f"found several ways to match layers of one shape that run side by side in "
                f"{graph.name!r}, such as {unclear[:4]}: {_WHOLE}"
            )
        matched[name] = partner
    if len({id(entry) for entry in matched.values()}) != len(stored):
        raise ReaderError(f"found names that pair two layers with one in {graph.name!r}: {_WHOLE}")
    return matched


def _paired_by_name(stored: list[_Stored]) -> dict[str, _Stored]:
    """Batch norms by the convolution that is called alike (`block1_0_conv`, `block1_0_bn`).

    Numbers alone (`conv2d_5`) count layers in the order they were made, which is not who reads
    whom: such names pair nothing.
    """
    convs: dict[str, list[str]] = {}
    norms: dict[str, list[_Stored]] = {}
    for entry in stored:
        stem = _KIND_WORDS.sub("", entry.name)
        if not re.search(r"[A-Za-z]", stem):
            continue
        if "kernel" in entry.arrays:
            convs.setdefault(stem, []).append(entry.name)
        else:
            norms.setdefault(stem, []).append(entry)
    return {names[0]: norms[stem][0] for stem, names in convs.items()
            if len(names) == 1 and len(norms.get(stem, [])) == 1}  # fmt: skip


def _as_stored(layer: L.Layer, matched: dict[str, _Stored]) -> L.Layer:
    """A layer with the biases the file has, and a batch norm with Keras' epsilon."""
    if layer.name not in matched:
        return layer
    arrays = matched[layer.name].arrays
    if isinstance(layer, L.BatchNorm):
        affine = "gamma" in arrays or "beta" in arrays
        return dataclasses.replace(layer, eps=_EPSILON, affine=affine)
    return dataclasses.replace(cast(Any, layer), use_bias="bias" in arrays)


def _variables(graph: Graph, matched: dict[str, _Stored]) -> Variables:
    variables: Variables = {"params": {}, "batch_stats": {}}
    for collection, layers in graph.variable_shapes().items():
        for name, shapes in layers.items():
            entry = matched[name]
            filled = {"scale": np.ones, "bias": np.zeros}
            given = {_OURS.get(key, key): array for key, array in entry.arrays.items()}
            for variable, shape in shapes.items():
                array = (
                    given[variable] if variable in given else filled[variable](shape, np.float32)
                )
                broken = not np.isfinite(array).all() or (variable == "var" and (array < 0).any())
                if array.dtype.kind != "f" or array.size != np.prod(shape) or broken:
                    raise ReaderError(
                        f"found {variable} {array.dtype} {array.shape} of layer {entry.name!r}, or "
                        f"numbers no network has in it, expected finite floats of {shape}"
                    )
                made = np.ascontiguousarray(array, np.float32).reshape(shape)
                variables[collection].setdefault(name, {})[variable] = made
    return variables
