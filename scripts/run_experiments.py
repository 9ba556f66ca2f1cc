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

REPOSITORY = Path(__file__).resolve().parents[1]

R20 = {
    **{f"lrq seed {seed}": [f"--config.seed={seed}"] for seed in (0, 1, 2)},
    "lrq paper placement": ["--config.student.placement=paper"],
    "gdfq": ["--config.method.preset=gdfq"],
    "lrq_released": ["--config.method.preset=lrq_released"],
    "lrq ranges only": ["--config.steps=0"],
    "lrq ranges only, paper placement": ["--config.steps=0", "--config.student.placement=paper"],
}
ABLATIONS = {
    "full": [],
    "no attention": ["--config.method.attention=none"],
    "no margin": ["--config.method.ama_weight=0.0"],
    "plain distillation": ["--config.method.student_loss=kd"],
}


def _rounded(rounding: str, *, equalize: bool = False, bias_correction: bool = False) -> list[str]:
    return [
        f"--config.method.rounding={rounding}",
        f"--config.method.equalize={equalize}",
        f"--config.method.bias_correction={bias_correction}",
    ]


INGREDIENTS = {
    "squant": _rounded("squant"),
    "nearest": _rounded("nearest"),
    "nearest, bias correction": _rounded("nearest", bias_correction=True),
    "nearest, equalized": _rounded("nearest", equalize=True),
    "squant, equalized": _rounded("squant", equalize=True),
    "squant, bias correction": _rounded("squant", bias_correction=True),
    "squant, equalized, bias correction": _rounded("squant", equalize=True, bias_correction=True),
    "adaround": [
        *_rounded("adaround"),
        "--config.method.reconstruction_iterations=300",
        "--config.method.reconstruction_learning_rate=0.01",
        "--config.method.reconstruction_step_rate=0.001",
        "--config.method.noise_batch_size=128",
        "--config.method.noise_batches=4",
        "--config.method.noise_iterations=250",
    ],
}


def _bits(weights: int, activations: int) -> list[str]:
    return [f"--config.student.weight_bits={weights}", f"--config.student.act_bits={activations}"]


