"""How long a run will take and how much memory, measured before it starts."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from lrq_jax.quantize import Job
from lrq_jax.training import steps
from lrq_jax.training.compilation import compile_step, put_replicated, steps_per_dispatch
from lrq_jax.training.loop import dispatches, phases
from lrq_jax.training.reconstruction import reconstructed

_CALLS = 3
LONG_STEPS = 5_000
"""A run of more steps than this on a CPU takes hours or days: worth an estimate first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseEstimate:
    """One phase of a run.

    Attributes:
      name: of the phase.
      steps: how many.
      seconds_per_step: the fastest of three calls.
      compile_seconds: once.
      bytes: of the program's arguments, results and temporaries on one device; None where the
        backend does not say.
    """

    name: str
    steps: int
    seconds_per_step: float
    compile_seconds: float
    bytes: int | None

    @property
    def seconds(self) -> float:
        """Of the whole phase, its compilation included."""
        return self.compile_seconds + self.steps * self.seconds_per_step


def estimate(job: Job) -> tuple[PhaseEstimate, ...]:
    """Compiles each phase's step and runs it three times; nothing is written.

    Phases that train on noise images are timed on a pool of zeros. Making the pool and learning the
    rounding of weights on it are not counted.
    """
    spec, mesh = job.spec, job.spec.mesh
    assert mesh is not None  # `prepare` makes one
    variables = put_replicated(job.teacher.variables, mesh)
    found = []
    for phase in phases(spec):
        if phase.step is reconstructed:
            continue
        state = put_replicated(steps.initial_state(spec, variables, job.settings.seed), mesh)
        arguments = (variables,)
        if phase.step in (steps.pool_step, steps.pool_calibration_step):
            count = spec.method.noise_batches * spec.method.noise_batch_size
            if spec.method.images == "folder":
                count = job.settings.train_images
            images = np.zeros((count, *job.teacher.graph.input_shape), np.float32)
            arguments += put_replicated((images, np.zeros(count, np.int32)), mesh)
        most = steps_per_dispatch(job.settings.steps_per_dispatch, mesh)
        per_call = dispatches(phase, phase.start, most)[0]
        clock = time.monotonic()
        program = compile_step(phase.step, state, *arguments, mesh=mesh, count=per_call, spec=spec)
        compiled = time.monotonic() - clock
        fastest = float("inf")
        for _ in range(_CALLS):
            clock = time.monotonic()
            state, _metrics = jax.block_until_ready(program(state, *arguments))
            fastest = min(fastest, time.monotonic() - clock)
        found.append(
            PhaseEstimate(
                name=phase.name,
                steps=phase.stop - phase.start,
                seconds_per_step=fastest / per_call,
                compile_seconds=compiled,
                bytes=_bytes(program),
            )
        )
    return tuple(found)


def _bytes(program: Any) -> int | None:
    """Memory of a compiled program, as its compiler counts it."""
    try:
        found = program.memory_analysis()
    except (NotImplementedError, RuntimeError):  # not every backend counts
        return None
    if found is None:
        return None
    return int(
        found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )  # fmt: skip


def describe(found: tuple[PhaseEstimate, ...]) -> str:
    """A table and the sums, for a person."""
    lines = [
        f"{phase.name}: {phase.steps:,} steps of {phase.seconds_per_step:.3g} s, "
        f"{duration(phase.seconds)} with {phase.compile_seconds:.0f} s of compilation"
        + ("" if phase.bytes is None else f"; {phase.bytes / 2**20:,.0f} MiB a device")
        for phase in found
    ]
    total = duration(sum(phase.seconds for phase in found))
    known = [phase.bytes for phase in found if phase.bytes is not None]
    memory = f", {max(known) / 2**20:,.0f} MiB a device at most" if known else ""
    return "\n".join(
        [
            *lines,
            f"in all about {total}{memory}; evaluation, noise images and "
            "learned rounding come on top",
        ]
    )


def duration(seconds: float) -> str:
    """`90 s`, `12 min`, `3.4 h` or `2.1 days`."""
    for size, unit in ((86_400, "days"), (3_600, "h")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
