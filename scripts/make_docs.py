"""Writes the pages of the docs that are made from code and logs.

    python scripts/make_docs.py

`docs/configuration.md` from the config's fields, `docs/results.md` from `results/*.jsonl`. A test
fails where they are not current.
"""

from __future__ import annotations

import json
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
        "says so (`before mixup`, `rate 5e-4`, `white noise`) was of an earlier recipe, and the same",
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


PAGES = {"configuration.md": markdown, "results.md": results_page}
"""Page -> what makes it."""


def main() -> None:
    """Writes the pages."""
    for name, make in PAGES.items():
        (REPOSITORY / "docs" / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
