"""Latency of an exported model beside its float twin, in one run.

    python -m lrq_jax.bench DIR [--batch 1,32] [--threads 1] [--runtime onnxruntime,litert,openvino]

The float twin is the same network in float32 with folded batch norms. Calls of both alternate, so
that whatever else the machine does slows both; medians and quartiles are shown, and the ratio of
each alternating pair. An export of a fixed batch is timed at that, others at 1 and 32 images a call.
The census counts the operators of the graph ONNX Runtime made of its file. Of ONNX Runtime and LiteRT,
taken where their files are, one whose package is missing is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lrq_jax.console import say
from lrq_jax.data.pixels import normalise
from lrq_jax.endings import fail, run_command
from lrq_jax.exported import record
from lrq_jax.passes import Student
from lrq_jax.paths import make_parents
from lrq_jax.runtimes import Runner
from lrq_jax.runtimes.litert import LiteRTRunner
from lrq_jax.runtimes.onnx_runtime import OnnxRunner
from lrq_jax.runtimes.openvino import OpenVinoRunner
from lrq_jax.runtimes.processor import machine
from lrq_jax.runtimes.trials import synthetic_pixels
from lrq_jax.writers.codes import load_student
from lrq_jax.writers.onnx_float import onnx_float_twin
from lrq_jax.writers.targets import FILES, STUDENT
from lrq_jax.writers.tflite_float import tflite_float_twin


def _onnx_twin(student: Student, codes: dict[str, Any], **fixed: int) -> bytes:
    return onnx_float_twin(student, codes, **fixed).SerializeToString()


RUNTIMES: dict[str, tuple[str, Callable[..., Runner], Callable[..., bytes], str]] = {
    OnnxRunner.name: (FILES["onnx"], OnnxRunner, _onnx_twin, "onnxruntime"),
    LiteRTRunner.name: (FILES["litert"], LiteRTRunner, tflite_float_twin, "ai-edge-litert"),
    OpenVinoRunner.name: (FILES["onnx"], OpenVinoRunner, _onnx_twin, "openvino"),
}
"""Runtime -> (file it runs, runner, writer of the float twin, package)."""

BATCHES = (1, 32)
"""Images a call, of exports that take any number."""

SECONDS, PAIRS = 4.0, (11, 301)
"""Each comparison runs about so long, within these numbers of alternating pairs."""

FLOAT_OPERATORS = ("Conv", "FusedConv", "Gemm", "MatMul")
INTEGER_OPERATORS = ("QLinearConv", "QGemm", "QLinearMatMul")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds a call: (first quartile, median, third quartile), and the ratio of pairs."""

    runtime: str
    batch: int
    threads: int
    pairs: int
    float32: tuple[float, float, float]
    integer: tuple[float, float, float]
    speedup: float


