"""How a command ends: exit codes, and one message where a traceback would help nobody."""

from __future__ import annotations

import _thread
import contextlib
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax

from lrq_jax.console import coloured

FAULT = 1
"""Exit code of a fault of this program; of `verify` and `export`, of a file that differs."""
REFUSED = 2
"""Exit code when nothing was started because the input cannot be used."""
DIVERGED = 3
"""Exit code when a loss stopped being finite."""
LOST = 4
"""Exit code when another process of the job was lost."""
FULL = 5
"""Exit code when memory or a disk was full."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, a shell's own for it."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def fail(program: str, error: Exception) -> int:
    """Says on standard error why a command ended; its exit code, `FULL` or `REFUSED`."""
    full = shortage(error)
    _tell(program, full or str(error))
    return FULL if full else REFUSED


def shortage(error: BaseException) -> str:
    """Of an error that means that memory or a disk is full: what to do; else empty."""
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        where = f" writing {error.filename}" if error.filename else ""
        return f"no space is left on the disk{where}: free some, and give the same command again"
    if isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    ):
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        return (
            f"out of memory on {jax.default_backend()} ({reason[:200]}): smaller batches need "
            "less, --config.method.batch_size, --config.method.noise_batch_size and "
            "--config.method.reconstruction_batch_size, or --config.rematerialize=elementwise, in "
            "the student's training --config.micro_batches=4, "
            "in a new --workdir; --estimate says how much a run takes"
        )
    # orbax and tensorstore wrap what the system said
    if "No space left on device" in str(error):
        return "no space is left on the disk: free some, and give the same command again"
    return ""


def run_command(program: str, command: Callable[[], int | None], *, resumes: bool = False) -> NoReturn:  # fmt: skip
    """Runs a command and ends the process with its exit code.

    Ctrl-C and a full memory or disk end in one message.

    Args:
      resumes: whether the same command goes on from where it was.
    """
    try:
        with _lost_interrupts_raised_again():
            raise SystemExit(command() or 0)
    except KeyboardInterrupt:
        rest = "; the same command goes on from what it had saved" if resumes else ""
        message, code = f"interrupted{rest}", INTERRUPTED
    except Exception as error:
        if not (message := shortage(error)):
            raise
        code = FULL
    _tell(program, message)
    sys.stdout.flush()
    os._exit(
        code
    )  # an ordinary exit waits for threads that compute and for a job's other processes


@contextlib.contextmanager
def _lost_interrupts_raised_again() -> Iterator[None]:
    """In here a Ctrl-C is not lost.

    A `KeyboardInterrupt` that comes while Python collects garbage or runs a `__del__` is reported
    as ignored, and the program goes on; jax has a callback there.
    """
    report = sys.unraisablehook

    def interrupt_again(lost: sys.UnraisableHookArgs) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            # later: here it would come inside this very function, and be lost again
            again = threading.Timer(0.1, _thread.interrupt_main)
            again.daemon = True
            again.start()
        else:
            report(lost)

    sys.unraisablehook = interrupt_again
    try:
        yield
    finally:
        sys.unraisablehook = report


def _tell(program: str, message: str) -> None:
    print(f"{coloured(program, 'red', sys.stderr)}: {message}", file=sys.stderr, flush=True)
