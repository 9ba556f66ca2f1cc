"""Finished runs side by side: one table, and one page.

    python -m lrq_jax.compare RUN RUN ... [--out compare.html]

The table says what was reported and, run by run, which settings differ from the first run's.
Accuracies are comparable only where teacher and images are the same: the page and the command say
where they are not. Exits 0, or 2 after a message where a run cannot be read.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrq_jax.config import differences
from lrq_jax.console import coloured, say
from lrq_jax.endings import fail, run_command
from lrq_jax.paths import make_parents
from lrq_jax.report.page import render
from lrq_jax.report_file import read_report

COLUMNS = {
    "network": "network",
    "weight_bits": "W",
    "act_bits": "A",
    "policy": "policy",
    "placement": "placement",
    "preset": "preset",
    "steps": "steps",
    "seed": "seed",
    "teacher/top1": "teacher, %",
    "student/top1": "student, %",
    "drop": "drop, points",
    "agreement": "same class, %",
    "images": "images",
    "size/bytes": "bytes",
}
"""Field of report.json -> heading."""

_SETTINGS_SHOWN = {"student.weight_bits", "student.act_bits", "student.policy", "student.placement",
                   "preset", "method.steps", "seed"}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs beside the first of them.

    Attributes:
      names: of the runs, as given.
      reports: their `report.json`.
      changes: per run, `field: first -> its own` of settings the columns do not show.
      warnings: why figures may not be compared; empty where they may.
    """

    names: tuple[str, ...]
    reports: tuple[dict[str, Any], ...] = dataclasses.field(repr=False)
    changes: tuple[tuple[str, ...], ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        rows = [("run", *COLUMNS.values())]
        rows += [
            (name, *(_text(_value(report, path)) for path in COLUMNS))
            for name, report in zip(self.names, self.reports, strict=True)
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def compare(runs: Sequence[str | Path]) -> Comparison:
    """Reads finished runs and finds what differs.

    Args:
      runs: at least two finished run directories, or exports.

    Raises:
      FileNotFoundError: one of them is no finished run.
      ValueError: fewer than two.
    """
    if len(runs) < 2:
        raise ValueError(
            f"found {len(runs)} runs, expected at least two finished run directories; "
            "python -m lrq_jax.main --workdir=DIR makes one"
        )
    reports = tuple(read_report(run) for run in runs)
    first = reports[0]
    changes = tuple(
        tuple(
            line
            for line in differences(first["settings"], report["settings"])
            if line.partition(":")[0] not in _SETTINGS_SHOWN
        )
        for report in reports
    )
    warnings = [
        f"{what}: found {len(found)} different ones, so the accuracies are not comparable"
        for what, found in (
            ("teacher", {report["teacher_sha256"] for report in reports}),
            ("images", {(report["data"], report["images"]) for report in reports}),
        )
        if len(found) > 1
    ]
    return Comparison(
        names=tuple(str(run) for run in runs),
        reports=reports,
        changes=changes,
        warnings=tuple(warnings),
    )


def write_comparison(comparison: Comparison, path: str | Path) -> None:
    """Writes the page: one self-contained file."""
    columns = [
        (
            heading,
            path,
            2
            if any(isinstance(_value(report, path), float) for report in comparison.reports)
            else None,
        )
        for path, heading in COLUMNS.items()
    ]
    # A run of another version may lack a field: None shows as "-".
    shown = [{path: _value(report, path) for path in COLUMNS} for report in comparison.reports]
    text = render("compare.html", comparison=comparison, columns=columns, shown=shown)
    Path(path).write_text(text, encoding="utf-8")


def _value(report: dict[str, Any], path: str) -> Any:
    """A field of a report, None where its version had none."""
    value: Any = report
    for part in path.split("/"):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lrq_jax.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", help="finished run directories, the first the baseline")
    parser.add_argument("--out", default="compare.html", help="page to write")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after a message on standard error."""
    options = _parser().parse_args(arguments)
    try:
        comparison = compare(options.runs)
        make_parents(options.out, "--out")
        write_comparison(comparison, options.out)
    except (ValueError, OSError) as error:
        return fail("lrq_jax.compare", error)
    say(str(comparison))
    for name, changes in zip(comparison.names[1:], comparison.changes[1:], strict=True):
        for change in changes:
            say(f"{name}: {change}")
    for warning in comparison.warnings:
        say(coloured(f"careful: {warning}", "yellow"))
    say(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    run_command("lrq_jax.compare", main)
