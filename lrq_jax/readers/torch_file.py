"""Reads PyTorch checkpoints (`.pt`, `.pth`, `.th`) without PyTorch and without running anything.

Two containers are known: the zip archive PyTorch writes since 1.6 and the stream of pickles
before it. Both hold one pickle of the object tree and the raw bytes of each storage.
"""

from __future__ import annotations

import pickletools
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lrq_jax.readers.errors import ReaderError
from lrq_jax.readers.torch_pickle import (
    BFLOAT16,
    MAX_BYTES,
    Storage,
    TensorRecord,
    item_size,
    resolve,
    storage_of,
    unpickle,
)
from lrq_jax.readers.zip_limits import check_archive

__all__ = ["ReaderError", "read_torch_file"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_RATIO = 100
"""Bytes of all tensors for one of the file: views of one storage may overlap, a few times ..."""
_ANY_FILE = 2**24
"""... or a small file's expanded ones."""


def read_torch_file(path: str | Path) -> Any:
    """The object tree of a PyTorch file: dicts, lists, tuples, scalars and numpy arrays.

    Tensors come contiguous and writable in their own dtype and native byte order; bfloat16 is
    widened to float32. Values that are neither (arguments, devices) come as `Opaque`.

    Args:
      path: a file written by `torch.save`, as a zip archive or in the format before PyTorch 1.6.

    Raises:
      FileNotFoundError: no such file.
      ReaderError: not such a file, truncated or damaged, larger than 8 GiB, or holding anything
        but tensors (whole pickled modules are refused by the name of their class).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"found no file {str(path)!r}, expected a PyTorch checkpoint")
    if path.stat().st_size > MAX_BYTES:
        raise ReaderError(f"{path.name}: found over {MAX_BYTES} bytes, expected less")
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                return _read_zip(file, path.stat().st_size)
            file.seek(0)
            return _read_legacy(file, path.stat().st_size)
    except ReaderError as error:
        raise ReaderError(f"{path.name}: {error}") from error


# --- zip archive ---------------------------------------------------------------------------------


def _read_zip(file: BinaryIO, file_size: int) -> Any:
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ReaderError(f"found a truncated or damaged zip archive ({error})") from error
    with archive:
        members = {info.filename: info for info in archive.infolist()}
        check_archive(archive, file_size)
        roots = [name for name in members if name.endswith("data.pkl") and name.count("/") <= 1]
        prefix = roots[0].removesuffix("data.pkl") if len(roots) == 1 else None
        if prefix is None or prefix + "constants.pkl" in members:
            kind = "a TorchScript archive" if prefix is not None else f"members {[*members][:6]}"
            raise ReaderError(
                f"found {kind}, expected one written by torch.save with one data.pkl: write the "
                "weights with torch.save(model.state_dict(), 'weights.pt')"
            )

        def read(name: str) -> bytes:
            try:
                return archive.read(members[prefix + name])
            except KeyError:
                raise ReaderError(f"found no member {name!r} in the archive") from None
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError,
                    NotImplementedError) as error:  # fmt: skip
                raise ReaderError(f"found a damaged member {name!r} ({error})") from error

        order = read("byteorder").strip() if prefix + "byteorder" in members else b"little"
        if order not in (b"little", b"big"):
            raise ReaderError(f"found byte order {order!r}, expected 'little' or 'big'")
        return _materialize(
            unpickle(read("data.pkl")),
            lambda storage: read(f"data/{storage.key}"),
            little_endian=order == b"little",
            file_size=file_size,
        )


# --- stream of pickles (before PyTorch 1.6) ------------------------------------------------------


def _read_legacy(file: BinaryIO, file_size: int) -> Any:
    if _next_value(file, "a PyTorch file (zip archive or legacy magic number)") != _LEGACY_MAGIC:
        raise ReaderError("found another pickle, expected a file written by torch.save")
    protocol = _next_value(file, "the protocol number")
    if protocol != _LEGACY_PROTOCOL:
        raise ReaderError(f"found protocol {protocol!r}, expected {_LEGACY_PROTOCOL}")
    system = _next_value(file, "the record of the writing machine")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ReaderError("found a file of a big-endian machine: save it again with PyTorch >= 1.6")

    roots: dict[str, Storage] = {}

    def load_storage(pid: tuple) -> Storage:
        root = storage_of(pid)
        if roots.setdefault(root.key, root) != root:
            raise ReaderError(f"found storage {root.key!r} with two types or sizes, expected one")
        if len(pid) < 6 or pid[5] is None:
            return root
        _, start, numel = pid[5]
        if type(start) is not int or type(numel) is not int or not 0 <= start <= start + numel <= root.numel:  # fmt: skip
            raise ReaderError(f"found a view outside storage {root.key!r}, expected one inside")
        return Storage(root.key, root.dtype, numel, start)

    tree = unpickle(_next_pickle(file, "the pickle of the tensors"), load_storage)
    keys = _next_value(file, "the list of storages")
    known = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not known or set(keys) != set(roots) or len(keys) != len(roots):
        raise ReaderError("found other storages listed than used, expected the same")
    blobs: dict[str, bytes] = {}
    for key in keys:
        root = roots[key]
        header = file.read(8)
        count = int.from_bytes(header, "little", signed=True)
        size = root.numel * item_size(root.dtype)
        if len(header) < 8 or size > file_size - file.tell():
            raise ReaderError(f"found a truncated file: storage {key!r} of {size} bytes is cut")
        if count != root.numel:
            raise ReaderError(f"found {count} elements in storage {key!r}, expected {root.numel}")
        blobs[key] = file.read(size)
    return _materialize(tree, lambda storage: blobs[storage.key], little_endian=True,
                        file_size=file_size, roots=roots)  # fmt: skip


def _next_pickle(file: BinaryIO, what: str) -> bytes:
    """Bytes of the pickle at the file's position, which moves behind it; nothing is run."""
    start = file.tell()
    try:
        for _ in pickletools.genops(file):
            pass
    except Exception as error:  # foreign bytes can raise anything
        raise ReaderError(
            f"found no complete pickle ({error}) where {what} is expected: the file is truncated, "
            "damaged or of another kind"
        ) from error
    end = file.tell()
    file.seek(start)
    return file.read(end - start)


def _next_value(file: BinaryIO, what: str) -> Any:
    return unpickle(_next_pickle(file, what))


# --- bytes to arrays -----------------------------------------------------------------------------


def _materialize(tree: Any, read: Callable[[Storage], bytes], *, little_endian: bool,
                 file_size: int, roots: dict[str, Storage] | None = None) -> Any:  # fmt: skip
    blobs: dict[str, bytes] = {}

    def array(record: TensorRecord) -> np.ndarray:
        storage = record.storage
        if storage.key not in blobs:
            blobs[storage.key] = read(storage)
        blob = blobs[storage.key]
        whole = roots[storage.key] if roots else storage
        expected = whole.numel * item_size(whole.dtype)
        if len(blob) != expected:
            raise ReaderError(
                f"found {len(blob)} bytes in storage {storage.key!r}, expected {expected} for "
                f"{whole.numel} elements of {whole.dtype}"
            )
        return _strided(blob, record, little_endian)

    return resolve(tree, array, limit=min(MAX_BYTES, max(_MAX_RATIO * file_size, _ANY_FILE)))


def _strided(blob: bytes, record: TensorRecord, little_endian: bool) -> np.ndarray:
    """A contiguous, writable, native copy of a view whose bounds are checked already."""
    stored = {BFLOAT16: "uint16", "bool": "uint8"}.get(record.dtype, record.dtype)
    dtype = np.dtype(stored).newbyteorder("<" if little_endian else ">")
    start = record.storage.start * item_size(record.storage.dtype)
    try:  # np.ndarray checks the geometry against the buffer once more: as_strided would not
        view = np.ndarray(
            record.size,
            dtype,
            buffer=blob if 0 not in record.size else None,
            offset=start + record.offset * dtype.itemsize if 0 not in record.size else 0,
            strides=[step * dtype.itemsize for step in record.stride],
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise ReaderError(f"found a tensor of size {record.size}: {error}") from error
    values = np.array(view, dtype=dtype.newbyteorder("="), order="C")
    if record.dtype == BFLOAT16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values != 0 if record.dtype == "bool" else values
