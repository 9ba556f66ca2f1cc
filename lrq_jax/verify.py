"""Prove that an export's files compute the same integers.

    python -m lrq_jax.verify DIR [--data IMAGES] [--runtime onnxruntime,litert,openvino]

The codes in DIR/student, executed by JAX, are the reference. Exact runtimes must give identical
logits on every image; the constants in an ONNX file must be the reference's to the last bit. Exits 1
on any difference and names the first tensor that differs. Without --data the images are synthetic:
all darkest, all brightest, flat, smooth, checkered and random pixels, and random codes that no
pixels make.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lrq_jax.console import say
from lrq_jax.data import EvalData, Preprocessing, load_data
from lrq_jax.data.pixels import crop, normalise
from lrq_jax.export import FILES, STUDENT, onnx_proto
from lrq_jax.graph import INPUT
from lrq_jax.passes import Student
from lrq_jax.run_directory import REPORT
from lrq_jax.runtimes import Reference, Runner
from lrq_jax.runtimes.jax_exported import JaxExportRunner
from lrq_jax.runtimes.litert import LiteRTRunner
from lrq_jax.runtimes.onnx_runtime import OnnxRunner
from lrq_jax.runtimes.openvino import OpenVinoRunner
from lrq_jax.writers.codes import load_student
from lrq_jax.writers.extras import require
from lrq_jax.writers.onnx_difference import first_difference

RUNTIMES: dict[str, tuple[str, Callable[..., Runner]]] = {
    OnnxRunner.name: (FILES["onnx"], OnnxRunner),
    JaxExportRunner.name: (FILES["jax"], JaxExportRunner),
    LiteRTRunner.name: (FILES["litert"], LiteRTRunner),
    OpenVinoRunner.name: (FILES["onnx"], OpenVinoRunner),
}
"""Runtime -> (file it runs, runner)."""

SYNTHETIC_IMAGES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found out about one runtime.

    Attributes:
      runtime: name and version.
      exact: whether it had to be identical.
      images: how many it was tried on.
      different: images whose logits differ in any bit.
      flips: images classed otherwise.
      largest: largest difference of a logit.
      fault: what is wrong and where; empty if nothing.
    """

    runtime: str
    exact: bool
    images: int = 0
    different: int = 0
    flips: int = 0
    largest: float = 0.0
    fault: str = ""

    @property
    def passed(self) -> bool:
        """False only where a runtime that must be identical is not, or cannot be run."""
        return not self.fault and not (self.exact and self.different)

    def __str__(self) -> str:
        if not self.images:
            return f"FAILED  {self.runtime}: {self.fault}" if self.fault else f"ok      {self.runtime}: every bit the same"  # fmt: skip
        outcome = "ok    " if self.passed else "FAILED"
        kind = "identical" if self.exact else "close"
        text = (
            f"{outcome}  {self.runtime}: {self.images - self.different} of {self.images} images "
            f"identical, {self.flips} classed otherwise, largest difference {self.largest:.3g} "
            f"(must be {kind})"
        )
        return f"{text}\n        {self.fault}" if self.fault else text


def verify(directory: str | Path, *, data: EvalData | None = None, images: int | None = None,
           runtimes: tuple[str, ...] | None = None) -> list[Verdict]:  # fmt: skip
    """One verdict per runtime, and one on the constants of the ONNX file.

    Args:
      directory: an export.
      data: images to try instead of synthetic ones.
      images: how many of them; None for all.
      runtimes: keys of `RUNTIMES`; None takes the exact ones whose files are there.

    Raises:
      FileNotFoundError: no export there, or no file for a runtime asked for.
      ValueError: an unknown runtime, or a student that cannot be read.
    """
    directory = Path(directory)
    student, codes, preprocessing = load_student(directory / STUDENT)
    reference = Reference(student, codes)
    if runtimes is None:
        runtimes = tuple(
            name
            for name, (file, runner) in RUNTIMES.items()
            if runner.exact and (directory / file).exists()
        )
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown or not runtimes:
        raise ValueError(f"runtime: found {unknown or 'none'}, expected some of {list(RUNTIMES)}")
    if data is None:
        pixels = synthetic_pixels(student.graph.input_shape, SYNTHETIC_IMAGES)
    else:
        count = data.num_examples if images is None else min(images, data.num_examples)
        chosen = np.linspace(0, data.num_examples - 1, count).astype(int)
        pixels = np.stack([crop(data.source[int(i)][0], preprocessing) for i in chosen])
    verdicts = []
    if any(RUNTIMES[name][0] == FILES["onnx"] for name in runtimes):
        path = directory / FILES["onnx"]
        verdicts.append(_constants(path, student, codes, preprocessing, directory))
    for name in runtimes:
        file, runner = RUNTIMES[name]
        if not (directory / file).exists():
            raise FileNotFoundError(
                f"runtime {name}: found no {file} in {str(directory)!r}, expected one; export it "
                "with --targets"
            )
        try:
            loaded = runner(directory / file)
        except ValueError as error:
            verdicts.append(Verdict(runtime=name, exact=runner.exact, fault=str(error)))
            continue
        fed, normalised = _inputs(loaded, student, codes, preprocessing, pixels, data is None)
        verdicts.append(_compare(loaded, reference, fed, normalised))
    return verdicts


