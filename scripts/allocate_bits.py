"""Gives each layer's weights bits of their own, under a budget for all; prints the overrides.

    python scripts/allocate_bits.py --teacher DIR --budget size --average-bits 4

How much each layer suffers at each number of bits is measured on images made from the teacher
(preset `squant`'s), so no data is needed. The last line is a flag for `python -m lrq_jax.main`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import jax

from lrq_jax.config import base_config, resolve
from lrq_jax.endings import fail, run_command
from lrq_jax.passes.mixed_precision import (
    BUDGETS,
    CANDIDATES,
    allocate,
    costs,
    overrides,
    sensitivities,
)
from lrq_jax.quantize import step_spec
from lrq_jax.readers.store import load_teacher
from lrq_jax.sharding import data_mesh
from lrq_jax.training.compilation import put_replicated
from lrq_jax.training.noise_pool import synthesize_pool


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="converted teacher, or `digits`")
    parser.add_argument("--budget", choices=BUDGETS, default="size")
    parser.add_argument(
        "--average-bits",
        type=float,
        default=4.0,
        help="the budget is what these bits for every layer's weights would take",
    )
    parser.add_argument("--act-bits", type=int, default=4)
    parser.add_argument("--bits", type=int, nargs="+", default=list(CANDIDATES))
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> int:
    """Measures, prints a table and the flag; returns 0, or 2 after a message on standard error."""
    arguments = _parser().parse_args()
    try:
        if not min(arguments.bits) <= arguments.average_bits <= max(arguments.bits):
            raise ValueError(
                f"--average-bits: found {arguments.average_bits:g}, expected a number between the "
                f"smallest and the largest of --bits {arguments.bits}"
            )
        teacher = load_teacher(arguments.teacher)
        config = base_config()
        config.method.preset, config.student.act_bits = "squant", arguments.act_bits
        settings = resolve(config, image_size=max(teacher.graph.input_shape[:2]))
        mesh = data_mesh()
        spec = step_spec(teacher, settings, mesh)
    except (ValueError, OSError, ImportError) as error:
        return fail("allocate_bits", error)
    jax.config.update("jax_default_matmul_precision", settings.resources.matmul_precision)
    variables = put_replicated(teacher.variables, mesh)
    with tempfile.TemporaryDirectory() as directory:
        pool = synthesize_pool(spec, variables, Path(directory), seed=arguments.seed)
    harm = sensitivities(spec.student, variables, pool.images, arguments.bits)
    cost = costs(spec.student, arguments.budget, arguments.bits)
    limit = sum(cost[name][bits] / bits * arguments.average_bits
                for name, by_bits in cost.items() for bits in list(by_bits)[:1])  # fmt: skip
    chosen = allocate(harm, cost, limit)
    for name, bits in chosen.items():
        row = "  ".join(f"w{b} {harm[name][b]:.5f}" for b in arguments.bits)
        print(f"{name:24} {bits} bits   KL: {row}")
    taken = sum(cost[name][bits] for name, bits in chosen.items())
    print(f"{arguments.budget}: {taken:.6g} of {limit:.6g}")
    print(f'--config.student.overrides="{overrides(chosen)}"')
    return 0


if __name__ == "__main__":
    run_command("allocate_bits", main)
