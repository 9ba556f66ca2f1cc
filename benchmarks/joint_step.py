"""Our joint step beside the same step in eager PyTorch, interleaved, in one process tree.

    pip install ".[dev]" torch
    python benchmarks/joint_step.py                    # all cases; JSON in results/joint_step.jsonl
    python benchmarks/joint_step.py --only r20-64 --pairs 20
    python benchmarks/joint_step.py --compiled         # GPUs: against torch.compile of the same twin

Two processes hold a side each (`joint_worker.py`); calls of a part alternate between them, so that
whatever else the machine does slows both, and a side never computes while the other does. Both use
the processors this command may use (on Linux: `taskset`), or the one GPU. The ratio is the median
of those of each alternating pair; minima are shown beside, and the same ratio of processor seconds,
which a busy machine changes less. Before anything is timed both make two
steps from the same state on the same noise, and the largest difference of what they minimise is
shown: it is the same step. The twin runs in that of PyTorch's memory layouts that is faster for it.
Both get huge pages of memory on request, as `lrq_jax.main` does; PyTorch alone seldom has them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from joint_worker import PARTS, Case

from lrq_jax.huge_pages import TUNABLE, VARIABLE

SMALL, LARGE = "resnet20_cifar", "resnet18"
CASES = {
    "r20-64": Case(network=SMALL, batch=64, attention="after_block1"),
    "r20-64-integer": Case(network=SMALL, batch=64, attention="after_block1", placement="integer"),
    "r20-64-none": Case(network=SMALL, batch=64, attention="none"),
    "r20-200": Case(network=SMALL, batch=200, attention="after_block1"),
    "r18-8": Case(network=LARGE, batch=8, attention="after_block1"),
    "r18-8-integer": Case(network=LARGE, batch=8, attention="after_block1", placement="integer"),
}
CASES = {name: dataclasses.replace(case, calls=5) for name, case in CASES.items()}
GPU_CASES = {
    "r20-200-gpu": dataclasses.replace(CASES["r20-200"], steps=20, calls=1),
    "r18-16-gpu": Case(network=LARGE, batch=16, attention="after_block1", steps=20),
    "r18-64-gpu": Case(network=LARGE, batch=64, attention="after_block1", steps=20),
}
"""Of 20 steps between two waits, as the loop makes them on a GPU."""
SIDES = ("ours", "torch")
HUGE_PAGES = {VARIABLE: f"{TUNABLE}=1", "THP_MEM_ALLOC_ENABLE": "1"}
"""Of glibc, and of PyTorch's own allocator."""


