"""Where this package keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$LRQ_CACHE`, or `~/.cache/lrq_jax`: datasets built from folders, compiled programs."""
    return Path(os.environ.get("LRQ_CACHE") or "~/.cache/lrq_jax").expanduser()
