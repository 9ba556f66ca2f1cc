"""report.json, of a finished run and of an export: read and written without what made it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

CONFIG, REPORT = "config.json", "report.json"
_RUN = ("network", "weight_bits", "act_bits", "policy", "preset", "steps", "seed", "images",
        "data", "teacher", "student", "drop", "agreement", "settings", "versions",
        "teacher_source", "teacher_sha256")  # fmt: skip
"""What a run always reports and others read; the figures are null where nothing was measured."""


def missing_fields(run: dict[str, Any]) -> list[str]:
    """Fields that every run's report has and this one lacks."""
    return [name for name in _RUN if name not in run]


def temporary_path(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(f".{path.name}.new")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON through a temporary file, so that a killed process leaves the old one."""
    temporary = temporary_path(path)
    temporary.write_text(json.dumps(value, indent=1, sort_keys=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      FileNotFoundError: no file there.
      ValueError: it holds something else; names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: found no readable JSON ({error}), expected the file as lrq_jax wrote it; "
            "copy or make it again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}: found a JSON {type(value).__name__}, expected an object as lrq_jax wrote it; "
            "copy or make it again"
        )
    return value


def read_report(path: str | Path) -> dict[str, Any]:
    """The report of a finished run, or of an export: what its run reported.

    Raises:
      FileNotFoundError: no finished run there.
      ValueError: its report cannot be read or lacks what every report has; names the file.
    """
    file = Path(path) / REPORT
    if not file.is_file():
        state = "an unfinished run" if (Path(path) / CONFIG).is_file() else "no run"
        raise FileNotFoundError(
            f"found {state} at {str(path)!r}, expected the directory of a finished one, with a "
            f"{REPORT}; python -m lrq_jax.main --workdir={path} makes or finishes it"
        )
    report = read_object(file)
    run = report.get("run", report)  # an export's report holds its run's
    if not isinstance(run, dict):
        raise ValueError(f"{file}: found {type(run).__name__} as 'run', expected a run's report")
    if lacking := missing_fields(run):
        raise ValueError(
            f"{file}: found no {', '.join(lacking)}, expected the report of a finished run; "
            f"remove it and python -m lrq_jax.main --workdir={path}, with the run's own settings, "
            "writes it again"
        )
    return run
