"""Seconds from a command to a step of training, without and with compiled programs on disk.

    python benchmarks/cold_start.py --teacher teachers/r20_cifar10 --out results/cold_start.jsonl
    python benchmarks/cold_start.py --teacher teachers/r20_cifar10 --phase training
    python benchmarks/cold_start.py --teacher teachers/r20_cifar10 --presets fast --phase training

The command is `python -m lrq_jax.main --config.log_every=1` on `configs/r20_cifar10.py`, for preset
`fast` on `configs/fast.py`. Timed is from its start to a line of the run's metrics.jsonl. The first
start finds an empty cache, the others what it left there.

Without `--phase` that is the run's first line. With a generator it is a step of the warm-up: importing,
reading the teacher, compiling the generator's step alone and one such step lie before it. For `fast` and others
with noise images it comes after all of these were made: it times synthesis.

With `--phase` it is the first line of that phase, and what comes before is as short as a run can be: one
step of warm-up and calibration together (of the generator, or on the pool), one batch of noise images
of one iteration, one iteration of each block's reconstruction. So `--phase training` times importing,
reading the teacher, compiling the calibration step and the student's step, for `fast` the noise images'
step and those of its blocks as well, and one of each; compilation is nearly all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import child_processes
from provenance import REPOSITORY, provenance, report

CONFIGS = {"fast": "configs/fast.py"}
"""Of presets that have one; the others run on `OTHERS`."""
OTHERS = "configs/r20_cifar10.py"
PHASES = ("warm-up", "calibration", "training")
"""As metrics.jsonl names them, the last one last."""


def phases_logged(metrics: Path) -> list[str]:
    """The phase of each whole line of a metrics.jsonl, which need not be there yet."""
    if not metrics.exists():
        return []
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]  # the last may be half written
    return [json.loads(line)["phase"] for line in lines]


def seconds_until(command: list[str], environment: dict[str, str], metrics: Path,
                  phase: str | None) -> float:  # fmt: skip
    """Seconds until the command logs a step of the phase (None: any step); then it is ended.

    Raises:
      RuntimeError: the command ended, or trains, without.
    """
    with tempfile.TemporaryFile("w+") as said:
        clock = time.perf_counter()
        process = child_processes.start(
            command, env=environment, cwd=REPOSITORY, stdout=said, stderr=said
        )
        try:
            while True:
                ended = process.poll() is not None  # asked before the file is read
                seen, seconds = phases_logged(metrics), time.perf_counter() - clock
                if phase in seen or (phase is None and seen):
                    return seconds
                if ended or PHASES[-1] in seen:
                    said.seek(0)
                    raise RuntimeError(
                        f"found steps of {sorted(set(seen)) or 'no phase'}, expected one of "
                        f"{phase or 'any phase'}; the command said: {said.read()[-500:]}"
                    )
                time.sleep(0.02)
        finally:
            child_processes.end(process)


def shortest(phase: str | None) -> list[str]:
    """Flags that make what comes before a phase as short as a run can be."""
    if phase is None:
        return []
    before = int(phase == "warm-up")  # it is there only outside the calibration
    fields = {
        "warmup_steps": before + 1, "calibration_start": before, "calibration_steps": 1,
        "noise_batches": 1, "noise_iterations": 1, "reconstruction_iterations": 1,
    }  # fmt: skip
    return [f"--config.method.{name}={value}" for name, value in fields.items()]


def command_of(preset: str, teacher: str, batch: int, phase: str | None, workdir: str) -> list[str]:
    """The command that is timed."""
    return [
        sys.executable, "-m", "lrq_jax.main", f"--config={CONFIGS.get(preset, OTHERS)}",
        f"--workdir={workdir}", f"--config.method.preset={preset}",
        f"--config.teacher.path={teacher}", f"--config.method.batch_size={batch}",
        "--config.log_every=1", *shortest(phase),
    ]  # fmt: skip


def measure(preset: str, teacher: str, batch: int, phase: str | None, warm_starts: int) -> dict[str, Any]:  # fmt: skip
    """One preset: a cold start, then warm ones."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "LRQ_CACHE": f"{folder}/cache", "PYTHONUNBUFFERED": "1"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        seconds = []
        for number in range(1 + warm_starts):
            workdir = f"{folder}/run{number}"
            command = command_of(preset, teacher, batch, phase, workdir)
            metrics = Path(workdir) / "metrics.jsonl"
            seconds.append(round(seconds_until(command, environment, metrics, phase), 1))
        return {
            "preset": preset, "batch": batch, "phase": phase or "the first",
            "cold": seconds[0], "warm": seconds[1:],
        }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="a converted ResNet-20")
    parser.add_argument("--presets", nargs="*", default=("lrq", "gdfq"))
    parser.add_argument("--phase", choices=PHASES, help="wait for its first step; default: any")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--warm-starts", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a line of JSON is appended for each preset")
    return parser


def main() -> None:
    """See the module docstring."""
    options = _parser().parse_args()
    child_processes.leave_on_sigterm()
    teacher = options.teacher
    if Path(teacher).exists():
        teacher = str(Path(teacher).resolve())
    for preset in options.presets:
        about = provenance()
        found = measure(preset, teacher, options.batch, options.phase, options.warm_starts)
        report({**found, **about}, options.out)


if __name__ == "__main__":
    main()
