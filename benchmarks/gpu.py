"""Everything that wants a GPU, one command after another, each with a time limit of its own.

    python benchmarks/gpu.py --dry-run                 # prints the commands
    python benchmarks/gpu.py --teacher teachers/r20_cifar10 --data DIR_OF_TEST_IMAGES
    python benchmarks/gpu.py --only joint --minutes 8

Start it again and it goes on: what has finished is marked in RUNS and left out, and training resumes
from its checkpoint. A command that fails or takes too long is ended with all it has started; the
next one begins. Lines of JSON go to OUT (of a schedule, in `schedule.jsonl`, its report and the
seconds of its phases), what commands say to RUNS. Needs torch beside jax.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import child_processes
from provenance import REPOSITORY, provenance, report

CASES = ("r20-200-gpu", "r18-16-gpu", "r18-64-gpu")
"""Of `joint_step.py`: ResNet-20, and ResNet-18 at 224 px with 16 and 64 images."""
PRECISIONS = ("float32", "tf32")
PATIENCE = 30.0
"""Seconds a command has to end once it is asked to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One command.

    Attributes:
      name: of its mark and its log.
      seconds: after which it is ended.
      arguments: behind `python`.
      workdir: of `lrq_jax.main`, whose report is a line of results; None for a benchmark, which
        writes its own.
    """

    name: str
    seconds: int
    arguments: tuple[str, ...]
    workdir: Path | None = None


def runs(options: argparse.Namespace) -> list[Run]:
    """All commands, those first that tell most a minute."""
    found = [_joint(case, precision, options) for case in CASES for precision in PRECISIONS]
    found += [
        _memory(rematerialize, precision, options)
        for precision in ("float32", "bfloat16")
        for rematerialize in ("none", "elementwise")
    ]
    return found + [_schedule(precision, options) for precision in reversed(PRECISIONS)]


def _joint(case: str, precision: str, options: argparse.Namespace) -> Run:
    """The joint step beside PyTorch, eager and compiled."""
    arguments = (
        "benchmarks/joint_step.py", "--gpu", "--only", case, "--precision", precision, "--compiled",
        "--compile-budget", "240", "--seconds", "90", "--out", str(options.out / "joint_step.jsonl"),
    )  # fmt: skip
    return Run(name=f"joint-{case}-{precision}", seconds=540, arguments=arguments)


def _memory(rematerialize: str, precision: str, options: argparse.Namespace) -> Run:
    """What ResNet-50 holds at 224 px with 64 images; a process each, for the peak is the process's."""
    arguments = (
        "benchmarks/scaling.py", "growth", "--network", "resnet50", "--side", "224",
        "--batches", "64", "--sides", "--repeats", "3", "--precision", precision,
        "--rematerialize", rematerialize, "--out", str(options.out / "memory.jsonl"),
    )  # fmt: skip
    name = f"memory-resnet50-{precision}-{rematerialize}"
    return Run(name=name, seconds=420, arguments=arguments)


def _schedule(precision: str, options: argparse.Namespace) -> Run:
    """The 80,800 steps of LRQ's published schedule on ResNet-20: no config, the preset alone."""
    name = f"schedule-r20-{precision}"
    workdir = options.runs / name / "run"
    arguments = [
        "-m", "lrq_jax.main", f"--workdir={workdir}",
        "--config.method.preset=lrq", f"--config.teacher.path={options.teacher}",
        f"--config.precision={precision}", "--config.log_every=200",
        "--config.checkpoint_every=4000", "--config.images_every=20000",
    ]  # fmt: skip
    if options.data:
        arguments.append(f"--config.data.path={options.data}")
    return Run(name=name, seconds=2700, arguments=tuple(arguments), workdir=workdir)


def of_schedule(workdir: Path) -> dict[str, Any]:
    """What a finished schedule reports: seconds of each phase, accuracies, precision."""
    found = json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    kept = ("preset", "steps", "student", "teacher", "drop", "device", "versions", "wall_seconds")
    return {name: found[name] for name in kept} | {
        "precision": found["settings"]["resources"]["precision"]
    }


def perform(run: Run, folder: Path) -> str:
    """Runs a command; how it ended: `finished`, `exit code N` or `out of time`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        process = child_processes.start(
            [sys.executable, *run.arguments], cwd=REPOSITORY, stdout=log, stderr=log
        )
        try:
            code = process.wait(run.seconds)
        except subprocess.TimeoutExpired:
            return f"out of time after {run.seconds} s"
        finally:
            child_processes.end(process, patience=PATIENCE)
    return f"exit code {code}" if code else "finished"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--only", default="", help="commands whose name holds this")
    parser.add_argument("--minutes", type=float, default=1e9, help="start none after so long")
    parser.add_argument("--teacher", type=Path, default=Path("teachers/r20_cifar10"))
    parser.add_argument("--data", type=Path, help="a folder of labelled test images")
    parser.add_argument("--out", type=Path, default=Path("results"), help="of lines of JSON")
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu"), help="of marks and logs")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs what has not finished yet; returns 1 if any of it still has not."""
    options = _parser().parse_args(arguments)
    for name in ("teacher", "data", "out", "runs"):
        if (path := getattr(options, name)) is not None:
            setattr(options, name, path.resolve())
    chosen = [run for run in runs(options) if options.only in run.name]
    if options.dry_run:
        for run in chosen:
            print(f"# {run.name}, at most {run.seconds} s")
            print(shlex.join(["python", *run.arguments]))
        return 0
    child_processes.leave_on_sigterm()
    start, unfinished = time.monotonic(), 0
    for run in chosen:
        mark = options.runs / run.name / "finished"
        if mark.exists():
            continue
        if time.monotonic() - start > 60 * options.minutes:
            how = "not started"
        else:
            about = provenance()
            how = perform(run, options.runs / run.name)
        print(f"{run.name}: {how}", flush=True)
        if how == "finished":
            if run.workdir:
                report({**of_schedule(run.workdir), **about}, options.out / "schedule.jsonl")
            mark.touch()
        unfinished += how != "finished"
    return int(bool(unfinished))


if __name__ == "__main__":
    sys.exit(main())
