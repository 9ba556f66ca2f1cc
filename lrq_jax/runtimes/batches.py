"""Calls of one size over any number of images: some files are fixed to one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

Results = TypeVar("Results", np.ndarray, list[np.ndarray])


def in_batches(forward: Callable[[np.ndarray], Results], images: np.ndarray, size: int | None = 64) -> Results:  # fmt: skip
    """`forward` on batches of one size (the last one padded), its results put together again.

    Args:
      forward: images to an array, or a list of arrays, of as many rows.
      images: `[N, ...]`.
      size: images a call; None for all in one.
    """
    if size is None:
        return forward(images)
    rest = -len(images) % size
    padded = np.concatenate([images, np.repeat(images[-1:], rest, axis=0)]) if rest else images
    pieces = [forward(padded[i : i + size]) for i in range(0, len(padded), size)]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(images)], *pieces)
