"""What a line of results was measured on, when, and at which commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


def provenance() -> dict[str, Any]:
    """Machine with its load, date and commit: to be asked before anything is measured."""
    return {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(REPOSITORY),
    }


def report(entry: dict[str, Any], out: Path | None) -> None:
    """Prints a result as a line of JSON, and appends it to a file if there is one."""
    line = json.dumps(entry)
    print(line, flush=True)
    if out:
        append(line, out)


def append(line: str, out: Path) -> None:
    """Appends a line to a file, whose folder is made if needed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def machine() -> dict[str, Any]:
    """Processor model, how many of them this process may use, and the load of the last minute."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        text = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in text if x.startswith("model name")), model)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cpu": model, "usable_cpus": usable, "load_at_start": load}


def commit(repository: Path) -> str:
    """Commit of a work tree, `-dirty` with changes elsewhere than in `results/`; `unknown` without
    git."""

    def git(*words: str) -> str:
        try:
            found = subprocess.run(["git", *words], cwd=repository, capture_output=True, text=True)
        except OSError:
            return ""
        return found.stdout.strip()

    name = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    return (name or "unknown") + ("-dirty" if changed else "")