def synthetic_pixels(shape: tuple[int, int, int], count: int) -> np.ndarray:
    """uint8 `[count, H, W, C]`: extremes first, then flat, smooth, checkered and random images."""
    rng = np.random.default_rng(0)
    height, width, channels = shape
    made = [np.zeros(shape), np.full(shape, 255.0)]
    made += [
        np.where(np.arange(channels) == c, 255.0, 0.0) * np.ones(shape) for c in range(channels)
    ]
    rows, columns = np.mgrid[:height, :width]
    made += [np.repeat(255.0 * ((rows + columns) % 2)[..., None], channels, axis=2)]
    y, x = rows[..., None] / height, columns[..., None] / width
    while len(made) < count:
        kind = len(made) % 3
        if kind == 0:
            made.append(rng.integers(0, 256, shape))
        elif kind == 1:
            made.append(np.ones(shape) * rng.integers(0, 256, channels))
        else:
            phase, turns = rng.uniform(0, 2 * np.pi, channels), rng.uniform(-4, 4, (2, channels))
            wave = np.sin(2 * np.pi * (turns[0] * y + turns[1] * x) + phase)
            made.append(127.5 + rng.uniform(20, 127.5) * wave)
    return np.rint(made[:count]).clip(0, 255).astype(np.uint8)


def _inputs(runner: Runner, student: Student, codes: dict[str, Any],
            preprocessing: Preprocessing, pixels: np.ndarray, synthetic: bool) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """What to feed the runner, and the same images normalised."""
    normalised = normalise(pixels, preprocessing)
    if runner.input_kind == "uint8":
        return pixels, normalised
    if synthetic:  # codes that no pixels make: beyond a channel's own range
        stored = codes["tensors"][INPUT]
        made = np.random.default_rng(1).integers(
            0, 2**student.spec.boundary_bits, (64, *student.graph.input_shape)
        )
        made[0], made[1] = 0, 2**student.spec.boundary_bits - 1
        real = (made - int(stored["zero_point"])).astype(np.float32) * stored["scale"]
        normalised = np.concatenate([normalised, real])
    return normalised, normalised


def _constants(path: Path, student: Student, codes: dict[str, Any],
               preprocessing: Preprocessing, directory: Path) -> Verdict:  # fmt: skip
    """Whether the ONNX file holds exactly the reference's numbers."""
    onnx = require("onnx", extra="onnx")
    what = f"{path.name} against the stored codes"
    options = json.loads((directory / REPORT).read_text(encoding="utf-8"))["options"]
    try:
        found = onnx.load(path)
    except Exception as error:  # protobuf's own error classes
        return Verdict(runtime=what, exact=True, fault=f"not a readable ONNX file: {error}")
    fault = first_difference(found, onnx_proto(student, codes, preprocessing, options))
    return Verdict(runtime=what, exact=True, fault=fault or "")


def _compare(runner: Runner, reference: Reference, fed: np.ndarray, images: np.ndarray) -> Verdict:
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


def in_batches(forward: Callable[[np.ndarray], np.ndarray], images: np.ndarray, size: int = 64) -> np.ndarray:  # fmt: skip
    """`forward` on batches of one size (the last one padded), its results put together again."""
    rest = -len(images) % size
    padded = np.concatenate([images, np.repeat(images[-1:], rest, axis=0)])
    pieces = [forward(padded[i : i + size]) for i in range(0, len(padded), size)]
    return np.concatenate(pieces)[: len(images)]


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
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0, 1 on any difference, 2 after a message on standard error."""
    options = _parser().parse_args(arguments)
    runtimes = tuple(options.runtime.split(",")) if options.runtime else None
    try:
        data = None
        if options.data or options.data_name:
            data = load_data(path=options.data, name=options.data_name)
        verdicts = verify(options.directory, data=data, images=options.images, runtimes=runtimes)
    except (ValueError, OSError, ImportError) as error:
        print(f"lrq_jax.verify: {error}", file=sys.stderr)
        return 2
    for verdict in verdicts:
        say(str(verdict))
    return 0 if all(verdict.passed for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
