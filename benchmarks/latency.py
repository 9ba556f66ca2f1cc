"""Latency of integer files beside their float twins, network by network, on this machine.

    LRQ_ASSETS=DIR python benchmarks/latency.py --out results/latency.jsonl

Each network is exported at W4A4 for ONNX Runtime and LiteRT and timed by `lrq_jax.bench`, one line
of OUT each; networks already there are skipped. Ratios hold for the processor named in the line:
those with VNNI multiply 8-bit integers several times faster than those without.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from provenance import append
from subjects import SUBJECTS, Subject

from lrq_jax.bench import bench, table
from lrq_jax.data import Preprocessing
from lrq_jax.export import export_student
from lrq_jax.report_file import REPORT, missing_fields
from lrq_jax.writers.codes import save_student

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
NAMES = (
    "ResNet-20",
    "MobileNetV2 x0.5",
    "mobilenet_v2 224px",
    "resnet18 64px",
    "resnet50 64px",
    "resnet18 224px",
    "resnet50 224px",
)


def exported(subject: Subject, directory: Path) -> Path:
    """An export of the subject at W4A4."""
    student, variables = subject.student(subject.ranges(), weight_bits=4, act_bits=4)
    preprocessing: Preprocessing = subject.preprocessing
    save_student(
        directory / "run" / "student", student, variables, preprocessing=preprocessing,
        provenance={},
    )  # fmt: skip
    about = {
        **dict.fromkeys(missing_fields({})), "settings": {}, "teacher_sha256": "",
        "network": subject.name, "weight_bits": 4, "act_bits": 4, "preset": "none", "policy": "U",
        "steps": 0, "seed": 0, "images": 0, "versions": {},
        "teacher_source": {"file": subject.source, "sha256": ""},
    }  # fmt: skip
    (directory / "run" / REPORT).write_text(json.dumps(about), encoding="utf-8")
    export_student(directory / "run", directory / "out", targets=("onnx", "litert"))
    return directory / "out"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/latency.jsonl"))
    parser.add_argument("--only", nargs="*", default=NAMES, help="names of networks")
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 32])
    return parser


def main() -> int:
    """Times the networks not in OUT yet."""
    options = _parser().parse_args()
    assets = Path(os.environ.get("LRQ_ASSETS", ASSETS))
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = {json.loads(line)["subject"] for line in lines}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        if name in done:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            directory = exported(SUBJECTS[name](assets), Path(temporary))
            result = bench(directory, batches=tuple(options.batch))
        load = round(os.getloadavg()[0], 1)
        when = time.strftime("%Y-%m-%d", time.gmtime())
        entry = {"subject": name, "date": when, "load": load, **result}
        append(json.dumps(entry), options.out)
        print(table(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
