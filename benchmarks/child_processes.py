"""Programs that benchmarks start, and end with all that those have started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import Any, NoReturn


def start(command: list[str], **options: Any) -> subprocess.Popen:
    """`subprocess.Popen`, at the head of a group of processes of its own."""
    return subprocess.Popen(command, start_new_session=os.name == "posix", **options)


def end(process: subprocess.Popen, *, patience: float = 0.0) -> None:
    """Ends a process of `start` and its group, at first politely if there is patience for it."""
    if patience:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    _signal(process, signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.name == "posix":
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)


def leave_on_sigterm() -> None:
    """From now on SIGTERM unwinds this program, so that it ends what it has started."""

    def leave(*_: Any) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)
