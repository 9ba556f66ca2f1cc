"""A published checkpoint becomes a teacher: reads the file, finds the network, checks every name."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lrq_jax.data import Preprocessing
from lrq_jax.networks import build_network
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
from lrq_jax.readers.names import (
    detect_arch,
    file_settings,
    find_naming,
    match_variables,
    unwrap_state_dict,
)
from lrq_jax.readers.npz_file import read_npz_file
from lrq_jax.readers.safetensors_file import read_safetensors_file
from lrq_jax.readers.teacher import Teacher
from lrq_jax.readers.torch_file import read_torch_file

Triple = tuple[float, float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recipe:
    """Preprocessing published with the files of one naming, architecture and class count.

    `mean` and `std` are in units of pixels scaled to [0, 1]; `size` and `resize` are pixels.
    """

    naming: str
    arch: str  # regular expression
    num_classes: int
    mean: Triple
    std: Triple
    size: int
    resize: int | None
    source: str


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CIFAR10_MEAN, _CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def _cifar(naming: str, arch: str, num_classes: int, mean: Triple, std: Triple, source: str) -> _Recipe:  # fmt: skip
    return _Recipe(naming=naming, arch=arch, num_classes=num_classes, mean=mean, std=std, size=32,
                   resize=None, source=source)  # fmt: skip


def _imagenet(naming: str, source: str) -> _Recipe:
    return _Recipe(naming=naming, arch=r"resnet\d+", num_classes=1000, mean=_IMAGENET_MEAN,
                   std=_IMAGENET_STD, size=224, resize=256, source=source)  # fmt: skip


_A, _B = r"resnet\d+_cifar", r"resnet\d+_cifar_b"

RECIPES: tuple[_Recipe, ...] = (
    _cifar("akamaster", _A, 10, _IMAGENET_MEAN, _IMAGENET_STD,
           "akamaster/pytorch_resnet_cifar10, which normalises CIFAR-10 with ImageNet's numbers"),
    _cifar("akamaster", _B, 10, _CIFAR10_MEAN, _CIFAR10_STD,
           "Rehan000/forge-tta, whose names these are"),
    _cifar("akamaster", _B, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
           "Rehan000/forge-tta, whose names these are"),
    # pytorchcv's own scripts divide by (.2023, .1994, .2010) for both data sets; the papers on
    # zero-shot quantization evaluate its files with the numbers below (GDFQ's data loader).
    _cifar("pytorchcv CIFAR", _B, 10, _CIFAR10_MEAN, _CIFAR10_STD,
           "the zero-shot quantization papers' evaluation of pytorchcv's files"),
    _cifar("pytorchcv CIFAR", _B, 100, (0.5071, 0.4865, 0.4408), (0.2675, 0.2565, 0.2761),
           "the zero-shot quantization papers' evaluation of pytorchcv's files"),
    _cifar("torchvision", _B, 10, _CIFAR10_MEAN, (0.2023, 0.1994, 0.2010),
           "chenyaofo/pytorch-cifar-models, whose names these are"),
    _cifar("torchvision", _B, 100, (0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761),
           "chenyaofo/pytorch-cifar-models, whose names these are"),
    _imagenet("torchvision", "torchvision's ImageNet recipe"),
    _imagenet("pytorchcv", "pytorchcv's ImageNet recipe"),
)  # fmt: skip
"""Published preprocessing, found by naming, architecture and class count."""


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


def convert_teacher(source: str | Path, arch: str | None = None, *, num_classes: int | None = None,
                    mean: Triple | None = None, std: Triple | None = None,
                    size: int | None = None) -> Teacher:  # fmt: skip
    """The teacher in a published checkpoint.

    Args:
      source: a PyTorch, safetensors, NumPy, Keras or Flax (msgpack) file, or the directory of an
        orbax checkpoint.
      arch: the architecture (see `build_network`); None where names and shapes are to decide it.
      num_classes: checked against the file where given.
      mean, std: per channel, in units of pixels scaled to [0, 1]; None takes the published ones.
      size: side of the square input in pixels; None takes the published one.

    Raises:
      FileNotFoundError: no such file.
      ReaderError: an unreadable file, arrays that do not fit, or preprocessing that is not known.
      ValueError: an unknown architecture.
    """
    path = Path(source)
    if path.suffix in KERAS_SUFFIXES:
        made = _keras(path, arch, num_classes=num_classes, mean=mean, std=std, size=size)
        return dataclasses.replace(made, source=path.name, source_sha256=_sha256(path))
    if (flax := _flax_tree(path)) is not None:
        tree, notes = flax
        try:
            flat, more = flax_variables(tree)
            made = read_flax_variables(
                flat, arch, num_classes=num_classes, mean=mean, std=std, size=size
            )
        except ReaderError as error:
            raise ReaderError(f"{path.name}: {error}") from error
        notes += more + made.notes
        return dataclasses.replace(made, source=path.name, source_sha256=_sha256(path), notes=notes)
    state, notes = read_checkpoint(path)
    try:
        made = _build(state, arch, num_classes, mean, std, size)
    except ReaderError as error:
        raise ReaderError(f"{path.name}: {error}") from error
    return dataclasses.replace(
        made, source=path.name, source_sha256=_sha256(path), notes=notes + made.notes
    )


def _flax_tree(path: Path) -> tuple[dict[str, Any], tuple[str, ...]] | None:
    """The tree of a Flax checkpoint and notes on it; None where the file is none."""
    arrays = read_npz_file(path) if path.suffix == ".npz" else {}
    try:
        if path.is_dir():
            return read_orbax_directory(path)
        if is_msgpack(path):
            return read_msgpack_file(path), ()
        if any(is_flax_path(name) for name in arrays):
            return unflatten(arrays), ()
    except ReaderError as error:
        raise ReaderError(f"{path.name}: {error}") from error
    return None


def _keras(path: Path, arch: str | None, **settings: Any) -> Teacher:
    """The teacher in one of Keras' files, without its source."""
    try:
        file = read_keras_file(path)
        if file.model is None:
            return read_keras_weights(file, arch, **settings)
        if arch is not None:
            raise ReaderError(
                "found a whole Keras model, which carries its architecture, expected no --arch"
            )
        return read_keras_model(file, **settings)
    except ReaderError as error:
        raise ReaderError(f"{path.name}: {error}") from error


