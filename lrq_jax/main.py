"""Quantize a trained network without its data.

    python -m lrq_jax.main [--config=configs/NAME.py] [--workdir=DIR] [--config.FIELD=VALUE ...]

Examples:

    the embedded default, handwritten digits and a small residual network:
        python -m lrq_jax.main
    a published ResNet-18, with images to measure its accuracy on:
        python -m lrq_jax.main --config=configs/r18.py --workdir=runs/r18 \\
            --config.teacher.path=resnet18.pth --config.data.path=DIR_OF_IMAGES
    three bits, and a look at how long it would take:
        python -m lrq_jax.main --config.student.weight_bits=3 --estimate

With --config.distributed=True on every process of a job they train together; see `processes.py`.

Starting again on the same --workdir resumes. A finished run holds report.html and report.json;
then: python -m lrq_jax.export, verify, bench, evaluate, report, compare (each knows --help).

Exit codes: 0 finished; 1 a fault of this program; 2 nothing was started, the input cannot be used;
3 a loss stopped being finite; 4 another process of a distributed job was lost; 5 memory or a disk
is full; 130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import NoReturn

from lrq_jax.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before what takes seconds to import

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from lrq_jax import config as embedded_config
from lrq_jax.config import base_config, field_names, resolve
from lrq_jax.console import be_silent, coloured, say
from lrq_jax.endings import DIVERGED, LOST, REFUSED, fail, run_command, shortage
from lrq_jax.estimate import describe, estimate, is_long
from lrq_jax.hints import accelerator_hint
from lrq_jax.paths import cache_directory
from lrq_jax.processes import is_first, join_processes
from lrq_jax.quantize import Job, load_eval_data, prepare, quantize, step_spec, summary
from lrq_jax.readers.store import load_teacher
from lrq_jax.reference import fields_text, overview
from lrq_jax.sharding import data_mesh
from lrq_jax.training.errors import TrainingDiverged


def _exit(code: int, message: str) -> NoReturn:
    print(f"lrq_jax: {message}", file=sys.stderr)
    raise SystemExit(code)


def _leave(reason: str) -> NoReturn:
    """Ends a job that has lost a process, at once: an ordinary exit waits for all of them."""
    print(
        f"lrq_jax: process {jax.process_index()} of {jax.process_count()}: a step failed, most "
        f"likely because another process ended ({reason.splitlines()[0][:200]}); start all of them "
        "again, as many as you like, on the same --workdir: it resumes",
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST)


def _check_names(names: Iterable[str], where: str) -> None:
    """Refuses names that are no fields of a config, showing the fields they may stand for."""
    known = field_names(base_config().to_dict())
    for name in names:
        if name not in known:
            inside = [field for field in known if field.startswith(f"{name}.")]
            close = inside or difflib.get_close_matches(name, known, n=5)
            end = name.rpartition(".")[2]
            close += [f for f in known if f.rpartition(".")[2] == end and f not in close]
            _exit(REFUSED, f"{where}: found {name!r}, expected one of {close or known}")


# ml_collections applies the overrides as the flag is defined, where a typo ends in a traceback.
_OVERRIDES = [
    match[1] for arg in sys.argv if (match := re.match(r"--?(?:no)?config\.([^=]*)", arg))
]
_check_names(_OVERRIDES, "--config.FIELD")
_CONFIG = config_flags.DEFINE_config_file(
    "config", embedded_config.__file__, "Config file, e.g. configs/r18.py; default: the digits."
)
_LIST = flags.DEFINE_bool("list", False, "Print presets, file formats and networks, and end.")
_FIELDS = flags.DEFINE_bool(
    "fields", False, "Print every --config.FIELD, its default and meaning, and end."
)
_ESTIMATE = flags.DEFINE_bool(
    "estimate", False, "Measure how long the run will take and how much memory, and end."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/latest", "Run directory; an unfinished run resumes."
)


def _last_line(error: Exception) -> str:
    """What an error says, without the traceback that ml_collections puts in front of it."""
    return (str(error).strip().splitlines() or [""])[-1].strip()


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Flags parser for absl that ends in a message where absl's own shows a traceback, and whose
    help is no error."""
    if {"--help", "-help", "-h", "--helpshort", "-?"} & set(argv):
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
    files = [match[1] for arg in argv if (match := re.match(r"--?config=(.*)", arg))]
    where = f"--config={files[-1]}" if files else "--config"
    try:
        rest = flags.FLAGS(argv)
        found = field_names(_CONFIG.value.to_dict())
    except flags.Error as error:
        _exit(REFUSED, f"{_last_line(error)}; --help shows the flags")
    except Exception as error:  # the file is code: it can raise anything
        _exit(
            REFUSED,
            f"{where}: found {type(error).__name__} ({_last_line(error)}), expected a Python file "
            "with get_config(), such as configs/digits.py",
        )
    _check_names(found, where)
    missing = sorted(set(field_names(base_config().to_dict())) - set(found))
    if missing:
        _exit(
            REFUSED,
            f"{where}: found no {missing}, expected every field; let get_config() start from "
            "lrq_jax.config.base_config()",
        )
    return rest