def compare(float32: Callable[[], Any], integer: Callable[[], Any]) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Seconds of alternating calls `[pairs]` of each."""
    for call in (float32, integer, float32, integer):
        call()
    start = time.perf_counter()
    float32(), integer()
    pairs = int(np.clip(SECONDS / (time.perf_counter() - start), *PAIRS))
    seconds = np.empty((2, pairs))
    for pair in range(pairs):
        for row, call in enumerate((float32, integer)):
            start = time.perf_counter()
            call()
            seconds[row, pair] = time.perf_counter() - start
    return seconds[0], seconds[1]


def bench(directory: str | Path, *, batches: tuple[int, ...] | None = None, threads: int = 1,
          runtimes: tuple[str, ...] | None = None) -> dict[str, Any]:  # fmt: skip
    """Timings, operator census, file sizes and the machine they were measured on.

    Args:
      directory: an export.
      batches: images a call; None takes the export's fixed batch, or `BATCHES`.
      threads: of each runtime.
      runtimes: keys of `RUNTIMES`; None takes ONNX Runtime and LiteRT where their files are there,
        and leaves out one whose package is missing.

    Returns:
      JSON-ready. Census and layers counted in it are None where ONNX Runtime is not timed; `untimed`
      says why a runtime was left out.

    Raises:
      FileNotFoundError: no export there, or no file for a runtime asked for.
      ValueError: an unknown runtime, no threads, a damaged file, or batches other than the export's fixed one.
      ImportError: the package of a runtime asked for is missing, or of all; names the extra.
    """
    directory = Path(directory)
    student, codes, preprocessing = load_student(directory / STUDENT)
    asked = runtimes is not None
    if runtimes is None:
        wanted = (OnnxRunner.name, LiteRTRunner.name)
        runtimes = tuple(name for name in wanted if (directory / RUNTIMES[name][0]).exists())
        if not runtimes:
            raise FileNotFoundError(
                f"found no {FILES['onnx']} and no {FILES['litert']} in {str(directory)!r}, "
                "expected one; export it with --targets onnx"
            )
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if threads < 1:
        raise ValueError(f"threads: found {threads}, expected a number from 1 up")
    if unknown or not runtimes:
        raise ValueError(f"runtime: found {unknown or 'none'}, expected some of {list(RUNTIMES)}")
    plan, untimed, sizes, versions = {}, {}, {}, {}
    for name in runtimes:
        path = directory / RUNTIMES[name][0]
        if not path.exists():
            raise FileNotFoundError(
                f"runtime {name}: found no {path.name} in {str(directory)!r}, expected one; export "
                "it with --targets"
            )
        _, runner, write_twin, package = RUNTIMES[name]
        try:
            loaded = runner(path, threads=threads)
            fixed = {"batch": loaded.fixed_batch} if loaded.fixed_batch else {}
            twin = write_twin(student, codes, **fixed)
        except ImportError as error:
            if asked:
                raise
            untimed[name] = str(error)
            continue
        plan[name] = path, twin, _batches(path, loaded.fixed_batch, batches)
        sizes[path.name] = {"integer": path.stat().st_size, "float32": len(twin)}
        versions[package] = loaded.version
    if not plan:
        raise ImportError("; ".join([*untimed.values(), "no runtime is left to time"]))
    timings = []
    for name, (path, twin, counts) in plan.items():
        for batch in counts:
            pixels = synthetic_pixels(student.graph.input_shape, batch)
            fed = pixels, normalise(pixels, preprocessing)
            seconds = _seconds(name, path, twin, fed, threads)
            timings.append(_timing(name, batch, threads, *seconds))
    census = None
    if OnnxRunner.name in plan:
        census = OnnxRunner(directory / FILES["onnx"], threads=threads).census()
    return {
        "network": student.graph.name,
        "weight_bits": student.spec.weight_bits,
        "act_bits": student.spec.act_bits,
        "timings": [dataclasses.asdict(timing) for timing in timings],
        "census": census,
        "integer_layers": _layers(census, INTEGER_OPERATORS),
        "float_layers": _layers(census, FLOAT_OPERATORS),
        "bytes": sizes,
        "machine": machine(),
        "versions": versions,
        "untimed": untimed,
    }


def _batches(path: Path, fixed: int | None, batches: tuple[int, ...] | None) -> tuple[int, ...]:
    """What to time a file at; padded calls would be timed as if all their images were asked for."""
    if fixed is None:
        return batches or BATCHES
    if batches not in (None, (fixed,)):
        raise ValueError(
            f"batches: found {list(batches)}, expected [{fixed}], as {path.name} was exported with "
            f"--batch {fixed}; leave them out, or export with --batch dynamic"
        )
    return (fixed,)


def _layers(census: dict[str, int] | None, kinds: tuple[str, ...]) -> int | None:
    return None if census is None else sum(census.get(kind, 0) for kind in kinds)


def _seconds(name: str, path: Path, twin: bytes, fed: tuple[np.ndarray, np.ndarray],
             threads: int) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Of alternating calls of the float twin and the integer file.

    Args:
      fed: pixels, and the same images normalised.
    """
    runner = RUNTIMES[name][1]
    options = {"batch": len(fed[0])} if runner is LiteRTRunner else {}
    with tempfile.TemporaryDirectory() as temporary:
        twin_path = Path(temporary) / f"float{path.suffix}"
        twin_path.write_bytes(twin)
        float32, integer = (runner(p, threads=threads, **options) for p in (twin_path, path))
        images = fed[0] if integer.input_kind == "uint8" else fed[1]
        return compare(lambda: float32.logits(fed[1]), lambda: integer.logits(images))


