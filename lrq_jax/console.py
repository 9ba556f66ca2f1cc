"""What a person sees: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0
_COLOURS = {"bold": "1", "red": "31", "green": "32", "yellow": "33"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """How far a phase of a run is: what a progress callback is given.

    Attributes:
      phase: `warm-up`, `calibration`, `training`, ...
      done, total: units of the phase.
      unit: what is counted, in the singular.
      losses: means since the last call, by name.
    """

    phase: str
    done: int
    total: int
    unit: str
    losses: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Audience:
    callback: Callable[[Step], None] | None = None
    verbose: bool = True


_AUDIENCE = contextvars.ContextVar("audience", default=_Audience())  # noqa: B039  (it is frozen)


@contextlib.contextmanager
def audience(callback: Callable[[Step], None] | None = None, *, verbose: bool = True) -> Iterator[None]:  # fmt: skip
    """While this lasts, `callback` is told of every step of progress; unless `verbose`, nothing is
    printed. An exception of the callback ends the run, which resumes from its last checkpoint."""
    token = _AUDIENCE.set(_Audience(callback=callback, verbose=verbose))
    try:
        yield
    finally:
        _AUDIENCE.reset(token)


def be_silent() -> None:
    """From now on this process says nothing: another one of its job does."""
    _AUDIENCE.set(_Audience(verbose=False))


def say(message: str) -> None:
    """A line for the person who runs the command."""
    if not _AUDIENCE.get().verbose:
        return
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


def coloured(text: str, colour: str, stream: TextIO | None = None) -> str:
    """The text in a colour where `stream` (default: standard output) is a terminal that shows it.

    Elsewhere, with NO_COLOR set (no-color.org) or TERM=dumb, the text as it is.
    """
    stream = stream or sys.stdout
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if plain or not stream.isatty():
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


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
        self._audience = _AUDIENCE.get()
        terminal = self._audience.verbose and sys.stdout.isatty()
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
        if self._audience.callback is not None:
            self._audience.callback(
                Step(phase=self._phase, done=done, total=self._stop, unit=self._unit, losses=losses)
            )
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
