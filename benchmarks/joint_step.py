"""Our joint step beside the same step in eager PyTorch, interleaved, in one process tree.

    pip install ".[dev]" torch
    python benchmarks/joint_step.py                    # all cases; JSON in results/joint_step.jsonl
    python benchmarks/joint_step.py --only r20-64 --pairs 20
    python benchmarks/joint_step.py --compiled         # torch.compile of the same twin beside both

Two processes hold a side each (`joint_worker.py`); calls of a part alternate between them, so that
whatever else the machine does slows both, and a side never computes while the other does. Both use
the processors this command may use (on Linux: `taskset`), or the one GPU. The ratio is the median
of those of each alternating pair; minima are shown beside, and the same ratio of processor seconds,
which a busy machine changes less. The twin runs in that of PyTorch's memory layouts that is faster
for it. Both get huge pages of memory on request, as `lrq_jax.main` does (PyTorch alone seldom has
them), or neither does, where the system gives none or `GLIBC_TUNABLES` refuses them.

Before anything is timed both make two steps from the same state on the same noise. In float32 the
losses of the first, and each term of them, must agree within `TOLERANCES`, or the command ends with
exit code 1 and writes nothing. Differences of the second step, after an update, are shown.

A share of the peak is that of one peak for all sides, the fastest matrix product that any of them
made: another side's library may multiply faster than one's own. FLOPs of ours are counted in our
program as it is written for the platform (jax's cost analysis before XLA optimises), the twin's are
those of its products and convolutions (`FlopCounterMode`): ours needs fewer, so that a lower share
can be the faster step.

`--compiled` adds a third process, whose twin's forwards and losses went through `torch.compile`. If
it is not ready after `--compile-budget` seconds it is ended and left out, the rest is measured as
without it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import child_processes
from joint_worker import PARTS, STEPS, Case
from provenance import REPOSITORY, append, provenance

from lrq_jax import huge_pages

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
WORKER = Path(__file__).with_name("joint_worker.py")
SIDES = ("ours", "torch")
COMPILED = "compiled"
"""The third side, of whole steps alone."""
TOLERANCES = {"generator": 2e-4, "student": 0.1}
"""Relative differences of losses in the first float32 step that rounding explains. The generator's
were up to 8e-5 on CPUs and a GPU; a slope of 0.19 for 0.2 or a norm's epsilon of 1e-3 for 1e-5 makes
more of them. In the student one activation that rounds to the other code moves all later codes of its
image, and that image's logits by up to 0.5: of 16 images one or two, 1.4 % of the distillation; rounded
down instead of to the nearest, ranges' ends make 28 %. Losses on equal logits are compared in the
tests, to rounding."""
SMALLEST_SHARE = 1e-3
"""Of a loss that each of its terms must be, or it could be wrong unnoticed: random weights with
which activations grow layer by layer leave a loss of one term."""
GPU_MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.35"}
"""What jax takes of a GPU at once, unless the environment says otherwise: all sides share it."""


def _tunables() -> str:
    """glibc's for both sides: the caller's, and huge pages unless they say otherwise."""
    return huge_pages.requested(os.environ.get(huge_pages.VARIABLE, ""))


def _huge_pages() -> bool:
    """Whether the sides get them: both or none."""
    return huge_pages.given(_tunables())


class DifferentSteps(RuntimeError):
    """Two sides do not make the same step, or nothing shows that they do."""


class NotReady(RuntimeError):
    """A side has ended, or was ended, before it could be timed."""


class Worker:
    """A process that runs parts of one side's step on demand, ended with its context.

    Raises:
      NotReady: it ended, or `budget` seconds (None: any time) were not enough to get ready.
    """

    def __init__(self, side: str, case: Case, exchange: Path, *,
                 budget: float | None = None) -> None:  # fmt: skip
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        arguments = [side, json.dumps(dataclasses.asdict(case)), str(exchange)]
        self._process = child_processes.start(
            [sys.executable, str(WORKER), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**GPU_MEMORY, **os.environ, huge_pages.VARIABLE: _tunables(), "PYTHONPATH": path,
                 "THP_MEM_ALLOC_ENABLE": str(int(_huge_pages()))},
        )  # fmt: skip
        try:
            self.description: dict[str, Any] = self._first_line(budget)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        child_processes.end(self._process)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # of what was not sent any more
                pipe.close()

    def _first_line(self, budget: float | None) -> dict[str, Any]:
        late = threading.Event()

        def end() -> None:
            late.set()
            child_processes.end(self._process)

        watchdog = threading.Timer(budget or 0.0, end)
        if budget is not None:
            watchdog.start()
        try:
            return json.loads(self._line())
        except NotReady:
            if late.is_set():
                raise NotReady(f"not ready after {budget:g} s") from None
            raise
        finally:
            watchdog.cancel()

    def _line(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise NotReady(f"ended with exit code {self._process.wait()}; see above")
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


def check_first_step(case: Case, side: Mapping[str, Any]) -> None:
    """Compares the losses of a side's first step with ours; see `TOLERANCES`.

    Args:
      case: of another precision than float32 nothing is refused; with other quantizers than the
        twin's the student's losses are not compared.
      side: a description with `losses` of the first steps, `{name: (ours, its)}` each, and
        `weights_of_losses`, of the terms that `generator/loss` and `student/loss` sum.

    Raises:
      DifferentSteps: a loss or a term differs; or a term is so small a part of its sum that it
        could be wrong unnoticed.
    """
    if case.precision != "float32":
        return
    first, weights = side["losses"][0], side["weights_of_losses"]
    parts = ("generator", "student") if case.placement == "paper" else ("generator",)
    for name, (ours, its) in first.items():
        part = name.partition("/")[0]
        if part not in parts or name not in (*weights, f"{part}/loss"):
            continue
        total, tolerance = first[f"{part}/loss"][0], TOLERANCES[part]
        if not abs(weights.get(name, 1.0) * ours) > SMALLEST_SHARE * abs(total):
            raise DifferentSteps(
                f"{case.name}: {name} is {ours:.3g} in a sum of {total:.6g}, expected more than "
                f"{SMALLEST_SHARE:g} of it: nothing would show an error of this term; choose another "
                "first state"
            )
        if not abs(its - ours) <= tolerance * abs(ours):
            raise DifferentSteps(
                f"{case.name}: the first step's {name} is {ours:.6g} and the twin's {its:.6g}, "
                f"expected a relative difference of at most {tolerance:g}: this is not the same step"
            )


def relative_differences(side: Mapping[str, Any]) -> list[dict[str, float]]:
    """Of each loss of each of the first steps."""
    return [
        {name: abs(its - ours) / max(abs(ours), 1e-12) for name, (ours, its) in step.items()}
        for step in side["losses"]
    ]


def measure(case: Case, *, pairs: int, seconds: float, compile_budget: float) -> dict[str, Any]:
    """One case: `pairs` alternating calls of the whole step (fewer of its parts), ended after
    about `seconds`, but never before three pairs.

    Raises:
      DifferentSteps: the sides do not make the same step.
    """
    left_out = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        exchange = Path(folder) / "exchange.npz"
        workers = {}
        for side in SIDES:  # ours first: it writes
            workers[side] = stack.enter_context(Worker(side, case, exchange))
        torch = workers["torch"].description
        check_first_step(case, torch)
        if case.compiled:
            own = dataclasses.replace(case, layout=torch["layout"])
            try:
                worker = Worker(COMPILED, own, exchange, budget=compile_budget)
                workers[COMPILED] = stack.enter_context(worker)
                check_first_step(case, worker.description)
            except (NotReady, DifferentSteps) as error:
                left_out[COMPILED] = str(error)
                workers.pop(COMPILED, None)
        times = timed(workers, pairs=pairs, seconds=seconds)
        described = {side: worker.description | worker.finish() for side, worker in workers.items()}
    summary = _summary(times, described, case)
    return {"case": case.name, **dataclasses.asdict(case), "left_out": left_out, **summary}


def timed(workers: Mapping[str, Any], *, pairs: int, seconds: float) -> dict[str, Any]:
    """Seconds of alternating calls, `{part: {side: [(wall, processor), ...]}}`."""
    times = {}
    started = time.monotonic()
    for part in reversed(PARTS):
        sides = [side for side in workers if part in STEPS or side != COMPILED]
        times[part] = {side: [] for side in sides}
        wanted = pairs if part == "joint" else max(3, pairs // 3)
        for side in sides:
            workers[side].run(part)
        for done in range(wanted):
            if done >= 3 and time.monotonic() - started > seconds:
                break
            for side in sides if done % 2 else reversed(sides):
                times[part][side].append(workers[side].run(part))
    return times


def _summary(times: dict, described: dict, case: Case) -> dict[str, Any]:
    parts = {part: _summary_of_part(found) for part, found in times.items()}
    flops = {side: about["flops"] for side, about in described.items()}
    flops = {side: flops["torch"] if own is None else own for side, own in flops.items()}
    rates = {side: flops[side] / parts["joint"][f"{side}_median"] for side in described}
    shares = shares_of_peak(rates, {s: about["matmul_flops"] for s, about in described.items()})
    sides = {}
    for side, about in described.items():
        sides[side] = {
            **about,
            "flops": flops[side],
            "images_per_second": round(case.batch / parts["joint"][f"{side}_median"], 1),
            "flops_per_second": rates[side],
            "share_of_matmul_peak": round(shares[side], 3),
        }
        if "losses" in about:
            sides[side]["relative_differences_of_losses"] = relative_differences(about)
    joint = parts["joint"]
    return {
        "speedup": joint["speedup"],
        "processor_speedup": joint["processor_speedup"],
        "seconds": parts,
        "sides": sides,
    }


def shares_of_peak(rates: Mapping[str, float], peaks: Mapping[str, float]) -> dict[str, float]:
    """FLOP/s of each side as a share of the largest peak that any of them showed."""
    return {side: rate / max(peaks.values()) for side, rate in rates.items()}


def _summary_of_part(found: Mapping[str, list[tuple[float, float]]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"pairs": len(found["ours"])}
    for side, calls in found.items():
        walls, processors = zip(*calls, strict=True)
        if side != "ours":
            prefix = "" if side == "torch" else f"{side}_"
            for name, own, values in zip(
                ("speedup", "processor_speedup"),
                zip(*found["ours"], strict=True),
                (walls, processors),
                strict=True,
            ):
                ratios = [theirs / ours for ours, theirs in zip(own, values, strict=True)]
                summary[prefix + name] = round(statistics.median(ratios), 3)
        summary |= {
            f"{side}_min": round(min(walls), 4),
            f"{side}_median": round(statistics.median(walls), 4),
            f"{side}_processor_median": round(statistics.median(processors), 4),
        }
    return summary


def table(result: dict[str, Any]) -> str:
    """A result for a person."""
    sides = result["sides"]
    lines = [
        f"{result['case']}: {result['speedup']:.2f}x; losses of the first steps within "
        + ", ".join(
            f"{max(d['generator/loss'], d['student/loss']):.1e}"
            for d in sides["torch"]["relative_differences_of_losses"]
        ),
        f"  {'seconds, median (min)':<24}"
        + "".join(
            f"{side:>20}" + f"{'ratio':>7}{'of CPU':>7}" * (side != "ours") for side in sides
        ),
    ]
    for part in PARTS:
        row, cells = result["seconds"][part], []
        for side in sides:
            if f"{side}_median" not in row:
                continue
            cells.append(f"{row[f'{side}_median']:.4f} ({row[f'{side}_min']:.4f})".rjust(20))
            if side != "ours":
                prefix = "" if side == "torch" else f"{side}_"
                ratios = (row[f"{prefix}{name}"] for name in ("speedup", "processor_speedup"))
                cells += [f"{ratio:>7.2f}" for ratio in ratios]
        lines.append(f"  {part:<24}" + "".join(cells))
    for name, unit, scale, places in (
        ("images_per_second", "images/s", 1, 1),
        ("flops", "GFLOP a step", 1e9, 1),
        ("flops_per_second", "GFLOP/s", 1e9, 1),
        ("share_of_matmul_peak", "of the matmul peak", 1, 3),
        ("matmul_flops", "matmul GFLOP/s", 1e9, 1),
        ("peak_bytes", "MB at the peak", 1e6, 1),
        ("compile_seconds", "s to compile", 1, 1),
    ):
        cells = [
            f"{about[name] / scale:>20.{places}f}" + " " * 14 * (side != "ours")
            for side, about in sides.items()
        ]
        lines.append(f"  {unit:<24}" + "".join(cells).rstrip())
    lines += [f"  {side} was left out: {why}" for side, why in result["left_out"].items()]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help=f"of {[*CASES, *GPU_CASES]}")
    parser.add_argument("--gpu", action="store_true", help=f"the cases {sorted(GPU_CASES)}")
    parser.add_argument("--compiled", action="store_true", help="torch.compile as a third side")
    parser.add_argument(
        "--compile-budget", type=float, default=300.0,
        help="seconds in which that side must be ready, its start included",
    )  # fmt: skip
    parser.add_argument("--precision", default="float32", help="of both sides' float products")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=120.0, help="a case, about")
    parser.add_argument("--out", type=Path, default=Path("results/joint_step.jsonl"))
    return parser


def main() -> int:
    """Measures the chosen cases, appends a line of JSON each; returns 1 after a message where two
    sides do not make the same step."""
    parser = _parser()
    options = parser.parse_args()
    known = {**CASES, **GPU_CASES}
    unknown = sorted(set(options.only or ()) - set(known))
    if unknown:
        parser.error(f"--only: found {unknown}, expected some of {sorted(known)}")
    child_processes.leave_on_sigterm()
    options.out.parent.mkdir(parents=True, exist_ok=True)  # a place that cannot be is told at once
    for name in options.only or (GPU_CASES if options.gpu else CASES):
        case = dataclasses.replace(
            known[name], compiled=options.compiled, precision=options.precision
        )
        about = provenance()
        try:
            result = measure(
                case, pairs=options.pairs, seconds=options.seconds,
                compile_budget=options.compile_budget,
            )  # fmt: skip
        except (DifferentSteps, NotReady) as error:
            print(f"joint_step: {name}: {error}", file=sys.stderr)
            return 1
        result = {"name": name, **result, **about, "huge_pages": _huge_pages()}
        append(json.dumps(result), options.out)
        print(table(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
