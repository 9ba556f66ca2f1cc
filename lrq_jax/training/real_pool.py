"""A pool of real images, for the ceiling that synthetic ones are measured against."""

from __future__ import annotations

import jax
import numpy as np

from lrq_jax.data import EvalData, Preprocessing, load_data, preprocess
from lrq_jax.training.compilation import put_replicated
from lrq_jax.training.noise_pool import Pool


def training_data(path: str, *, count: int) -> EvalData:
    """The labelled images of a folder (see `lrq_jax.data.load_data`), at least `count` of them.

    Raises:
      ValueError: fewer images.
    """
    data = load_data(path=path)
    if data.num_examples < count:
        raise ValueError(
            f"data.train_images: found {count}, expected at most the {data.num_examples} images of "
            f"{path}"
        )
    return data


def read_pool(path: str, preprocessing: Preprocessing, *, count: int, seed: int,
              mesh: jax.sharding.Mesh) -> Pool:  # fmt: skip
    """Random images of a folder, preprocessed as the teacher wants them.

    Args:
      path: a folder of labelled images, see `lrq_jax.data.load_data`.
      preprocessing: the teacher's.
      count: images to draw, without repetition.
      seed: of the draw.
      mesh: where the pool is put, a copy on every device.

    Raises:
      ValueError: fewer than `count` images.
    """
    data = training_data(path, count=count)
    picked = np.random.default_rng(seed).permutation(data.num_examples)[:count]
    examples = [data.source[int(index)] for index in picked]
    images = np.stack([preprocess(image, preprocessing) for image, _ in examples])
    labels = np.asarray([label for _, label in examples], np.int32)
    return Pool(*put_replicated((images, labels), mesh))
