"""Batches of one shape, each image in exactly one of them."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from lrq_jax.data.pixels import Preprocessing, crop, normalise
from lrq_jax.data.sources import EvalData

SMALL_SIDE = 64  # pixels; below, threads lose more to the GIL than decoding takes


class Batch(NamedTuple):
    """A batch; the last one is padded with zero images of label 0 and mask False. A pytree.

    Attributes:
      images: float32 [B, H, W, C], normalised.
      labels: int32 [B].
      mask: bool [B], True where there is an image. Sum over it, never over B.
    """

    images: np.ndarray
    labels: np.ndarray
    mask: np.ndarray


def batches(
    data: EvalData, preprocessing: Preprocessing, *, batch_size: int, threads: int | None = None
) -> Iterator[Batch]:
    """All images of `data` in order, each once, as `ceil(num_examples / batch_size)` batches.

    While one batch is in use, the next is being decoded.

    Args:
      data: the images.
      preprocessing: what the teacher wants.
      batch_size: B, images; the same for every batch, so that a jitted step compiles once.
      threads: that decode and resize, beside the caller's. None: one for images below
        `SMALL_SIDE`, else as many as there are CPUs for this process, up to 16.

    Returns:
      An iterator over batches; every batch has arrays of its own.

    Raises:
      ValueError: at once for `batch_size` or `threads` below 1; while iterating for an image that
        cannot be preprocessed.
    """
    if threads is None:
        small = max(preprocessing.size, preprocessing.resize or 0) < SMALL_SIDE
        threads = 1 if small else min(16, _num_cpus())
    if batch_size < 1 or threads < 1:
        raise ValueError(
            f"found batch_size {batch_size} and threads {threads}, expected both at least 1"
        )
    return _generate(data, preprocessing, batch_size, threads)


def _generate(
    data: EvalData, preprocessing: Preprocessing, batch_size: int, threads: int
) -> Iterator[Batch]:
    starts = range(0, data.num_examples, batch_size)
    with ThreadPoolExecutor(max_workers=threads) as pool:
        ahead: collections.deque[list[Future]] = collections.deque()
        for start in (*starts, None):
            if start is not None:
                indices = range(start, min(start + batch_size, data.num_examples))
                step = -(-len(indices) // threads)
                parts = [indices[i : i + step] for i in range(0, len(indices), step)]
                ahead.append([pool.submit(_read, data, preprocessing, part) for part in parts])
            if len(ahead) == 2 or (start is None and ahead):
                yield _assemble([f.result() for f in ahead.popleft()], preprocessing, batch_size)


def _read(
    data: EvalData, preprocessing: Preprocessing, indices: range
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [N, size, size, C] and labels int32 [N] of these indices."""
    size = preprocessing.size
    pixels = np.empty((len(indices), size, size, preprocessing.channels), np.uint8)
    labels = np.empty(len(indices), np.int32)
    for row, index in enumerate(indices):
        image, labels[row] = data.source[index]
        try:
            pixels[row] = crop(image, preprocessing)
        except ValueError as error:
            raise ValueError(f"data {data.name!r}, image {index}: {error}") from error
    return pixels, labels


def _assemble(
    parts: list[tuple[np.ndarray, np.ndarray]], preprocessing: Preprocessing, batch_size: int
) -> Batch:
    """Normalises and pads."""
    size = preprocessing.size
    images = np.zeros((batch_size, size, size, preprocessing.channels), np.float32)
    labels = np.zeros(batch_size, np.int32)
    filled = 0
    for pixels, part_labels in parts:
        rows = slice(filled, filled + len(pixels))
        normalise(pixels, preprocessing, out=images[rows])
        labels[rows] = part_labels
        filled = rows.stop
    return Batch(images=images, labels=labels, mask=np.arange(batch_size) < filled)


def _num_cpus() -> int:
    """CPUs this process may use; containers and clusters give fewer than there are."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1
