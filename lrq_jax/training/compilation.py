"""The one place where steps are jitted, donated, sharded, and several put into one dispatch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lrq_jax.ops.by_platform import tracing_for
from lrq_jax.sharding import replicated
from lrq_jax.training.spec import StepSpec

StepFunction = Callable[..., tuple[Any, dict[str, jax.Array]]]

_STEPS_PER_DISPATCH = {"cpu": 1, "gpu": 20, "tpu": 50}
"""On XLA CPU convolutions inside a loop lose their fast path: a scan over steps is 6-7 times
slower a step than one dispatch each. Elsewhere it hides the launch latency; those two numbers are
guesses, not measured."""


def steps_per_dispatch(setting: int, mesh: Mesh) -> int:
    """The setting, or with 0 what suits the mesh's platform."""
    return setting or _STEPS_PER_DISPATCH.get(mesh.devices.flat[0].platform, 1)


def iterations_per_call(iterations: int, most: int) -> int:
    """The most that divide them all: one program makes every call, none is compiled for a rest."""
    return max(count for count in range(1, most + 1) if iterations % count == 0)


def compile_step(step: StepFunction, state: Any, *arguments: Any, mesh: Mesh, spec: StepSpec,
                 count: int = 1, **static: Any) -> Callable[..., Any]:  # fmt: skip
    """Compiles `count` consecutive steps into one program, ahead of time, with float32 products of
    the precision that the spec's resources name.

    The state is donated and replicated over the mesh, as are the arguments. The result accepts
    these shapes only: it cannot recompile.

    Args:
      step: `(state, *arguments, spec=spec, **static) -> (state, metrics)`.
      state, arguments: arrays (or their shapes) the program will be called with.
      mesh: devices.
      spec: static description of the step.
      count: steps a call; more than one run in a `lax.scan`.
      **static: passed through, closed over.

    Returns:
      `(state, *arguments) -> (state, metrics)`, each metric stacked to `[count]`.
    """
    bound = functools.partial(step, spec=spec, **static)

    def program(state: Any, *arguments: Any) -> Any:
        if count == 1:
            state, metrics = bound(state, *arguments)
            return state, jax.tree.map(lambda x: x[None], metrics)
        return jax.lax.scan(lambda s, _: bound(s, *arguments), state, length=count)

    program.__name__ = step.__name__  # what profiles and jax's events call it
    sharding = replicated(mesh)
    jitted = jax.jit(program, donate_argnums=0, in_shardings=sharding, out_shardings=sharding)
    precision = jax.default_matmul_precision(spec.resources.matmul_precision)
    with tracing_for(mesh.devices.flat[0].platform), precision:
        return jitted.lower(state, *arguments).compile()


def program_bytes(program: Any) -> int | None:
    """Memory of a compiled program on one device, as its compiler counts it: arguments, results
    and temporaries; None where the backend does not say."""
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


def compiled_in(seconds: float, program: Any) -> str:
    """How long a program took to compile and what it needs, for a person."""
    found = program_bytes(program)
    memory = "" if found is None else f"; it takes {found / 2**20:,.0f} MiB a device"
    return f"compiled in {seconds:.1f} s{memory}"


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Copies of host or device arrays on every device of the mesh, alike in all processes.

    Among several processes what one holds alone must be equal in all, to the bit and without NaN,
    and goes by way of the host: of an array on one device `jax.device_put` would make one that
    programs take but that cannot be saved (jax 0.10.2).
    """
    sharding = replicated(mesh)

    def put(x: Any) -> jax.Array:
        if sharding.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
            return jax.device_put(jnp.asarray(x), sharding)
        return jax.device_put(np.asarray(x), sharding)

    return jax.tree.map(put, tree)
