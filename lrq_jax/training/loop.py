"""The host loop: phases of steps, with checkpoints, metrics and images along the way."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrq_jax.checkpoints import TrainingCheckpoints
from lrq_jax.config import RunSettings
from lrq_jax.console import Progress, say
from lrq_jax.readers.teacher import Teacher
from lrq_jax.run_directory import RunDirectory
from lrq_jax.synthesis.generator import generate
from lrq_jax.training import steps
from lrq_jax.training.compilation import (
    compile_step,
    compiled_in,
    put_replicated,
    steps_per_dispatch,
)
from lrq_jax.training.errors import TrainingDiverged
from lrq_jax.training.noise_pool import Pool, synthesize_pool
from lrq_jax.training.real_pool import read_pool
from lrq_jax.training.reconstruction import reconstructed
from lrq_jax.training.spec import StepSpec
from lrq_jax.training.steps import TrainState

STUDENT_LOSS = "student/loss"
_GRID_IMAGES = 40
_REBUILD_STREAM = 2
"""Folded into the run's seed, as the pool's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """Consecutive steps of one kind: from step `start` up to, not including, `stop`."""

    name: str
    step: Callable[..., Any]
    start: int
    stop: int


def phases(spec: StepSpec) -> tuple[Phase, ...]:
    """The phases of a method, in order; empty ones left out.

    The warm-up (with the calibration of activation ranges inside it; all there is of it without a
    generator to warm up), the reconstruction of the student's blocks, which counts as one step,
    then the student's training.
    """
    method = spec.method
    begin, warm = method.calibration_start, method.warmup_steps
    if not method.trains_generator:
        begin, warm = 0, method.calibration_steps
    end = begin + method.calibration_steps
    student = steps.joint_step if method.images == "generator" else steps.pool_step
    calibration: Callable[..., Any] = steps.calibration_step
    if method.calibration_images == "pool":
        calibration = steps.pool_calibration_step
    rebuilt = warm + int(method.rounding == "adaround")
    plan = (
        Phase(name="warm-up", step=steps.warmup_step, start=0, stop=begin),
        Phase(name="calibration", step=calibration, start=begin, stop=end),
        Phase(name="warm-up", step=steps.warmup_step, start=end, stop=warm),
        Phase(name="reconstruction", step=reconstructed, start=warm, stop=rebuilt),
        Phase(name="training", step=student, start=rebuilt, stop=rebuilt + method.steps),
    )
    return tuple(phase for phase in plan if phase.stop > phase.start)


