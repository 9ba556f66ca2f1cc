"""Export a finished student as files that integer runtimes execute.

    python -m lrq_jax.export --run runs/latest --out exported [--targets onnx,litert,jax,orbax]

Writes, beside a report and a model card:

    student/           orbax: integer codes and scales with their graph; always there, the reference
    model.onnx         onnx: quantize-dequantize form, opset 21
    model.jaxexport    jax: one serialized function for CPU, CUDA and TPU
    model.tflite       litert: int8, for LiteRT's XNNPACK kernels

Then proves that they compute the same integers (`lrq_jax.verify`) and times them beside their float
twins (`lrq_jax.bench`), and puts both into the report and the card; `--unmeasured` leaves that out.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import jax

from lrq_jax import __version__
from lrq_jax.bench import bench
from lrq_jax.bench import table as bench_table
from lrq_jax.console import say
from lrq_jax.endings import fail, run_command
from lrq_jax.exported import CARD, FORMAT, contents, hashes, record, run_sha256, sizes
from lrq_jax.paths import check_can_be_made
from lrq_jax.report_file import REPORT, read_object, read_report, write_json
from lrq_jax.verify import verify
from lrq_jax.writers.codes import load_student
from lrq_jax.writers.model_card import model_card
from lrq_jax.writers.onnx_model import INPUTS, WEIGHT_STORAGES, require_integer
from lrq_jax.writers.targets import FILES, STUDENT, TARGETS, target_bytes

_ABSOLUTE = re.compile(r"[/\\~]|[A-Za-z]:[/\\]")
"""How a path of one machine or one person begins."""


def export_student(run: str | Path, out: str | Path, *, targets: Sequence[str] = ("onnx", "jax"),
                   weight_storage: str = "uint4", batch: int | None = None,
                   input_kind: str = "float", overwrite: bool = False) -> dict[str, Any]:  # fmt: skip
    """Writes a finished run's student in every target's form; returns the report.

    Args:
      run: a finished run directory, or an earlier export.
      out: directory to make.
      targets: some of `TARGETS`.
      weight_storage: of the ONNX file, `uint4` (two codes a byte) or `int8`.
      batch: images a call; None for any number.
      input_kind: of the ONNX and LiteRT files: `float`, normalised images; `uint8`, raw pixels.
      overwrite: replace an earlier export at `out`; where that is a link, what it leads to.

    Raises:
      FileNotFoundError: no finished student in `run`.
      FileExistsError: `out` holds files, and is not to be replaced.
      ValueError: an unknown target, a setting it cannot have, a student that is not integer,
        damaged files, or an `out` in the run's directory.
      ImportError: a target's package is missing; names the extra.
    """
    run, out = Path(run), Path(out)
    targets = (targets,) if isinstance(targets, str) else targets
    if batch is not None and not (isinstance(batch, int) and batch >= 1):
        raise ValueError(f"batch: found {batch!r}, expected a number from 1 up, or None for any")
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        raise ValueError(f"targets: found {unknown}, expected some of {sorted(TARGETS)}")
    student, codes, preprocessing = load_student(run / STUDENT)
    require_integer(student)
    check_out(out, run, overwrite)
    about = read_report(run)
    options = {"weight_storage": weight_storage, "batch": batch, "input_kind": input_kind}
    report: dict[str, Any] = {
        "format": FORMAT,
        "version": __version__,
        "jax": jax.__version__,
        "options": options,
        "run": (ran := _without_places(about)),
        "run_sha256": run_sha256(ran),
        **contents(student, codes),
    }
    place = out.resolve()  # where a link leads
    place.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    made, old = workspace / "new", workspace / "old"
    try:
        shutil.copytree(run / STUDENT, made / STUDENT)
        for target in [target for target in targets if target in FILES]:
            say(f"{FILES[target]} ...")
            content = target_bytes(target, student, codes, preprocessing, options)
            (made / FILES[target]).write_bytes(content)
        report["files"] = sizes(made)
        report["sha256"] = hashes(made, codes)
        write_json(made / REPORT, report)
        (made / CARD).write_text(model_card(report, preprocessing), encoding="utf-8")
        if place.exists():
            os.replace(place, old)
        os.replace(made, place)
    finally:
        if old.exists() and not place.exists():
            os.replace(old, place)
        shutil.rmtree(workspace, ignore_errors=True)
    return report


def _without_places(value: Any, key: str = "") -> Any:
    """The report with no directories of this machine in it: of paths, the last name stays."""
    if isinstance(value, dict):
        return {name: _without_places(entry, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_places(entry, key) for entry in value]
    if not isinstance(value, str):
        return value
    if key == "command":
        return shlex.join(_without_place_of_flag(word) for word in shlex.split(value))
    if key.endswith(("path", "workdir")) or _ABSOLUTE.match(value):
        return PureWindowsPath(value).name  # which knows both kinds of separator
    return value


def _without_place_of_flag(word: str) -> str:
    """A word of a command, such as `--config.data.path=/home/me/images`."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{flag}{equals}{_without_places(value, flag)}"


