"""A published checkpoint becomes a teacher: reads the file, finds the network, checks every name."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lrq_jax.data import Preprocessing
from lrq_jax.graph import Graph
from lrq_jax.graph import layers as L
from lrq_jax.networks import Recipe, build_network
from lrq_jax.readers.detection import Match, best_match, detect_match, fit_graph
from lrq_jax.readers.errors import ReaderError
from lrq_jax.readers.flax_file import (
    flax_variables,
    is_flax_path,
    is_msgpack,
    read_msgpack_file,
    read_orbax_directory,
    unflatten,
)
from lrq_jax.readers.flax_names import read_flax_variables
from lrq_jax.readers.keras_file import SUFFIXES as KERAS_SUFFIXES
from lrq_jax.readers.keras_file import read_keras_file
from lrq_jax.readers.keras_model import read_keras_model
from lrq_jax.readers.keras_weights import read_keras_weights
from lrq_jax.readers.names import match_variables, unwrap_state_dict
from lrq_jax.readers.npz_file import read_npz_file
from lrq_jax.readers.onnx_graph import read_onnx
from lrq_jax.readers.onnx_preprocessing import onnx_preprocessing
from lrq_jax.readers.published.files import PublishedFile, find_published
from lrq_jax.readers.published.recipes import find_recipe
from lrq_jax.readers.safetensors_file import read_safetensors_file
from lrq_jax.readers.teacher import Teacher, flatten_variables
from lrq_jax.readers.torch_file import read_torch_file

Channels = tuple[float, ...]

_OPTION_A = r"resnet\d+_cifar"


def read_checkpoint(source: str | Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The flat state dict of a `.pt`, `.pth`, `.th`, `.safetensors` or `.npz` file, and notes on it.

    Raises:
      FileNotFoundError: no such file.
      ReaderError: not such a file, or not a state dict.
    """
    path = Path(source)
    if path.suffix == ".safetensors":
        arrays, _ = read_safetensors_file(path)
        return unwrap_state_dict(arrays)
    if path.suffix == ".npz":
        return unwrap_state_dict(read_npz_file(path))
    return unwrap_state_dict(read_torch_file(path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """What the user says instead of what is published; None everywhere takes the published.

    Attributes:
      mean, std: per channel, in units of pixels scaled to [0, 1].
      size: side of the square input in pixels.
      resize: shorter side before the centre crop, pixels.
      interpolation: of the resize, "bilinear" or "bicubic".
      bn_eps: of every batch norm.
    """

    mean: Channels | None = None
    std: Channels | None = None
    size: int | None = None
    resize: int | None = None
    interpolation: str | None = None
    bn_eps: float | None = None

    def __post_init__(self) -> None:
        for name, unit in (("size", "pixels"), ("resize", "pixels")):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ReaderError(f"found {name} {value}, expected at least 1, {unit}")
        if self.bn_eps is not None and not 0 <= self.bn_eps < math.inf:
            raise ReaderError(f"found bn_eps {self.bn_eps}, expected a finite number from 0 up")
        if (self.mean is None) != (self.std is None):
            raise ReaderError("found only one of mean and std, expected both or none")
        if self.mean is not None and max(*self.mean, *self.std) > 1:
            raise ReaderError(
                f"found mean {self.mean} and std {self.std}, expected units of pixels scaled to "
                "[0, 1]: divide numbers for pixels of 0 to 255 by 255"
            )


def convert_teacher(source: str | Path, arch: str | None = None, *, num_classes: int | None = None,
                    assume_bn: str | None = None, **choices: Any) -> Teacher:  # fmt: skip
    """The teacher in a published checkpoint.

    Args:
      source: a PyTorch, safetensors, NumPy, Keras or Flax (msgpack) file, the directory of an
        orbax checkpoint, or an ONNX file. Whole Keras models and ONNX files carry their network.
      arch: the architecture (see `build_network`); None where names and shapes are to decide it.
      num_classes: checked against the file where given.
      assume_bn: `unit` takes an ONNX file without batch norms, for data-free rounding only.
      **choices: fields of `Choices`: mean, std, size, resize, interpolation, bn_eps.

    Raises:
      FileNotFoundError: no such file.
      ReaderError: an unreadable file, arrays that do not fit, or preprocessing that is not known.
      ValueError: an unknown architecture.
    """
    path, chosen = Path(source), Choices(**choices)
    if assume_bn is not None and path.suffix != ".onnx":
        raise ReaderError(f"{path.name}: found assume_bn, expected it with an .onnx file only")
    try:
        if path.suffix == ".onnx":
            made = _from_onnx(path, arch, num_classes, chosen, assume_bn)
        elif path.suffix in KERAS_SUFFIXES:
            made = _from_keras(path, arch, num_classes, chosen)
        elif (flax := _flax_tree(path)) is not None:
            made = _from_flax(*flax, arch, num_classes, chosen)
        else:
            return _from_state_dict(path, arch, num_classes, chosen)
    except ReaderError as error:
        if str(error).startswith(f"{path.name}: "):
            raise
        raise ReaderError(f"{path.name}: {error}") from error
    _refuse_broken(path.name, made)
    return dataclasses.replace(
        _with_choices(made, chosen), source=path.name, source_sha256=_sha256(path)
    )


def _refuse_broken(file: str, teacher: Teacher) -> None:
    broken = [
        name
        for name, array in flatten_variables(teacher.variables).items()
        if not np.isfinite(array).all() or (name.endswith("/var") and (array < 0).any())
    ]
    if broken:
        raise ReaderError(
            f"{file}: found NaN, infinity or a negative variance, expected finite weights, in "
            + ", ".join(broken)
        )


def _from_state_dict(path: Path, arch: str | None, num_classes: int | None, chosen: Choices) -> Teacher:  # fmt: skip
    state, notes = read_checkpoint(path)
    sha1, sha256 = _hashes(path)
    made = _build(state, arch, num_classes, chosen, find_published(sha1, sha256))
    return dataclasses.replace(
        made, source=path.name, source_sha256=sha256, notes=notes + made.notes
    )


def _from_onnx(path: Path, arch: str | None, num_classes: int | None, chosen: Choices,
               assume_bn: str | None) -> Teacher:  # fmt: skip
    if arch is not None:
        raise ReaderError(
            f"found the architecture {arch!r}, expected none: an ONNX file carries its own"
        )
    network = read_onnx(path, size=chosen.size, assume_bn=assume_bn)
    if num_classes not in (None, network.graph.num_classes):
        raise ReaderError(
            f"found {network.graph.num_classes} classes in the file, expected the "
            f"{num_classes} asked for: leave --num-classes out or choose another file"
        )
    preprocessing, origin = onnx_preprocessing(network, chosen.mean, chosen.std)
    return Teacher(
        graph=network.graph,
        variables=network.variables,
        preprocessing=preprocessing,
        arch=network.graph.name,
        notes=("network read from the ONNX file", origin, *network.notes),
    )


def _from_keras(path: Path, arch: str | None, num_classes: int | None, chosen: Choices) -> Teacher:
    settings: dict[str, Any] = {
        "num_classes": num_classes, "mean": chosen.mean, "std": chosen.std, "size": chosen.size,
    }  # fmt: skip
    file = read_keras_file(path)
    if file.model is None:
        return read_keras_weights(file, arch, **settings)
    if arch is not None:
        raise ReaderError(
            "found a whole Keras model, which carries its architecture, expected no --arch"
        )
    return read_keras_model(file, **settings)


def _flax_tree(path: Path) -> tuple[dict[str, Any], tuple[str, ...]] | None:
    """The tree of a Flax checkpoint and notes on it; None where the file is none."""
    if path.is_dir():
        return read_orbax_directory(path)
    if is_msgpack(path):
        return read_msgpack_file(path), ()
    arrays = read_npz_file(path) if path.suffix == ".npz" else {}
    if any(is_flax_path(name) for name in arrays):
        return unflatten(arrays), ()
    return None


def _from_flax(tree: dict[str, Any], notes: tuple[str, ...], arch: str | None,
               num_classes: int | None, chosen: Choices) -> Teacher:  # fmt: skip
    flat, more = flax_variables(tree)
    given: dict[str, Any] = {"mean": chosen.mean, "std": chosen.std, "size": chosen.size}
    made = read_flax_variables(flat, arch, num_classes=num_classes, **given)
    return dataclasses.replace(made, notes=notes + more + made.notes)


def _with_choices(made: Teacher, chosen: Choices) -> Teacher:
    """The user's resize and interpolation, where a file's format has none of its own."""
    if chosen.bn_eps is not None:
        raise ReaderError("found bn_eps, expected none: this file says what its batch norms have")
    given = {
        name: value
        for name in ("resize", "interpolation")
        if (value := getattr(chosen, name)) is not None
    }
    preprocessing = dataclasses.replace(made.preprocessing, **given)
    return dataclasses.replace(made, preprocessing=preprocessing)


def _build(state: dict[str, np.ndarray], arch: str | None, num_classes: int | None,
           choices: Choices, published: PublishedFile | None) -> Teacher:  # fmt: skip
    """The teacher without its source; see `convert_teacher`."""
    notes: tuple[str, ...] = ()
    if published is not None:
        notes += (
            f"the file's hash is that of {published.origin}'s {published.arch} with "
            f"{published.top1:.2f} % top-1",
        )
        arch = arch or published.arch
    if arch is None:
        match = detect_match(state)
        notes += (f"the file's names and shapes are those of {match.arch} and of no other network",)
    else:
        match = best_match(arch, state)
    graph, found = _graph(match, state, num_classes, choices)
    notes += found
    variables = match_variables(graph, state, namings=(match.naming,))
    if match.naming.ignored:
        left = [name for name in state if re.fullmatch(match.naming.ignored, name)]
        notes += (f"left out {len(left)} arrays of auxiliary parts",) if left else ()
    recipe = find_recipe(match.naming.name, match.arch, graph.num_classes)
    if published is not None and published.resize is not None and recipe is not None:
        text = f"{recipe[1]}, resized to {published.resize} as this file was measured"
        recipe = dataclasses.replace(recipe[0], resize=published.resize), text
    preprocessing, origin = _preprocessing(recipe, choices, graph.input_shape)
    notes += (f"read with {match.naming.name} names", origin)
    if re.fullmatch(_OPTION_A, match.arch):
        notes += (
            "its shortcuts have no parameters, so the file cannot tell their kind: taken as "
            "akamaster's (every second pixel, zero channels half before and half after)",
        )
    return Teacher(
        graph=graph,
        variables=variables,
        preprocessing=preprocessing,
        arch=match.arch,
        notes=notes,
        top1=None if published is None else published.top1,
    )


def _graph(match: Match, state: dict[str, np.ndarray], num_classes: int | None,
           choices: Choices) -> tuple[Graph, tuple[str, ...]]:  # fmt: skip
    """The network as the file has it and the user wants it, and sentences on what is unusual."""
    settings = dict(match.settings)
    classes = settings.get("num_classes", num_classes)
    if num_classes is not None and classes != num_classes:
        raise ReaderError(
            f"found {classes} classes in the file, expected the {num_classes} asked for: leave "
            "--num-classes out or choose another file"
        )
    if classes is not None:
        settings["num_classes"] = classes
    if choices.size is not None:
        settings["input_shape"] = (choices.size, choices.size, match.graph.input_shape[2])
    graph, notes = fit_graph(build_network(match.arch, **settings), match.naming, state)
    if choices.bn_eps is not None:
        layers = (
            dataclasses.replace(layer, eps=choices.bn_eps)
            if isinstance(layer, L.BatchNorm)
            else layer
            for layer in graph.layers
        )
        graph = dataclasses.replace(graph, layers=tuple(layers))
        notes += (f"eps of every batch norm: {choices.bn_eps:g}, as given",)
    return graph, notes


def _preprocessing(known: tuple[Recipe, str] | None, choices: Choices,
                   image: tuple[int, ...]) -> tuple[Preprocessing, str]:  # fmt: skip
    """How to prepare images of a network's input shape, and a sentence on where that comes from."""
    size, channels = image[0], image[2]
    if choices.mean is not None:
        mean, std, origin = choices.mean, choices.std, "normalisation: as given"
    elif known is not None and len(known[0].mean) == channels:
        mean, std, origin = known[0].mean, known[0].std, f"normalisation: {known[1]}"
    else:
        values = "R,G,B" if channels == 3 else "VALUE"
        raise ReaderError(
            "found no published normalisation for this network, these names and this "
            f"number of classes, expected --mean {values} --std {values} (pixels scaled to "
            "[0, 1]) as the network was trained with"
        )
    resize, interpolation = choices.resize, choices.interpolation
    if known is not None and known[0].resize is not None and resize is None:
        # The published share of the shorter side that the crop keeps, whatever the size.
        resize = round(size * known[0].resize / known[0].size)
    if interpolation is None:
        interpolation = "bilinear" if known is None else known[0].interpolation
    return Preprocessing(
        mean=tuple(mean), std=tuple(std), size=size, resize=resize, interpolation=interpolation
    ), origin


def _hashes(path: Path) -> tuple[str, str]:
    """SHA-1 and SHA-256 of a file, in hexadecimal digits."""
    return _digest(path, "sha1"), _digest(path, "sha256")


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _sha256(path: Path) -> str:
    """Of a file; of a directory, over its files' names and hashes."""
    if not path.is_dir():
        return _digest(path, "sha256")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(path).as_posix()} {_digest(file, 'sha256')}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def describe(teacher: Teacher) -> str:
    """A few lines on a teacher: network, size, normalisation, source and notes."""
    how = teacher.preprocessing
    size = f"{how.size} x {how.size} pixels"
    rows: Mapping[str, str] = {
        "architecture": teacher.arch,
        "parameters": f"{teacher.graph.num_parameters():,}",
        "classes": str(teacher.graph.num_classes),
        "input": size
        if how.resize is None
        else f"{size} cut from a shorter side of {how.resize} ({how.interpolation})",
        "mean": ", ".join(f"{value:g}" for value in how.mean),
        "std": ", ".join(f"{value:g}" for value in how.std),
        "source": teacher.source,
        "sha256": teacher.source_sha256,
    }
    lines = [f"{name:<13}{value}" for name, value in rows.items()]
    return "\n".join([*lines, *(f"note         {note}" for note in teacher.notes)])
