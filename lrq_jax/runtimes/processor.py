"""The processor that runtimes run on, and what of it decides how they multiply."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8")
VNNI = {"avx_vnni", "avx512_vnni", "amx_int8"}


def machine() -> dict[str, Any]:
    """Processor model and those of its features that integer kernels use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    flags = set(fields.get("flags", "").split())
    return {
        "processor": fields.get("model name", platform.processor() or platform.machine()),
        "features": [flag for flag in FEATURES if flag in flags],
    }


def saturates_pairs() -> bool:
    """Whether ONNX Runtime may add pairs of 8-bit products in int16 here: x86 without VNNI."""
    known = set(machine()["features"])
    return platform.machine().lower() in ("x86_64", "amd64") and not known & VNNI
