"""An export's directory: its report and its card, and what is measured of it later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lrq_jax.report_file import REPORT, write_json
from lrq_jax.writers.codes import load_student
from lrq_jax.writers.model_card import model_card
from lrq_jax.writers.targets import STUDENT

CARD = "README.md"


def record(directory: str | Path, **findings: Any) -> None:
    """Puts findings into an export's report, and writes its card anew.

    Args:
      directory: of `lrq_jax.export`.
      **findings: JSON-ready; `census`, `agreement` and `latency` are shown on the card.

    Raises:
      FileNotFoundError: no export there.
    """
    directory = Path(directory)
    path = directory / REPORT
    if not path.exists():
        raise FileNotFoundError(f"found no {REPORT} in {str(directory)!r}, expected an export")
    report = json.loads(path.read_text(encoding="utf-8")) | findings
    _, _, preprocessing = load_student(directory / STUDENT)
    write_json(path, report)
    (directory / CARD).write_text(model_card(report, preprocessing), encoding="utf-8")
