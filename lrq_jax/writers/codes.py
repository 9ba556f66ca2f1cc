"""The finished student as an orbax checkpoint: integer codes and scales, and its graph.

    DIR/student.json   graph, quantization, preprocessing, provenance
    DIR/codes/         arrays

`integer` placement: per layer uint8 weight codes and zero points, float32 scales, int32 biases;
per tensor a float32 scale and a uint8 zero point; per activation on its own a uint8 table of
codes: everything the integer forward needs.
`paper` placement: uint8 weight codes with float32 scale and int32 offset per channel, the
batch norms and activation ranges in float32, since that placement computes in float.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrq_jax.checkpoints import local_checkpointer
from lrq_jax.console import quiet_logging
from lrq_jax.data import Preprocessing
from lrq_jax.graph import graph_from_dict, graph_to_dict
from lrq_jax.passes import QuantSpec, Student
from lrq_jax.passes.float_forward import Variables
from lrq_jax.passes.integer_forward import QuantizedWeights
from lrq_jax.passes.student import freeze, paper_weight_codes
from lrq_jax.quantizers.affine import AffineParameters

FORMAT_VERSION = 1
_DESCRIPTION, _ARRAYS = "student.json", "codes"


def student_codes(student: Student, variables: Variables) -> dict[str, Any]:
    """All arrays of the finished student, integers in integer dtypes; see the module docstring."""
    if student.is_integer:
        frozen = jax.jit(freeze, static_argnums=0)(student, variables)
        dtypes = QuantizedWeights(np.uint8, np.uint8, np.float32, np.int32)
        return jax.device_get(
            {
                "weights": {
                    name: _cast(weights, dtypes) for name, weights in frozen["weights"].items()
                },
                "tensors": {
                    name: _cast(tensor, AffineParameters(np.float32, np.uint8))
                    for name, tensor in frozen["tensors"].items()
                },
                "tables": {
                    name: table.astype(np.uint8) for name, table in frozen["tables"].items()
                },
            }
        )
    kernels = jax.jit(paper_weight_codes, static_argnums=0)(student, variables)
    floats = {
        layer: {name: value for name, value in params.items() if name != "kernel"}
        for layer, params in variables["params"].items()
    }
    return jax.device_get(
        {
            "weights": kernels,
            "params": {layer: params for layer, params in floats.items() if params},
            "batch_stats": variables["batch_stats"],
            "ranges": variables["quant"]["activations"],
        }
    )


def frozen_from_codes(codes: dict[str, Any]) -> dict[str, Any]:
    """The tree `integer_forward` runs on from stored codes: the same numbers, as float32."""
    as_float = lambda tree: {k: jnp.asarray(v, jnp.float32) for k, v in tree.items()}  # noqa: E731
    return {
        "weights": {n: QuantizedWeights(**as_float(w)) for n, w in codes["weights"].items()},
        "tensors": {n: AffineParameters(**as_float(t)) for n, t in codes["tensors"].items()},
        "tables": as_float(codes.get("tables") or {}),  # orbax drops an empty one
    }


def save_student(directory: Path, student: Student, variables: Variables, *,
                 preprocessing: Preprocessing, provenance: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    """Writes a finished student; replaces an earlier one as a whole. Returns its codes.

    Args:
      directory: to write.
      student, variables: the student after its last step.
      preprocessing: how images become its input.
      provenance: JSON-ready: teacher hash, preset, versions.
    """
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    codes = student_codes(student, variables)
    description = {
        "format": "lrq_jax student",
        "version": FORMAT_VERSION,
        "spec": dataclasses.asdict(student.spec),
        "input_range": list(student.input_range),
        "preprocessing": dataclasses.asdict(preprocessing),
        "provenance": provenance,
        "graph": graph_to_dict(student.graph),
    }
    workspace = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        made = workspace / "new"
        with quiet_logging(), local_checkpointer() as checkpointer:
            checkpointer.save(made / _ARRAYS, codes)
            checkpointer.wait_until_finished()
        text = json.dumps(description, indent=1) + "\n"
        (made / _DESCRIPTION).write_text(text, encoding="utf-8")
        if directory.exists():
            os.replace(directory, workspace / "old")
        os.replace(made, directory)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return codes


def is_student(directory: Path) -> bool:
    """Whether `save_student` wrote there."""
    return (directory / _DESCRIPTION).is_file()


def load_student(directory: str | Path) -> tuple[Student, dict[str, Any], Preprocessing]:
    """A student written by `save_student`: its description, codes and preprocessing.

    Raises:
      FileNotFoundError: no student there.
      ValueError: another format version.
    """
    directory = Path(directory).resolve()
    if not is_student(directory):
        raise FileNotFoundError(
            f"found no {_DESCRIPTION} in {str(directory)!r}, expected the `student` directory of a "
            "finished run or of an export: python -m lrq_jax.main --workdir=RUN makes the one, "
            "python -m lrq_jax.export --run RUN --out DIR the other"
        )
    description = json.loads((directory / _DESCRIPTION).read_text(encoding="utf-8"))
    if description.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{directory}: found format version {description.get('version')!r}, expected "
            f"{FORMAT_VERSION}; quantize again with this version of lrq_jax"
        )
    spec = description["spec"]
    student = Student(
        graph=graph_from_dict(description["graph"]),
        spec=QuantSpec(**{**spec, "overrides": tuple(spec["overrides"])}),
        input_range=tuple(description["input_range"]),
    )
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with quiet_logging(), local_checkpointer() as checkpointer:
        stored = checkpointer.metadata(directory / _ARRAYS).item_metadata.tree
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), stored
        )
        codes = jax.device_get(checkpointer.restore(directory / _ARRAYS, abstract))
    return student, codes, Preprocessing(**description["preprocessing"])


def _cast(values: Any, dtypes: Any) -> dict[str, jax.Array]:
    """A NamedTuple of integer-valued float32 arrays as a dict in their stored dtypes."""
    return {
        name: jnp.asarray(value).astype(dtype)
        for name, value, dtype in zip(values._fields, values, dtypes, strict=True)
    }
