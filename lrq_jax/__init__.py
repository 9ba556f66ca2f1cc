"""Zero-shot quantization of image classifiers to real 2-8 bit integers, in JAX.

`lrq_jax.api` is the library; it is imported when first asked for, so that this package stays light.
"""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`lrq_jax.api`, at its first use."""
    if name == "api":
        return importlib.import_module("lrq_jax.api")
    raise AttributeError(f"module 'lrq_jax' has no attribute {name!r}")
