"""A pool of training images optimised from noise, batch by batch, each kept as it is finished."""

from __future__ import annotations

import functools
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lrq_jax import losses
from lrq_jax.config import differences
from lrq_jax.console import Progress, say
from lrq_jax.losses.margin import Centers
from lrq_jax.processes import is_first, wait_for_all
from lrq_jax.sharding import replicated
from lrq_jax.training import compilation, noise_steps
from lrq_jax.training.compilation import (
    compile_step,
    compiled_in,
    iterations_per_call,
    put_replicated,
)
from lrq_jax.training.errors import TrainingDiverged
from lrq_jax.training.noise_steps import NoiseState
from lrq_jax.training.spec import StepSpec

_POOL_STREAM = 1
"""Folded into the run's seed, so that pool and training draw different numbers."""
_REPORT_EVERY = 20
_WAY_OUT = (
    "finished batches are kept; lower method.noise_learning_rate and start with another --workdir"
)


class Pool(NamedTuple):
    """Images `[N, H, W, C]` in the teacher's normalised input space, labels `[N]`."""

    images: jax.Array
    labels: jax.Array


def check_pool(path: str, config: dict[str, Any]) -> None:
    """Finds out whether an earlier run's noise images are those that this run would make.

    Args:
      path: its run directory.
      config: what this run's config.json holds.

    Raises:
      ValueError: no finished pool there, or one of another teacher, seed or synthesis.
    """
    directory = Path(path)
    try:
        earlier = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        found = _recipe(earlier)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"data.pool_path: found no run in {path} ({error!r}), expected the run directory of an "
            "earlier run with method.images='noise'"
        ) from error
    if changed := differences(found, _recipe(config)):
        raise ValueError(
            f"data.pool_path: found a pool of other images in {path}:\n  "
            + "\n  ".join(changed)
            + "\nexpected the same; leave data.pool_path empty to make new images"
        )
    missing = [
        name
        for name in map(_batch_name, range(found["method"]["noise_batches"]))
        if not (directory / "pool" / name).exists()
    ]
    if missing:
        raise ValueError(
            f"data.pool_path: found no {missing[0]} in {directory / 'pool'}, expected a finished "
            "pool; let that run finish its image synthesis first"
        )


_GENERATOR_FIELDS = ("attention", "conditioning", "generator_width", "latent_dim")
"""Fields of a method that say what its generator is."""


def _recipe(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that a pool's images depend on."""
    names = {"adam_epsilon", "class_focus"}
    if config["method"].get("noise_parameters") == "latents":
        names.update(_GENERATOR_FIELDS)
    method = {
        name: value
        for name, value in config["method"].items()
        if name.startswith(("noise_", "ama_")) or name in names
    }
    return {
        "teacher_sha256": config["teacher_sha256"],
        "seed": config["seed"],
        "precision": config["resources"]["precision"],
        "method": method,
    }


def _batch_name(number: int) -> str:
    return f"batch_{number:03d}.npz"


def synthesize_pool(spec: StepSpec, teacher: Any, directory: Path, *, seed: int,
                    steps_per_dispatch: int = 0) -> Pool:  # fmt: skip
    """Optimises `method.noise_batches` batches of images from noise.

    A finished batch is kept in `directory`; a later call with the same spec and seed takes it
    from there, and repeats an unfinished one from its start, to the same images.

    Args:
      spec: static description of the steps, with its mesh.
      teacher: variables on the mesh.
      directory: made if needed.
      seed: of the run.
      steps_per_dispatch: the most iterations a program call runs; 0: what suits the platform.

    Raises:
      TrainingDiverged: a loss stopped being finite; iteration and terms named.
    """
    directory.mkdir(parents=True, exist_ok=True)
    method, graph, mesh = spec.method, spec.graph, spec.mesh
    key = jax.random.fold_in(jax.random.key(seed), _POOL_STREAM)
    centers = losses.initial_centers(graph.num_classes, graph.shapes[graph.features][0])
    most = compilation.steps_per_dispatch(steps_per_dispatch, mesh)
    count = iterations_per_call(method.noise_iterations, most)
    program = finish = None
    batches = []
    for number in range(method.noise_batches):
        path = directory / _batch_name(number)
        if not path.exists():
            state = noise_steps.initial_noise(spec, jax.random.fold_in(key, number), centers)
            state = put_replicated(state, mesh)
            if program is None:
                clock = time.monotonic()
                say("image synthesis: compiling the noise step ...")
                program = compile_step(
                    noise_steps.noise_step, state, teacher, mesh=mesh, count=count, spec=spec
                )
                finish = _compile_finish(state, teacher, spec)
                say(f"image synthesis: {compiled_in(time.monotonic() - clock, program)}")
            state = _optimise(program, count, state, teacher, number, spec)
            finished = jax.device_get((state.labels, *finish(state, teacher)))
            if not np.isfinite(finished[1]).all():  # losses are those before the last update
                raise TrainingDiverged(
                    f"image synthesis, batch {number + 1}: images are not finite after the last "
                    f"iteration; {_WAY_OUT}"
                )
            if is_first():
                _save(path, *finished)
            wait_for_all(str(path))
        with np.load(path) as stored:
            batches.append((stored["images"], stored["labels"]))
            centers = Centers(*jax.device_put((stored["sums"], stored["counts"])))
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return Pool(*put_replicated((images, labels), mesh))


def _compile_finish(state: NoiseState, teacher: Any, spec: StepSpec) -> Any:
    """`finished_noise`, ahead of time; replicated: each process reads the images of all."""
    finish = functools.partial(noise_steps.finished_noise, spec=spec)
    jitted = jax.jit(finish, out_shardings=replicated(spec.mesh))
    return jitted.lower(state, teacher).compile()


def _optimise(program: Any, count: int, state: NoiseState, teacher: Any, number: int,
              spec: StepSpec) -> NoiseState:  # fmt: skip
    """A batch's iterations, by a program of `count` of them."""
    iterations = spec.method.noise_iterations
    name = f"image synthesis, batch {number + 1}/{spec.method.noise_batches}"
    pending: list[dict[str, jax.Array]] = []
    with Progress(name, start=0, stop=iterations) as progress:
        for done in range(count, iterations + 1, count):
            with jax.transfer_guard("disallow"):
                state, metrics = program(state, teacher)
            pending.append(metrics)
            if done % _REPORT_EVERY < count or done == iterations:
                values = _checked(name, done, pending)
                pending = []
                progress.update(done, values)
    return state


def _checked(name: str, done: int, pending: list[dict[str, jax.Array]]) -> dict[str, float]:
    """The latest metrics; stops the run if any of those since the last look is not finite."""
    found = jax.device_get(pending)
    stacked = {term: np.concatenate([m[term] for m in found]) for term in found[0]}
    finite = np.all([np.isfinite(values) for values in stacked.values()], axis=0)
    if not finite.all():
        first = int(np.argmin(finite))
        terms = {term: float(values[first]) for term, values in stacked.items()}
        raise TrainingDiverged(
            f"{name}: a loss is not finite at iteration {done - len(finite) + first}: "
            f"{terms}; {_WAY_OUT}"
        )
    return {term: float(values[-1]) for term, values in stacked.items()}


def _save(path: Path, labels: jax.Array, images: jax.Array, centers: Centers) -> None:
    temporary = path.with_name(f".{path.stem}.new.npz")
    images, labels, sums, counts = jax.device_get((images, labels, *centers))
    np.savez(temporary, images=images, labels=labels, sums=sums, counts=counts)
    os.replace(temporary, path)
