"""Flax's checkpoints: msgpack files, orbax directories and flat `.npz` archives of variables."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lrq_jax.console import quiet_logging
from lrq_jax.readers.errors import ReaderError
from lrq_jax.readers.torch_pickle import MAX_BYTES

MSGPACK_SUFFIXES = (".msgpack", ".flax")
COLLECTIONS = ("params", "batch_stats")

_MAX_RATIO = 1000
"""Bytes of arrays for one of an orbax directory, which packs them (zstd)."""
_MAX_DEPTH = 8
_STEP = re.compile(r"(?:.*_)?(\d+)")
_LEAVES = {"kernel": "params", "bias": "params", "scale": "params", "mean": "batch_stats",
           "var": "batch_stats"}  # fmt: skip

Flat = dict[str, np.ndarray]
"""Arrays by path: `params/conv_init/kernel`."""


def is_msgpack(path: Path) -> bool:
    """Whether a file is Flax's by its name; its older checkpoints are called `checkpoint_100`."""
    return (
        path.suffix in MSGPACK_SUFFIXES or re.fullmatch(r"checkpoint(_\d+)?", path.name) is not None
    )


def is_flax_path(name: str) -> bool:
    """Whether an array's name is a path of Flax, such as `params/conv/kernel`."""
    return "/" in name and name.rpartition("/")[2] in _LEAVES


# --- files ---------------------------------------------------------------------------------------


def read_msgpack_file(path: Path) -> dict[str, Any]:
    """The tree in a file of `flax.serialization.to_bytes` (or `msgpack_serialize`).

    Raises:
      FileNotFoundError: no such file.
      ReaderError: not such a file, or a damaged one.
    """
    from flax import serialization

    if not path.is_file():
        raise FileNotFoundError(f"found no file {str(path)!r}, expected a Flax checkpoint")
    if path.stat().st_size > MAX_BYTES:
        raise ReaderError(f"found over {MAX_BYTES} bytes, expected less")
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
    # msgpack's exceptions have no common base but Exception, numpy's join them.
    except Exception as error:
        raise ReaderError(
            f"found a truncated or damaged msgpack file ({type(error).__name__}: {error}), "
            "expected one of flax.serialization.to_bytes"
        ) from error
    if not isinstance(tree, dict):
        raise ReaderError(f"found a {type(tree).__name__}, expected a dict of variables")
    return tree


