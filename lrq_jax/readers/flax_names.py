"""Flax's ResNets become teachers: names and padding of flax's examples/imagenet (models.py)."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lrq_jax.data import Preprocessing
from lrq_jax.graph import Graph
from lrq_jax.networks import build_network
from lrq_jax.readers.errors import ReaderError
from lrq_jax.readers.flax_file import Flat
from lrq_jax.readers.padding import with_tf_same
from lrq_jax.readers.teacher import Teacher, Variables

Triple = tuple[float, float, float]

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIZE, _CROP_PADDING = 224, 32
_EDGES = {"conv1": "conv_init", "bn1": "bn_init", "classifier": "Dense_0"}
_BASIC, _BOTTLENECK = "ResNetBlock", "BottleneckResNetBlock"
_DEPTHS = {
    (_BASIC, (2, 2, 2, 2)): "resnet18",
    (_BASIC, (3, 4, 6, 3)): "resnet34",
    (_BOTTLENECK, (3, 4, 6, 3)): "resnet50",
    (_BOTTLENECK, (3, 4, 23, 3)): "resnet101",
}
_STEM = "conv1"
"""Its padding is given as 3 on each side; everything else is padded as "SAME" does."""


def module_names(graph: Graph) -> dict[str, str]:
    """Our layers with variables -> their modules in flax's examples/imagenet.

    Blocks are counted through all stages (`ResNetBlock_0` ...), and the convolutions and norms in
    each (`Conv_0`, `BatchNorm_0` ...); the projection's are `conv_proj` and `norm_proj`.

    Raises:
      ReaderError: a graph with other layers than a ResNet's.
    """
    shapes = graph.variable_shapes()
    layers = dict.fromkeys(name for collection in shapes.values() for name in collection)
    kind = _BOTTLENECK if any(name.endswith("_conv3") for name in layers) else _BASIC
    blocks: dict[str, int] = {}
    names = {}
    for layer in graph.layers:
        if layer.name not in layers:
            continue
        match = re.fullmatch(r"(stage\d+_block\d+)_(conv|bn|shortcut_conv|shortcut_bn)(\d*)", layer.name)  # fmt: skip
        if layer.name in _EDGES:
            names[layer.name] = _EDGES[layer.name]
        elif match:
            block = blocks.setdefault(match[1], len(blocks))
            module = {"shortcut_conv": "conv_proj", "shortcut_bn": "norm_proj"}.get(match[2])
            if module is None:
                module = f"{'Conv' if match[2] == 'conv' else 'BatchNorm'}_{int(match[3]) - 1}"
            names[layer.name] = f"{kind}_{block}/{module}"
        else:
            raise ReaderError(
                f"found layer {layer.name!r} in network {graph.name!r}, expected those of a "
                f"ResNet: one of {sorted(_DEPTHS.values())}, or names equal to ours"
            )
    return names


def detect_flax_arch(flat: Flat) -> str:
    """The architecture whose blocks a file has.

    Raises:
      ReaderError: none of ours.
    """
    widths = {int(m[2]): (m[1], array.shape[-1]) for name, array in flat.items()
              if (m := re.fullmatch(r"params/(\w*ResNetBlock)_(\d+)/Conv_0/kernel", name))
              and array.ndim == 4}  # fmt: skip
    counts = collections.Counter(width for _, width in widths.values())
    kinds = {kind for kind, _ in widths.values()}
    stages: Any = tuple(counts[width] for width in sorted(counts))
    arch = _DEPTHS.get((next(iter(kinds)), stages)) if len(kinds) == 1 else None
    if arch is None:
        found = f"{sorted(kinds)} in stages of {stages}" if kinds else f"names such as {list(flat)[:4]}"  # fmt: skip
        raise ReaderError(
            f"found {found}, expected a ResNet-18, 34, 50 or 101 with the names of flax's "
            "examples/imagenet, or --arch with arrays named as that network's layers; a model of "
            "your own enters through GraphBuilder, see the README"
        )
    return arch


def read_flax_variables(flat: Flat, arch: str | None = None, *, num_classes: int | None = None,
                        mean: Triple | None = None, std: Triple | None = None,
                        size: int | None = None) -> Teacher:  # fmt: skip
    """The teacher of a Flax ResNet's variables; arguments as of `convert_teacher`.

    Raises:
      ReaderError: arrays that do not fit, or preprocessing that is not known.
    """
    notes: list[str] = []
    if arch is None:
        arch = detect_flax_arch(flat)
        notes.append(f"the file's names and shapes are those of {arch} and of no other network")
    ours = "params/classifier/kernel" in flat
    head = flat.get("params/classifier/kernel" if ours else "params/Dense_0/kernel")
    if head is None or head.ndim != 2:
        raise ReaderError(
            f"found no classifier 'Dense_0' among {list(flat)[:4]}, expected the names of flax's "
            "examples/imagenet, or those of our own layers"
        )
    if num_classes not in (None, head.shape[1]):
        raise ReaderError(
            f"found {head.shape[1]} classes in the file, expected the {num_classes} asked for: "
            "leave --num-classes out or choose another file"
        )
    settings = {"num_classes": head.shape[1]}
    settings |= {} if size is None else {"input_shape": (size, size, 3)}
    graph = build_network(arch, **settings)
    if ours:
        modules = {layer.name: layer.name for layer in graph.layers}
        notes.append("read with our own layers' names, and the padding of our own network")
    else:
        graph = with_tf_same(graph, keep=(_STEM,))
        modules = module_names(graph)
        notes.append("read with the names of flax's examples/imagenet; strided windows are padded "
                     "as there, asymmetrically (SAME)")  # fmt: skip
    variables = _match(graph, modules, flat)
    how, origin = _preprocessing(graph, ours, mean, std)
    return Teacher(graph=graph, variables=variables, preprocessing=how, arch=arch,
                   notes=(*notes, origin))  # fmt: skip


def _match(graph: Graph, modules: Mapping[str, str], flat: Flat) -> Variables:
    """The graph's variables, each array used exactly once."""
    variables: Variables = {"params": {}, "batch_stats": {}}
    lines, used = [], set()
    for collection, layers in graph.variable_shapes().items():
        for layer, shapes in layers.items():
            for variable, shape in shapes.items():
                name = f"{collection}/{modules[layer]}/{variable}"
                used.add(name)
                array = flat.get(name)
                if array is None:
                    lines.append(f"missing in the file: {name!r} {shape}, for {layer!r}")
                elif array.shape != shape:
                    lines.append(f"wrong shape: {name!r} is {array.shape} in the file, expected "
                                 f"{shape} for {layer!r}")  # fmt: skip
                elif not np.isfinite(array).all() or (variable == "var" and (array < 0).any()):
                    lines.append(f"NaN, infinity or a negative variance in {name!r}")
                else:
                    variables[collection].setdefault(layer, {})[variable] = array
    lines += [f"in the file only: {name!r} {array.shape}" for name, array in flat.items()
              if name not in used]  # fmt: skip
    if lines:
        raise ReaderError(
            f"found {len(lines)} differences between the file and network {graph.name!r}, expected "
            "none; check the architecture:" + "".join(f"\n  {line}" for line in lines)
        )
    return variables


