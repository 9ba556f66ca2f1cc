"""Prove that an export's files compute the same integers.

    python -m lrq_jax.verify DIR [--data IMAGES] [--runtime onnxruntime,litert,openvino,jax]

The codes in DIR/student, executed by JAX, are the reference. Exact runtimes (ONNX Runtime, LiteRT,
model.jaxexport) must give identical logits on every image, and the constants in each file must be the
reference's to the last bit; DIR/report.json must say what both are. Exits 1 on any difference and names
the first tensor that differs, 2 if a runtime's package is missing and nothing else is wrong. OpenVINO
drops quantizers before additions: its flips are counted, and fail beyond --tolerance. Without --data
the images are synthetic: all darkest, all brightest, flat, smooth, checkered and random pixels; codes
that no pixels make, all 0, all the highest and random; of files that take pixels, every value.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lrq_jax.console import say
from lrq_jax.data import EvalData, Preprocessing, load_data
from lrq_jax.data.pixels import crop
from lrq_jax.endings import fail, run_command
from lrq_jax.exported import (
    claims,
    contents,
    hashes,
    read_export,
    record,
    run_sha256,
    sha256,
    sizes,
)
from lrq_jax.passes import Student
from lrq_jax.report_file import REPORT
from lrq_jax.runtimes import Reference, Runner
from lrq_jax.runtimes.jax_exported import JaxExportRunner
from lrq_jax.runtimes.litert import LiteRTRunner
from lrq_jax.runtimes.onnx_runtime import WIDE_PAIRS, OnnxRunner
from lrq_jax.runtimes.openvino import OpenVinoRunner
from lrq_jax.runtimes.processor import machine, saturates_pairs
from lrq_jax.runtimes.trials import fed_to, in_batches, synthetic_pixels
from lrq_jax.writers import (
    jax_difference,
    onnx_difference,
    tflite_difference,
    value_difference,
)
from lrq_jax.writers.codes import load_student
from lrq_jax.writers.extras import require
from lrq_jax.writers.tables import is_portable
from lrq_jax.writers.targets import FILES, STUDENT, onnx_proto, target_bytes

RUNTIMES: dict[str, tuple[str, Any]] = {
    OnnxRunner.name: (FILES["onnx"], OnnxRunner),
    "jax": (FILES["jax"], JaxExportRunner),
    LiteRTRunner.name: (FILES["litert"], LiteRTRunner),
    OpenVinoRunner.name: (FILES["onnx"], OpenVinoRunner),
}
"""Runtime -> (file it runs, runner)."""

_AGAINST = "against the stored codes"
SYNTHETIC_IMAGES = 256
TOLERANCE = 0.3
"""A runtime that is not exact may class this share of the images otherwise: what it drops turns codes
near a rounding boundary, and at 4 bits that spreads (OpenVINO: docs/integers.md)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found out about one runtime, or file.

    Attributes:
      runtime: name and version; or the file, and what it was compared with.
      exact: whether it had to be identical.
      images: how many it was tried on.
      different: images whose logits differ in any bit.
      flips: images classed otherwise.
      tolerance: share of the images that may be, where it need not be identical.
      largest: largest difference of a logit.
      fault: what is wrong and where; empty if nothing.
      untried: why it was not tried, such as a package that is missing; empty if it was.
      compared: of a file that passed, what was found the same.
    """

    runtime: str
    exact: bool
    images: int = 0
    different: int = 0
    flips: int = 0
    tolerance: float = 0.0
    largest: float = 0.0
    fault: str = ""
    untried: str = ""
    compared: str = ""

    @property
    def passed(self) -> bool:
        """False where a runtime that must be identical is not, another is too far from it, or
        one cannot be run or was not tried."""
        allowed = 0 if self.exact else self.tolerance * self.images
        wrong = self.fault or self.untried or (self.exact and self.different)
        return not wrong and self.flips <= allowed

    @property
    def failed(self) -> bool:
        """Whether it was tried and did not pass."""
        return not self.passed and not self.untried

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, with whether it passed."""
        return {**dataclasses.asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        if self.untried:
            return f"-       {self.runtime}: not tried: {self.untried}"
        outcome = "FAILED" if self.failed else "ok    "
        if not self.images:
            return f"{outcome}  {self.runtime}: {self.fault or self.compared}"
        kind = (
            "must be identical"
            if self.exact
            else f"is not exact; {self.tolerance:.0%} of them may be classed otherwise"
        )
        text = (
            f"{outcome}  {self.runtime}: {self.images - self.different} of {self.images} images "
            f"identical, {self.flips} classed otherwise, largest difference {self.largest:.3g} "
            f"({kind})"
        )
        return f"{text}\n        {self.fault}" if self.fault else text


def verify(directory: str | Path, *, data: EvalData | None = None, images: int | None = None,
           runtimes: tuple[str, ...] | None = None, wide_pairs: bool = False,
           tolerance: float = TOLERANCE) -> list[Verdict]:  # fmt: skip
    """One verdict per file on its constants, one per runtime, and one on the report.

    Args:
      directory: an export.
      data: images to try instead of synthetic ones.
      images: how many of them; None for all.
      runtimes: keys of `RUNTIMES`; None takes the exact ones whose files are there, and leaves
        those untried whose packages are missing.
      wide_pairs: ONNX Runtime's option for 8-bit files on x86 processors without VNNI.
      tolerance: share of the images that a runtime which is not exact may class otherwise.

    Raises:
      FileNotFoundError: no export there, or no file for a runtime asked for.
      ValueError: an unknown runtime, no images, a tolerance that is no share, or a student or report that
        cannot be read.
      ImportError: the package of a runtime asked for is missing; names the extra.
    """
    directory = Path(directory)
    student, codes, preprocessing = load_student(directory / STUDENT)
    asked = runtimes is not None
    if runtimes is None:
        runtimes = tuple(
            name
            for name, (file, runner) in RUNTIMES.items()
            if runner.exact and (directory / file).exists()
        )
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown or (asked and not runtimes):
        raise ValueError(f"runtime: found {unknown or 'none'}, expected some of {list(RUNTIMES)}")
    if images is not None and images < 1:
        raise ValueError(f"images: found {images}, expected a number from 1 up, or none for all")
    if not 0 <= tolerance <= 1:
        raise ValueError(f"tolerance: found {tolerance}, expected a share from 0 to 1")
    report = read_export(directory)
    if data is None:
        pixels = synthetic_pixels(student.graph.input_shape, SYNTHETIC_IMAGES)
    else:
        count = data.num_examples if images is None else min(images, data.num_examples)
        chosen = np.linspace(0, data.num_examples - 1, count).astype(int)
        pixels = np.stack([crop(data.source[int(i)][0], preprocessing) for i in chosen])
    for name in runtimes:
        if not (directory / RUNTIMES[name][0]).exists():
            raise FileNotFoundError(
                f"runtime {name}: found no {RUNTIMES[name][0]} in {str(directory)!r}, expected one; "
                "export it with --targets"
            )
    reference = Reference(student, codes)

    def constants(file: str) -> Verdict:
        return _constants(file, directory, report, student, codes, preprocessing)

    def tried(name: str) -> Verdict:
        file, runner = RUNTIMES[name]
        options = {"wide_pairs": True} if wide_pairs and runner is OnnxRunner else {}
        try:
            loaded = runner(directory / file, **options)
        except ValueError as error:
            return Verdict(runtime=runner.name, exact=runner.exact, fault=str(error))
        hostile = data is None
        fed, shown = fed_to(loaded, student, codes, preprocessing, pixels, hostile=hostile)
        verdict = _compare(loaded, reference, fed, shown, tolerance)
        if name == OnnxRunner.name and not wide_pairs and not verdict.passed and verdict.images:
            verdict = _with_cause(verdict, directory / file, reference, codes, fed, shown)
        return verdict

    files = dict.fromkeys(RUNTIMES[name][0] for name in runtimes)
    attempts = [(f"{file} {_AGAINST}", True, partial(constants, file)) for file in files]
    for name in runtimes:
        _, runner = RUNTIMES[name]
        attempts.append((runner.name, runner.exact, partial(tried, name)))
    verdicts = []
    for what, exact, attempt in attempts:
        try:
            verdicts.append(attempt())
        except ImportError as error:
            if asked:
                raise
            verdicts.append(Verdict(runtime=what, exact=exact, untried=str(error)))
    return [*verdicts, _said(directory, report, student, codes)]


def _with_cause(verdict: Verdict, file: Path, reference: Reference, codes: dict[str, Any],
                fed: np.ndarray, images: np.ndarray) -> Verdict:  # fmt: skip
    """Names saturating pairs of products, if they may be why logits differ, and tries the way out."""
    if is_portable(reference.student, codes) or not saturates_pairs():
        return verdict
    wide = _compare(OnnxRunner(file, wide_pairs=True), reference, fed, images, 0.0)
    outcome = (
        "All images are identical so: nothing else is wrong"
        if wide.passed
        else f"{wide.different} images differ even so: something else is wrong too"
    )
    here = machine()
    cause = (
        f"{verdict.fault}\n        Weights of 8 bits with inputs of 8 bits saturate in ONNX "
        f"Runtime on x86 processors without VNNI, such as this one ({here['processor']}, "
        f"{' '.join(here['features'])}). Ways out: the session option "
        f"{WIDE_PAIRS[0]}={WIDE_PAIRS[1]} (OnnxRunner(wide_pairs=True), verify --wide-pairs), or "
        f"weights of 7 bits (--config.student.weight_bits=7). {outcome}"
    )
    return dataclasses.replace(verdict, fault=cause)


def _constants(file: str, directory: Path, report: dict[str, Any], student: Student,
               codes: dict[str, Any], preprocessing: Preprocessing) -> Verdict:  # fmt: skip
    """Whether a file holds exactly the reference's numbers: it is written once more and compared."""
    options, found = report["options"], (directory / file).read_bytes()
    what, compared = f"{file} {_AGAINST}", "every bit the same"
    fault: str | None
    if file == FILES["jax"]:
        if report.get("jax") != jax.__version__:
            fault, compared = _as_written(file, directory, report)
        else:
            expected = target_bytes("jax", student, codes, preprocessing, options)
            fault = jax_difference.first_difference(found, expected, codes)
    elif file == FILES["litert"]:
        expected = target_bytes("litert", student, codes, preprocessing, options, report["version"])
        fault = tflite_difference.first_difference(found, expected)
    else:
        try:
            model = require("onnx", extra="onnx").load_from_string(found)
        except ImportError:
            raise
        except Exception as error:  # protobuf's own error classes
            return Verdict(runtime=what, exact=True, fault=f"not a readable ONNX file: {error}")
        expected = onnx_proto(student, codes, preprocessing, options)
        fault = onnx_difference.first_difference(model, expected)
    return Verdict(runtime=what, exact=True, fault=fault or "", compared=compared)


def _as_written(file: str, directory: Path, report: dict[str, Any]) -> tuple[str, str]:
    """Fault and what was compared of a file that this version of jax would write otherwise."""
    why = f"since jax {report.get('jax')} wrote it and this is jax {jax.__version__}"
    if not (recorded := _hashes(report).get(file)):
        return "", f"not compared, {why} and the export recorded no sha256"
    fault = ""
    if (found := sha256(directory / file)) != recorded:
        fault = f"found sha256 {found}, expected {recorded}, as written at export"
    return fault, f"as written at export (sha256); constants not compared, {why}"


def _said(directory: Path, report: dict[str, Any], student: Student, codes: dict[str, Any]) -> Verdict:  # fmt: skip
    """Whether the report says what the student and the files are."""
    expected = {**contents(student, codes), "files": sizes(directory)}
    compared = "as written at export"
    if _hashes(report):
        expected["sha256"] = hashes(directory, codes)
    else:
        compared = "the same; sha256 not compared, since an earlier version recorded none"
    found = {name: report[name] for name in expected}
    told = claims(directory, student)
    expected["run"] = {name: value for name, value in told.items() if name in report["run"]}
    found["run"] = {name: report["run"][name] for name in expected["run"]}
    if "run_sha256" in report:
        found["run_sha256"] = report["run_sha256"]
        expected["run_sha256"] = run_sha256(report["run"])
    else:
        compared += "; the run's figures not compared, since an earlier version recorded no sha256"
    fault = value_difference.first_difference(found, json.loads(json.dumps(expected)))
    what = f"{REPORT} against {STUDENT}/ and the files"
    return Verdict(runtime=what, exact=True, fault=fault or "", compared=compared)


def _hashes(report: dict[str, Any]) -> dict[str, str]:
    """By file; {} of exports that an earlier version made."""
    return report.get("sha256") or {}


def _compare(runner: Runner, reference: Reference, fed: np.ndarray, images: np.ndarray,
             tolerance: float) -> Verdict:  # fmt: skip
    what = f"{runner.name} {runner.version}"
    expected = in_batches(reference.logits, images)
    try:
        found = in_batches(runner.logits, fed)
    except Exception as error:  # runtimes raise classes of their own
        return Verdict(runtime=what, exact=runner.exact, fault=f"cannot run: {error}")
    if found.shape != expected.shape:
        fault = f"found logits of shape {found.shape}, expected {expected.shape}"
        return Verdict(runtime=what, exact=runner.exact, fault=fault)
    rows = (found != expected).any(-1)
    fault = ""
    if runner.exact and rows.any():
        worst = np.flatnonzero(rows)[:8]
        fault = first_tensor(runner, reference, fed[worst], images[worst])
    return Verdict(
        runtime=what,
        exact=runner.exact,
        images=len(images),
        different=int(rows.sum()),
        flips=int((found.argmax(-1) != expected.argmax(-1)).sum()),
        tolerance=0.0 if runner.exact else tolerance,
        largest=float(np.abs(found - expected).max()),
        fault=fault,
    )


def first_tensor(runner: Runner, reference: Reference, fed: np.ndarray, images: np.ndarray) -> str:
    """A sentence on the first tensor whose codes differ."""
    tensors = list(reference.student.origins)
    tensors.remove(reference.student.graph.output)
    theirs = runner.codes(fed, tensors)
    if not theirs:
        return "its tensors cannot be looked at: only the logits are known to differ"
    ours = reference.codes(images, tuple(theirs))
    for name, found in theirs.items():
        expected = ours[name].reshape(found.shape)
        wrong = found != expected
        if wrong.any():
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            return (
                f"first tensor that differs: {name!r}, {wrong.sum()} of {wrong.size} codes; at "
                f"{place} found {found[place]}, expected {expected[place]}"
            )
    return f"all codes agree: only the logits of {reference.student.graph.output!r} differ"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lrq_jax.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", help="of lrq_jax.export")
    parser.add_argument("--data", default="", help="folder of images to try; default: synthetic")
    parser.add_argument("--data-name", default="", help="or a dataset by name, such as digits")
    parser.add_argument("--images", type=int, help="how many of them, evenly spread; default: all")
    parser.add_argument("--runtime", help=f"some of {','.join(RUNTIMES)}; default: the exact ones")
    parser.add_argument(
        "--wide-pairs",
        action="store_true",
        help="ONNX Runtime's option for 8-bit files on x86 processors without VNNI",
    )
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE,
        help=f"share of images OpenVINO may class otherwise; default {TOLERANCE}",
    )  # fmt: skip
    parser.add_argument(
        "--record", action="store_true", help="put the outcome into DIR's report and model card"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0, 1 on any difference, 2 if a runtime was not tried and nothing
    failed, or after a message on standard error."""
    options = _parser().parse_args(arguments)
    runtimes = tuple(options.runtime.split(",")) if options.runtime else None
    try:
        data = None
        if options.data or options.data_name:
            data = load_data(path=options.data, name=options.data_name)
        verdicts = verify(
            options.directory,
            data=data,
            images=options.images,
            runtimes=runtimes,
            wide_pairs=options.wide_pairs,
            tolerance=options.tolerance,
        )
        if options.record:
            record(options.directory, agreement=[verdict.as_dict() for verdict in verdicts])
    except (ValueError, OSError, ImportError) as error:
        return fail("lrq_jax.verify", error)
    for verdict in verdicts:
        say(str(verdict))
    if any(verdict.failed for verdict in verdicts):
        return 1
    return 2 if any(verdict.untried for verdict in verdicts) else 0


if __name__ == "__main__":
    run_command("lrq_jax.verify", main)
