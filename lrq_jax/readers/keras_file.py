"""Keras' files: `.h5` of whole models and of weights, `.keras` archives, `.weights.h5`.

Two layouts of weights are known. The older one (`.h5` of Keras 1 to 3) lists names as attributes:
`layer_names` of the model, `weight_names` of each layer. The newer one (`.keras`, `.weights.h5`)
has a folder for each layer, called after its class and counted within its model, with the
variables numbered: `layers/conv2d_1/vars/0`.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lrq_jax.readers.errors import ReaderError
from lrq_jax.readers.hdf5_file import Hdf5Tree, read_hdf5
from lrq_jax.readers.zip_limits import check_archive

SUFFIXES = (".h5", ".hdf5", ".keras")

_MAX_RATIO = 100
_OPTIMIZER = ("optimizer_weights", "optimizer", "_optimizer")
NESTED = ("layers", "_layer_checkpoint_dependencies")
_CONFIG, _METADATA, _WEIGHTS = "config.json", "metadata.json", "model.weights.h5"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Address:
    """Where a layer's variables lie: `names` of the models it is nested in and its own, and the
    `folder` of the newer layout."""

    names: tuple[str, ...]
    folder: str


class Weights(Protocol):
    """The variables in a file, whatever their layout."""

    def of(self, address: Address, wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
        """The variables of one layer by name (`kernel`, `moving_mean`, ...), exactly those
        `wanted`; raises ReaderError where the file holds others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KerasFile:
    """What a file holds: the version of Keras that wrote it (empty where it does not say), the
    `{"class_name", "config"}` of a whole model or None, its weights and the tree they are in."""

    version: str
    model: dict[str, Any] | None
    weights: Weights
    tree: Hdf5Tree


@dataclasses.dataclass(frozen=True)
class ListedWeights:
    """The older layout, below the group `root`."""

    tree: Hdf5Tree
    root: str

    def group(self, layer: str) -> str:
        """Path of a layer's group."""
        return f"{self.root}/{layer}".removeprefix("/")

    def variables(self, layer: str) -> dict[str, np.ndarray]:
        """A layer's arrays by the name the file lists them under, in that order."""
        group = self.group(layer)
        listed = self.tree.names(group, "weight_names") or []
        missing = [name for name in listed if f"{group}/{name}" not in self.tree.arrays]
        if missing:
            raise ReaderError(f"found no arrays {missing} of layer {layer!r}, which it lists")
        return {name: self.tree.arrays[f"{group}/{name}"] for name in listed}

    def of(self, address: Address, wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
        """See `Weights.of`. A nested model's variables lie in one group, under `layer/variable`."""
        outer, *inner = address.names
        found: dict[str, np.ndarray] = {}
        for listed, array in self.variables(outer).items():
            scope, _, variable = listed.removesuffix(":0").rpartition("/")
            if inner and scope != inner[-1] and not scope.endswith(f"/{inner[-1]}"):
                continue
            if variable == "depthwise_kernel" and "kernel" in wanted:  # Keras 2's name of it
                variable = "kernel"
            if variable in found:
                raise ReaderError(
                    f"found {listed!r} and another variable of that name for layer "
                    f"{'/'.join(address.names)!r}, expected one: save the model as .keras"
                )
            found[variable] = array
        return _exactly(address, wanted, found)


@dataclasses.dataclass(frozen=True)
class NumberedWeights:
    """The newer layout."""

    tree: Hdf5Tree

    def of(self, address: Address, wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
        """See `Weights.of`; the variables are numbered in the order of `wanted`."""
        arrays = numbered(self.tree, address.folder)
        if not arrays:  # Keras 2.12 and 2.13 called the folders so
            old = address.folder.replace("layers/", f"{NESTED[1]}/")
            arrays = numbered(self.tree, old)
        if len(arrays) != len(wanted):
            raise ReaderError(
                f"found {len(arrays)} variables in {address.folder + '/vars'!r}, expected "
                f"{len(wanted)} for layer {'/'.join(address.names)!r}: {', '.join(wanted)}"
            )
        return dict(zip(wanted, arrays, strict=True))


def numbered(tree: Hdf5Tree, folder: str) -> list[np.ndarray]:
    """The arrays `folder/vars/0`, `folder/vars/1`, ..."""
    arrays: list[np.ndarray] = []
    while (name := f"{folder}/vars/{len(arrays)}") in tree.arrays:
        arrays.append(tree.arrays[name])
    return arrays


def _exactly(address: Address, wanted: tuple[str, ...],
             found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:  # fmt: skip
    if set(found) != set(wanted):
        raise ReaderError(
            f"found variables {sorted(found)} for layer {'/'.join(address.names)!r}, expected "
            f"{sorted(wanted)}"
        )
    return found


def read_keras_file(path: Path) -> KerasFile:
    """The configuration and the weights in one of Keras' files; nothing in it is executed.

    Raises:
      FileNotFoundError: no such file.
      ReaderError: not such a file, a damaged one, or h5py is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"found no file {str(path)!r}, expected one of Keras' files")
    if path.suffix == ".keras":
        return _read_archive(path)
    tree = read_hdf5(path, leave_out=_OPTIMIZER)
    text = tree.text("", "model_config")
    root = "model_weights" if "model_weights" in tree.attributes else ""
    weights: Weights
    if tree.names(root, "layer_names") is not None:
        weights = ListedWeights(tree, root)
    elif any(name in tree.attributes for name in NESTED):
        weights = NumberedWeights(tree)
    else:
        raise ReaderError(
            f"found an HDF5 file of {sorted(tree.attributes)[:8]}, expected one written by Keras' "
            "model.save or model.save_weights"
        )
    version = tree.text("", "keras_version") or tree.text(root, "keras_version") or ""
    model = None if text is None else _json(text, "model_config")
    return KerasFile(version=version, model=model, weights=weights, tree=tree)


def _read_archive(path: Path) -> KerasFile:
    try:
        with zipfile.ZipFile(path) as archive:
            check_archive(archive, path.stat().st_size)
            members = set(archive.namelist())
            if not {_CONFIG, _METADATA, _WEIGHTS} <= members:
                raise ReaderError(
                    f"found an archive of {sorted(members)[:8]}, expected {_CONFIG}, {_METADATA} "
                    f"and {_WEIGHTS}: save with model.save('model.keras')"
                )
            config, metadata, data = (archive.read(n) for n in (_CONFIG, _METADATA, _WEIGHTS))
    except ReaderError:
        raise
    # A damaged archive: what zipfile raises depends on where; RuntimeError is an encrypted one.
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
        raise ReaderError(f"found a truncated or damaged .keras archive ({error})") from error
    tree = read_hdf5(data, leave_out=_OPTIMIZER)
    version = _json(metadata, _METADATA).get("keras_version")
    return KerasFile(version=str(version or ""), model=_json(config, _CONFIG),
                     weights=NumberedWeights(tree), tree=tree)  # fmt: skip


def _json(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReaderError(f"found damaged JSON in {where} ({error})") from error
    if not isinstance(value, dict):
        raise ReaderError(f"found a {type(value).__name__} in {where}, expected an object")
    return value
