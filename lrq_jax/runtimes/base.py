"""The interface all runtimes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np


class Runner(Protocol):
    """A loaded model.

    Attributes:
      name: of the runtime.
      exact: whether it must give the reference's codes bit for bit.
      input_kind: `float`, normalised images, or `uint8`, raw pixels.
      version: of the runtime.
      fixed_batch: images a call that the file was exported for; None for any number.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    input_kind: str
    version: str
    fixed_batch: int | None

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits `[B, K]` of images `[B, H, W, C]`."""
        ...

    def codes(self, images: np.ndarray, tensors: Sequence[str]) -> dict[str, np.ndarray]:
        """Codes of tensors of the network, to find where two runtimes part."""
        ...
