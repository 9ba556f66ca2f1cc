"""An export's directory: its report and its card, and what is measured of it later."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from lrq_jax.passes import Student
from lrq_jax.report_file import REPORT, missing_fields, read_object, write_json
from lrq_jax.writers.codes import load_student, provenance, student_sha256
from lrq_jax.writers.model_card import model_card
from lrq_jax.writers.tables import float32_bytes, is_portable, layer_table, tensor_table
from lrq_jax.writers.targets import FILES, STUDENT

CARD = "README.md"
FORMAT = "lrq_jax export"
_FIELDS = {
    "version": str, "options": dict, "run": dict, "layers": list, "tensors": list,
    "portable_without_vnni": bool, "float32_bytes": int, "files": dict,
}  # fmt: skip
_LICENCE = re.compile("^- licence: .*$", re.MULTILINE)
"""The line of a card that a person fills in."""
_OPTIONS = ("weight_storage", "batch", "input_kind")


def read_export(directory: str | Path) -> dict[str, Any]:
    """An export's report.

    Raises:
      FileNotFoundError: no report there.
      ValueError: it is damaged, or not an export's.
    """
    path = Path(directory) / REPORT
    if not path.is_file():
        raise FileNotFoundError(f"found no {REPORT} in {str(directory)!r}, expected an export")
    report = read_object(path)
    if report.get("format") != FORMAT:
        raise ValueError(
            f"{path}: found format {report.get('format')!r}, expected {FORMAT!r}; "
            "python -m lrq_jax.export makes one of a run"
        )
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(report.get(name), kind)]
    if not wrong:
        wrong = [f"options/{name}" for name in _OPTIONS if name not in report["options"]]
        wrong += [f"run/{name}" for name in missing_fields(report["run"])]
    if wrong:
        raise ValueError(
            f"{path}: found no usable {', '.join(wrong)}, expected an export's report as it was "
            "written; export again"
        )
    return report


def contents(student: Student, codes: dict[str, Any]) -> dict[str, Any]:
    """What a report says of the integers themselves; JSON-ready."""
    return {
        "layers": layer_table(student, codes),
        "tensors": tensor_table(student, codes),
        "portable_without_vnni": is_portable(student, codes),
        "float32_bytes": float32_bytes(student, codes),
    }


def sizes(directory: Path) -> dict[str, int]:
    """Bytes of an export's files."""
    files = {path.name: path.stat().st_size for path in _files(directory)}
    student = [path for path in (directory / STUDENT).rglob("*") if path.is_file()]
    return {**files, f"{STUDENT}/": sum(path.stat().st_size for path in student)}


def hashes(directory: Path, codes: dict[str, Any]) -> dict[str, str]:
    """sha256 of an export's files, and of what its student says.

    Args:
      directory: of the export.
      codes: of its student.
    """
    files = {path.name: sha256(path) for path in _files(directory)}
    return {**files, f"{STUDENT}/": student_sha256(directory / STUDENT, codes)}


def run_sha256(run: dict[str, Any]) -> str:
    """Of what a run reported, figures included, which nothing else in an export can confirm."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


def claims(directory: Path, student: Student) -> dict[str, Any]:
    """The part of a run's report that an export's student says too."""
    spec = ("weight_bits", "act_bits", "policy", "placement")
    known = provenance(directory / STUDENT)
    told = ("teacher_sha256", "preset", "seed")
    return {
        **{name: getattr(student.spec, name) for name in spec},
        **{name: known[name] for name in told if name in known},
    }


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _files(directory: Path) -> list[Path]:
    return [path for name in sorted(FILES.values()) if (path := directory / name).is_file()]


def record(directory: str | Path, **findings: Any) -> None:
    """Puts findings into an export's report, and writes its card anew but for the licence line.

    Rows of `agreement`, and timings of `latency` from the same machine, stay for the runtimes that
    the findings do not hold.

    Args:
      directory: of `lrq_jax.export`.
      **findings: JSON-ready; `census`, `agreement` and `latency` are shown on the card.

    Raises:
      FileNotFoundError: no export there.
      ValueError: its report is damaged.
    """
    directory = Path(directory)
    report = read_export(directory)
    if "agreement" in findings:
        findings["agreement"] = _merged(report.get("agreement", []), findings["agreement"])
    if "latency" in findings and "latency" in report:
        findings["latency"] = _merged_latency(report["latency"], findings["latency"])
        findings["census"] = findings["latency"]["census"]
    report |= findings
    _, _, preprocessing = load_student(directory / STUDENT)
    write_json(directory / REPORT, report)
    card, text = directory / CARD, model_card(report, preprocessing)
    if card.is_file() and (filled := _LICENCE.search(card.read_text(encoding="utf-8"))):
        text = _LICENCE.sub(lambda _: filled[0], text)
    card.write_text(text, encoding="utf-8")


def _merged(earlier: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, behind those of other runtimes, or files: a name's first word, without version."""
    runtimes = {row["runtime"].split()[0] for row in rows}
    return [row for row in earlier if row["runtime"].split()[0] not in runtimes] + rows


def _merged_latency(earlier: dict[str, Any], latency: dict[str, Any]) -> dict[str, Any]:
    """What `bench` returned, with what it had returned of other runtimes on this machine."""
    if earlier["machine"] != latency["machine"]:
        return latency
    merged = earlier | latency
    if not latency["census"]:  # ONNX Runtime was not timed this time
        for name in ("census", "integer_layers", "float_layers"):
            merged[name] = earlier[name]
    for name in ("bytes", "versions"):
        merged[name] = earlier[name] | latency[name]
    merged["timings"] = _merged(earlier["timings"], latency["timings"])
    return merged