def _hint(message: str) -> str:
    """The error, and for one of the commonest the command that gets further."""
    if "teacher" in message and "convert_teacher" in message:
        message += (
            "\nname it with --config.teacher.path=FILE, a published .pth will do; "
            "--list shows the networks and files that are known"
        )
    return message


def _tell_before(job: Job) -> None:
    """What is better known before a run than after it."""
    if hint := accelerator_hint(jax.default_backend()):
        say(coloured(f"careful: {hint}", "yellow"))
    for name, why in job.spec.method.without_effect.items():
        say(coloured(f"careful: method.{name} has no effect here: {why}", "yellow"))
    steps = job.spec.method.warmup_steps + job.spec.method.steps
    height, width = job.teacher.graph.input_shape[:2]
    if is_long(steps, height, width) and jax.default_backend() == "cpu":
        say(
            f"{steps:,} steps at {height}x{width} pixels are long for a CPU: the same command with "
            "--estimate measures how long; preset squant trains nothing"
        )


def main(argv: Sequence[str]) -> None:
    """Entry point of absl."""
    if len(argv) > 1:
        _exit(REFUSED, f"found arguments {argv[1:]}, expected flags only: --config.FIELD=VALUE")
    logging.set_verbosity(logging.ERROR)  # orbax reports each array it writes
    if _LIST.value or _FIELDS.value:
        say(overview() if _LIST.value else fields_text())
        return
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
    try:
        if _CONFIG.value.distributed:
            join_processes()
            if not is_first():
                be_silent()
        teacher = load_teacher(_CONFIG.value.teacher.path)
        settings = resolve(_CONFIG.value, image_size=max(teacher.graph.input_shape[:2]))
        step_spec(teacher, settings, data_mesh())  # before images are read, which can take long
        data = load_eval_data(settings) if is_first() else None
        if _ESTIMATE.value:
            with tempfile.TemporaryDirectory() as nowhere:
                say(describe(estimate(prepare(teacher, settings, data, f"{nowhere}/run"))))
            return
        job = prepare(teacher, settings, data, _WORKDIR.value)
    except (ValueError, OSError, ImportError) as error:
        if shortage(error):
            raise SystemExit(fail("lrq_jax", error)) from error
        _exit(REFUSED, _hint(str(error)))
    _tell_before(job)
    try:
        report = quantize(job)
    except TrainingDiverged as error:
        _exit(DIVERGED, str(error))
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or shortage(error):
            raise
        _leave(str(error))
    if not is_first():
        return
    say(summary(report))
    say(f"report: {_WORKDIR.value}/report.json, {_WORKDIR.value}/report.html")


if __name__ == "__main__":
    run_command("lrq_jax", lambda: app.run(main, flags_parser=parse_flags), resumes=True)
