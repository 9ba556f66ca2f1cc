"""Reads `.safetensors` files into numpy, half precisions widened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors

from lrq_jax.readers.errors import ReaderError
from lrq_jax.readers.torch_pickle import MAX_BYTES

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


def read_safetensors_file(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and header metadata of a safetensors file.

    Returns:
      `(arrays, metadata)`; float16 and bfloat16 arrays are widened to float32, exactly.

    Raises:
      FileNotFoundError: no such file.
      ReaderError: a damaged file, or a dtype that numpy does not have (float8).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"found no file {str(path)!r}, expected a safetensors file")
    if path.stat().st_size > MAX_BYTES:
        raise ReaderError(f"{path.name}: found over {MAX_BYTES} bytes, expected less")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ReaderError(f"{path.name}: found a damaged safetensors file ({error})") from error
    return {name: _array(path.name, name, entry) for name, entry in entries}, metadata


def _array(file_name: str, name: str, entry: dict) -> np.ndarray:
    kind = entry["dtype"]
    if kind not in _DTYPES:
        raise ReaderError(
            f"{file_name}: found {name!r} of dtype {kind}, expected one of {sorted(_DTYPES)}"
        )
    values = np.frombuffer(entry["data"], _DTYPES[kind]).reshape(entry["shape"])
    if kind == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    native = np.float32 if kind == "F16" else values.dtype.newbyteorder("=")
    return np.array(values, dtype=native)
