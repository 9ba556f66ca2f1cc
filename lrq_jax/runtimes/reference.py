"""The integer forward in JAX on the codes as stored: what every other runtime must equal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from lrq_jax.passes import Student, frozen_logits
from lrq_jax.passes.integer_forward import integer_codes
from lrq_jax.writers.codes import frozen_from_codes, load_student


class Reference:
    """Runs a student directory; see `writers.codes`."""

    name: ClassVar[str] = "jax"
    exact: ClassVar[bool] = True
    input_kind = "float"
    version = jax.__version__
    fixed_batch: int | None = None

    def __init__(self, student: Student, codes: dict[str, Any]) -> None:
        self.student = student
        self._frozen = frozen_from_codes(codes)
        self._logits = jax.jit(lambda frozen, images: frozen_logits(student, frozen, images))
        self._codes = jax.jit(
            lambda frozen, images, tensors: integer_codes(
                student.operations, frozen, images, tensors, input_bits=student.spec.boundary_bits
            ),
            static_argnums=2,
        )

    @classmethod
    def load(cls, directory: str | Path) -> Reference:
        """The student of a directory written by `save_student`."""
        student, codes, _ = load_student(directory)
        return cls(student, codes)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits `[B, K]` of normalised images `[B, H, W, C]`."""
        return np.asarray(self._logits(self._frozen, images))

    def codes(self, images: np.ndarray, tensors: Sequence[str]) -> dict[str, np.ndarray]:
        """uint8 codes of tensors, channels last."""
        found = self._codes(self._frozen, images, tuple(tensors))
        return {name: np.asarray(codes).astype(np.uint8) for name, codes in found.items()}
