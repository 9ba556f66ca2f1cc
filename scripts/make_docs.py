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
        "in percent on all images after the last step; nothing was selected on them. Minutes are wall",
        "time on the machine named.",
    ]
    for path in sorted((REPOSITORY / "results").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if "student" in row and "command" in row]
        if not rows:
            continue
        lines += ["", f"## {path.stem}", "", "| run | bits | placement | teacher | student | drop | images | minutes |"]  # fmt: skip
        lines += ["|---|---|---|---|---|---|---|---|", *(_row(row) for row in rows), "", "```text"]
        lines += [row["command"] for row in rows]
        lines += ["```", "", f"Machine: {', '.join(sorted({row['machine'] for row in rows}))}."]
    return "\n".join(lines) + "\n"


def _row(row: dict[str, Any]) -> str:
    number = lambda value: "-" if value is None else f"{value:.2f}"  # noqa: E731
    minutes = sum(row["wall_seconds"].values()) / 60
    return (
        f"| {row['cell']} | W{row['weight_bits']}A{row['act_bits']} | {row['placement']} | "
        f"{number(row['teacher']['top1'])} | {number(row['student']['top1'])} | "
        f"{number(row['drop'])} | {row['images']:,} | {minutes:.1f} |"
    )


PAGES = {"configuration.md": markdown, "results.md": results_page}
"""Page -> what makes it."""


def main() -> None:
    """Writes the pages."""
    for name, make in PAGES.items():
        (REPOSITORY / "docs" / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
