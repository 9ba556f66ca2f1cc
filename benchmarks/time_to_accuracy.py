"""Seconds until a run's last step loses no more top-1 than asked, preset beside preset.

    python benchmarks/time_to_accuracy.py --teacher teachers/r20_cifar10 --data DIR_OF_TEST_IMAGES
    python benchmarks/time_to_accuracy.py --teacher ... --data ... --drop 1.0 --presets squant fast

The default drop is the 3.7 points that GDFQ (arXiv 2003.03603) loses on CIFAR-10's ResNet-20 at
W4A4. A run knows its length from its start (its rates fall on a schedule), so each preset is run from
nothing with twice as many training steps each time, until one is good enough: the time is that one's alone.
Of each run, in a new directory: `seconds`, from the command to its end, evaluation and export included, with no
compiled program on disk (of the very first, it takes up the images as well); `without_evaluation`, what its report counts
for all else it timed. A run that fails ends its preset, and is told.
Test images only measure; the number of steps is chosen by them, which is what the question asks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import child_processes
from provenance import REPOSITORY, provenance, report

from lrq_jax import presets

PUBLISHED_DROP = 3.7
CONFIGS = {name: f"configs/{name}.py" for name in ("best", "fast", "squant")}
"""Of presets that have one; the others run on the schedule of minutes of `OTHERS`."""
OTHERS = "configs/r20_cifar10.py"
EVALUATION = "evaluation and export"


def ladder(preset: str, first: int, most: int) -> list[int | None]:
    """Numbers of training steps to try, each twice the one before; None, once, where the preset
    has none."""
    if not presets.preset(preset, image_size=32).method.steps:
        return [None]
    return [first * 2**doublings for doublings in range(max(1, (most // first).bit_length()))]


def command_of(preset: str, steps: int | None, options: argparse.Namespace, workdir: str) -> list[str]:  # fmt: skip
    """The command that is timed."""
    return [
        sys.executable, "-m", "lrq_jax.main", f"--config={CONFIGS.get(preset, OTHERS)}",
        f"--workdir={workdir}", f"--config.method.preset={preset}",
        f"--config.teacher.path={options.teacher}",
        *([f"--config.data.path={options.data}", "--config.data.name="] if options.data else []),
        f"--config.seed={options.seed}",
        f"--config.student.weight_bits={options.bits}", f"--config.student.act_bits={options.bits}",
        *([] if steps is None else [f"--config.steps={steps}"]), *options.flags.split(),
    ]  # fmt: skip


def run(command: list[str], workdir: Path, cache: Path) -> dict[str, Any]:
    """Times one command and reads its report.

    Raises:
      RuntimeError: it failed, its last words are in the message; or it had no images to evaluate.
    """
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    with tempfile.TemporaryFile("w+") as said:
        clock = time.perf_counter()
        process = child_processes.start(
            command, env=environment, cwd=REPOSITORY, stdout=said, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait()
        finally:
            child_processes.end(process)
        seconds = time.perf_counter() - clock
        if code:
            said.seek(0)
            raise RuntimeError(f"found exit code {code}; the command said: {said.read()[-500:]}")
    found = json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    if found["drop"] is None:
        raise RuntimeError("nothing was evaluated, expected labelled images: give --data")
    phases = found["wall_seconds"]
    return {
        "steps": found["steps"],
        "seconds": round(seconds, 1),
        "without_evaluation": round(sum(phases.values()) - phases[EVALUATION], 1),
        "drop": found["drop"],
        "teacher": found["teacher"]["top1"],
        "images": found["images"],
    }


def measure(preset: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs one preset ever longer until its drop is at most the one asked for; all runs are told."""
    runs: list[dict[str, Any]] = []
    for steps in ladder(preset, options.first_steps, options.most_steps):
        with tempfile.TemporaryDirectory() as folder:
            workdir = Path(folder) / "run"
            command = command_of(preset, steps, options, str(workdir))
            try:
                runs.append(run(command, workdir, Path(folder) / "cache"))
            except RuntimeError as error:
                runs.append({"steps": steps, "error": str(error)})
        print(f"{preset}: {runs[-1]}", file=sys.stderr, flush=True)
        if "error" in runs[-1] or runs[-1]["drop"] <= options.drop:
            break
    reached = runs[-1] if runs[-1].get("drop", math.inf) <= options.drop else None
    return {
        "preset": preset, "bits": options.bits, "asked": options.drop, "seed": options.seed,
        "flags": options.flags, "reached": reached, "runs": runs,
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="a converted teacher, or `digits`")
    parser.add_argument("--data", help="folder of labelled test images; default: the digits")
    parser.add_argument(
        "--presets",
        nargs="+",
        choices=sorted(presets.PRESETS),
        default=("squant", "fast", "lrq", "gdfq"),
    )
    parser.add_argument("--drop", type=float, default=PUBLISHED_DROP, help="points of top-1")
    parser.add_argument("--bits", type=int, default=4, help="of weights and activations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first-steps", type=int, default=100, help="of training, to begin with")
    parser.add_argument("--most-steps", type=int, default=3200, help="give up beyond")
    parser.add_argument("--flags", default="", help="more of lrq_jax.main's, for every run")
    parser.add_argument("--out", type=Path, help="a line of JSON is appended for each preset")
    return parser


def main() -> None:
    """See the module docstring."""
    options = _parser().parse_args()
    child_processes.leave_on_sigterm()
    for name in ("teacher", "data"):
        place = getattr(options, name)
        if place and Path(place).exists():
            setattr(options, name, str(Path(place).resolve()))
    for preset in options.presets:
        about = provenance()
        report({**measure(preset, options), **about}, options.out)


if __name__ == "__main__":
    main()
