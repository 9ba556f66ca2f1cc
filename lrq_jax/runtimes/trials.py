"""Images to try runtimes on: made, not found, and as hostile as pixels and codes can be."""

from __future__ import annotations

from typing import Any

import numpy as np

from lrq_jax.data import Preprocessing
from lrq_jax.data.pixels import normalise
from lrq_jax.graph import INPUT
from lrq_jax.passes import Student
from lrq_jax.runtimes.base import Runner
from lrq_jax.runtimes.batches import in_batches as in_batches

HOSTILE_IMAGES = 64


def synthetic_pixels(shape: tuple[int, ...], count: int) -> np.ndarray:
    """uint8 `[count, H, W, C]`: extremes first, then flat, smooth, checkered and random images."""
    rng = np.random.default_rng(0)
    height, width, channels = shape
    made = [np.zeros(shape), np.full(shape, 255.0)]
    made += [
        np.where(np.arange(channels) == c, 255.0, 0.0) * np.ones(shape) for c in range(channels)
    ]
    rows, columns = np.mgrid[:height, :width]
    made += [np.repeat(255.0 * ((rows + columns) % 2)[..., None], channels, axis=2)]
    y, x = rows[..., None] / height, columns[..., None] / width
    while len(made) < count:
        kind = len(made) % 3
        if kind == 0:
            made.append(rng.integers(0, 256, shape))
        elif kind == 1:
            made.append(np.ones(shape) * rng.integers(0, 256, channels))
        else:
            phase, turns = rng.uniform(0, 2 * np.pi, channels), rng.uniform(-4, 4, (2, channels))
            wave = np.sin(2 * np.pi * (turns[0] * y + turns[1] * x) + phase)
            made.append(127.5 + rng.uniform(20, 127.5) * wave)
    return np.rint(made[:count]).clip(0, 255).astype(np.uint8)


def hostile_pixels(shape: tuple[int, ...]) -> np.ndarray:
    """uint8 `[64, H, W, C]` for files that take pixels, whose codes are those of a table: every
    value in every channel, then noise of darkest and brightest values only."""
    rng = np.random.default_rng(1)
    height, width, channels = shape
    needed = -(-256 // (height * width))
    pixels = rng.choice(np.array([0, 255], np.uint8), (HOSTILE_IMAGES, *shape))
    values = np.resize(np.arange(256), needed * height * width)
    shuffled = np.stack([rng.permutation(values) for _ in range(channels)], axis=-1)
    needed = min(needed, HOSTILE_IMAGES)
    pixels[:needed] = shuffled.reshape(-1, *shape)[:needed]
    return pixels


def hostile_codes(student: Student, codes: dict[str, Any]) -> np.ndarray:
    """Normalised images `[64, H, W, C]` whose codes no pixels make, beyond a channel's own range:
    all 0, all the highest, random."""
    stored, top = codes["tensors"][INPUT], 2**student.spec.boundary_bits - 1
    shape = (HOSTILE_IMAGES, *student.graph.input_shape)
    made = np.random.default_rng(1).integers(0, top + 1, shape)
    made[0], made[1] = 0, top
    return (made - int(stored["zero_point"])).astype(np.float32) * stored["scale"]


def fed_to(runner: Runner, student: Student, codes: dict[str, Any], preprocessing: Preprocessing,
           pixels: np.ndarray, *, hostile: bool) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """What to feed a runner, and the same images normalised.

    Args:
      runner, student, codes, preprocessing: which.
      pixels: uint8 `[N, H, W, C]`.
      hostile: add hostile images of the runner's kind of input.
    """
    if runner.input_kind == "uint8":
        if hostile:
            pixels = np.concatenate([pixels, hostile_pixels(student.graph.input_shape)])
        return pixels, normalise(pixels, preprocessing)
    images = normalise(pixels, preprocessing)
    if hostile:
        images = np.concatenate([images, hostile_codes(student, codes)])
    return images, images
