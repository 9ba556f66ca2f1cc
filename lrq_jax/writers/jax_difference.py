"""Where two serialized JAX functions of one student differ."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np
from jax import export

_CONSTANT = re.compile(r"dense<(.*)> : tensor<((?:\d+x)*)(\w+)>")
_TYPES = {"ui8": np.uint8, "i8": np.int8, "i32": np.int32, "f32": np.float32}


def first_difference(found: bytes, expected: bytes, codes: dict[str, Any]) -> str | None:
    """A sentence on the first difference of two files of `writers.jax_export`, None if there is
    none.

    Args:
      found, expected: the files, made by the same version of JAX.
      codes: of the student of `expected`, to name constants by.
    """
    if found == expected:
        return None
    try:
        lines = [_lines(content) for content in (found, expected)]
    except Exception as error:  # flatbuffers and MLIR raise classes of their own
        return f"not a readable JAX function: {error}"
    for ours, theirs in itertools.zip_longest(*lines, fillvalue=""):
        if ours != theirs:
            name = _name(theirs, codes)
            what = f"constant {name!r} differs" if name else "an operation differs"
            return f"{what}: found {ours.strip()[:120]!r}, expected {theirs.strip()[:120]!r}"
    return "not the bytes expected, around the same operations and constants"


def _lines(content: bytes) -> list[str]:
    return export.deserialize(bytearray(content)).mlir_module().splitlines()


def _name(line: str, codes: dict[str, Any]) -> str | None:
    """Layer and part of codes that a line's constant holds."""
    if not (match := _CONSTANT.search(line)) or match[3] not in _TYPES:
        return None
    shape, dtype = tuple(map(int, match[2].split("x")[:-1])), _TYPES[match[3]]
    text = match[1].strip('"')
    if text.startswith("0x"):
        values = np.frombuffer(bytes.fromhex(text[2:]), dtype)
    else:
        values = np.asarray(re.findall(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?", text), float)
    if values.size not in (1, math.prod(shape)):
        return None
    for part, entries in codes.items():
        for name, arrays in entries.items():
            for kind, array in arrays.items() if isinstance(arrays, dict) else [(part, arrays)]:
                array = np.asarray(array)
                if array.shape == shape and array.dtype == dtype:
                    held = array.reshape(-1).astype(float)
                    if np.allclose(held, values.astype(float), rtol=1e-5, atol=0):
                        return f"{name}.{kind}"
    return None
