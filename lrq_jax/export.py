"""Export a finished student as files that integer runtimes execute.

    python -m lrq_jax.export --run runs/latest --out exported [--targets onnx,jax,litert]

Writes, beside a report and a model card:

    student/           integer codes and scales (orbax) with their graph: the reference
    model.onnx         onnx: quantize-dequantize form, opset 21
    model.jaxexport    jax: one serialized function for CPU, CUDA and TPU
    model.tflite       litert: int8, for LiteRT's XNNPACK kernels

`python -m lrq_jax.verify OUT` then proves that they compute the same integers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrq_jax import __version__
from lrq_jax.console import say
from lrq_jax.data import Preprocessing
from lrq_jax.data.pixels import normalise
from lrq_jax.passes import Student
from lrq_jax.quantizers.affine import top_code
from lrq_jax.run_directory import REPORT
from lrq_jax.writers.codes import load_student
from lrq_jax.writers.jax_export import jax_export
from lrq_jax.writers.model_card import model_card
from lrq_jax.writers.onnx_model import INPUTS, WEIGHT_STORAGES, onnx_model, require_integer
from lrq_jax.writers.tflite_model import tflite_model

STUDENT, CARD = "student", "README.md"
FILES = {"onnx": "model.onnx", "jax": "model.jaxexport", "litert": "model.tflite"}
"""Target -> file; the orbax directory `student/` is always written, as the others' reference."""

LARGEST_PAIR = 2**15 - 1
"""x86 CPUs without VNNI add two products of a uint8 and an int8 in int16, and saturate here."""


def export_student(run: str | Path, out: str | Path, *, targets: Sequence[str] = ("onnx", "jax"),
                   weight_storage: str = "uint4", batch: int | None = None,
                   input_kind: str = "float", overwrite: bool = False) -> dict[str, Any]:  # fmt: skip
    """Writes a finished run's student in every target's form; returns the report.

    Args:
      run: a finished run directory, or an earlier export.
      out: directory to make.
      targets: keys of `FILES`.
      weight_storage: of the ONNX file, `uint4` (two codes a byte) or `int8`.
      batch: images a call; None for any number.
      input_kind: of the ONNX and LiteRT files: `float`, normalised images; `uint8`, raw pixels.
      overwrite: replace an earlier export at `out`.

    Raises:
      FileNotFoundError: no finished student in `run`.
      FileExistsError: `out` holds files, and is not to be replaced.
      ValueError: an unknown target or setting, or a student that is not integer.
      ImportError: a target's package is missing; names the extra.
    """
    run, out = Path(run), Path(out)
    unknown = [target for target in targets if target not in FILES]
    if unknown:
        raise ValueError(f"targets: found {unknown}, expected some of {sorted(FILES)}")
    student, codes, preprocessing = load_student(run / STUDENT)
    require_integer(student)
    check_out(out, overwrite)
    accuracy = json.loads((run / REPORT).read_text(encoding="utf-8"))
    accuracy = accuracy.get("run", accuracy)  # an export's report holds its run's
    options = {"weight_storage": weight_storage, "batch": batch, "input_kind": input_kind}
    report = {
        "format": "lrq_jax export",
        "version": __version__,
        "options": options,
        "run": accuracy,
        "layers": layer_table(student, codes),
        "tensors": tensor_table(student, codes),
        "portable_without_vnni": is_portable(student, codes),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.resolve().parent))
    try:
        made = workspace / "new"
        shutil.copytree(run / STUDENT, made / STUDENT)
        for target in targets:
            say(f"{FILES[target]} ...")
            content = target_bytes(target, student, codes, preprocessing, options)
            (made / FILES[target]).write_bytes(content)
        report["files"] = {
            str(path.relative_to(made)): path.stat().st_size
            for path in sorted(made.iterdir())
            if path.is_file()
        }
        report["files"][f"{STUDENT}/"] = sum(
            path.stat().st_size for path in (made / STUDENT).rglob("*") if path.is_file()
        )
        text = json.dumps(report, indent=1) + "\n"
        (made / REPORT).write_text(text, encoding="utf-8")
        (made / CARD).write_text(model_card(report, preprocessing), encoding="utf-8")
        if out.exists():
            os.replace(out, workspace / "old")
        os.replace(made, out)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return report


