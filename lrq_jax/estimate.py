"""How long a run will take and how much memory, measured before it starts."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrq_jax import losses
from lrq_jax.passes.blocks import blocks_of, canonical, variables_of
from lrq_jax.passes.float_forward import Variables
from lrq_jax.quantize import Job
from lrq_jax.training import noise_steps, steps
from lrq_jax.training.compilation import (
    StepFunction,
    compile_step,
    iterations_per_call,
    program_bytes,
    put_replicated,
    steps_per_dispatch,
)
from lrq_jax.training.loop import dispatches, phases
from lrq_jax.training.reconstruction import (
    BlockImages,
    initial_block,
    reconstructed,
    reconstruction_step,
    say_if_whole,
)

_CALLS = 3
_LONG_STEPS = 5_000
"""A run of more steps than this at 32 px on a CPU takes hours or days: worth an estimate first."""


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
    """Compiles each phase's step and calls it three times; nothing is written.

    The images' own optimisation, where a method has it, is the first phase. Steps that train on
    such images are timed on a pool of zeros. A step of reconstruction is one iteration of every block;
    the passes of the whole pool between blocks are not timed.
    """
    spec, mesh = job.spec, job.spec.mesh
    assert mesh is not None  # `prepare` makes one
    variables = put_replicated(job.teacher.variables, mesh)
    found = (
        [] if job.settings.pool_path or not spec.method.makes_pool else [_of_images(job, variables)]
    )
    start = jax.jit(steps.initial_state, static_argnums=(0, 2))
    for phase in phases(spec):
        state = put_replicated(start(spec, variables, job.settings.seed), mesh)
        if phase.step is reconstructed:
            found.append(_of_reconstruction(phase.name, job, state.student))
            continue
        arguments = (variables,)
        if phase.step in (steps.pool_step, steps.pool_calibration_step):
            images = np.zeros((_pool_size(job), *job.teacher.graph.input_shape), np.float32)
            arguments += put_replicated((images, np.zeros(len(images), np.int32)), mesh)
        most = steps_per_dispatch(job.settings.steps_per_dispatch, mesh)
        count = dispatches(phase, phase.start, most)[0]
        timed = _compiled_and_timed(phase.step, state, *arguments, job=job, count=count)
        found.append(PhaseEstimate(name=phase.name, steps=phase.stop - phase.start, **timed))
    return tuple(found)


def _pool_size(job: Job) -> int:
    method = job.spec.method
    if method.images == "folder":
        return job.settings.train_images
    return method.noise_batches * method.noise_batch_size


def _of_images(job: Job, variables: Variables) -> PhaseEstimate:
    """The optimisation of all batches of images from noise."""
    spec, graph = job.spec, job.spec.graph
    centers = losses.initial_centers(graph.num_classes, graph.shapes[graph.features][0])
    state = noise_steps.initial_noise(spec, jax.random.key(job.settings.seed), centers)
    state = put_replicated(state, spec.mesh)
    return PhaseEstimate(
        name="image synthesis",
        steps=spec.method.noise_batches * spec.method.noise_iterations,
        **_compiled_and_timed(noise_steps.noise_step, state, variables, job=job, count=1),
    )


def _of_reconstruction(name: str, job: Job, student: Variables) -> PhaseEstimate:
    """All iterations of all blocks; what they read and must make is zeros."""
    method, shapes, mesh = job.spec.method, job.spec.graph.shapes, job.spec.mesh
    assert mesh is not None  # `prepare` makes one
    say_if_whole(method, mesh)
    most = steps_per_dispatch(job.settings.steps_per_dispatch, mesh)
    count = iterations_per_call(method.reconstruction_iterations, most)
    timed: dict[tuple[Any, ...], dict[str, Any]] = {}
    seconds = []
    for block in blocks_of(job.spec.student):
        shared, names = canonical(block)
        source, made = (
            jnp.zeros((method.reconstruction_batch_size, *shapes[tensor]))
            for tensor in (block.source, block.output)
        )
        key = (shared, source.shape)
        if key not in timed:
            own = variables_of(student, names)
            state = initial_block(job.spec, shared, own, jax.random.key(0))
            state, *arguments = put_replicated(
                (state, own, BlockImages(source, source, made)), mesh
            )
            timed[key] = _compiled_and_timed(
                reconstruction_step, state, *arguments, job=job, count=count, block=shared
            )
            if timed[key]["bytes"] is not None:  # a block's program takes the whole pool
                held = (2 * source.nbytes + made.nbytes) // len(source)
                timed[key]["bytes"] += held * (_pool_size(job) - len(source))
        seconds.append(timed[key]["seconds_per_step"])
    known = [each["bytes"] for each in timed.values() if each["bytes"] is not None]
    return PhaseEstimate(
        name=name,
        steps=method.reconstruction_iterations,
        seconds_per_step=sum(seconds),
        compile_seconds=sum(each["compile_seconds"] for each in timed.values()),
        bytes=max(known, default=None),
    )


def _compiled_and_timed(step: StepFunction, state: Any, *arguments: Any, job: Job, count: int,
                        **static: Any) -> dict[str, Any]:  # fmt: skip
    """`_timed` of `count` steps in one program, compiled here."""
    clock = time.monotonic()
    program = compile_step(
        step, state, *arguments, mesh=job.spec.mesh, count=count, spec=job.spec, **static
    )
    return _timed(program, time.monotonic() - clock, state, arguments, count=count)


def _timed(program: Any, compile_seconds: float, state: Any, arguments: tuple[Any, ...], *,
           count: int) -> dict[str, Any]:  # fmt: skip
    """Of a program of `count` steps: a step's seconds, and the program's seconds and bytes."""
    fastest = float("inf")
    for _ in range(_CALLS):
        clock = time.monotonic()
        state, _metrics = jax.block_until_ready(program(state, *arguments))
        fastest = min(fastest, time.monotonic() - clock)
    return {
        "seconds_per_step": fastest / count,
        "compile_seconds": compile_seconds,
        "bytes": program_bytes(program),
    }


def is_long(steps: int, height: int, width: int) -> bool:
    """Whether so many steps on images of so many pixels are hours on a CPU."""
    return steps * height * width > _LONG_STEPS * 32 * 32


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
            f"in all about {total}{memory}; evaluation comes on top",
        ]
    )


def duration(seconds: float) -> str:
    """`90 s`, `12 min`, `3.4 h` or `2.1 days`."""
    for size, unit in ((86_400, "days"), (3_600, "h")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