DIGITS = {
    **{f"W4A4 seed {seed}": [f"--config.seed={seed}"] for seed in (0, 1, 2)},
    "W4A4 ranges only": ["--config.steps=0", "--config.method.rounding=nearest"],
    "W3A3 seed 0": _bits(3, 3),
}
REAL = ["--config.method.images=folder"]
POLICY_R = ["--config.student.policy=R"]
FAST = {
    **{f"U W4A4 seed {seed}": [f"--config.seed={seed}"] for seed in (0, 1, 2)},
    **{f"U W3A3 seed {seed}": [*_bits(3, 3), f"--config.seed={seed}"] for seed in (0, 1)},
    "U W5A5 seed 0": _bits(5, 5),
    "U W4A4 real images": REAL,
    "U W3A3 real images": [*REAL, *_bits(3, 3)],
    "U W5A5 real images": [*REAL, *_bits(5, 5)],
    "R W4A4 seed 0": POLICY_R,
    "R W3A3 seed 0": [*POLICY_R, *_bits(3, 3)],
    "R W3A3 real images": [*REAL, *POLICY_R, *_bits(3, 3)],
    "R W2A4 seed 0": [*POLICY_R, *_bits(2, 4)],
}
FAST_PARTS = {
    "fast": [],
    "no mixup": ["--config.method.mixup=0.0"],
    "white noise": ["--config.method.noise_spectrum=0.0"],
    "channel alignment": ["--config.method.channel_alignment=1000.0"],
    "activation map alignment": ["--config.method.cam_alignment=1.0"],
    "perturbation": ["--config.method.perturbation=0.01"],
    "latents": [
        "--config.method.noise_parameters=latents",
        "--config.method.noise_spectrum=0.0",
        "--config.method.attention=after_block1",
        "--config.method.latent_dim=256",
    ],
    "latents, no attention": [
        "--config.method.noise_parameters=latents",
        "--config.method.noise_spectrum=0.0",
        "--config.method.latent_dim=256",
    ],
    "swing": ["--config.method.noise_swing=1"],
    "image statistics": ["--config.method.noise_image_weight=0.1"],
    "low pass": ["--config.method.noise_low_pass=8.0"],
    "averaged weights": ["--config.method.average_decay=0.99"],
    "inundation": ["--config.method.inundation=0.001"],
    "equalized": ["--config.method.equalize=True"],
    "rounded to the nearest": ["--config.method.rounding=nearest"],
    "one rate for all": ["--config.method.student_kernel_rate=0.0"],
    "rounded to the nearest, one rate for all": [
        "--config.method.rounding=nearest",
        "--config.method.student_kernel_rate=0.0",
    ],
    "1,000 steps": ["--config.steps=1000"],
    "2,000 steps": ["--config.steps=2000"],
    "2,000 steps of 32": [
        "--config.steps=2000",
        "--config.method.batch_size=32",
        "--config.method.warmup_steps=32",
        "--config.method.calibration_steps=32",
    ],
    "half the rates": [
        "--config.method.student_learning_rate=0.0001",
        "--config.method.student_kernel_rate=0.0015",
    ],
    "temperature 10": ["--config.method.temperature=10"],
    "2,048 images of 64 iterations": [
        "--config.method.noise_batches=16",
        "--config.method.noise_iterations=64",
    ],
    "learned rounding alone": ["--config.steps=0"],
    "higher rates": [
        "--config.method.student_learning_rate=0.0005",
        "--config.method.student_kernel_rate=0.006",
    ],
}
SHORT = [
    *_bits(3, 3),
    "--config.steps=300",
    "--config.method.reconstruction_iterations=100",
    "--config.method.noise_batches=2",
]
"""`fast` at 32 px with a quarter of its images and of its rounding's iterations and a seventh of its
steps: minutes a cell, for parts to be switched on and off. At 3 bits, where they differ most."""
ABLATED = {
    name: FAST_PARTS[name]
    for name in (
        "fast",
        "no mixup",
        "rounded to the nearest",
        "one rate for all",
        "channel alignment",
        "activation map alignment",
        "perturbation",
        "averaged weights",
        "inundation",
        "equalized",
        "white noise",
        "low pass",
        "swing",
        "image statistics",
        "latents",
    )
} | {
    "step sizes as searched": ["--config.student.learned_steps=none"],
    "ranges from extremes": [
        "--config.student.weight_observer=min_max",
        "--config.student.act_observer=min_max",
    ],
    "gradients unclipped": ["--config.method.gradient_clip=1e9"],
    "labels": ["--config.method.ce_weight=1.0"],
    "labels of easy images": ["--config.method.ce_weight=1.0", "--config.method.ce_hardest=0.3"],
    "decoupled distillation": ["--config.method.student_loss=dkd"],
    "plain variances": ["--config.method.noise_statistics=variance"],
    "deviations": ["--config.method.noise_statistics=deviation"],
    "no classes": ["--config.method.noise_target_weight=0.0"],
    "focal classes": ["--config.method.class_focus=2.0"],
    "class probabilities": [
        "--config.method.noise_target=probability",
        "--config.method.noise_lowest_target=0.95",
    ],
    "feature distances": [
        "--config.method.ama_weight=1.0",
        "--config.method.ama_margin=0.0",
        "--config.method.ama_lower=0.05",
        "--config.method.ama_center=classifier",  # running means have seen no image of batch 1
    ],
    "images not moved while made": [
        "--config.method.noise_augmentation=none",
        "--config.method.noise_augment_probability=0.0",
    ],
}
_POOL = ["--config.method.noise_iterations=250", "--config.method.noise_plateau_patience=12"]
_OWN_TEMPERATURE = ["--config.method.temperature=20"]
TEN_MINUTES = {
    "lrq": ["--config.steps=1250"],
    "gdfq": ["--config.steps=1800", *_OWN_TEMPERATURE],
    "intraq": ["--config.steps=1800", *_OWN_TEMPERATURE, *_POOL],
    "hast": ["--config.steps=700", *_OWN_TEMPERATURE, *_POOL],
    "genie": [
        "--config.steps=0",
        "--config.method.noise_batches=2",
        "--config.method.noise_iterations=100",
        "--config.method.noise_plateau_patience=3",
        "--config.method.noise_generator_decay_every=3",
        "--config.method.reconstruction_iterations=900",
        "--config.method.reconstruction_learning_rate=0.01",
        "--config.method.reconstruction_step_rate=0.001",
    ],
}
"""Preset -> a schedule of 10 minutes, evaluation apart, on one processor (AMD Zen 5) for ResNet-20 at
32 px, beside one of the same size on another. A pool of 512 images, half of `fast`'s, is made in 3.6 of
them; Genie's 256, through a generator, in 3.7. How often rates fall is cut as their iterations are."""
_SLOWER = ["--config.method.student_learning_rate=2e-4"]
"""Better than the config's own 5e-4 for all but Genie, which trains no weights."""
_LEFT_OUT = {"command", "layers", "batch_norms", "histogram", "disagreements", "synthetic"}
"""Of a report: what is long, and the command with this machine's paths."""

SUITES = {
    "best": ("configs/best.py", FAST),
    "fast": ("configs/fast.py", FAST),
    "fast_parts": ("configs/fast.py", FAST_PARTS),
    "fast_ablation": (
        "configs/fast.py",
        {name: [*SHORT, *flags] for name, flags in ABLATED.items()},
    ),
    "ten_minutes": (
        "configs/r20_cifar10.py",
        {
            f"{name} W{bits}A{bits} seed {seed}{words}": [
                f"--config.method.preset={name}",
                *flags,
                *rate,
                *_bits(bits, bits),
                f"--config.seed={seed}",
            ]
            for seed in (0, 1)
            for bits in (4, 3)
            for name, flags in TEN_MINUTES.items()
            for words, rate in (("", []), (", rate 2e-4", _SLOWER))
            if not rate or name != "genie"  # which trains no weights
        },
    ),
    "ingredients": ("configs/squant.py", INGREDIENTS),
    "ingredients_depthwise": ("configs/squant.py", INGREDIENTS),
    "r20_cifar10": ("configs/r20_cifar10.py", R20),
    "r20_cifar10_ablation": (
        "configs/r20_cifar10.py",
        {
            f"{name} seed {seed}": ["--config.steps=120", *flags, f"--config.seed={seed}"]
            for seed in (0, 1)
            for name, flags in ABLATIONS.items()
        },
    ),
    "r20_cifar100": (
        "configs/r20_cifar100.py",
        {"lrq seed 0": [], "lrq ranges only": ["--config.steps=0"]},
    ),
    "digits": ("configs/digits.py", DIGITS),
    "digits_lrq": ("configs/digits_lrq.py", DIGITS),
}
"""Suite -> config and {cell: flags}."""


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