class TrainingLoop:
    """Runs the phases of a method, resuming where an earlier start of the run stopped.

    Args:
      spec: static description of the steps, with its mesh.
      teacher: the float network.
      settings: of the run.
      run: its directory.
    """

    def __init__(self, spec: StepSpec, teacher: Teacher, settings: RunSettings,
                 run: RunDirectory) -> None:  # fmt: skip
        self._spec, self._teacher, self._settings, self._run = spec, teacher, settings, run
        self._variables = put_replicated(teacher.variables, spec.mesh)
        self._timings = run.timings()
        self._recent_loss: float | None = None
        self._made_pool: Pool | None = None

    @property
    def timings(self) -> dict[str, float]:
        """Wall seconds per phase, over all starts of the run."""
        return dict(self._timings)

    def run(self) -> TrainState:
        """Trains to the end.

        Raises:
          TrainingDiverged: a loss stopped being finite.
        """
        # One program: op by op each of its draws would be compiled on its own.
        start = jax.jit(steps.initial_state, static_argnums=(0, 2))
        state = start(self._spec, self._teacher.variables, self._settings.seed)
        state = put_replicated(state, self._spec.mesh)
        with TrainingCheckpoints(self._run.checkpoints) as checkpoints:
            done = checkpoints.latest_step or 0
            if done:
                say(f"resuming after step {done}")
                state = checkpoints.restore(done, state, self._spec.mesh)
            if done < phases(self._spec)[-1].stop:
                self._compile_helpers(state)
            self._run.open_metrics(done)
            try:
                for phase in phases(self._spec):
                    run = self._rebuild if phase.step is reconstructed else self._run_phase
                    state = run(phase, state, checkpoints)
                self._save("the last step", int(state.step), state, checkpoints)
                self._write_images(state)
            finally:
                self._run.close()
        return state

    def _run_phase(self, phase: Phase, state: TrainState, checkpoints: TrainingCheckpoints) -> TrainState:  # fmt: skip
        start = max(phase.start, int(state.step))
        if start >= phase.stop:
            return state
        arguments: tuple[Any, ...] = (self._variables,)
        if phase.step in (steps.pool_step, steps.pool_calibration_step):
            with _naming_last_good(checkpoints, self._run):
                arguments += self.pool()
        done = start
        most = steps_per_dispatch(self._settings.steps_per_dispatch, self._spec.mesh)
        counts = dispatches(phase, start, most)
        programs = {
            count: self._compile(phase, state, arguments, count) for count in dict.fromkeys(counts)
        }
        pending: list[dict[str, jax.Array]] = []
        held: tuple[int, list[dict[str, jax.Array]]] | None = None  # to be logged: step, metrics
        clock = time.monotonic()
        with Progress(
            phase.name, start=start - phase.start, stop=phase.stop - phase.start
        ) as progress:

            def log(until: int, metrics: list[dict[str, jax.Array]]) -> None:
                losses = self._log(phase, until, metrics, checkpoints)
                progress.update(until - phase.start, losses)

            for count in counts:
                with jax.transfer_guard("disallow"):
                    state, metrics = programs[count](state, *arguments)
                pending.append(metrics)
                before, done = done, done + count
                due = _due(before, done, phase.stop)
                if held:  # waits for the steps before those just dispatched: no device idles
                    log(*held)
                    held = None
                if due(self._settings.log_every) or due(self._settings.checkpoint_every):
                    held, pending = (done, pending), []
                if held and due(self._settings.checkpoint_every):  # or the phase ends
                    log(*held)
                    held = None
                if due(self._settings.images_every) and done < phase.stop:
                    self._write_images(state)
                if due(self._settings.checkpoint_every):
                    self._save(phase.name, done, state, checkpoints)
                    clock = self._add_time(phase.name, clock)
        self._add_time(phase.name, clock)
        return state

    def _rebuild(self, phase: Phase, state: TrainState, checkpoints: TrainingCheckpoints) -> TrainState:  # fmt: skip
        """The phase of one step that learns the student's rounding on the pool."""
        if int(state.step) >= phase.stop:
            return state
        # Of the seed alone, as the pool: a run stopped in here starts this phase again.
        key = jax.random.fold_in(jax.random.key(self._settings.seed), _REBUILD_STREAM)
        with _naming_last_good(checkpoints, self._run):
            pool, clock = self.pool(), time.monotonic()
            say(f"{phase.name}: compiling a step for each kind of block as it comes ...")
            student = reconstructed(
                self._spec,
                state.student,
                pool.images,
                key,
                steps_per_dispatch=self._settings.steps_per_dispatch,
            )
        state = state._replace(step=state.step + 1, student=student)
        state = put_replicated(state, self._spec.mesh)
        self._add_time(phase.name, clock)
        self._save(phase.name, phase.stop, state, checkpoints)
        return state

    def _save(self, phase: str, done: int, state: TrainState, checkpoints: TrainingCheckpoints) -> None:  # fmt: skip
        """Saves a state after a look at its arrays: losses are those before the last update."""
        wrong = [
            jax.tree_util.keystr(path)
            for path, finite in jax.tree_util.tree_leaves_with_path(jax.device_get(_finite(state)))
            if not finite
        ]
        if wrong:
            raise TrainingDiverged(
                f"{phase}: after step {done} {len(wrong)} arrays are not finite, the first "
                f"{wrong[0]}; {_way_out(checkpoints, self._run)}"
            )
        checkpoints.save(done, state, self._recent_loss)

    def _compile(self, phase: Phase, state: TrainState, arguments: tuple[Any, ...], count: int) -> Any:  # fmt: skip
        clock = time.monotonic()
        say(f"{phase.name}: compiling the {phase.step.__name__.replace('_', ' ')} ...")
        program = compile_step(
            phase.step, state, *arguments, mesh=self._spec.mesh, count=count, spec=self._spec
        )
        say(f"{phase.name}: {compiled_in(time.monotonic() - clock, program)}")
        self._add_time("compilation", clock)
        return program

    def _compile_helpers(self, state: TrainState) -> None:
        """Compiles what is called between steps, by a first call before all of them."""
        clock = time.monotonic()
        jax.block_until_ready(_finite(state))
        if self._spec.method.trains_generator:
            self._generated(state, seed=0)
        self._add_time("compilation", clock)

    def pool(self) -> Pool:
        """The images the student trains on, if not live ones: made, taken or read at first use."""
        if self._made_pool is not None:
            return self._made_pool
        clock = time.monotonic()
        # Seeded by the settings alone, so that a resumed run optimises the same images.
        settings = self._settings
        if self._spec.method.images == "folder":
            pool = read_pool(
                settings.train_path,
                self._teacher.preprocessing,
                count=settings.train_images,
                seed=settings.seed,
                mesh=self._spec.mesh,
            )
            self._add_time("reading of real images", clock)
        else:
            earlier = settings.pool_path
            directory = Path(earlier) / self._run.pool.name if earlier else self._run.pool
            pool = synthesize_pool(
                self._spec,
                self._variables,
                directory,
                seed=settings.seed,
                steps_per_dispatch=settings.steps_per_dispatch,
            )
            self._add_time("image synthesis", clock)
        preview = np.linspace(0, len(pool.labels) - 1, _GRID_IMAGES).astype(int)
        labels = np.asarray(pool.labels)
        self._run.write_images(
            "pool",
            np.asarray(pool.images)[preview],
            labels[preview],
            self._teacher.preprocessing,
            self._teacher.class_names,
        )
        self._made_pool = pool
        return pool

    def _log(self, phase: Phase, done: int, pending: list[dict[str, jax.Array]],
             checkpoints: TrainingCheckpoints) -> dict[str, float]:  # fmt: skip
        """Means of the metrics since the last call, logged; stops the run if one is not finite."""
        values = [jax.device_get(metrics) for metrics in pending]
        stacked = {name: np.concatenate([v[name] for v in values]) for name in values[0]}
        finite = np.all([np.isfinite(v) for v in stacked.values()], axis=0)
        if not finite.all():
            first = int(np.argmin(finite))
            step = done - len(finite) + first
            terms = {name: float(v[first]) for name, v in stacked.items()}
            raise TrainingDiverged(
                f"{phase.name}: a loss is not finite at step {step}: {terms}; "
                f"{_way_out(checkpoints, self._run)}"
            )
        means = {name: float(v.mean()) for name, v in stacked.items()}
        if STUDENT_LOSS in means:
            self._recent_loss = means[STUDENT_LOSS]
        self._run.log(done, phase.name, means)
        return means

    def preview(self, state: TrainState, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Images `[N, H, W, C]` (normalised) that the student is trained on, no two the same, and
        their classes: the generator's as it is, in grids, or N = `count` of the pool, or all of it."""
        if self._spec.method.images == "generator":
            grids = [self._generated(state, seed) for seed in range(-(-count // _GRID_IMAGES))]
            images, labels = (np.concatenate(parts) for parts in zip(*grids, strict=True))
            return images[:count], labels[:count]
        pool = self.pool()
        images, labels = np.asarray(pool.images), np.asarray(pool.labels)
        chosen = np.linspace(0, len(labels) - 1, min(count, len(labels))).astype(int)
        return images[chosen], labels[chosen]

    def _generated(self, state: TrainState, seed: int) -> tuple[np.ndarray, np.ndarray]:
        spec = self._spec
        labels = np.arange(_GRID_IMAGES) * max(1, spec.generator.num_classes // _GRID_IMAGES)
        labels = labels % spec.generator.num_classes
        noise = jax.random.normal(jax.random.key(seed), (_GRID_IMAGES, spec.generator.latent_dim))
        generator = jax.device_get(state.generator)  # of several processes each draws on its own
        images = _generate(spec.generator, generator, noise, jnp.asarray(labels))
        return jax.device_get(images), labels

    def _write_images(self, state: TrainState) -> None:
        """A grid of what the generator makes now, classes in order; nothing if it is not used."""
        if not self._spec.method.trains_generator:
            return
        images, labels = self._generated(state, seed=0)
        self._run.write_images(
            f"step_{int(state.step):06d}",
            images,
            labels,
            self._teacher.preprocessing,
            self._teacher.class_names,
        )

    def _add_time(self, phase: str, since: float) -> float:
        now = time.monotonic()
        self._timings[phase] = self._timings.get(phase, 0.0) + now - since
        self._run.write_timings(self._timings)
        return now


_generate = jax.jit(generate, static_argnums=0)


def _due(before: int, done: int, stop: int) -> Callable[[int], bool]:
    """Whether a multiple of an interval was passed, or the phase has ended."""
    return lambda every: done // every > before // every or done >= stop


def dispatches(phase: Phase, start: int, most: int) -> list[int]:
    """How many steps each program call of a phase runs, from step `start` on: `most`, and one at a
    time for the rest. A resumed phase gets the very calls that the undisturbed one has left."""
    most = min(most, phase.stop - phase.start)
    whole, rest = divmod(phase.stop - start, most)
    return [most] * whole + [1] * rest


@contextlib.contextmanager
def _naming_last_good(checkpoints: TrainingCheckpoints, run: RunDirectory) -> Iterator[None]:
    """What diverges in here also names the last good checkpoint."""
    try:
        yield
    except TrainingDiverged as error:
        raise TrainingDiverged(f"{error}; {_last_good(checkpoints, run)}") from error


def _last_good(checkpoints: TrainingCheckpoints, run: RunDirectory) -> str:
    step = checkpoints.latest_step
    return f"last good checkpoint: {'none yet' if step is None else run.checkpoints / str(step)}"


def _way_out(checkpoints: TrainingCheckpoints, run: RunDirectory) -> str:
    return (
        f"{_last_good(checkpoints, run)}; lower method.student_learning_rate, "
        "method.student_kernel_rate, method.generator_learning_rate or method.gradient_clip, and "
        "start with another --workdir"
    )


@jax.jit
def _finite(state: TrainState) -> Any:
    """Whether all entries of each array are finite, array by array."""
    return jax.tree.map(
        lambda x: jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else True, state
    )
