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
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrq_jax.checkpoints import check_files, file_hashes, local_checkpointer
from lrq_jax.console import quiet_logging
from lrq_jax.data import Preprocessing
from lrq_jax.graph import graph_from_dict, graph_to_dict
from lrq_jax.graph.layers import Activation
from lrq_jax.passes import QuantSpec, Student
from lrq_jax.passes.float_forward import Variables
from lrq_jax.passes.integer_forward import QuantizedWeights
from lrq_jax.passes.student import freeze, paper_weight_codes
from lrq_jax.quantizers.affine import AffineParameters
from lrq_jax.report_file import read_object

FORMAT_VERSION = 1
_DESCRIPTION, _ARRAYS = "student.json", "codes"
_FILES = "files"
"""Key of the description: hashes of the files of the arrays."""


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
        files = {_FILES: file_hashes(made / _ARRAYS)}
        text = json.dumps(description | files, indent=1) + "\n"
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
      ValueError: another format version, or damaged or missing parts; names the file.
    """
    directory = Path(directory).resolve()
    if not is_student(directory):
        raise FileNotFoundError(
            f"found no {_DESCRIPTION} in {str(directory)!r}, expected the `student` directory of a "
            "finished run or of an export: python -m lrq_jax.main --workdir=RUN makes the one, "
            "python -m lrq_jax.export --run RUN --out DIR the other"
        )
    description = read_object(directory / _DESCRIPTION)
    if description.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{directory}: found format version {description.get('version')!r}, expected "
            f"{FORMAT_VERSION}; quantize again with this version of lrq_jax"
        )
    try:
        spec = description["spec"]
        student = Student(
            graph=graph_from_dict(description["graph"]),
            spec=QuantSpec(**{**spec, "overrides": tuple(spec["overrides"])}),
            input_range=tuple(description["input_range"]),
        )
        preprocessing = Preprocessing(**description["preprocessing"])
        expected = _shapes(student) if student.is_integer else {}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{directory / _DESCRIPTION}: found no description of a student "
            f"({type(error).__name__}: {error}), expected the file as it was written; copy or "
            "make it again"
        ) from error
    # A student of an earlier version of lrq_jax has no hashes.
    codes = _restored(directory / _ARRAYS, description.get(_FILES, {}))
    for place, shape in expected.items():
        found: Any = codes
        for name in place:
            found = found.get(name) if isinstance(found, dict) else None
        if found is None or (shape and found.shape != shape):
            what = "nothing" if found is None else f"shape {found.shape}"
            raise ValueError(
                f"{directory / _ARRAYS}: found {what} as {'/'.join(place)}, expected an array"
                f"{f' of shape {shape}' if shape else ''}, as {_DESCRIPTION} beside it says; "
                "copy or make both again"
            )
    return student, codes, preprocessing


def provenance(directory: str | Path) -> dict[str, Any]:
    """What `save_student` was told of where a student comes from."""
    return read_object(Path(directory) / _DESCRIPTION).get("provenance", {})


def student_sha256(directory: str | Path, codes: dict[str, Any]) -> str:
    """Of a student's description and codes: of what they say, however the files are laid out.

    Args:
      directory: of `save_student`.
      codes: its arrays, of `load_student`.
    """
    description = read_object(Path(directory) / _DESCRIPTION)
    description.pop(_FILES, None)
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for path, array in jax.tree_util.tree_leaves_with_path(codes):
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _shapes(student: Student) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Place of each array of an integer student -> its shape; () where any will do."""
    params = student.graph.variable_shapes()["params"]
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
    for operation in student.operations:
        name = operation.layer.name
        if operation.has_weights:
            kernel = params[name]["kernel"]
            shapes["weights", name, "codes"] = kernel
            for part in ("zero_point", "scale", "bias"):
                shapes["weights", name, part] = kernel[-1:]
        elif isinstance(operation.layer, Activation):
            shapes["tables", operation.output] = ()
    for name in student.code_bits:
        shapes["tensors", name, "scale"] = shapes["tensors", name, "zero_point"] = ()
    return shapes


def _restored(path: Path, hashes: dict[str, str]) -> dict[str, Any]:
    """The arrays under `path`, on this machine's first device and then on the host."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        check_files(path, hashes)
        with quiet_logging(), local_checkpointer() as checkpointer:
            stored = checkpointer.metadata(path).item_metadata
            if stored is None:  # orbax says no more of files that are missing or cut short
                raise ValueError("missing or damaged")
            abstract = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                stored.tree,
            )
            return jax.device_get(checkpointer.restore(path, abstract))
    except Exception as error:  # orbax and tensorstore raise classes of their own
        raise ValueError(
            f"{path}: found no readable codes ({str(error)[:200]}), expected the directory as it was "
            "written; copy or make it again"
        ) from error


def _cast(values: Any, dtypes: Any) -> dict[str, jax.Array]:
    """A NamedTuple of integer-valued float32 arrays as a dict in their stored dtypes."""
    return {
        name: jnp.asarray(value).astype(dtype)
        for name, value, dtype in zip(values._fields, values, dtypes, strict=True)
    }
