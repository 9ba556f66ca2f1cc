"""Reads networks this project never named from ONNX files and prints what comes of them.

    pip install torch torchvision timm pytorchcv && python scripts/check_onnx_families.py

Each network is built by the package that defines it (10 classes, random weights, batch norm
statistics of random images), exported by torch with batch norms kept, read back, compared with
onnxruntime on random images, and quantized: ranges from random images, then the integer forward.
Prints the table of docs/networks.md; about two minutes a network on one CPU core.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lrq_jax.passes import QuantSpec, Student, calibrate, float_logits, freeze, frozen_logits
from lrq_jax.readers import ReaderError
from lrq_jax.readers.onnx_graph import OnnxNetwork, read_onnx

FAMILIES = (
    ("MNASNet 0.5", "torchvision", "mnasnet0_5", 64),
    ("MobileNetV3 small", "torchvision", "mobilenet_v3_small", 64),
    ("ResNeXt-50 32x4d", "torchvision", "resnext50_32x4d", 64),
    ("Wide ResNet-50-2", "torchvision", "wide_resnet50_2", 64),
    ("GoogLeNet", "torchvision", "googlenet", 64),
    ("SqueezeNet 1.1", "torchvision", "squeezenet1_1", 64),
    ("GhostNet 0.5", "timm", "ghostnet_050", 64),
    ("RepVGG-A0", "timm", "repvgg_a0", 64),
    ("DLA-34", "timm", "dla34", 64),
    ("RegNetY-200MF", "timm", "regnety_002", 64),
    ("EfficientNet-B0", "timm", "efficientnet_b0", 64),
    ("HRNet-W18 small", "timm", "hrnet_w18_small", 64),
    ("ConvNeXt atto", "timm", "convnext_atto", 64),
    ("SqueezeNext 1.0-23", "pytorchcv", "sqnxt23_w1", 224),
    ("ShuffleNet 0.25 g3", "pytorchcv", "shufflenet_g3_wd4", 224),
)
"""Family, package, its name there, side of the images in pixels."""

BITS = (8, 4)
PIXELS = (-2.0, 2.0)  # range of normalised images
IMAGES = 4


def build(package: str, name: str, size: int) -> Any:
    """The package's model in evaluation mode, its statistics those of random images."""
    import torch

    torch.manual_seed(0)
    if package == "torchvision":
        import torchvision

        extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        model = torchvision.models.get_model(name, weights=None, num_classes=10, **extra)
    elif package == "timm":
        import timm

        model = timm.create_model(name, pretrained=False, num_classes=10)
    else:
        from pytorchcv.model_provider import get_model

        model = get_model(name, num_classes=10)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the plain mean of all batches
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias, 0, 0.2)
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.rand(8, 3, size, size) * (PIXELS[1] - PIXELS[0]) + PIXELS[0])
    return model.eval()


def export(model: Any, size: int, path: Path) -> None:
    """torch's older exporter with the settings that keep batch norms."""
    import torch

    torch.onnx.export(
        model, (torch.zeros(1, 3, size, size),), str(path), dynamo=False,
        training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False,
        input_names=["input"], dynamic_axes={"input": {0: "batch"}},
    )  # fmt: skip


def reference(path: Path, images: np.ndarray) -> np.ndarray:
    """onnxruntime's logits, nothing optimised; images `[N, H, W, C]`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    fed = np.ascontiguousarray(np.moveaxis(images, -1, 1))
    return session.run(None, {"input": fed})[0].reshape(len(images), -1)


def random_images(network: OnnxNetwork, seed: int) -> np.ndarray:
    """`[N, H, W, C]`, uniform."""
    shape = (IMAGES, *network.graph.input_shape)
    return np.random.default_rng(seed).uniform(*PIXELS, shape).astype(np.float32)


def student_logits(network: OnnxNetwork, bits: int, images: np.ndarray) -> np.ndarray:
    """Logits of the integer network, its ranges calibrated on other random images."""
    spec = QuantSpec(weight_bits=bits, act_bits=bits)
    student = Student(graph=network.graph, spec=spec, input_range=PIXELS)
    variables = student.initial_variables(network.variables)
    step = jax.jit(lambda variables, images: calibrate(student, variables, images)[1])
    for seed in (1, 2):
        variables = step(variables, random_images(network, seed))
    run = jax.jit(
        lambda variables, images: frozen_logits(student, freeze(student, variables), images)
    )
    return np.asarray(run(variables, images))


def row(family: str, package: str, name: str, size: int) -> list[str]:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.onnx"
        export(build(package, name, size), size, path)
        cells = [family, f"{package} `{name}`", str(size)]
        try:
            network = read_onnx(path)
        except ReaderError as error:
            reason = re.split(r"; expected some of|, expected some: |, first node", str(error))[0]
            return [*cells, f"refused: {reason}", *["-"] * 4]
        images = random_images(network, 0)
        expected = reference(path, images)
    forward = jax.jit(lambda variables, x: float_logits(network.graph, variables, x))
    found = np.asarray(forward(network.variables, images))
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    cells += [
        f"read, {len(network.graph.layers)} layers",
        str(len(network.graph.batch_norms)),
        f"{difference:.1e}",
    ]
    for bits in BITS:
        logits = student_logits(network, bits, images)
        if not np.all(np.isfinite(logits)) or not np.ptp(logits):
            raise ValueError(f"{name} W{bits}A{bits}: found logits {logits}")
        cells.append(f"runs, {np.corrcoef(logits.ravel(), found.ravel())[0, 1]:.3f}")
    return cells


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns 1 where a network could be neither read nor refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="names in their packages; default: all")
    options = parser.parse_args(arguments)
    try:
        import torch  # noqa: F401
    except ImportError:
        print("found no torch, expected it: pip install torch torchvision timm pytorchcv")
        return 2
    warnings.simplefilter("ignore")  # torch announces the exporter's retirement on every call
    head = ["family", "from", "pixels", "result", "batch norms", "float forward, max difference"]
    head += [f"W{bits}A{bits}" for bits in BITS]
    print("| " + " | ".join(head) + " |", flush=True)
    print("|" + "---|" * len(head), flush=True)
    failed = 0
    for family in FAMILIES:
        if options.only and family[2] not in options.only:
            continue
        start = time.monotonic()
        try:
            print("| " + " | ".join(row(*family)) + " |", flush=True)
        except Exception as error:  # one network's failure must not hide the others' results
            failed = 1
            print(f"{family[2]}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        print(f"{family[2]}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
