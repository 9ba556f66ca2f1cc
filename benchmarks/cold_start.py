"""Seconds from a command to its first step of training, without and with compiled programs on disk.

    python benchmarks/cold_start.py --teacher teachers/r20_cifar10 --out results/cold_start.jsonl

The command is `python -m lrq_jax.main --config.log_every=1`. What counts is the first line of the run's
metrics.jsonl: importing, reading the teacher, compiling and one step of `--batch` images lie before
it. The first start finds an empty cache, the others what it left there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from joint_step import machine


def first_step(command: list[str], environment: dict[str, str], metrics: Path) -> float:
    """Seconds until the command logs a step; then it is ended."""
    clock = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (metrics.exists() and metrics.stat().st_size):
        if process.poll() is not None:
            raise RuntimeError(
                f"no step was made; the command said: {process.stdout.read()[-500:]}"
            )
        time.sleep(0.02)
    seconds = time.perf_counter() - clock
    process.kill()
    process.wait()
    return seconds


def measure(preset: str, teacher: str, batch: int, warm_starts: int) -> dict[str, Any]:
    """One preset: a cold start, then warm ones."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "LRQ_CACHE": f"{folder}/cache", "PYTHONUNBUFFERED": "1"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        seconds = []
        for number in range(1 + warm_starts):
            command = [
                sys.executable, "-m", "lrq_jax.main", "--config=configs/r20_cifar10.py",
                f"--workdir={folder}/run{number}", f"--config.method.preset={preset}",
                f"--config.teacher.path={teacher}", f"--config.method.batch_size={batch}",
                "--config.log_every=1",
            ]  # fmt: skip
            metrics = Path(folder) / f"run{number}" / "metrics.jsonl"
            seconds.append(round(first_step(command, environment, metrics), 1))
        return {"preset": preset, "batch": batch, "cold": seconds[0], "warm": seconds[1:]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="a converted ResNet-20")
    parser.add_argument("--presets", nargs="*", default=("lrq", "gdfq"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--warm-starts", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a line of JSON is appended for each preset")
    return parser


def main() -> None:
    """See the module docstring."""
    options = _parser().parse_args()
    for preset in options.presets:
        found = measure(preset, options.teacher, options.batch, options.warm_starts)
        line = json.dumps({**found, "machine": machine(), "date": time.strftime("%Y-%m-%d")})
        print(line, flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
