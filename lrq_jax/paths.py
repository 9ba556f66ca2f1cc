"""Where things go: what this package can make again, and what a command was asked to write."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$LRQ_CACHE`, or `~/.cache/lrq_jax`: datasets built from folders, compiled programs."""
    return Path(os.environ.get("LRQ_CACHE") or "~/.cache/lrq_jax").expanduser()


def check_can_be_made(path: str | Path, option: str) -> None:
    """Refuses a place to write to below something that is a file.

    Raises:
      NotADirectoryError: names that file.
    """
    for parent in Path(path).absolute().parents:
        if parent.is_dir():
            return
        if parent.exists():
            raise NotADirectoryError(
                f"{option} {path}: found a file {str(parent)!r}, expected a directory or nothing "
                "there; choose another place"
            )


def make_parents(path: str | Path, option: str) -> None:
    """Makes the directory that `path` is to be in.

    Raises:
      NotADirectoryError: see `check_can_be_made`.
    """
    check_can_be_made(path, option)
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
