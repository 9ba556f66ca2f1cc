"""Reads `.npz` archives of named arrays; pickled objects are refused, never loaded."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np

from lrq_jax.readers.errors import ReaderError
from lrq_jax.readers.zip_limits import check_archive

_MAX_HEADER = 10_000
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_FLAT = "np.savez('weights.npz', **{name: array, ...})"


def read_npz_file(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file by name, each in its own dtype.

    Raises:
      FileNotFoundError: no such file.
      ReaderError: a damaged archive, pickled objects, dtypes that are no numbers, or more data
        than the file can hold.
    """
    if not path.is_file():
        raise FileNotFoundError(f"found no file {str(path)!r}, expected a NumPy archive")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            check_archive(archive, path.stat().st_size)
            return {
                member.filename.removesuffix(".npy"): _array(archive.read(member), member.filename)
                for member in members
            }
    except ReaderError as error:
        message = str(error)
        raise ReaderError(
            message if message.startswith(path.name) else f"{path.name}: {message}"
        ) from error
    # What zipfile raises on damage depends on where it is; RuntimeError is an encrypted archive.
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
        raise ReaderError(
            f"{path.name}: found a truncated or damaged NumPy archive ({error})"
        ) from error


def _array(data: bytes, name: str) -> np.ndarray:
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            raise ReaderError(f"found {name!r} in format {version}, expected arrays of numbers")
        shape, fortran, dtype = _HEADERS[version](stream, max_header_size=_MAX_HEADER)
    except ReaderError:
        raise
    except (ValueError, TypeError, SyntaxError, EOFError, RecursionError, MemoryError) as error:
        raise ReaderError(f"found {name!r}, which is no NumPy array ({error})") from error
    if dtype.hasobject:
        raise ReaderError(
            f"found pickled objects in {name!r}, expected plain arrays: a pickle can run code and "
            f"is never loaded; save a flat dict of arrays with {_FLAT}"
        )
    if dtype.kind not in "fiub":
        raise ReaderError(
            f"found {name!r} of dtype {dtype}, expected numbers: NumPy cannot keep bfloat16, save "
            "array.astype(np.float32)"
        )
    expected, left = math.prod(shape) * dtype.itemsize, len(data) - stream.tell()
    if expected != left:
        raise ReaderError(f"found {left} bytes of {name!r} {shape}, expected {expected}")
    values = np.frombuffer(data, dtype, offset=stream.tell())
    values = values.reshape(shape, order="F" if fortran else "C")
    return np.array(values, dtype.newbyteorder("="), order="C")
