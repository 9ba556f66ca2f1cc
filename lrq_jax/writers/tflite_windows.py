"""Windows over images in a .tflite file: padding by its two names or by hand, and sums."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lrq_jax.graph import layers as L
from lrq_jax.writers.tflite_codes import CodesWriter


def window_padding(layer: L.Conv | L.MaxPool, size: Sequence[int], reach: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:  # fmt: skip
    """The runtime's name of the layer's padding, and what to pad by hand before it."""
    same, amounts = [], []
    for n, width, stride, (before, after) in zip(
        size, reach, layer.strides, layer.padding, strict=True
    ):
        outputs = (n + before + after - width) // stride + 1
        read = max((outputs - 1) * stride + width - n - before, 0)  # of `after`; the rest never is
        total = max((math.ceil(n / stride) - 1) * stride + width - n, 0)
        same.append(
            outputs == math.ceil(n / stride) and (before, read) == (total // 2, -(-total // 2))
        )
        amounts.append((before, read))
    if all(same):
        return "SAME", []
    return "VALID", amounts if any(map(any, amounts)) else []


def subsampling(layer: L.Slice, shape: Sequence[int]) -> tuple[int, int] | None:
    """Strides of a convolution of one tap that keeps what the layer keeps of an image `[H, W, C]`,
    if there is one. XNNPACK has no strided slice: one cuts the network into pieces of its own."""
    height, width, channels = (range(n)[s] for n, s in zip(shape, layer.slices, strict=True))
    *size, depth = shape
    whole = channels == range(depth) and all(
        kept == range(0, n, kept.step) for kept, n in zip((height, width), size, strict=True)
    )
    strides = (height.step, width.step)
    return strides if whole and max(strides) > 1 else None


def padded(tensor: str, name: str, amounts: Sequence[tuple[int, int]], writer: CodesWriter, *,
            lowest: bool = False) -> int:  # fmt: skip
    """An image's codes with codes of 0.0 (or the lowest code) around, by height and width."""
    pairs = [(0, 0), *amounts, (0, 0)]
    shape = [n + sum(pair) for n, pair in zip(writer.shape(tensor), pairs[1:], strict=True)]
    unit, zero = writer.meaning(tensor)
    made = writer.builder.tensor(f"{name}.padded", shape, "int8", (unit, zero))
    inputs = [writer.codes[tensor], writer.integers(f"{name}.amounts", pairs)]
    zero_point = writer.parameters(tensor).zero_point
    if not lowest or zero_point == 0:
        return writer.node("PAD", inputs, made)
    value = np.full(1, zero - zero_point, np.int8)
    inputs.append(writer.builder.constant(f"{name}.value", value, scale=unit.reshape(1), zero=zero))
    return writer.node("PADV2", inputs, made)


def window_sum(layer: L.AvgPool, source: str, shape: Sequence[int], writer: CodesWriter) -> int:
    """Float sums `shape` of a tensor's real values over each window, tap by tap in row order."""
    name, image = layer.name, writer.real(source)
    *size, channels = writer.shape(source)
    if any(map(any, layer.padding)):
        size = [n + sum(pair) for n, pair in zip(size, layer.padding, strict=True)]
        amounts = writer.integers(f"{name}.amounts", [(0, 0), *layer.padding, (0, 0)])
        image = writer.floats("PAD", [image, amounts], f"{name}.padded", (*size, channels))
    total: Any = None
    for tap in itertools.product(*map(range, layer.window)):
        at = f"{name}.{tap[0]}.{tap[1]}"
        ends = [
            first + (n - 1) * stride + 1
            for first, n, stride in zip(tap, shape, layer.strides, strict=False)
        ]
        limits = {
            "begin": [0, *tap, 0],
            "end": [0, *ends, channels],
            "step": [1, *layer.strides, 1],
        }
        inputs = [image, *(writer.integers(f"{at}.{end}", value) for end, value in limits.items())]
        masks = {"beginMask": 1, "endMask": 1}  # all of the batch
        values = writer.floats("STRIDED_SLICE", inputs, at, shape, **masks)
        if total is None:
            total = values
        else:
            total = writer.floats("ADD", [total, values], f"{at}.sum", shape)
    return total