def read_orbax_directory(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The tree of params and batch statistics in an orbax checkpoint, and notes on it.

    Args:
      path: what a checkpointer or a CheckpointManager wrote; of several steps the last is read.

    Raises:
      ReaderError: not such a directory, links in it, or a damaged one.
    """
    checkpoint, notes = _checkpoint(path.resolve())
    if (checkpoint / "checkpoint").is_file() and not (checkpoint / "_METADATA").exists():
        return read_msgpack_file(checkpoint / "checkpoint"), notes
    links = [file for file in checkpoint.rglob("*") if file.is_symlink()]
    if links:
        raise ReaderError(f"found a link {links[0].name!r}, expected all data in the directory")
    _check_names(checkpoint / "_METADATA")
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    import orbax.checkpoint as ocp

    try:
        with quiet_logging(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            stored = checkpointer.metadata(checkpoint).item_metadata.tree
            wanted, taken = _variables(stored)
            held = sum(int(np.prod(leaf.shape, dtype=object)) * np.dtype(leaf.dtype).itemsize
                       for leaf in jax.tree.leaves(wanted) if hasattr(leaf, "shape"))  # fmt: skip
            if held > min(MAX_BYTES, _MAX_RATIO * size):
                raise ReaderError(f"found {held} bytes of arrays in {size} on disk, expected less")
            partial = _nested(wanted, taken)
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), partial)
            arguments = ocp.args.PyTreeRestore(item=partial, restore_args=how, partial_restore=True)
            return checkpointer.restore(checkpoint, args=arguments), notes
    except ReaderError:
        raise
    # tensorstore's and orbax's errors have no common base but Exception.
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else ""
        raise ReaderError(
            f"found a damaged orbax checkpoint ({type(error).__name__}: {first[:200]})"
        ) from error


def _checkpoint(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The directory of the last step in `path`, which may be one itself."""
    notes: list[str] = []
    for _ in range(_MAX_DEPTH):
        if (path / "_METADATA").is_file() or (path / "checkpoint").is_file():
            return path, tuple(notes)
        inner = [item for item in sorted(path.iterdir()) if item.is_dir() and not item.is_symlink()]
        steps = {int(m[1]): item for item in inner if (m := _STEP.fullmatch(item.name))}
        if steps:
            path = steps[max(steps)]
            notes.append(f"took step {max(steps)} of {sorted(steps)[-8:]}")
            continue
        named = [
            item for item in inner if item.name in ("default", "state", "params", "checkpoint")
        ]
        if not named:
            break
        path = named[0]
    raise ReaderError(
        f"found a directory of {[item.name for item in sorted(path.iterdir())][:8]}, expected an "
        "orbax checkpoint: the folder with _METADATA, or one of numbered steps"
    )


def _check_names(metadata: Path) -> None:
    """Refuses names that could lead out of the directory, where arrays are kept by name."""
    try:
        entries = json.loads(metadata.read_bytes())["tree_metadata"].values()
        names = {str(key["key"]) for entry in entries for key in entry["key_metadata"]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReaderError(f"found a damaged orbax checkpoint (its _METADATA: {error!r})") from error
    if wrong := [name for name in names if re.search(r"[/\\\0]|^\.", name)]:
        raise ReaderError(f"found an array named {wrong[0]!r}, expected names of modules")


# --- trees ---------------------------------------------------------------------------------------


def _variables(tree: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The shallowest dict with `params` in it, only with the collections we know, and its path."""
    level: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    for _ in range(_MAX_DEPTH):
        for path, node in level:
            if isinstance(node, Mapping) and isinstance(node.get("params"), Mapping):
                inner = node["params"]
                if isinstance(inner.get("params"), Mapping):  # a TrainState of whole variables
                    return {k: inner[k] for k in COLLECTIONS if k in inner}, (*path, "params")
                return {name: node[name] for name in COLLECTIONS if name in node}, path
        level = [((*path, str(key)), value) for path, node in level if isinstance(node, Mapping)
                 for key, value in node.items()]  # fmt: skip
    keys = list(tree)[:8] if isinstance(tree, Mapping) else type(tree).__name__
    raise ReaderError(
        f"found a tree of {keys}, expected Flax variables: dicts 'params' and 'batch_stats', by "
        "themselves or in a TrainState"
    )


def _nested(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in reversed(path):
        tree = {key: tree}
    return tree


def flax_variables(tree: Mapping[str, Any]) -> tuple[Flat, tuple[str, ...]]:
    """The arrays of a tree of variables by path, as float32, and notes on what was done.

    Raises:
      ReaderError: no `params` in it, or leaves that are no float arrays.
    """
    notes: list[str] = []
    found, path = _variables(tree)
    if path:
        notes.append(f"took the variables under {'/'.join(path)!r}")
    beside = sorted({str(key) for key in tree} - set(COLLECTIONS) - set(path[:1]))
    if beside:
        notes.append(f"left out {', '.join(beside)}")
    flat: Flat = {}
    level: list[tuple[str, Any]] = list(found.items())
    while level:
        name, node = level.pop()
        if isinstance(node, Mapping):
            level += [(f"{name}/{key}", value) for key, value in node.items()]
        else:
            flat[name] = _float32(name, node)
    return dict(sorted(flat.items())), tuple(notes)


def unflatten(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Flat paths as a tree; the collections are added where the paths leave them out.

    Raises:
      ReaderError: a name that is both an array and a folder.
    """
    tree: dict[str, Any] = {}
    complete = any("params" in name.split("/")[:-1] for name in arrays)
    for name, array in arrays.items():
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders if complete else [_LEAVES.get(leaf, "params"), *folders]:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                raise ReaderError(f"found {name!r} below an array, expected one of both")
        if isinstance(node.get(leaf), dict):
            raise ReaderError(f"found {name!r} as an array and a folder, expected one of both")
        node[leaf] = array
    return tree


def _float32(name: str, leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise ReaderError(f"found {array.dtype} {name!r}, expected a float array")
    return np.ascontiguousarray(array, np.float32)
