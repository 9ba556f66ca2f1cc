"""Packages that only some targets need, installed as extras."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, *, extra: str) -> Any:
    """The imported module.

    Args:
      module: dotted name.
      extra: of this package, which installs it.

    Raises:
      ImportError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"found no package {module!r} ({error}), expected it for this target: "
            f"pip install 'lrq_jax[{extra}]'"
        ) from error
