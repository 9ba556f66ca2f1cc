"""Whether ONNX Runtime gives our logits to the bit: networks x bits x policies x storages.

    LRQ_ASSETS=DIR python benchmarks/onnx_exactness.py --out results/onnx_exactness.jsonl

Real teachers see 2,000 images, published topologies with random weights 256 synthetic ones of the
size in their name. Each finished cell is one line of OUT; cells already there are skipped, so the
command can be repeated until it is done. Ranges are the float network's smallest and largest
values: accuracies here are no results of a method, only equal or not.

`identical` is that of a plain session. On an x86 processor without VNNI pairs of 8-bit products
saturate there, in files that `portable_without_vnni` is false of; `identical_wide_pairs` is that of a
session with the runtime's option for such processors.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from provenance import append
from subjects import SUBJECTS, Subject

from lrq_jax.bench import FLOAT_OPERATORS, INTEGER_OPERATORS
from lrq_jax.runtimes import Reference
from lrq_jax.runtimes.batches import in_batches
from lrq_jax.runtimes.onnx_runtime import OnnxRunner
from lrq_jax.runtimes.processor import machine
from lrq_jax.writers.codes import student_codes
from lrq_jax.writers.onnx_float import onnx_float_twin
from lrq_jax.writers.onnx_model import WEIGHT_STORAGES, onnx_model
from lrq_jax.writers.tables import is_portable

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
BITS, POLICIES = (4, 5, 8, 3), ("U", "R")


def measure(subject: Subject, ranges: dict[str, tuple[float, float]], bits: int, policy: str) -> dict[str, Any]:  # fmt: skip
    """One cell: all storages of one student."""
    student, variables = subject.student(ranges, weight_bits=bits, act_bits=bits, policy=policy)
    codes = student_codes(student, variables)
    images = subject.normalised(subject.pixels)
    ours = in_batches(Reference(student, codes).logits, images)
    result = {
        "images": subject.images,
        "distinct_logits": len(np.unique(ours, axis=0)),
        "portable_without_vnni": is_portable(student, codes),
        "float32_bytes": onnx_float_twin(student, codes).ByteSize(),
        "storages": {},
    }
    top1 = {"ours": _top1(ours, subject.labels)}
    for storage in WEIGHT_STORAGES:
        file = onnx_model(student, codes, metadata={}, weight_storage=storage).SerializeToString()
        runner = OnnxRunner(file, threads=1)
        theirs = in_batches(runner.logits, images)
        census = runner.census()
        found = {
            "bytes": len(file),
            "identical": bool(np.array_equal(ours, theirs)),
            "images_that_differ": int((ours != theirs).any(-1).sum()),
            "integer_layers": sum(census.get(kind, 0) for kind in INTEGER_OPERATORS),
            "float_layers": sum(census.get(kind, 0) for kind in FLOAT_OPERATORS),
        }
        if not found["identical"]:
            wide = OnnxRunner(file, threads=1, wide_pairs=True)
            theirs = in_batches(wide.logits, images)
            found["identical_wide_pairs"] = bool(np.array_equal(ours, theirs))
        top1[storage] = _top1(theirs, subject.labels)
        result["storages"][storage] = found
    if len(subject.labels):
        result["top1"] = top1
    return result


def _top1(logits: np.ndarray, labels: np.ndarray) -> float | None:
    right = logits[: len(labels)].argmax(-1) == labels
    return round(100 * float(right.mean()), 4) if len(labels) else None


def markdown(lines: list[str]) -> str:
    """The finished cells as a table: images identical in a plain session (and under the option for
    processors without VNNI, where that differs), and the size of the UINT4 file against the int8 one.
    """
    cells = {cell["cell"]: cell for cell in map(json.loads, lines)}
    names = dict.fromkeys(name.rsplit(" ", 2)[0] for name in cells)
    columns = [f"W{bits}A{bits} {policy}" for bits in BITS for policy in POLICIES]
    rows = [f"| network | images | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name in names:
        found = [cells.get(f"{name} {column}") for column in columns]
        images = next(cell["images"] for cell in found if cell)
        rows.append(f"| {name} | {images} | {' | '.join(map(_outcome, found))} |")
    return "\n".join(rows)


def _outcome(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "not run"
    storages = cell["storages"]
    share = storages["uint4"]["bytes"] / storages["int8"]["bytes"]
    if any(storage["float_layers"] for storage in storages.values()):
        return "FLOATS"
    differ = max(storage["images_that_differ"] for storage in storages.values())
    if not differ:
        return f"all ({share:.3f})"
    wide = all(s["identical"] or s["identical_wide_pairs"] for s in storages.values())
    return f"{differ} differ; {'all' if wide else 'DIFFER'} with wide pairs ({share:.3f})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/onnx_exactness.jsonl"))
    parser.add_argument("--only", nargs="*", help="names of networks; default: all")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no cell after so long")
    parser.add_argument("--table", action="store_true", help="print OUT as a table, run nothing")
    return parser


def main() -> int:
    """Runs the missing cells; returns 1 if any line of OUT is not identical."""
    options = _parser().parse_args()
    start = time.monotonic()
    assets = Path(os.environ.get("LRQ_ASSETS", ASSETS))
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    if options.table:
        print(markdown(lines))
        return 0
    done = {json.loads(line)["cell"] for line in lines}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "onnx", "onnxruntime")}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.only or SUBJECTS:
        cells = {f"{name} W{b}A{b} {p}": (b, p) for b in BITS for p in POLICIES}
        cells = {cell: what for cell, what in cells.items() if cell not in done}
        if not cells:
            continue
        subject = SUBJECTS[name](assets)
        ranges = subject.ranges()
        for cell, (bits, policy) in cells.items():
            if time.monotonic() - start > 60 * options.minutes:
                print("out of time: run again to go on")
                return 1
            clock = time.monotonic()
            entry = {"cell": cell, **measure(subject, ranges, bits, policy)}
            entry |= {"source": subject.source, "machine": machine(), "versions": versions}
            entry["seconds"] = round(time.monotonic() - clock, 1)
            append(json.dumps(entry), options.out)
            lines.append(json.dumps(entry))
            print(cell, json.dumps(entry["storages"]), f"{entry['seconds']} s", flush=True)
    storages = [s for line in lines for s in json.loads(line)["storages"].values()]
    same = [s["identical"] or s["identical_wide_pairs"] for s in storages]
    floats = sum(s["float_layers"] for s in storages)
    print(f"{sum(same)} of {len(same)} files identical, {floats} float convolutions")
    return 0 if all(same) and not floats else 1


if __name__ == "__main__":
    sys.exit(main())
