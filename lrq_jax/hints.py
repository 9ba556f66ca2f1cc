"""What a person should know before or after a run, though nothing is wrong enough to refuse."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

_NVIDIA = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidia0"))
_TPU = Path("/dev/accel0")

LARGEST_LOSS = 3.0
"""Points below its recorded accuracy at which a teacher is suspected to be fed wrongly; other
decoders and resizers cost up to about half a point."""


def accelerator_hint(backend: str) -> str | None:
    """A line where this machine has a GPU or TPU that jax does not use; None otherwise.

    Args:
      backend: `jax.default_backend()`.
    """
    if backend != "cpu":
        return None
    if any(path.exists() for path in _NVIDIA) or shutil.which("nvidia-smi"):
        return (
            "this machine has an NVIDIA GPU, but jax found only the CPU: "
            "pip install -U 'jax[cuda13]', and unset JAX_PLATFORMS"
        )
    if _TPU.exists():
        return (
            "this machine has a TPU, but jax found only the CPU: pip install -U 'jax[tpu]', and "
            "unset JAX_PLATFORMS"
        )
    return None


def preprocessing_warning(top1: float, *, images: int, num_classes: int,
                          recorded: float | None) -> str | None:  # fmt: skip
    """A line where a teacher's accuracy says that it is fed wrongly; None otherwise.

    Args:
      top1: percent, as measured on `images` images.
      num_classes: of the teacher; guessing gets 100 / this.
      recorded: percent, published for this very file; None where none is known.

    Three standard errors of the measurement are allowed for on top.
    """
    chance = 100 / num_classes
    error = 3 * 100 * math.sqrt(0.25 / images)
    ways = (
        "check the classes' order (sub-folders are numbered alphabetically, or write a labels.csv) "
        "and the preprocessing: python scripts/convert_teacher.py --mean --std --size --resize"
    )
    if recorded is not None and top1 < recorded - LARGEST_LOSS - error:
        return f"the teacher gets {top1:.2f} % of these images, {recorded:.2f} % are recorded for its file; {ways}"  # fmt: skip
    if top1 < chance + min(chance + min(error, chance), (100 - chance) / 2):
        return f"the teacher gets {top1:.2f} % of these images, hardly more than the {chance:.2g} % of guessing; {ways}"  # fmt: skip
    return None
