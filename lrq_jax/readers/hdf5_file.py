"""Reads HDF5 files into plain dicts: only what lies in the file itself, within bounds.

HDF5 can name other files (external and soft links, external and virtual datasets) and can claim
sizes that are not there. None of that is written by Keras, and none of it is followed here.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lrq_jax.readers.errors import ReaderError
from lrq_jax.readers.torch_pickle import MAX_BYTES

_MAX_RATIO = 100
"""Bytes of arrays for one of the file; Keras does not compress, so 1 is what to expect."""
_MAX_DEPTH = 32
_FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32"}
"""HDF5 looks for any other filter as a plugin on disk: those are refused."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hdf5Tree:
    """What a file holds: `arrays` by path (`layers/conv2d/vars/0`), `attributes` by path of their
    group (the root's is `""`) and name."""

    arrays: dict[str, np.ndarray]
    attributes: dict[str, dict[str, Any]]

    def names(self, group: str, attribute: str) -> list[str] | None:
        """A list of names kept as an attribute, or in pieces `attribute0`, `attribute1`, ... where
        it was too long for one; None where there is none."""
        found = self.attributes.get(group, {})
        if attribute in found:
            return [_text(name) for name in np.atleast_1d(found[attribute])]
        pieces: list[str] = []
        while f"{attribute}{len(pieces)}" in found:
            pieces.append(f"{attribute}{len(pieces)}")
        return [_text(name) for piece in pieces for name in found[piece]] if pieces else None

    def text(self, group: str, attribute: str) -> str | None:
        """An attribute as text, None where there is none."""
        value = self.attributes.get(group, {}).get(attribute)
        return None if value is None else _text(value)


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def import_h5py() -> Any:
    """The h5py module.

    Raises:
      ReaderError: it is not installed; names the extra that brings it.
    """
    try:
        import h5py
    except ImportError as error:
        raise ReaderError(
            "found no h5py, expected it for Keras' files: pip install 'lrq_jax[keras]'"
        ) from error
    return h5py


def read_hdf5(source: Path | bytes, *, leave_out: Iterable[str] = ()) -> Hdf5Tree:
    """Every array and attribute of an HDF5 file.

    Args:
      source: a file, or one's bytes.
      leave_out: groups at the root that are not read, such as an optimizer's state.

    Returns:
      Arrays in their own dtype; bfloat16, which Keras marks with an attribute, as float32.

    Raises:
      ReaderError: no or a damaged HDF5 file, links of any kind, data kept elsewhere, filters other
        than HDF5's own, or more data than the file can hold.
    """
    h5py = import_h5py()
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > MAX_BYTES:
        raise ReaderError(f"found over {MAX_BYTES} bytes, expected less")
    reader = _Reader(h5py=h5py, limit=min(MAX_BYTES, _MAX_RATIO * size))
    try:
        with h5py.File(io.BytesIO(source) if isinstance(source, bytes) else source, "r") as file:
            reader.visit(file, "", set(leave_out))
    except ReaderError:
        raise
    # What h5py raises on damage depends on where it is.
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:
        raise ReaderError(f"found a truncated or damaged HDF5 file ({error})") from error
    return Hdf5Tree(arrays=reader.arrays, attributes=reader.attributes)


class _Reader:
    """Walks one file and keeps count of what it read."""

    def __init__(self, *, h5py: Any, limit: int) -> None:
        self.h5py, self.limit, self.total = h5py, limit, 0
        self.arrays: dict[str, np.ndarray] = {}
        self.attributes: dict[str, dict[str, Any]] = {}
        self._seen: set[int] = set()  # addresses of groups

    def visit(self, group: Any, path: str, leave_out: set[str]) -> None:
        """Reads a group and everything below it."""
        if path.count("/") >= _MAX_DEPTH:
            raise ReaderError(f"found groups nested over {_MAX_DEPTH} deep at {path!r}")
        address = self.h5py.h5o.get_info(group.id).addr
        if address in self._seen:
            raise ReaderError(f"found group {path!r} linked twice, expected each once")
        self._seen.add(address)
        self.attributes[path] = self._attributes(group, path)
        for name in group:
            if name in leave_out:
                continue
            inner = f"{path}/{name}".removeprefix("/")
            link = group.get(name, getlink=True)
            if not isinstance(link, self.h5py.HardLink):
                where = f" to {link.filename!r}" if hasattr(link, "filename") else ""
                raise ReaderError(
                    f"found {type(link).__name__} {inner!r}{where}, expected all data in the file "
                    "itself, which is all that Keras writes"
                )
            item = group[name]
            if isinstance(item, self.h5py.Group):
                self.visit(item, inner, set())
            elif isinstance(item, self.h5py.Dataset):
                self.arrays[inner] = self._array(item, inner)
            else:
                raise ReaderError(f"found {type(item).__name__} {inner!r}, expected an array")

    def _count(self, size: int, what: str) -> None:
        self.total += size
        if self.total > self.limit:
            raise ReaderError(
                f"found more data than the file can hold at {what}, expected at most "
                f"{self.limit} bytes"
            )

    def _attributes(self, group: Any, path: str) -> dict[str, Any]:
        found = {}
        for name in group.attrs:
            kept = group.attrs.get_id(name)
            kind = kept.dtype.kind
            if kind not in "OSUiufb" or (kind == "O" and not self.h5py.check_string_dtype(kept.dtype)):  # fmt: skip
                continue  # references and the like are never looked up
            self._count(int(np.prod(kept.shape or (), dtype=object)) * kept.dtype.itemsize,
                        f"attribute {name!r} of {path!r}")  # fmt: skip
            found[name] = group.attrs[name]
        return found

    def _array(self, dataset: Any, path: str) -> np.ndarray:
        plan = dataset.id.get_create_plist()
        filters = {plan.get_filter(index)[0] for index in range(plan.get_nfilters())}
        if dataset.external or dataset.is_virtual or not filters <= set(_FILTERS):
            found = "data kept in another file" if dataset.external else "a virtual dataset"
            if not filters <= set(_FILTERS):
                found = f"HDF5 filters {sorted(filters)}"
            raise ReaderError(
                f"found {found} at {path!r}, expected an array in the file itself, plain or "
                f"packed by one of {sorted(_FILTERS.values())}"
            )
        if dataset.shape is None or dataset.dtype.kind not in "fiubV" or dataset.dtype.names:
            raise ReaderError(f"found {dataset.dtype} at {path!r}, expected numbers")
        # Python's integers, which no shape overflows.
        size = int(np.prod(dataset.shape, dtype=object)) * dataset.dtype.itemsize
        self._count(size, f"array {path!r} of shape {dataset.shape}")
        values = np.asarray(dataset[()])
        if values.dtype.kind == "V":
            marked = dataset.attrs.get("dtype") if "dtype" in dataset.attrs else None
            if values.dtype.itemsize != 2 or marked != "bfloat16":
                raise ReaderError(f"found {dataset.dtype} at {path!r}, expected numbers")
            return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return values.astype(values.dtype.newbyteorder("="))
