"""Where teachers are kept: a directory (orbax arrays + JSON) or one `.safetensors` file."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from lrq_jax.checkpoints import check_files, file_hashes, local_checkpointer
from lrq_jax.console import quiet_logging
from lrq_jax.data import Preprocessing
from lrq_jax.graph import Graph, graph_from_dict, graph_to_dict
from lrq_jax.paths import make_parents
from lrq_jax.readers.convert import convert_teacher
from lrq_jax.readers.errors import ReaderError
from lrq_jax.readers.safetensors_file import read_safetensors_file
from lrq_jax.readers.teacher import (
    Teacher,
    Variables,
    describe_array,
    flatten_variables,
    teacher_hash,
)

FORMAT_VERSION = 1
"""Version of the metadata; a reader refuses any other."""

DIGITS = "digits"
"""Path that stands for the teacher that comes with the package."""

_METADATA_FILE = "teacher.json"
_VARIABLES = "variables"
_HEADER_KEY = "lrq_jax"
_CONVERT = "python scripts/convert_teacher.py --source FILE --arch NAME --out DIR"

# --- metadata ------------------------------------------------------------------------------------


def _metadata(teacher: Teacher) -> dict[str, Any]:
    recorded = {} if teacher.top1 is None else {"top1": teacher.top1}
    return {
        "format": "lrq_jax teacher",
        "version": FORMAT_VERSION,
        "arch": teacher.arch,
        "num_classes": teacher.graph.num_classes,
        "class_names": teacher.class_names,
        "preprocessing": dataclasses.asdict(teacher.preprocessing),
        "source": Path(teacher.source).name,
        "source_sha256": teacher.source_sha256,
        "notes": teacher.notes,
        **recorded,
        "teacher_sha256": teacher_hash(teacher),
        "graph": graph_to_dict(teacher.graph),
    }


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        metadata = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: found damaged metadata ({error}); {_again()}") from error
    version = metadata.get("version") if isinstance(metadata, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{where}: found format version {version!r}, expected {FORMAT_VERSION}; {_again()}"
        )
    return metadata


def _again() -> str:
    return f"convert the teacher again: {_CONVERT}"


def _teacher(metadata: dict[str, Any], read: Callable[[Graph], Variables], where: str) -> Teacher:
    """The teacher of some metadata and the arrays `read` finds for its graph, hash checked."""
    try:
        graph = graph_from_dict(metadata["graph"])
        names = metadata["class_names"]
        teacher = Teacher(
            graph=graph,
            variables=read(graph),
            preprocessing=Preprocessing(**metadata["preprocessing"]),
            arch=metadata["arch"],
            class_names=None if names is None else tuple(names),
            source=metadata["source"],
            source_sha256=metadata["source_sha256"],
            notes=tuple(metadata["notes"]),
            top1=metadata.get("top1"),  # teachers of earlier versions have none
        )
        expected = metadata["teacher_sha256"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: found a damaged teacher ({error!r}); {_again()}") from error
    found = teacher_hash(teacher)
    if found != expected:
        raise ValueError(f"{where}: found hash {found}, expected {expected}: damaged; {_again()}")
    return teacher


# --- directory -----------------------------------------------------------------------------------


def save_teacher(teacher: Teacher, directory: str | Path, *, overwrite: bool = False) -> None:
    """Writes a teacher directory: all of it or, on failure, nothing.

    Args:
      teacher: what to write.
      directory: made, with its parents; an empty one is used.
      overwrite: replaces the teacher that is there.

    Raises:
      FileExistsError: a teacher is there and `overwrite` is false, or something else is there.
    """
    directory = Path(directory).resolve()
    occupied = directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))
    if occupied and not (directory / _METADATA_FILE).is_file():
        raise FileExistsError(
            f"found something other than a teacher at {str(directory)!r}, expected nothing or an "
            "empty directory: choose another place"
        )
    if occupied and not overwrite:
        raise FileExistsError(
            f"found a teacher at {str(directory)!r} already: choose another place, or overwrite "
            "it with --overwrite (overwrite=True)"
        )
    make_parents(directory, "--out")
    # Beside the target, so that the renames stay on one file system.
    workspace = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        made = workspace / "new"
        with quiet_logging(), local_checkpointer() as checkpointer:
            checkpointer.save(made / _VARIABLES, _filled(jax.device_get(teacher.variables)))
            checkpointer.wait_until_finished()
        files = {"files": file_hashes(made / _VARIABLES)}
        text = json.dumps(_metadata(teacher) | files, indent=1) + "\n"
        (made / _METADATA_FILE).write_text(text, encoding="utf-8")
        old = workspace / "old"
        if directory.exists():
            directory.rename(old)
        try:
            made.rename(directory)
        except OSError:
            if old.exists():  # what was there must not go with the workspace
                old.rename(directory)
            raise
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def load_teacher(path: str | Path) -> Teacher:
    """A teacher from where it is kept; its variables are numpy arrays, on no device yet.

    Args:
      path: a directory of `save_teacher`, a `.safetensors` file of `save_embedded`, or `digits`
        for the teacher that comes with the package. Any other file is converted on the fly, see
        `convert_teacher`: it must decide its architecture and normalisation itself, as published
        checkpoints do; where it does not, convert it first and say them there.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: something else, another format version, or damaged arrays.
    """
    return dataclasses.replace(_load(path), path=str(path))


def _load(path: str | Path) -> Teacher:
    if str(path) == DIGITS:
        return _load_digits()
    path = Path(path).resolve()
    if path.is_file():
        return _load_embedded(path) if _is_embedded(path) else _load_foreign(path)
    if not path.exists():
        raise FileNotFoundError(
            f"found no teacher at {str(path)!r}, expected a teacher directory, a checkpoint file "
            f"(.pth, .safetensors, .onnx, ...) or {DIGITS!r}; make a teacher directory: {_CONVERT}"
        )
    if not (path / _METADATA_FILE).is_file():
        raise ValueError(
            f"found a directory without {_METADATA_FILE} at {str(path)!r}, expected a teacher "
            f"directory, a checkpoint file or {DIGITS!r}; convert a checkpoint first: {_CONVERT}"
        )
    metadata = _parse((path / _METADATA_FILE).read_text(encoding="utf-8"), str(path))

    def read(graph: Graph) -> Variables:
        return _restore(path / _VARIABLES, graph, metadata["files"])

    return _teacher(metadata, read, str(path))


def _restore(path: Path, graph: Graph, hashes: dict[str, str]) -> Variables:
    """The arrays as numpy. Dtypes are checked before orbax sees them: it casts a wrong one in
    silence."""
    check_files(path, hashes)
    # An explicit sharding, so that the layout of the machine that saved them is never asked for.
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding),
        _filled(graph.variable_shapes()),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    with quiet_logging(), local_checkpointer() as checkpointer:
        stored = flatten_variables(checkpointer.metadata(path).item_metadata.tree)
        wanted = flatten_variables(abstract)
        found = {name: describe_array(leaf) for name, leaf in stored.items()}
        expected = {name: describe_array(leaf) for name, leaf in wanted.items()}
        if found != expected:
            wrong = sorted(found.items() ^ expected.items())
            raise ValueError(f"arrays other than the graph's: {wrong[:6]}")
        restored = jax.device_get(checkpointer.restore(path, abstract))
    return {"params": {}, "batch_stats": {}} | jax.tree.map(np.array, restored)


def _filled(tree: dict[str, Any]) -> dict[str, Any]:
    """The collections that hold something: orbax keeps no empty ones."""
    return {collection: layers for collection, layers in tree.items() if layers}


# --- one file ------------------------------------------------------------------------------------


def save_embedded(teacher: Teacher, file: str | Path) -> None:
    """Writes a teacher as one `.safetensors` file, its metadata in the header; the same teacher
    gives the same bytes. Replaces the file that is there, whole."""
    file = Path(file).resolve()
    if file.suffix != ".safetensors":
        raise ValueError(f"found {file.name!r}, expected a name that ends in .safetensors")
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        name: np.ascontiguousarray(array)
        for name, array in flatten_variables(jax.device_get(teacher.variables)).items()
    }
    data = safetensors.numpy.save(arrays, {_HEADER_KEY: json.dumps(_metadata(teacher))})
    handle, temporary = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _is_embedded(path: Path) -> bool:
    """Whether a file is a teacher of `save_embedded`, and no foreign checkpoint."""
    return path.suffix == ".safetensors" and _HEADER_KEY in read_safetensors_file(path)[1]


def _load_foreign(path: Path) -> Teacher:
    try:
        return convert_teacher(path)
    except ReaderError as error:
        raise ReaderError(
            f"{error}; or convert it with what it does not say: {_CONVERT}"
        ) from error


def _load_embedded(path: Path) -> Teacher:
    arrays, header = read_safetensors_file(path)

    def read(_: Graph) -> Variables:
        variables: Variables = {"params": {}, "batch_stats": {}}
        for name, array in arrays.items():
            collection, layer, variable = name.split("/")
            variables[collection].setdefault(layer, {})[variable] = array
        return variables

    return _teacher(_parse(header[_HEADER_KEY], str(path)), read, str(path))


def _load_digits() -> Teacher:
    asset = resources.files("lrq_jax") / "assets" / "digits_teacher.safetensors"
    if not asset.is_file():
        raise FileNotFoundError(
            f"found no {asset.name} in the package, expected it under lrq_jax/assets: install the "
            f"package again, or name another teacher; make one: {_CONVERT}"
        )
    with resources.as_file(asset) as path:
        return _load_embedded(path)
