"""Accuracy over every image of a dataset, of several networks side by side."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from lrq_jax.data import Batch, EvalData, Preprocessing, batches
from lrq_jax.data.pixels import crop
from lrq_jax.ops.by_platform import tracing_for
from lrq_jax.sharding import split_batch

Forward = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Accuracy of one network, in percent of `images`; `agreement` with the first network.

    `disagreements` are (class of the first network, class of this one, images), the commonest
    first; a class of -1 stands for logits that are not numbers.
    """

    top1: float
    top5: float
    agreement: float
    images: int
    disagreements: tuple[tuple[int, int, int], ...] = dataclasses.field(default=(), repr=False)


def check_data(data: EvalData, preprocessing: Preprocessing, classes: int) -> None:
    """Finds out before any work whether the images are ones for a network.

    Args:
      data: labelled images.
      preprocessing: what the network expects.
      classes: how many it tells apart.

    Raises:
      ValueError: another number of named classes than the network's, a label beyond them, or an
        image of a wrong size. Where images are resized anyway only the first is read, and labels
        as far as known.
    """
    if data.largest_label is not None and data.largest_label >= classes:
        raise ValueError(
            f"data {data.name!r}: found label {data.largest_label}, expected less than the "
            f"{classes} classes of the network; is it the right dataset for it?"
        )
    if data.class_names is not None and len(data.class_names) != classes:
        raise ValueError(
            f"data {data.name!r}: found {len(data.class_names)} named classes, expected the "
            f"{classes} of the network, since names are numbered in alphabetical order; where some "
            "classes have no images, name the folders by class number or write a labels.csv"
        )
    read = 1 if preprocessing.resize is not None else data.num_examples
    for number in range(read):
        image, label = data.source[number]
        try:
            crop(image, preprocessing)
        except ValueError as error:
            raise ValueError(f"data {data.name!r}, image {number}: {error}") from error
        if not 0 <= label < classes:
            raise ValueError(
                f"data {data.name!r}, image {number}: found label {label}, expected 0 to "
                f"{classes - 1}; is it the right dataset for this network?"
            )


def evaluate(forwards: dict[str, Forward], data: EvalData, preprocessing: Preprocessing, *,
             num_classes: int, batch_size: int, mesh: Mesh) -> dict[str, Accuracy]:  # fmt: skip
    """Top-1 and top-5 of each network on the same images, all of them, each counted once.

    Args:
      forwards: name -> pure function of images `[B, H, W, C]` to logits `[B, K]`; the first is
        the one agreement is measured against. Arrays bound by a `jax.tree_util.Partial` become
        arguments of the compiled program; those closed over become its constants.
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
    program = jax.jit(lambda forward, images: forward(images))
    partials = {name: Partial(forward) for name, forward in forwards.items()}
    tally = Tally(tuple(forwards), data.name, num_classes)
    for batch in batches(data, preprocessing, batch_size=batch_size):
        pixels = jax.device_put(batch.images, split_batch(mesh))
        with tracing_for(mesh.devices.flat[0].platform):
            logits = {name: program(forward, pixels) for name, forward in partials.items()}
        tally.add(jax.device_get(logits), batch)
    return tally.result()


class Tally:
    """Counts of right answers, batch by batch.

    Args:
      names: of the networks; the first is the one agreement is measured against.
      data_name: for errors.
      num_classes: a label beyond it is an error.
    """

    def __init__(self, names: tuple[str, ...], data_name: str, num_classes: int) -> None:
        self._counts = {name: np.zeros(3, np.int64) for name in names}
        self._images, self._data_name, self._num_classes = 0, data_name, num_classes
        self._pairs = {name: collections.Counter[tuple[int, int]]() for name in names}

    def add(self, logits: dict[str, np.ndarray], batch: Batch) -> None:
        """Counts a batch; its padding does not count.

        Raises:
          ValueError: a label the network has no class for.
        """
        wrong = (batch.labels < 0) | (batch.labels >= self._num_classes)
        if wrong.any():
            raise ValueError(
                f"data {self._data_name!r}: found label {batch.labels[wrong][0]}, expected 0 to "
                f"{self._num_classes - 1}; is it the right dataset for this network?"
            )
        reference = _best(logits[next(iter(self._counts))])
        self._images += int(batch.mask.sum())
        for name in self._counts:
            self._counts[name] += _count(logits[name], batch.labels, reference, batch.mask)
            best = _best(logits[name])
            apart = batch.mask & (best != reference)
            self._pairs[name].update(
                zip(reference[apart].tolist(), best[apart].tolist(), strict=True)
            )

    def result(self) -> dict[str, Accuracy]:
        """Accuracy of each network so far."""
        return {
            name: Accuracy(
                top1=100 * float(top1) / self._images,
                top5=100 * float(top5) / self._images,
                agreement=100 * float(agree) / self._images,
                images=self._images,
                disagreements=tuple(
                    (*pair, count) for pair, count in self._pairs[name].most_common()
                ),
            )
            for name, (top1, top5, agree) in self._counts.items()
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