def check_out(out: Path, overwrite: bool) -> None:
    """Refuses to write over anything that is not an earlier export, or over one unasked.

    Raises:
      FileExistsError: it would be lost.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / STUDENT).is_dir() or not (out / REPORT).is_file():
        raise FileExistsError(
            f"--out {out}: found other files, expected an empty or new directory; choose another"
        )
    if not overwrite:
        raise FileExistsError(f"--out {out}: found an earlier export; --overwrite replaces it")


def target_bytes(target: str, student: Student, codes: dict[str, Any],
                 preprocessing: Preprocessing, options: dict[str, Any]) -> bytes:  # fmt: skip
    """The file of one target."""
    if target == "jax":
        return jax_export(student, codes, batch=options["batch"])
    if target == "litert":
        return tflite_model(
            student,
            codes,
            metadata=_metadata(student, preprocessing, options),
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
        metadata=_metadata(student, preprocessing, options),
        weight_storage=options["weight_storage"],
        input_kind=options["input_kind"],
        table=lambda pixels: normalise(pixels, preprocessing),
        batch=options["batch"],
    )


def _metadata(student: Student, preprocessing: Preprocessing, options: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    """What a file says of itself, so that it can be evaluated alone."""
    return {
        "version": __version__,
        "options": options,
        "preprocessing": vars(preprocessing),
        "num_classes": student.graph.num_classes,
    }


def layer_table(student: Student, codes: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per layer with weights: bits, numbers of weights and codes, largest product pair."""
    rows = []
    for operation in student.operations:
        if operation.weight_bits is None:
            continue
        stored = codes["weights"][operation.layer.name]
        centred = stored["codes"].astype(np.int32) - stored["zero_point"]
        input_bits = student.code_bits[student.origins[operation.inputs[0]]]
        rows.append(
            {
                "layer": operation.layer.name,
                "kind": type(operation.layer).__name__,
                "shape": list(stored["codes"].shape),
                "weight_bits": operation.weight_bits,
                "input_bits": input_bits,
                "codes_used": int(np.unique(stored["codes"]).size),
                "smallest_weight": int(centred.min()),
                "largest_weight": int(centred.max()),
                "largest_pair": int(2 * top_code(input_bits) * np.abs(centred).max()),
            }
        )
    return rows


def tensor_table(student: Student, codes: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per tensor with codes of its own: bits, scale and zero point."""
    return [
        {
            "tensor": name,
            "bits": bits,
            "scale": float(codes["tensors"][name]["scale"]),
            "zero_point": int(codes["tensors"][name]["zero_point"]),
        }
        for name, bits in student.code_bits.items()
    ]


def is_portable(student: Student, codes: dict[str, Any]) -> bool:
    """Whether x86 CPUs without VNNI give the same integers too: no pair of products saturates."""
    return all(row["largest_pair"] <= LARGEST_PAIR for row in layer_table(student, codes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lrq_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", default="runs/latest", help="finished run directory")
    parser.add_argument("--out", required=True, help="directory to make")
    parser.add_argument(
        "--targets", default="onnx,jax", help=f"some of {','.join(FILES)}, comma-separated"
    )
    parser.add_argument("--weight-storage", choices=WEIGHT_STORAGES, default="uint4")
    parser.add_argument("--batch", default="dynamic", help="images a call: a number, or dynamic")
    parser.add_argument(
        "--input",
        choices=INPUTS,
        default="float",
        help="of model.onnx and model.tflite: normalised or raw images",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"--batch: found {text!r}, expected a number from 1 up, or dynamic")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after a message on standard error."""
    options = _parser().parse_args(arguments)
    try:
        report = export_student(
            options.run,
            options.out,
            targets=[target for target in options.targets.split(",") if target],
            weight_storage=options.weight_storage,
            batch=_batch(options.batch),
            input_kind=options.input,
            overwrite=options.overwrite,
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"lrq_jax.export: {error}", file=sys.stderr)
        return 2
    for name, size in report["files"].items():
        say(f"{size:>12,} bytes  {name}")
    portable = "yes" if report["portable_without_vnni"] else "no"
    say(f"portable to x86 CPUs without VNNI: {portable}")
    say(f"written to {options.out}; prove it: python -m lrq_jax.verify {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
