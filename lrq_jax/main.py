"""Quantize a trained network without its data.

    python -m lrq_jax.main [--config=configs/NAME.py] [--workdir=DIR] [--config.FIELD=VALUE ...]

Without --config: the embedded default (handwritten digits, a small residual teacher).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from lrq_jax import config as embedded_config
from lrq_jax.config import resolve
from lrq_jax.console import say
from lrq_jax.paths import cache_directory
from lrq_jax.quantize import load_eval_data, quantize, step_spec, summary
from lrq_jax.readers.store import load_teacher
from lrq_jax.sharding import data_mesh
from lrq_jax.training.loop import TrainingDiverged

_CONFIG = config_flags.DEFINE_config_file(
    "config", embedded_config.__file__, "Config file, e.g. configs/r18.py; default: the digits."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/latest", "Run directory; an unfinished run resumes."
)

REFUSED = 2
"""Exit code when nothing was started because the input cannot be used."""
DIVERGED = 3
"""Exit code when a loss stopped being finite."""


def main(argv: Sequence[str]) -> None:
    """Entry point of absl."""
    if len(argv) > 1:
        _exit(REFUSED, f"found arguments {argv[1:]}, expected flags only: --config.FIELD=VALUE")
    logging.set_verbosity(logging.ERROR)  # orbax reports each array it writes
    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
    try:
        teacher = load_teacher(_CONFIG.value.teacher.path)
        settings = resolve(_CONFIG.value, image_size=max(teacher.graph.input_shape[:2]))
        step_spec(teacher, settings, data_mesh())
        data = load_eval_data(settings)
        report = quantize(teacher, settings, data, _WORKDIR.value)
    except (ValueError, OSError) as error:
        _exit(REFUSED, str(error))
    except TrainingDiverged as error:
        _exit(DIVERGED, str(error))
    say(summary(report))
    say(f"report: {_WORKDIR.value}/report.json")


def _exit(code: int, message: str) -> None:
    print(f"lrq_jax: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    app.run(main)
