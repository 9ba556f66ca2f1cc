"""Evaluation images: where they are read from, how they are preprocessed, how they are batched.

The method itself uses no data; these images only measure what it made. Nothing here imports
TensorFlow, and scikit-learn, Pillow and TFDS are imported only by the function that needs them.
"""

from lrq_jax.data.batching import Batch, batches
from lrq_jax.data.pixels import Preprocessing, preprocess
from lrq_jax.data.sources import EvalData, load_data

__all__ = ["Batch", "EvalData", "Preprocessing", "batches", "load_data", "preprocess"]
