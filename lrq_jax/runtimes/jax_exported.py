"""A `model.jaxexport` file, run without the package's own arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
from jax import export

from lrq_jax.runtimes.batches import in_batches


class JaxExportRunner:
    """Runs a file of `writers.jax_export`.

    Raises:
      ValueError: not such a file.
    """

    name: ClassVar[str] = "jaxexport"
    exact: ClassVar[bool] = True
    input_kind = "float"
    version = jax.__version__

    def __init__(self, model: str | Path, *, threads: int = 0) -> None:
        try:
            exported = export.deserialize(bytearray(Path(model).read_bytes()))
        except Exception as error:  # flatbuffers raise struct.error, IndexError, ...
            raise ValueError(
                f"{model}: found no serialized JAX function ({error}), expected one written by "
                "lrq_jax.export"
            ) from error
        self._call = jax.jit(exported.call)
        size = exported.in_avals[0].shape[0]
        self.fixed_batch = size if isinstance(size, int) else None

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits `[B, K]` of normalised images `[B, H, W, C]`."""
        return in_batches(lambda some: np.asarray(self._call(some)), images, self.fixed_batch)

    def codes(self, images: np.ndarray, tensors: Sequence[str]) -> dict[str, np.ndarray]:
        """None: the function returns logits only."""
        return {}
