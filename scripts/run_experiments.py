"""Runs a suite of experiments, one `lrq_jax.main` after another, and files their reports.

    python scripts/run_experiments.py --suite r20_cifar10 --teacher DIR --data DIR --out results

Each finished run is one line of OUT/SUITE.jsonl: its report with the cell's name, command, commit
and machine. Cells already there are skipped and an interrupted one resumes from its checkpoint,
so the command can be repeated until it is done. With --jobs 2 two runs share the machine, each
on its own part of the processors; `processors` in the log says how many a run had.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import platform
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from suites import REAL, SUITES

REPOSITORY = Path(__file__).resolve().parents[1]

_LEFT_OUT = {"command", "layers", "batch_norms", "histogram", "disagreements", "synthetic"}
"""Of a report: what is long, and the command with this machine's paths."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=sorted(SUITES), required=True)
    parser.add_argument("--teacher", help="converted teacher; default: the config's")
    parser.add_argument("--data", help="folder of labelled test images; default: the config's")
    parser.add_argument("--label", help="of the teacher, added to the log's name: SUITE_LABEL")
    parser.add_argument("--train-data", help="real training images, for cells that are ceilings")
    parser.add_argument("--out", default="results", type=Path)
    parser.add_argument("--runs", default="runs", type=Path, help="where run directories go")
    parser.add_argument("--jobs", default=1, type=int, help="runs at a time")
    parser.add_argument("--only", help="the cell of this name, or those whose name holds it")
    parser.add_argument(
        "--flags", default="", help="added to every cell; give --label a name for it"
    )
    return parser


def main() -> int:
    """Runs the suite's missing cells; returns 0, or 2 after a message on standard error."""
    arguments = _parser().parse_args()
    for option, place in (("--data", arguments.data), ("--train-data", arguments.train_data)):
        if place and not Path(place).is_dir():
            print(f"{option}: found no directory {place}, expected a folder of labelled images",
                  file=sys.stderr)  # fmt: skip
            return 2
    if arguments.jobs < 1:
        print(f"--jobs: found {arguments.jobs}, expected a number from 1 up", file=sys.stderr)
        return 2
    config, cells = SUITES[arguments.suite]
    arguments.out, arguments.runs = arguments.out.resolve(), arguments.runs.resolve()
    name = "_".join(part for part in (arguments.suite, arguments.label) if part)
    log = arguments.out / f"{name}.jsonl"
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = log.read_text().splitlines() if log.exists() else []
    done = {json.loads(line)["cell"] for line in lines}
    inputs = []
    if arguments.teacher:
        inputs.append(f"--config.teacher.path={Path(arguments.teacher).resolve()}")
    if arguments.data:
        inputs += ["--config.data.name=", f"--config.data.path={Path(arguments.data).resolve()}"]
    shares = _processor_shares(arguments.jobs)
    lock = threading.Lock()

    def run(cell: str) -> None:
        workdir = arguments.runs / name / _workdir_name(cell)
        flags = [f"--config={config}", *cells[cell], *arguments.flags.split()]
        files = list(inputs)
        if REAL[0] in flags:
            files.append(f"--config.data.train_path={Path(arguments.train_data).resolve()}")
        elif pool := _pool_of(cell, cells, workdir):
            files.append(f"--config.data.pool_path={pool}")
        share = shares.get()
        try:
            _run(flags + files, workdir, share)
        finally:
            shares.put(share)
        report = json.loads((workdir / "report.json").read_text())
        for part in ("teacher_path", "data_path", "train_path", "pool_path"):
            report["settings"][part] = Path(report["settings"][part]).name
        entry = {
            "cell": cell,
            "command": " ".join(["python -m lrq_jax.main", *flags]),
            "commit": _commit(REPOSITORY),
            "machine": _machine(),
            "processors": len(share),
            **{name: value for name, value in report.items() if name not in _LEFT_OUT},
        }
        with lock, open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(f"{cell}: drop {report['drop']}, student {report['student']['top1']}", flush=True)

    missing = [cell for cell in _chosen(cells, arguments.only) if cell not in done]
    if not arguments.train_data:
        missing = [cell for cell in missing if REAL[0] not in cells[cell]]
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        futures = [pool.submit(run, cell) for cell in missing]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except RunFailed as error:
            for future in futures:
                future.cancel()
            print(f"run_experiments: {error}", file=sys.stderr)
            return 2
    return 0


class RunFailed(RuntimeError):
    """A cell's command ended with another exit code than 0; the message holds its last lines."""


def _chosen(cells: Iterable[str], only: str | None) -> list[str]:
    """The cell named so, or else all whose name holds the text, or all."""
    names = list(cells)
    return [only] if only in names else [cell for cell in names if (only or "") in cell]


def _workdir_name(cell: str) -> str:
    return cell.replace(" ", "_").replace(",", "")


_OF_IMAGES = (
    "--config.seed",
    "--config.method.preset",
    "--config.method.adam_epsilon",
    "--config.method.class_focus",
    "--config.method.conditioning",
    "--config.method.generator_width",
    "--config.precision",
    "--config.method.noise_",
    "--config.method.ama_",
    "--config.method.attention",
    "--config.method.latent_dim",
)
"""How a flag starts on which the images of a pool depend; a run given another pool refuses it."""


def _pool_of(cell: str, cells: dict[str, list[str]], workdir: Path) -> Path | None:
    """A finished run of the suite with noise images that this cell can take: the flags that say
    how images are made are the same. The one it took before, if it is a second start."""
    own = workdir / "config.json"
    if own.exists():
        return json.loads(own.read_text())["pool_path"] or None

    def recipe(flags: list[str]) -> set[str]:
        return {flag for flag in flags if flag.startswith(_OF_IMAGES)} - {"--config.seed=0"}

    for other, flags in cells.items():
        run = workdir.parent / _workdir_name(other)
        made = (run / "report.json").exists() and (run / "pool").exists()
        if made and recipe(flags) == recipe(cells[cell]):
            return run
    return None


def _processor_shares(jobs: int) -> queue.Queue[set[int]]:
    """The processors this process may use, dealt out evenly."""
    processors = sorted(os.sched_getaffinity(0))
    shares: queue.Queue[set[int]] = queue.Queue()
    for job in range(jobs):
        shares.put(set(processors[job::jobs]))
    return shares


def _run(flags: list[str], workdir: Path, processors: set[int]) -> None:
    workdir.parent.mkdir(parents=True, exist_ok=True)
    log = workdir.parent / f"{workdir.name}.log"
    with open(log, "a", encoding="utf-8") as output:
        command = [sys.executable, "-m", "lrq_jax.main", f"--workdir={workdir}", *flags]
        code = subprocess.run(
            command,
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
            preexec_fn=lambda: os.sched_setaffinity(0, processors),
        ).returncode
    if code:
        last = "\n".join(log.read_text(encoding="utf-8").splitlines()[-6:])
        raise RunFailed(f"{workdir.name} ended with exit code {code}, its log is {log}:\n{last}")


def _commit(repository: Path) -> str:
    """Commit of a work tree, `-dirty` with changes elsewhere than in the logs that runs write."""

    def git(*words: str) -> str:
        command = ["git", *words]
        return subprocess.run(
            command, cwd=repository, capture_output=True, text=True
        ).stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    return (commit or "unknown") + ("-dirty" if changed else "")


def _machine() -> str:
    """Processor model and count, without names of hosts."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return f"{model}, {os.cpu_count()} processors"


if __name__ == "__main__":
    sys.exit(main())
