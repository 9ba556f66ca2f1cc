"""What a person sees: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0
_silent = False


def be_silent() -> None:
    """From now on this process says nothing: another one of its job does."""
    global _silent
    _silent = True


def say(message: str) -> None:
    """A line for the person who runs the command."""
    if _silent:
        return
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


@contextlib.contextmanager
def quiet_logging() -> Iterator[None]:
    """Orbax and absl log each array at information level: errors only, while this lasts."""
    loggers = [logging.getLogger(name) for name in ("absl", "orbax")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Progress:
    """Progress of one phase: rate, ETA and losses. Use as a context manager."""

    def __init__(self, phase: str, *, start: int, stop: int, unit: str = "step") -> None:
        self._phase, self._unit = phase, unit
        self._start, self._done, self._stop = start, start, stop
        self._began = self._spoke = time.monotonic()
        terminal = sys.stdout.isatty() and not _silent
        self._bar = (
            tqdm(desc=phase, initial=start, total=stop, unit=unit, file=sys.stdout, leave=True)
            if terminal
            else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, losses: dict[str, float]) -> None:
        """Shows that `done` of the phase's steps are done, with the latest losses."""
        shown = {name: f"{value:.4g}" for name, value in losses.items()}
        if self._bar is not None:
            self._bar.update(done - self._done)
            self._bar.set_postfix(shown, refresh=False)
            self._done = done
            return
        self._done, now = done, time.monotonic()
        if done < self._stop and now - self._spoke < _SECONDS_BETWEEN_LINES:
            return
        self._spoke = now
        rate = (done - self._start) / max(now - self._began, 1e-9)
        remaining = (self._stop - done) / rate if rate else float("inf")
        text = " ".join(f"{name}={value}" for name, value in shown.items())
        say(
            f"{self._phase}: {done}/{self._stop} {self._unit}s, {rate:.2f} {self._unit}s/s, "
            f"ETA {remaining:.0f} s, {text}"
        )