def _preprocessing(graph: Graph, ours: bool, mean: Triple | None,
                   std: Triple | None) -> tuple[Preprocessing, str]:  # fmt: skip
    """How to prepare images, and a sentence on where that comes from."""
    size = graph.input_shape[0]
    if (mean is None) != (std is None):
        raise ReaderError("found only one of mean and std, expected both or none")
    imagenet = not ours and graph.num_classes == 1000
    if mean is None and not imagenet:
        raise ReaderError(
            f"found {graph.num_classes} classes, for which Flax publishes no normalisation, "
            "expected --mean R,G,B --std R,G,B (pixels scaled to [0, 1]) as the network was "
            "trained with"
        )
    origin = "normalisation: as given"
    if mean is None or std is None:
        mean, std = _IMAGENET_MEAN, _IMAGENET_STD
        origin = "normalisation and crop: flax's examples/imagenet (bicubic)"
    if max(*mean, *std) > 1:
        raise ReaderError(
            f"found mean {mean} and std {std}, expected units of pixels scaled to [0, 1]: divide "
            "numbers for pixels of 0 to 255 by 255"
        )
    resize = round(size * (_SIZE + _CROP_PADDING) / _SIZE) if imagenet else None
    interpolation = "bicubic" if imagenet else "bilinear"
    how = Preprocessing(mean=mean, std=std, size=size, resize=resize, interpolation=interpolation)
    return how, origin