def _timing(name: str, batch: int, threads: int, float32: np.ndarray, integer: np.ndarray) -> Timing:  # fmt: skip
    def quartiles(seconds: np.ndarray) -> tuple[float, float, float]:
        low, median, high = (
            round(1000 * float(q), 4) for q in np.percentile(seconds, (25, 50, 75))
        )
        return low, median, high

    return Timing(
        runtime=name,
        batch=batch,
        threads=threads,
        pairs=len(float32),
        float32=quartiles(float32),
        integer=quartiles(integer),
        speedup=round(float(np.median(float32 / integer)), 3),
    )


def table(result: dict[str, Any]) -> str:
    """The result for a person."""
    lines = [
        f"{result['network']} W{result['weight_bits']}A{result['act_bits']} on "
        f"{result['machine']['processor']} ({' '.join(result['machine']['features'])})",
        f"{'runtime':<14}{'batch':>6}{'threads':>8}  {'float32 ms (quartiles)':<34}"
        f"{'integer ms (quartiles)':<34}{'speed-up':>8}",
    ]
    for row in result["timings"]:
        cells = [
            f"{median:.3f} ({low:.3f} - {high:.3f})"
            for low, median, high in (row["float32"], row["integer"])
        ]
        lines.append(
            f"{row['runtime']:<14}{row['batch']:>6}{row['threads']:>8}  {cells[0]:<34}"
            f"{cells[1]:<34}{row['speedup']:>7.2f}x"
        )
    if result["census"]:
        lines.append(
            f"convolutions and dense layers run as integers: {result['integer_layers']}, "
            f"as floats: {result['float_layers']}"
        )
    lines += [
        f"{name}: {sizes['integer']:,} bytes, float32 {sizes['float32']:,}"
        for name, sizes in result["bytes"].items()
    ]
    lines += [f"{name}: not timed: {why}" for name, why in result["untimed"].items()]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Bars of median latency, float beside integer, as a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no window, nothing global

    rows = result["timings"]
    figure = Figure(figsize=(2.6 * len(rows), 3), layout="tight")
    axes = figure.subplots(1, len(rows), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        medians = [row["float32"][1], row["integer"][1]]
        axis.bar(["float32", "integer"], medians, color=["#999999", "#2a7f62"])
        axis.set_title(f"{row['runtime']}, batch {row['batch']}\n{row['speedup']:.2f}x", fontsize=9)
        axis.set_ylabel("ms a call (median)")
    figure.savefig(path, dpi=120, format="png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lrq_jax.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", help="of lrq_jax.export")
    parser.add_argument(
        "--batch", help="images a call, comma-separated; default: the export's fixed batch, or 1,32"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--runtime", help=f"some of {','.join(RUNTIMES)}; default: the exact ones with a file"
    )
    parser.add_argument("--out", help="also write the result there as JSON")
    parser.add_argument("--plot", help="also draw it there as PNG")
    parser.add_argument(
        "--record", action="store_true", help="put it into DIR's report and model card"
    )
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--batch: found {text!r}, expected numbers such as 1,32")
    return tuple(int(part) for part in parts)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after a message on standard error."""
    options = _parser().parse_args(arguments)
    try:
        if options.plot and Path(options.plot).suffix.lower() != ".png":
            raise ValueError(f"--plot: found {options.plot!r}, expected a name ending in .png")
        for option, path in (("--out", options.out), ("--plot", options.plot)):
            if path:  # before the measurement, which takes minutes
                make_parents(path, option)
        result = bench(
            options.directory,
            batches=None if options.batch is None else _numbers(options.batch),
            threads=options.threads,
            runtimes=tuple(options.runtime.split(",")) if options.runtime else None,
        )
        say(table(result))
        if options.out:
            Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if options.record:
            record(options.directory, census=result["census"], latency=result)
        if options.plot:
            plot(result, options.plot)
    except (ValueError, OSError, ImportError) as error:
        return fail("lrq_jax.bench", error)
    return 0


if __name__ == "__main__":
    run_command("lrq_jax.bench", main)
