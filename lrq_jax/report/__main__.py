"""Write the page of a finished run again.

    python -m lrq_jax.report [RUN]

Every run writes `report.html` at its end; this command is for a run that another version made, or
whose page was lost. What the run kept no files for is left out, and the page says so.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lrq_jax.console import say
from lrq_jax.endings import fail, run_command
from lrq_jax.report.page import write_page
from lrq_jax.run_directory import STUDENT
from lrq_jax.writers.codes import is_student, load_student


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lrq_jax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="?", default="runs/latest", help="a finished run directory")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after a message on standard error."""
    options = _parser().parse_args(arguments)
    student = Path(options.run) / STUDENT
    try:
        preprocessing = load_student(student)[2] if is_student(student) else None
        path = write_page(options.run, preprocessing)
    except (ValueError, OSError) as error:
        return fail("lrq_jax.report", error)
    say(f"written: {path} ({path.stat().st_size:,} bytes)")
    return 0


if __name__ == "__main__":
    run_command("lrq_jax.report", main)
