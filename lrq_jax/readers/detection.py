"""Which of our networks a file holds: by its names, and by all its shapes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lrq_jax.graph import Graph
from lrq_jax.graph import layers as L
from lrq_jax.networks import FAMILIES, build_network, find_network
from lrq_jax.networks.shufflenet import FEATURES as SHUFFLENETS
from lrq_jax.readers.errors import ReaderError
from lrq_jax.readers.names import differences
from lrq_jax.readers.naming import Naming
from lrq_jax.readers.published import NAMINGS

State = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """A network tried on a file: `lines` says what does not fit, one line an array."""

    arch: str
    settings: dict[str, Any]
    naming: Naming
    graph: Graph
    lines: list[str]


# --- what shapes tell ----------------------------------------------------------------------------


def file_settings(arch: str, state: State, naming: Naming) -> dict[str, Any]:
    """Builder settings that a file's names and shapes decide.

    For every network the number of classes and of input channels; further the width of a CIFAR
    ResNet or a MobileNet, the last convolution of a MobileNetV2, the stages of a ShuffleNetV2 and
    the hidden layers of a VGG. What does not fit anyhow shows when all shapes are compared.
    """
    settings = dict(naming.settings)
    graph = build_network(arch, **settings)
    modules, family = naming.modules(graph), find_network(arch).family

    def outputs(layer: str) -> int | None:
        array = state.get(f"{modules.get(layer)}.weight")
        return None if array is None or array.ndim < 2 else array.shape[0]

    stem = state.get(f"{modules[graph.weighted[0].name]}.weight")
    if stem is not None and stem.ndim == 4 and stem.shape[1] != graph.input_shape[2]:
        settings["input_shape"] = (*graph.input_shape[:2], stem.shape[1])
    if (classes := outputs("classifier")) is not None:
        settings["num_classes"] = classes
    if family == "cifar_resnet" and (width := outputs("conv1")) not in (None, 16):
        settings["width"] = width
    if family == "mobilenet_v1" and (last := outputs("stage5_block1_project_conv")):
        settings["width"] = last / 1024
    if family == "mobilenet_v2" and (last := outputs("stage7_block0_project_conv")):
        settings["width"] = last / 320
        settings["head_features"] = outputs("head_conv")
    if family == "shufflenet_v2" and (head := outputs("head_conv")):
        halves = [outputs(f"stage{stage}_block0_project_conv") or 1 for stage in (1, 2, 3)]
        features = (*(2 * half for half in halves), head)
        # Channels that are of no published width are taken for the first alone, not for all four.
        if arch == "shufflenet_v2_x1_0" and features not in SHUFFLENETS.values():
            settings["features"] = features
    if family == "vgg_bn":
        # A matrix of a dense layer that the rules know and the file has.
        layers = (module for name, module in _dense_rules(naming) if name != "classifier")
        weights = [state[name] for layer in layers if (name := f"{layer}.weight") in state]
        settings["hidden"] = tuple(len(array) for array in weights)
    return _needed(settings, arch)


def _dense_rules(naming: Naming) -> list[tuple[str, str]]:
    return [rule for rule in naming.rules if re.fullmatch(r"dense\d+|classifier", rule[0])]


def _needed(settings: dict[str, Any], arch: str) -> dict[str, Any]:
    """The settings without which the network would be another; the number of classes always
    stays."""
    wanted = build_network(arch, **settings)
    for name in [name for name in settings if name != "num_classes"]:
        fewer = {key: value for key, value in settings.items() if key != name}
        if build_network(arch, **fewer) == wanted:
            settings = fewer
    return settings


def fit_graph(graph: Graph, naming: Naming, state: State) -> tuple[Graph, tuple[str, ...]]:
    """The graph with biases before batch norms, and batch norms without scale and offset, as the
    file has them, and a sentence for each change.

    A kind is changed as a whole: where only some of its arrays are there, the file is not whole,
    and the comparison says which are missing.
    """
    modules, notes = naming.modules(graph), []

    def have(layers: Iterable[L.Layer], *variables: str) -> list[bool]:
        return [f"{modules[x.name]}.{name}" in state for x in layers for name in variables]

    changes: dict[str, L.Layer] = {}
    convs = [x for x in graph.layers if isinstance(x, L.Conv)]
    biases = have(convs, "bias")
    if convs and len(set(biases)) == 1:
        changed = [x for x in convs if x.use_bias != biases[0]]
        changes |= {x.name: dataclasses.replace(x, use_bias=biases[0]) for x in changed}
        if changed:
            notes.append(f"its {len(convs)} convolutions have {'' if biases[0] else 'no '}biases")
    norms = graph.batch_norms
    if norms and all(have(norms, "running_mean")) and not any(have(norms, "weight", "bias")):
        changes |= {x.name: dataclasses.replace(x, affine=False) for x in norms}
        notes.append(f"its {len(norms)} batch norms have no scale and offset")
    if not changes:
        return graph, ()
    layers = tuple(changes.get(x.name, x) for x in graph.layers)
    return dataclasses.replace(graph, layers=layers), tuple(notes)


# --- detection -----------------------------------------------------------------------------------


def try_network(arch: str, state: State, naming: Naming, **settings: Any) -> Match:
    """A network with the settings its file decides, and others, compared with the file."""
    settings = {**file_settings(arch, state, naming), **settings}
    graph, _ = fit_graph(build_network(arch, **settings), naming, state)
    lines = differences(graph, naming, state)
    return Match(arch=arch, settings=settings, naming=naming, graph=graph, lines=lines)


def best_match(arch: str, state: State, *, namings: tuple[Naming, ...] = NAMINGS) -> Match:
    """A named network under the naming that differs least from the file.

    Raises:
      ReaderError: no naming knows the network's layers.
      ValueError: an unknown architecture.
    """
    graph = build_network(arch)
    known = [
        x for x in namings if re.fullmatch(x.archs, arch) and None not in x.modules(graph).values()
    ]
    known = [x for x in known if all(mark in state for mark in x.marks)] or known
    if not known:
        raise ReaderError(
            f"found no naming for the layers of network {arch!r}, expected one of "
            f"{[naming.name for naming in namings]} to know them: add its table to NAMINGS"
        )
    matches = [try_network(arch, state, naming) for naming in known]
    return min(matches, key=lambda match: len(match.lines))


def _candidates(naming: Naming, state: State) -> list[str]:
    """Architectures that may have files of this naming; of CIFAR ResNets those with as many 3x3
    convolutions, whatever their depth."""
    threes = sum(array.ndim == 4 and array.shape[2:] == (3, 3) for array in state.values())
    archs = [arch for arch in FAMILIES if not re.match(r"resnet\d+_cifar", arch)]
    if threes % 6 == 1 and threes > 1:
        archs += [f"resnet{threes + 1}_cifar", f"resnet{threes + 1}_cifar_b"]
    return [arch for arch in archs if re.fullmatch(naming.archs, arch)]


def detect_match(state: State, *, namings: tuple[Naming, ...] = NAMINGS) -> Match:
    """The one network that fits a state dict's names and shapes exactly.

    Strides and paddings leave no trace in a file. Where networks of one set of shapes differ in
    those alone, names decide, and where they do not, nothing is chosen.

    Raises:
      ReaderError: nothing fits (with what comes nearest), or several networks do.
    """
    tried = [
        try_network(arch, state, naming)
        for naming in namings
        if all(mark in state for mark in naming.marks)
        for arch in _candidates(naming, state)
    ]
    fitting = {(match.arch, match.graph): match for match in tried if not match.lines}
    if any("_cifar" not in match.arch for match in fitting.values()):
        # 1000 classes are ImageNet's, whose networks stride more than CIFAR's of the same shapes.
        fitting = {
            key: match
            for key, match in fitting.items()
            if "_cifar" not in match.arch or match.graph.num_classes != 1000
        }
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    if fitting:
        raise ReaderError(
            f"found names that fit several architectures, {[x.arch for x in fitting.values()]}, "
            "expected one: choose with --arch"
        )
    if tried:
        nearest = min(tried, key=lambda match: len(match.lines))
        hint = f"{nearest.arch!r} comes nearest with {len(nearest.lines)} differences, such as "
        hint += "; ".join(nearest.lines[:4])
    else:
        names = list(dict.fromkeys(naming.name for naming in namings))
        hint = f"its names, such as {list(state)[:4]}, fit none of {names}"
    raise ReaderError(
        f"found no architecture of ours in the file ({hint}): choose with --arch, or add its names "
        "to lrq_jax/readers/published"
    )


def detect_arch(state: State, *, namings: tuple[Naming, ...] = NAMINGS) -> tuple[str, dict[str, Any]]:  # fmt: skip
    """`(arch, settings)` for `build_network(arch, **settings)`; see `detect_match`."""
    match = detect_match(state, namings=namings)
    return match.arch, match.settings