class Worker:
    """A process that runs parts of one side's step on demand."""

    def __init__(self, side: str, case: Case, exchange: Path) -> None:
        script = Path(__file__).with_name("joint_worker.py")
        root = str(script.parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        arguments = [side, json.dumps(dataclasses.asdict(case)), str(exchange)]
        self._process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **HUGE_PAGES, "PYTHONPATH": path},
        )  # fmt: skip
        self.description: dict[str, Any] = json.loads(self._line())

    def _line(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with exit code {self._process.wait()}; see above")
        return line

    def run(self, part: str) -> tuple[float, float]:
        """Seconds of one call, and those of processors (all threads)."""
        print(part, file=self._process.stdin, flush=True)
        return tuple(json.loads(self._line()))

    def finish(self) -> dict[str, Any]:
        """Ends the process; what it used."""
        self._process.stdin.close()
        found = json.loads(self._line())
        self._process.wait()
        return found


def measure(case: Case, *, pairs: int, seconds: float) -> dict[str, Any]:
    """One case: `pairs` alternating calls of the whole step (fewer of its parts), ended after
    about `seconds`, but never before three pairs."""
    with tempfile.TemporaryDirectory() as folder:
        exchange = Path(folder) / "exchange.npz"
        workers = {side: Worker(side, case, exchange) for side in SIDES}  # ours first: it writes
        times = {part: {side: [] for side in SIDES} for part in PARTS}
        started = time.monotonic()
        for part in reversed(PARTS):
            wanted = pairs if part == "joint" else max(3, pairs // 3)
            for worker in workers.values():
                worker.run(part)
            for done in range(wanted):
                if done >= 3 and time.monotonic() - started > seconds:
                    break
                for side in SIDES if done % 2 else reversed(SIDES):
                    times[part][side].append(workers[side].run(part))
        described = {side: workers[side].description | workers[side].finish() for side in SIDES}
    return {"case": case.name, **dataclasses.asdict(case), **_summary(times, described, case)}


def _summary(times: dict, described: dict, case: Case) -> dict[str, Any]:
    parts = {}
    for part, found in times.items():
        wall, processor = (
            [b[i] / a[i] for a, b in zip(found["ours"], found["torch"], strict=True)]
            for i in (0, 1)
        )
        parts[part] = {
            "pairs": len(wall),
            "speedup": round(statistics.median(wall), 3),
            "processor_speedup": round(statistics.median(processor), 3),
        }
        for side in SIDES:
            walls, processors = zip(*found[side], strict=True)
            parts[part] |= {
                f"{side}_min": round(min(walls), 4),
                f"{side}_median": round(statistics.median(walls), 4),
                f"{side}_processor_median": round(statistics.median(processors), 4),
            }
    sides = {}
    for side in SIDES:
        joint, about = parts["joint"][f"{side}_median"], described[side]
        # XLA does not count what cuDNN does for it; the twin's are those of the plain step.
        about["flops"] = about["flops"] or described["torch"]["flops"]
        sides[side] = {
            **about,
            "images_per_second": round(case.batch / joint, 1),
            "flops_per_second": about["flops"] / joint,
            "share_of_matmul_peak": round(about["flops"] / joint / about["matmul_flops"], 3),
        }
    joint = parts["joint"]
    return {
        "speedup": joint["speedup"],
        "processor_speedup": joint["processor_speedup"],
        "seconds": parts,
        "sides": sides,
    }


def table(result: dict[str, Any]) -> str:
    """A result for a person."""
    ours, torch = (result["sides"][side] for side in SIDES)
    lines = [
        f"{result['case']}: {result['speedup']:.2f}x; losses of the first steps within "
        + ", ".join(
            f"{max(d['generator/loss'], d['student/loss']):.1e}"
            for d in torch["relative_differences_of_losses"]
        ),
        f"  {'seconds':<22}{'ours median (min)':>22}{'torch median (min)':>22}{'ratio':>8}"
        f"{'of CPU':>8}",
    ]
    for part in PARTS:
        row = result["seconds"][part]
        mine, theirs = (f"{row[f'{side}_median']:.4f} ({row[f'{side}_min']:.4f})" for side in SIDES)
        lines.append(
            f"  {part:<22}{mine:>22}{theirs:>22}{row['speedup']:>8.2f}"
            f"{row['processor_speedup']:>8.2f}"
        )
    for name, unit, scale in (
        ("images_per_second", "images/s", 1),
        ("flops", "GFLOP a step", 1e9),
        ("flops_per_second", "GFLOP/s", 1e9),
        ("matmul_flops", "matmul GFLOP/s", 1e9),
        ("peak_bytes", "MB at the peak", 1e6),
        ("compile_seconds", "s to compile", 1),
    ):
        lines.append(f"  {unit:<22}{ours[name] / scale:>22.1f}{torch[name] / scale:>22.1f}")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What this ran on."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        text = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in text if x.startswith("model name")), model)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cpu": model, "usable_cpus": usable, "load_at_start": load}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help=f"of {[*CASES, *GPU_CASES]}")
    parser.add_argument("--gpu", action="store_true", help=f"the cases {sorted(GPU_CASES)}")
    parser.add_argument("--compiled", action="store_true", help="torch.compile the twin")
    parser.add_argument("--precision", default="float32", help="of both sides' float products")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=120.0, help="a case, about")
    parser.add_argument("--out", type=Path, default=Path("results/joint_step.jsonl"))
    return parser


def main() -> None:
    """Measures the chosen cases, appends a line of JSON each."""
    parser = _parser()
    options = parser.parse_args()
    known = {**CASES, **GPU_CASES}
    unknown = sorted(set(options.only or ()) - set(known))
    if unknown:
        parser.error(f"--only: found {unknown}, expected some of {sorted(known)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.only or (GPU_CASES if options.gpu else CASES):
        case = dataclasses.replace(
            known[name], compiled=options.compiled, precision=options.precision
        )
        about = machine()
        result = {"name": name, **measure(case, pairs=options.pairs, seconds=options.seconds)}
        result |= {"machine": about, "date": time.strftime("%Y-%m-%d"), "huge_pages": True}
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(table(result), flush=True)


if __name__ == "__main__":
    main()
