"""A finished integer student as an ONNX file in quantize-dequantize (QDQ) form.

Opset 21, IR 10. ONNX Runtime fuses every group `DequantizeLinear -> operator -> QuantizeLinear`
into an integer operator whose arithmetic is `passes.integer_forward`'s, bit for bit. The shape of
the file decides whether it does:

* Weights below 8 bits are int8 `code - zero_point`, or UINT4 codes behind `Cast` and `Sub`, which
  the runtime folds into the same int8 at load; a UINT4 straight into `DequantizeLinear` would run
  in float. Files of UINT4 weights hold little else either: biases of int16 where they fit, behind
  a `Cast`, and the biases' units as a product of the two scales.
* Activations below 8 bits are `QuantizeLinear` to uint8 and an integer `Clip` of the codes; a float
  `Clip` before `QuantizeLinear` would break the fusion.
* What only moves codes (max pool, pad, slice, shuffle, flatten) works on the uint8 codes.
* Activations other than ReLU are tables of codes, so no exponential is computed at run time.

Tensor `NAME` of the network is `NAME.codes` in the file (uint8, channels first).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lrq_jax.passes import Student
from lrq_jax.writers.onnx_layers import write_layer
from lrq_jax.writers.onnx_writer import OnnxWriter

INPUTS = ("float", "uint8")
WEIGHT_STORAGES = ("uint4", "int8")


def onnx_model(student: Student, codes: dict[str, Any], *, metadata: dict[str, Any],
               weight_storage: str = "uint4", input_kind: str = "float",
               table: Callable[[np.ndarray], np.ndarray] | None = None,
               batch: int | None = None) -> Any:  # fmt: skip
    """The `onnx.ModelProto` of a student.

    Args:
      student: of the `integer` placement.
      codes: its arrays, of `writers.codes.student_codes`.
      metadata: JSON-ready, kept in the file under `METADATA`.
      weight_storage: `uint4` packs weights of up to 4 bits, two a byte; `int8` does not.
      input_kind: `float`, normalised images `[B, C, H, W]`; or `uint8`, raw pixels
        `[B, H, W, C]`, whose normalisation becomes a table of codes.
      table: pixels `[256]` of one channel, all channels last `[256, C]`, to normalised values;
        needed for `uint8`.
      batch: images a call; None for any number.

    Raises:
      ValueError: a student that is not integer, or an unknown setting.
      ImportError: the package onnx is missing.
    """
    for name, value, known in (
        ("weight_storage", weight_storage, WEIGHT_STORAGES),
        ("input_kind", input_kind, INPUTS),
    ):
        if value not in known:
            raise ValueError(f"{name}: found {value!r}, expected one of {known}")
    require_integer(student)
    writer = OnnxWriter(student, codes, weight_storage)
    if input_kind == "float":
        image = writer.float_image(batch)
    else:
        if table is None:
            raise ValueError("found no table of normalised pixels, expected one for input 'uint8'")
        image = writer.pixel_image(batch, table)
    for operation in student.operations:
        write_layer(operation.layer, operation, writer)
    return writer.model(image, metadata, batch)


def require_integer(student: Student) -> None:
    """Refuses students that compute in float.

    Raises:
      ValueError: the student is not of the `integer` placement.
    """
    if not student.is_integer:
        raise ValueError(
            f"found placement {student.spec.placement!r}, expected 'integer': only it is an "
            "integer network; quantize with --config.student.placement=integer"
        )
