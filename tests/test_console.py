"""What a person sees while a run is under way."""

import io
import logging
import re
import time

import pytest

from lrq_jax import console
from lrq_jax.console import Progress, say


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_say_rate_eta_and_losses(capsys, clock):
    with Progress("training", start=100, stop=200) as progress:
        clock[0] += 20
        progress.update(140, {"student/loss": 1.23456, "generator/loss": 1e-9})
    out = capsys.readouterr().out
    assert out == (
        "training: 140/200 steps, 2.00 steps/s, ETA 30 s, student/loss=1.235 generator/loss=1e-09\n"
    )


def test_plain_lines_are_few_but_the_last_is_always_shown(capsys, clock):
    with Progress("training", start=0, stop=1000, unit="image") as progress:
        for done in range(1, 1001):
            clock[0] += 0.1
            progress.update(done, {})
    lines = capsys.readouterr().out.splitlines()
    assert 9 <= len(lines) <= 11  # one in ten seconds
    assert lines[-1].startswith("training: 1000/1000 images, 10.00 images/s, ETA 0 s")
    assert not any("\r" in line for line in lines)


def test_an_update_before_any_time_has_passed_is_no_division_by_zero(capsys, clock):
    with Progress("x", start=5, stop=5) as progress:
        progress.update(5, {})
    assert re.match(r"x: 5/5 steps, 0\.00 steps/s, ETA inf s", capsys.readouterr().out)


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    with Progress("warm-up", start=2, stop=10) as progress:
        progress.update(6, {"generator/loss": 0.5})
        say("a line between")
        time.sleep(0.12)  # the bar is drawn ten times a second at most
        progress.update(10, {"generator/loss": 0.25})
    text = terminal.getvalue()
    assert "warm-up" in text
    assert "10/10" in text
    assert "generator/loss=0.25" in text
    assert "a line between\n" in text


def test_say_is_seen_at_once(capsys):
    say("compiling ...")
    assert capsys.readouterr().out == "compiling ...\n"


def test_quiet_logging_restores_the_levels():
    logger = logging.getLogger("absl")
    before = logger.level

    def fails():
        with console.quiet_logging():
            assert not logger.isEnabledFor(logging.WARNING)
            assert logger.isEnabledFor(logging.ERROR)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert logger.level == before
