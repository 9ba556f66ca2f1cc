"""The README.md of an export: what the model is, what was measured, what its limits are."""

from __future__ import annotations

import json
from typing import Any

from lrq_jax.data import Preprocessing


def model_card(report: dict[str, Any], preprocessing: Preprocessing) -> str:
    """Markdown text from an export's report."""
    run = report["run"]
    layers = "\n".join(
        f"| {row['layer']} | {row['kind']} | {'x'.join(map(str, row['shape']))} | "
        f"{row['weight_bits']} | {row['input_bits']} |"
        for row in report["layers"]
    )
    files = "\n".join(f"| {name} | {size:,} |" for name, size in report["files"].items())
    return f"""# {run["network"]}, W{run["weight_bits"]}A{run["act_bits"]} integers

Made by lrq_jax {report["version"]} from a trained float network, {_images(run)}.

## Accuracy

{_accuracy(run)}

## Input

{_input(report, preprocessing)}

## Files

| file | bytes |
|---|---|
{files}

`student/` holds the integers themselves. `python -m lrq_jax.verify DIR` proves that the other
files compute the same ones; `python -m lrq_jax.evaluate --model DIR --data IMAGES` measures
accuracy on any labelled images.

In float32 its weights and biases would be {report["float32_bytes"]:,} bytes.

## Agreement

{_agreement(report)}

## Speed

{_speed(report)}

## Limits

- The accuracy above was measured on the images named there and on no others.
- Below 8 bits the files are smaller, but CPUs run 8-bit arithmetic: no faster than 8 bits.
- Runs alike on x86 CPUs without VNNI: {"yes" if report["portable_without_vnni"] else "NO: pairs of products saturate there"}.
- Runtimes that fuse or drop quantizers (OpenVINO) give other codes now and then.

## Provenance

- teacher: {run["teacher_source"]["file"]}, sha256 {run["teacher_source"]["sha256"]}
- method: preset {run["preset"]}, policy {run["policy"]}, {run["steps"]} steps, seed {run["seed"]}
- versions: {", ".join(f"{name} {version}" for name, version in run["versions"].items())}
- licence: (to be filled in: that of the teacher's weights)

<details><summary>the run's settings</summary>

```json
{json.dumps(run.get("settings", {}), indent=1)}
```

</details>

## Bits per layer

| layer | kind | shape | weight bits | input bits |
|---|---|---|---|---|
{layers}
"""


def _images(run: dict[str, Any]) -> str:
    """What it was made with; runs of before `zero_shot` was reported were."""
    if run.get("zero_shot", True):
        return "without the data it was trained on"
    return f"NOT zero-shot: trained on {run['settings']['train_images']:,} real images"


def _accuracy(run: dict[str, Any]) -> str:
    if not run["images"]:
        return "Not measured: the run was given no labelled images."
    return (
        f"{run['student']['top1']:.2f} % top-1 ({run['student']['top5']:.2f} % top-5) on the "
        f"{run['images']:,} images of {run['data']}; the float teacher has "
        f"{run['teacher']['top1']:.2f} % on the same images, and both agree on "
        f"{run['agreement']:.2f} % of them."
    )


def _agreement(report: dict[str, Any]) -> str:
    """Of each runtime with the integers in `student/`."""
    if "agreement" not in report:
        return "Not measured: `python -m lrq_jax.verify DIR --record` does."
    rows = "\n".join(
        f"| {row['runtime']} | {row['images'] or '-'} | {row['different']} | {row['flips']} | "
        f"{_outcome(row)} |"
        for row in report["agreement"]
    )
    return (
        "With the integers in `student/`, on the images that `lrq_jax.verify` makes or was given:\n\n"
        "| runtime | images | logits that differ | classed otherwise | |\n|---|---|---|---|---|\n"
        f"{rows}"
    )


def _outcome(row: dict[str, Any]) -> str:
    if row.get("untried"):
        return f"not tried: {' '.join(row['untried'].split())}"
    if not row["passed"]:
        return " ".join(["FAILED", *row["fault"].split()])
    return "passed" if row["images"] else row.get("compared", "passed")


def _speed(report: dict[str, Any]) -> str:
    """Latency beside the float twin, and where."""
    if "latency" not in report:
        return "Not measured: `python -m lrq_jax.bench DIR --record` does."
    latency = report["latency"]
    rows = "\n".join(
        f"| {row['runtime']} | {row['batch']} | {row['threads']} | {row['float32'][1]:.3f} | "
        f"{row['integer'][1]:.3f} | {row['speedup']:.2f} |"
        for row in latency["timings"]
    )
    machine = latency["machine"]
    counted = (
        f"ONNX Runtime runs {latency['integer_layers']} convolutions and dense layers as integers "
        f"and {latency['float_layers']} as floats. "
        if latency["census"]
        else ""
    )
    return (
        f"{counted}Milliseconds a call (medians), beside the same network in float32, on "
        f"{machine['processor']} ({' '.join(machine['features']) or 'no features for integers'}):\n\n"
        "| runtime | batch | threads | float32 | integers | times as fast |\n"
        f"|---|---|---|---|---|---|\n{rows}"
    )


def _input(report: dict[str, Any], preprocessing: Preprocessing) -> str:
    """Of each exported file."""
    size, channels = preprocessing.size, preprocessing.channels
    order = "RGB" if channels == 3 else "grey"
    mean, std = (
        ", ".join(f"{value:g}" for value in values)
        for values in (preprocessing.mean, preprocessing.std)
    )
    resize = (
        f"Images are resized to a shorter side of {preprocessing.resize} "
        f"({preprocessing.interpolation}, antialiased) and their centre is cut out. "
        if preprocessing.resize
        else ""
    )
    batch = report["options"]["batch"]
    last, first = f"{size}, {size}, {channels}", f"{channels}, {size}, {size}"
    pixels = report["options"]["input_kind"] == "uint8"
    raw, normalised = "raw uint8 pixels, normalised inside,", "normalised float32"
    kind = raw if pixels else normalised
    inputs = {
        "model.onnx": f"`image`, {kind} `[{batch or 'batch'}, {last if pixels else first}]`",
        "model.jaxexport": f"{normalised} `[{batch or 'batch'}, {last}]`",
        "model.tflite": f"{kind} `[{batch or 1}, {last}]`; the runtime can resize the batch",
    }
    lines = [f"- {name}: {text}" for name, text in inputs.items() if name in report["files"]]
    return (
        f"{order}, {size} x {size} pixels. {resize}Normalisation: `(pixels / 255 - mean) / std` "
        f"with mean {mean} and std {std}.\n\n" + "\n".join(lines)
    ).rstrip()
