"""Windows over images in a .tflite file: its two names of padding, and taps as slices."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def sliced(source: int, name: str, shape: Sequence[int], begin: Sequence[int],
            end: Sequence[int], step: Sequence[int], writer: CodesWriter) -> int:  # fmt: skip
    constants = [
        writer.integers(f"{name}.{end_name}", [first, *values])
        for end_name, first, values in (("begin", 0, begin), ("end", 0, end), ("step", 1, step))
    ]
    return writer.floats(
        "STRIDED_SLICE", [source, *constants], name, shape, beginMask=1, endMask=1
    )  # the masks: all of the batch
