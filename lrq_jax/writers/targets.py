"""The files a student is exported as, one a target."""

from __future__ import annotations

from typing import Any

from lrq_jax import __version__
from lrq_jax.data import Preprocessing
from lrq_jax.data.pixels import normalise
from lrq_jax.passes import Student
from lrq_jax.writers.jax_export import jax_export
from lrq_jax.writers.onnx_model import onnx_model
from lrq_jax.writers.tflite_model import tflite_model

STUDENT = "student"
"""Directory of codes and scales: the reference, in every export."""
FILES = {"onnx": "model.onnx", "jax": "model.jaxexport", "litert": "model.tflite"}
"""Target -> file."""
TARGETS = (*FILES, "orbax")
"""`orbax` is the directory `STUDENT`, which every export has."""


def target_bytes(target: str, student: Student, codes: dict[str, Any],
                 preprocessing: Preprocessing, options: dict[str, Any],
                 version: str | None = None) -> bytes:  # fmt: skip
    """The file of one target.

    Args:
      version: of lrq_jax, that the file names; None for this one. A comparison takes the file's.
    """
    if target == "jax":
        return jax_export(student, codes, batch=options["batch"])
    if target == "litert":
        return tflite_model(
            student,
            codes,
            metadata=_metadata(student, preprocessing, options, version or __version__),
            input_kind=options["input_kind"],
            table=lambda pixels: normalise(pixels, preprocessing),
            batch=options["batch"] or 1,
        )
    return onnx_proto(student, codes, preprocessing, options).SerializeToString()


def onnx_proto(student: Student, codes: dict[str, Any], preprocessing: Preprocessing,
               options: dict[str, Any]) -> Any:  # fmt: skip
    """The ONNX model an export with these options holds."""
    return onnx_model(
        student,
        codes,
        metadata=_metadata(student, preprocessing, options, __version__),
        weight_storage=options["weight_storage"],
        input_kind=options["input_kind"],
        table=lambda pixels: normalise(pixels, preprocessing),
        batch=options["batch"],
    )


def _metadata(student: Student, preprocessing: Preprocessing, options: dict[str, Any],
              version: str) -> dict[str, Any]:  # fmt: skip
    """What a file says of itself, so that it can be evaluated alone."""
    return {
        "version": version,
        "options": options,
        "preprocessing": vars(preprocessing),
        "num_classes": student.graph.num_classes,
    }