def _build(state: dict[str, np.ndarray], arch: str | None, num_classes: int | None,
           mean: Triple | None, std: Triple | None, size: int | None) -> Teacher:  # fmt: skip
    """The teacher without its source; see `convert_teacher`."""
    notes: tuple[str, ...] = ()
    if arch is None:
        arch, settings = detect_arch(state)
        notes += (f"the file's names and shapes are those of {arch} and of no other network",)
    else:
        naming = find_naming(build_network(arch), state)
        settings = file_settings(arch, state, naming)
    classes = settings.get("num_classes", num_classes)
    if num_classes is not None and classes != num_classes:
        raise ReaderError(
            f"found {classes} classes in the file, expected the {num_classes} asked for: leave "
            "--num-classes out or choose another file"
        )
    if classes is not None:
        settings["num_classes"] = classes
    if size is not None:
        settings["input_shape"] = (size, size, 3)
    graph = build_network(arch, **settings)
    naming = find_naming(graph, state)
    variables = match_variables(graph, state)
    recipe = _recipe(naming.name, arch, graph.num_classes)
    preprocessing, origin = _preprocessing(recipe, mean, std, graph.input_shape[0])
    notes += (f"read with {naming.name} names", origin)
    if re.fullmatch(_A, arch):
        notes += (
            "its shortcuts have no parameters, so the file cannot tell their kind: taken as "
            "akamaster's (every second pixel, zero channels half before and half after)",
        )
    return Teacher(
        graph=graph,
        variables=variables,
        preprocessing=preprocessing,
        arch=arch,
        notes=notes,
    )


def _recipe(naming: str, arch: str, num_classes: int) -> _Recipe | None:
    for recipe in RECIPES:
        if (recipe.naming, recipe.num_classes) == (naming, num_classes) and re.fullmatch(
            recipe.arch, arch
        ):
            return recipe
    return None


def _preprocessing(recipe: _Recipe | None, mean: Triple | None, std: Triple | None,
                   size: int) -> tuple[Preprocessing, str]:  # fmt: skip
    """How to prepare images of `size` pixels, and a sentence on where that comes from."""
    if (mean is None) != (std is None):
        raise ReaderError("found only one of mean and std, expected both or none")
    if mean is not None and std is not None and max(*mean, *std) > 1:
        raise ReaderError(
            f"found mean {mean} and std {std}, expected units of pixels scaled to [0, 1]: divide "
            "numbers for pixels of 0 to 255 by 255"
        )
    if mean is None and recipe is None:
        raise ReaderError(
            "found no published normalisation for this network, these names and this "
            "number of classes, expected --mean R,G,B --std R,G,B (pixels scaled to [0, 1]) as the "
            "network was trained with"
        )
    resize = None
    if recipe is not None and recipe.resize is not None:
        # The published share of the shorter side that the crop keeps, whatever the size.
        resize = round(size * recipe.resize / recipe.size)
    if mean is not None and std is not None:
        origin = "normalisation: as given"
    else:
        mean, std = recipe.mean, recipe.std
        origin = f"normalisation: {recipe.source}"
    return Preprocessing(mean=tuple(mean), std=tuple(std), size=size, resize=resize), origin


def _sha256(path: Path) -> str:
    """Of a file; of a directory, over its files' names and hashes."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{file.relative_to(path).as_posix()} {_sha256(file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(teacher: Teacher) -> str:
    """A few lines on a teacher: network, size, normalisation, source and notes."""
    how = teacher.preprocessing
    size = f"{how.size} x {how.size} pixels"
    rows: Mapping[str, str] = {
        "architecture": teacher.arch,
        "parameters": f"{teacher.graph.num_parameters():,}",
        "classes": str(teacher.graph.num_classes),
        "input": size if how.resize is None else f"{size} cut from a shorter side of {how.resize}",
        "mean": ", ".join(f"{value:g}" for value in how.mean),
        "std": ", ".join(f"{value:g}" for value in how.std),
        "source": teacher.source,
        "sha256": teacher.source_sha256,
    }
    lines = [f"{name:<13}{value}" for name, value in rows.items()]
    return "\n".join([*lines, *(f"note         {note}" for note in teacher.notes)])
