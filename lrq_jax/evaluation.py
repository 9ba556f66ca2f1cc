"""Accuracy over every image of a dataset, of several networks side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from lrq_jax.data import EvalData, Preprocessing, batches
from lrq_jax.sharding import split_batch

Forward = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Accuracy of one network, in percent of `images`; `agreement` with the first network."""

    top1: float
    top5: float
    agreement: float
    images: int


def evaluate(forwards: dict[str, Forward], data: EvalData, preprocessing: Preprocessing, *,
             num_classes: int, batch_size: int, mesh: Mesh) -> dict[str, Accuracy]:  # fmt: skip
    """Top-1 and top-5 of each network on the same images, all of them, each counted once.

    Args:
      forwards: name -> pure function of images `[B, H, W, C]` to logits `[B, K]`; the first is
        the one agreement is measured against.
      data: labelled images.
      preprocessing: what the networks expect.
      num_classes: K; a label beyond it is an error.
      batch_size: images a program call, rounded up to the number of devices.
      mesh: devices to split a batch over.

    Raises:
      ValueError: a label the network has no class for.
    """
    devices = mesh.devices.size
    batch_size = -(-batch_size // devices) * devices
    programs = {name: jax.jit(forward) for name, forward in forwards.items()}
    counts = {name: np.zeros(3, np.int64) for name in forwards}
    images = 0
    for batch in batches(data, preprocessing, batch_size=batch_size):
        if batch.labels.max() >= num_classes:
            raise ValueError(
                f"data {data.name!r}: found label {batch.labels.max()}, expected less than the "
                f"{num_classes} classes of the teacher; is it the right dataset for this teacher?"
            )
        pixels = jax.device_put(batch.images, split_batch(mesh))
        logits = {name: jax.device_get(program(pixels)) for name, program in programs.items()}
        reference = _best(next(iter(logits.values())))
        images += int(batch.mask.sum())
        for name, values in logits.items():
            counts[name] += _count(values, batch.labels, reference, batch.mask)
    return {
        name: Accuracy(
            top1=100 * float(top1) / images,
            top5=100 * float(top5) / images,
            agreement=100 * float(agree) / images,
            images=images,
        )
        for name, (top1, top5, agree) in counts.items()
    }


def _count(logits: np.ndarray, labels: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> np.ndarray:  # fmt: skip
    """Numbers of images right at rank 1, right within rank 5, and classed as the reference."""
    best = _best(logits)
    # A tie or a NaN must not count as right: rank = classes not clearly below the label's.
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    rank = (~(logits < own)).sum(-1)
    mask = mask & (best >= 0)
    return np.array(
        [
            ((rank == 1) & mask).sum(),
            ((rank <= 5) & mask).sum(),
            ((best == reference) & mask).sum(),
        ]
    )


def _best(logits: np.ndarray) -> np.ndarray:
    """Class of each row's largest logit; -1 where one is NaN, for which argmax names its place."""
    return np.where(np.isnan(logits).any(-1), -1, logits.argmax(-1))
