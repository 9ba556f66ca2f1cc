"""How commands end where nothing is wrong with the input: interrupted, or out of memory or disk."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from lrq_jax import bench, compare, endings, export, verify

REPOSITORY = Path(__file__).resolve().parents[1]


class Ended(Exception):
    """The process would be gone."""


@pytest.fixture
def ended(monkeypatch):
    """Exit codes of processes that would have ended at once."""

    def leave(code):
        raise Ended(code)

    monkeypatch.setattr(endings.os, "_exit", leave)


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), endings.INTERRUPTED, ["interrupted", "goes on from what it had"]),
        (MemoryError(), endings.FULL, ["out of memory", "method.batch_size", "--estimate"]),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
            endings.FULL,
            ["allocating 9 bytes", "method.batch_size", "new --workdir"],
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a"),
            endings.FULL,
            ["no space", "runs/a", "same command"],
        ),
        (ValueError("UNKNOWN: No space left on device"), endings.FULL, ["no space"]),
    ],
)
def test_what_is_no_fault_ends_in_one_line(ended, capsys, error, code, words):
    with pytest.raises(Ended) as end:
        endings.run_command("lrq_jax", raising(error), resumes=True)
    assert end.value.args == (code,)
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    for text in words:
        assert text in message


@pytest.mark.parametrize(
    "error", [ValueError("wrong"), jax.errors.JaxRuntimeError("INTERNAL: wrong"),
              OSError(errno.EIO, "wrong")],
)  # fmt: skip
def test_a_fault_keeps_its_traceback(ended, error):
    with pytest.raises(type(error), match="wrong"):
        endings.run_command("lrq_jax", raising(error))


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (1, 1), (2, 2)])
def test_a_command_that_returns_ends_with_its_code(ended, result, code):
    with pytest.raises(SystemExit) as end:
        endings.run_command("lrq_jax.verify", lambda: result)
    assert end.value.code == code


def test_a_full_disk_while_something_is_written_is_no_refusal(capsys):
    assert endings.fail("lrq_jax.export", OSError(errno.ENOSPC, "full", "x")) == endings.FULL
    assert endings.fail("lrq_jax.export", FileNotFoundError("found no x")) == endings.REFUSED
    assert "found no x" in capsys.readouterr().err


def test_memory_that_really_is_not_there_is_told_from_a_fault():
    with pytest.raises((jax.errors.JaxRuntimeError, MemoryError)) as caught:
        jax.block_until_ready(jax.numpy.zeros((1 << 45,)) + 1)
    assert "method.batch_size" in endings.shortage(caught.value)


LISTENING = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("lrq_jax.main", run_name="__main__", alter_sys=True)
"""
"""The command, also where the tests run in the background of a shell, which ignores Ctrl-C there."""


def test_ctrl_c_ends_a_run_in_one_line_and_the_same_command_resumes(tmp_path):
    command = [
        sys.executable, "-c", LISTENING, f"--workdir={tmp_path / 'run'}",
        f"--config={REPOSITORY / 'configs' / 'digits_lrq.py'}",
        "--config.steps=1000000", "--config.method.warmup_steps=1",
        "--config.method.calibration_start=0", "--config.method.calibration_steps=1",
        "--config.method.batch_size=2", "--config.method.generator_width=8",
        "--config.checkpoint_every=1",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu",
                   "LRQ_CACHE": str(tmp_path / "cache"), "PYTHONUNBUFFERED": "1"}  # fmt: skip
    del environment["XLA_FLAGS"]  # the tests' eight devices
    seen = []
    for _ in range(2):
        with subprocess.Popen(
            command, env=environment, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            for line in process.stdout:
                seen.append(line)
                if line.startswith("training"):
                    break
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=120)
        assert process.returncode == endings.INTERRUPTED, error
        assert error.splitlines() == [
            "lrq_jax: interrupted; the same command goes on from what it had saved"
        ]
    assert len([line for line in seen if line.startswith("resuming")]) == 1, seen


SWALLOWING = """
import signal, time
from lrq_jax.endings import run_command

class Garbage:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def command():
    Garbage()
    for _ in range(60):
        time.sleep(1)

signal.signal(signal.SIGINT, signal.default_int_handler)
run_command("lrq_jax", command)
"""


def test_a_ctrl_c_that_comes_while_garbage_is_collected_is_not_lost():
    result = subprocess.run(
        [sys.executable, "-c", SWALLOWING], text=True, capture_output=True, timeout=50, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert result.returncode == endings.INTERRUPTED, result.stderr
    assert result.stderr.splitlines() == ["lrq_jax: interrupted"]


def test_a_command_leaves_lost_exceptions_to_who_reported_them(ended):
    before = sys.unraisablehook
    with pytest.raises(SystemExit):
        endings.run_command("lrq_jax", lambda: 0)
    with pytest.raises(Ended):
        endings.run_command("lrq_jax", raising(KeyboardInterrupt()))
    assert sys.unraisablehook is before


@pytest.mark.parametrize(
    ("run", "arguments", "words"),
    [
        (export.main, ["--run", "RUN", "--out", "afile/x"], "--out afile/x: found a file"),
        (verify.main, ["EXPORT", "--images", "0"], "images: found 0, expected a number from 1"),
        (verify.main, ["EXPORT", "--images", "-3"], "images: found -3, expected a number from 1"),
        (bench.main, ["EXPORT", "--threads", "0"], "threads: found 0, expected a number from 1"),
        (bench.main, ["EXPORT", "--plot", "x.foo"], "--plot: found 'x.foo', expected a name"),
        (bench.main, ["EXPORT", "--plot", "afile/x.png"], "--plot afile/x.png: found a file"),
        (bench.main, ["EXPORT", "--out", "afile/x/y"], "--out afile/x/y: found a file"),
        (compare.main, ["RUN", "RUN", "--out", "afile/x"], "--out afile/x: found a file"),
    ],
)
def test_impossible_numbers_and_places_are_refused_by_name(
    tiny_run, tmp_path, monkeypatch, capsys, run, arguments, words
):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").touch()
    if "EXPORT" in arguments:
        export.export_student(tiny_run[0].path, tmp_path / "EXPORT")
    monkeypatch.setattr(bench, "compare", raising(AssertionError("it was timed first")))
    arguments = [str(tiny_run[0].path) if a == "RUN" else a for a in arguments]
    assert run(arguments) == endings.REFUSED
    message = capsys.readouterr().err
    assert words in message
    assert len(message.splitlines()) == 1


def test_a_page_is_written_into_a_directory_that_is_not_there_yet(tiny_run, tmp_path):
    run, page = str(tiny_run[0].path), tmp_path / "new" / "page.html"
    assert compare.main([run, run, "--out", str(page)]) == 0
    assert page.exists()


def test_a_workdir_below_a_file_is_refused(tmp_path):
    (tmp_path / "afile").touch()
    from lrq_jax.run_directory import RunDirectory

    with pytest.raises(NotADirectoryError, match=r"workdir .*afile/x: found a file"):
        RunDirectory(tmp_path / "afile" / "x", {})
