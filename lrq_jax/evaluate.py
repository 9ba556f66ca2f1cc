"""Accuracy of an exported model on any labelled images, without the run that made it.

    python -m lrq_jax.evaluate --model DIR --data IMAGES [--runtime jax,onnxruntime]

DIR is an export, a run's `student` directory, or a `model.onnx` of an export: the file carries its
own preprocessing. Every runtime sees the same images.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lrq_jax.console import say
from lrq_jax.data import EvalData, Preprocessing, batches, load_data
from lrq_jax.endings import fail, run_command
from lrq_jax.evaluation import Accuracy, Tally, check_data
from lrq_jax.runtimes import Reference, Runner
from lrq_jax.runtimes.jax_exported import JaxExportRunner
from lrq_jax.runtimes.litert import LiteRTRunner
from lrq_jax.runtimes.onnx_runtime import OnnxRunner
from lrq_jax.writers.codes import is_student, load_student
from lrq_jax.writers.extras import require
from lrq_jax.writers.onnx_writer import METADATA
from lrq_jax.writers.targets import FILES, STUDENT


def evaluate_model(model: str | Path, data: EvalData, *, runtimes: tuple[str, ...] | None = None,
                   batch_size: int = 64) -> dict[str, Accuracy]:  # fmt: skip
    """Accuracy by runtime on all images.

    Args:
      model: an export, a student directory, or an exported ONNX file.
      data: labelled images.
      runtimes: some of `jax`, `jaxexport`, `litert`, `onnxruntime`; None takes all the model has files for.
      batch_size: images a call.

    Raises:
      FileNotFoundError: nothing of that kind there.
      ValueError: an unknown runtime, or images or labels that are not for this network.
    """
    preprocessing, classes, found = _runners(Path(model))
    unknown = [name for name in runtimes or () if name not in found]
    if unknown:
        raise ValueError(f"runtime: found {unknown}, expected some of {list(found)} for {model}")
    check_data(data, preprocessing, classes)
    runners = {name: found[name]() for name in runtimes or found}
    tally = Tally(tuple(runners), data.name, classes)
    for batch in batches(data, preprocessing, batch_size=batch_size):
        pixels = np.rint(
            (
                batch.images * np.array(preprocessing.std, np.float32)
                + np.array(preprocessing.mean, np.float32)
            )
            * 255
        )
        raw = pixels.clip(0, 255).astype(np.uint8)
        logits = {
            name: runner.logits(raw if runner.input_kind == "uint8" else batch.images)
            for name, runner in runners.items()
        }
        tally.add(logits, batch)
    return tally.result()


def _runners(model: Path) -> tuple[Preprocessing, int, dict[str, Callable[[], Runner]]]:
    """Preprocessing, number of classes, and a maker of every runner the model has files for."""
    if model.is_file():
        return *_from_onnx(model), {OnnxRunner.name: lambda: OnnxRunner(model)}
    directory = model if is_student(model) else model / STUDENT
    student, codes, preprocessing = load_student(directory)
    makers: dict[str, Callable[[], Runner]] = {Reference.name: lambda: Reference(student, codes)}
    runners: dict[str, Any] = {"onnx": OnnxRunner, "jax": JaxExportRunner, "litert": LiteRTRunner}
    for target, runner in runners.items():
        if (path := model / FILES[target]).exists():
            makers[runner.name] = functools.partial(runner, path)
    return preprocessing, student.graph.num_classes, makers


def _from_onnx(path: Path) -> tuple[Preprocessing, int]:
    """What an exported ONNX file says of itself."""
    onnx = require("onnx", extra="onnx")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's own error classes
        raise ValueError(f"{path}: found no readable ONNX file ({error})") from error
    texts = {entry.key: entry.value for entry in model.metadata_props}
    if METADATA not in texts:
        raise ValueError(
            f"{path}: found no metadata {METADATA!r}, expected a model.onnx of lrq_jax.export"
        )
    described = json.loads(texts[METADATA])
    return Preprocessing(**described["preprocessing"]), described["num_classes"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lrq_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="export, student directory or model.onnx")
    parser.add_argument("--data", default="", help="folder of labelled images")
    parser.add_argument("--data-name", default="", help="or a dataset by name, such as digits")
    parser.add_argument("--runtime", help="comma-separated; default: all the model has files for")
    parser.add_argument("--batch", type=int, default=64, help="images a call")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after a message on standard error."""
    options = _parser().parse_args(arguments)
    runtimes = tuple(options.runtime.split(",")) if options.runtime else None
    try:
        if not (options.data or options.data_name):
            raise ValueError("found no images, expected --data FOLDER or --data-name NAME")
        data = load_data(path=options.data, name=options.data_name)
        result = evaluate_model(options.model, data, runtimes=runtimes, batch_size=options.batch)
    except (ValueError, OSError, ImportError) as error:
        return fail("lrq_jax.evaluate", error)
    first = next(iter(result))
    for name, accuracy in result.items():
        agreement = (
            "" if name == first else f", same class as {first} on {accuracy.agreement:.2f} %"
        )
        say(
            f"{name}: {accuracy.top1:.2f} % top-1, {accuracy.top5:.2f} % top-5 on "
            f"{accuracy.images} images of {data.name}{agreement}"
        )
    return 0


if __name__ == "__main__":
    run_command("lrq_jax.evaluate", main)
