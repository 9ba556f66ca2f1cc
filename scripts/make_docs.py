"""Writes the pages of the docs, and the part of the README, that are made from code and logs.

    python scripts/make_docs.py

`docs/configuration.md` from the config's fields, `docs/results.md` and the README's table of preset
`fast` from `results/*.jsonl`. A test fails where they are not current.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from lrq_jax.reference import markdown

REPOSITORY = Path(__file__).resolve().parents[1]


def results_page() -> str:
    """Every logged run: what it reached, and the command that repeats it."""
    lines = [
        "# Results",
        "",
        "Every run logged in `results/`, made into this page by `python scripts/make_docs.py`. Top-1",
        "in percent on all images after the last step; no step, seed or run was selected on them. Minutes",
        "are wall time on the machine named; with a star those of images taken from another run are not",
        "in it. A run is repeated by its command at its commit: a run whose name",
        "says so (`before mixup`, `rate 5e-4`, `white noise`, `rounded to the nearest`, at 3 bits and fewer",
        "`1,000 steps`) was of an earlier recipe, and the same",
        "command now runs today's. Where a command names a teacher or images, it is by the last part",
        "of their path. Figures vary a little from one processor to another, as sums are rounded.",
    ]
    for path in sorted((REPOSITORY / "results").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if "student" in row and "command" in row]
        if not rows:
            continue
        lines += ["", f"## {path.stem}", "", "| run | bits | placement | teacher | student | drop | images | minutes | commit |"]  # fmt: skip
        lines += [
            "|---|---|---|---|---|---|---|---|---|",
            *(_row(row) for row in rows),
            "",
            "```text",
        ]
        lines += dict.fromkeys(_command(row) for row in rows)
        lines += ["```", "", f"Machine: {', '.join(sorted({row['machine'] for row in rows}))}."]
    return "\n".join(lines) + "\n"


def _row(row: dict[str, Any]) -> str:
    number = lambda value: "-" if value is None else f"{value:.2f}"  # noqa: E731
    minutes = f"{sum(row['wall_seconds'].values()) / 60:.1f}"
    if row.get("settings", {}).get("pool_path"):
        minutes += "*"
    return (
        f"| {row['cell']} | W{row['weight_bits']}A{row['act_bits']} | {row['placement']} | "
        f"{number(row['teacher']['top1'])} | {number(row['student']['top1'])} | "
        f"{number(row['drop'])} | {row['images']:,} | {minutes} | {row.get('commit', '-')} |"
    )


def _command(row: dict[str, Any]) -> str:
    """The logged one, with the files it was given by name."""
    settings = row.get("settings", {})
    flags = [
        f"--config.{field}={settings[name]}"
        for name, field in (
            ("teacher_path", "teacher.path"),
            ("data_path", "data.path"),
            ("train_path", "data.train_path"),
        )
        if settings.get(name) not in (None, "", "digits")
        and f"--config.{field}=" not in row["command"]
    ]
    return " ".join([row["command"], *flags])


TEACHERS = {
    "akamaster": "ResNet-20, CIFAR-10 (akamaster's, 91.73 %)",
    "forge": "ResNet-20, CIFAR-10 (another, 92.13 %)",
    "forge100": "ResNet-20, CIFAR-100 (68.16 %)",
    "mbv2_forge": "MobileNetV2 x0.5, CIFAR-10 (91.74 %)",
}
"""Label of `run_experiments.py --suite fast` -> the README's row."""
CELLS = ("U W5A5", "U W4A4", "U W3A3", "R W4A4", "R W3A3", "R W2A4")
RECIPES = {"": "", ", 1,000 steps": "‡", ", rounded to the nearest": "†", ", white noise": "*"}
"""What the name of a run ends in -> the mark of its figure, today's recipe first."""


def drops_of_fast() -> str:
    """Drops of preset `fast`, a row a teacher: of today's recipe, else of the newest there is."""
    lines = ["| teacher | " + " | ".join(CELLS) + " |", "|---" * (1 + len(CELLS)) + "|"]
    for label, teacher in TEACHERS.items():
        log = REPOSITORY / "results" / f"fast_{label}.jsonl"
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        drops = {row["cell"]: row["drop"] for row in rows}
        lines.append(f"| {teacher} | " + " | ".join(_drop(cell, drops) for cell in CELLS) + " |")
    return "\n".join(lines)


def _drop(cell: str, drops: dict[str, float]) -> str:
    """Mean and standard deviation of three seeds and more, else each with its seed."""
    for suffix, mark in RECIPES.items():
        pattern = re.compile(rf"{re.escape(cell)} seed (\d+){re.escape(suffix)}")
        found = {int(m[1]): drop for name, drop in drops.items() if (m := pattern.fullmatch(name))}
        if len(found) > 2:
            mean, spread = statistics.mean(found.values()), statistics.stdev(found.values())
            return f"{mean:.2f} +- {spread:.2f} ({len(found)} seeds){mark}"
        if found:
            return ", ".join(
                f"{drop:.2f}{mark}" + (f" (seed {seed})" if seed or len(found) > 1 else "")
                for seed, drop in sorted(found.items())
            )
    return ""


BEGINS, ENDS = "<!-- made by scripts/make_docs.py -->\n", "\n<!-- end -->"


def readme() -> str:
    """The README as it is, its made part made again."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    before, rest = text.split(BEGINS)
    return before + BEGINS + "\n" + drops_of_fast() + "\n" + ENDS + rest.split(ENDS, 1)[1]


PAGES = {"configuration.md": markdown, "results.md": results_page}
"""Page -> what makes it."""


def main() -> None:
    """Writes the pages and the README."""
    for name, make in PAGES.items():
        (REPOSITORY / "docs" / name).write_text(make(), encoding="utf-8")
    (REPOSITORY / "README.md").write_text(readme(), encoding="utf-8")


if __name__ == "__main__":
    main()