def check_out(out: Path, run: Path, overwrite: bool) -> None:
    """Refuses to write over anything that is not an earlier export, or over one unasked.

    Raises:
      FileExistsError: it would be lost.
      NotADirectoryError: `out` lies below a file.
      ValueError: `out` lies in the run's directory.
    """
    if out.resolve().is_relative_to(run.resolve()):
        raise ValueError(
            f"--out {out}: found a place in --run {run}, expected one outside of it; choose another"
        )
    check_can_be_made(out, "--out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        kind = read_object(out / REPORT).get("format")
    except (ValueError, OSError):
        kind = None
    if kind != FORMAT:
        raise FileExistsError(
            f"--out {out}: found other files, expected an empty or new directory, or an earlier "
            "export; choose another"
        )
    ours = {STUDENT, REPORT, CARD, *FILES.values()}
    if others := sorted({entry.name for entry in out.iterdir()} - ours):
        raise FileExistsError(
            f"--out {out}: found an earlier export and beside it {', '.join(others[:5])}, expected "
            "nothing that export does not write; move them, or choose another"
        )
    if not overwrite:
        raise FileExistsError(f"--out {out}: found an earlier export; --overwrite replaces it")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lrq_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", default="runs/latest", help="finished run directory")
    parser.add_argument("--out", required=True, help="directory to make")
    parser.add_argument(
        "--targets", default="onnx,jax", help=f"some of {','.join(TARGETS)}, comma-separated"
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
    parser.add_argument(
        "--unmeasured", action="store_true", help="neither verify the files nor time them"
    )
    return parser


def measure(directory: str | Path) -> bool:
    """Verifies an export on synthetic images and times it; puts both into its report and card.

    What a package is missing for is neither tried nor timed, and said.

    Returns:
      Whether nothing failed.
    """
    directory = Path(directory)
    verdicts = verify(directory)
    for verdict in verdicts:
        say(str(verdict))
    record(directory, agreement=[verdict.as_dict() for verdict in verdicts])
    if any((directory / FILES[target]).exists() for target in ("onnx", "litert")):
        try:
            result = bench(directory)
            say(bench_table(result))
            record(directory, census=result["census"], latency=result)
        except (ImportError, ValueError) as error:
            say(f"not timed: {error}")
    return not any(verdict.failed for verdict in verdicts)


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"--batch: found {text!r}, expected a number from 1 up, or dynamic")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0, 1 if a file does not compute the student's integers, 2 after a
    message on standard error."""
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
        return fail("lrq_jax.export", error)
    for name, size in report["files"].items():
        say(f"{size:>12,} bytes  {name}")
    portable = "yes" if report["portable_without_vnni"] else "no"
    say(f"portable to x86 CPUs without VNNI: {portable}")
    passed = options.unmeasured or measure(options.out)
    say(f"written to {options.out}; on another machine: python -m lrq_jax.verify {options.out}")
    return 0 if passed else 1


if __name__ == "__main__":
    run_command("lrq_jax.export", main)
