"""Block reconstruction: the rounding of a student's weights learned block by block.

AdaRound's soft rounding (arXiv 2004.10568), on BRECQ's blocks (arXiv 2102.05426), with QDrop's
random dropping of activation quantization (arXiv 2203.05740) and learned activation steps.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lrq_jax.console import Progress, say
from lrq_jax.graph import INPUT
from lrq_jax.method import Method
from lrq_jax.ops.by_platform import tracing_for
from lrq_jax.passes.blocks import (
    Block,
    block_forward,
    blocks_of,
    canonical,
    fake_quantized,
    variables_of,
)
from lrq_jax.passes.float_forward import Variables
from lrq_jax.passes.kernels import coarse_kernel, kernel_parameters
from lrq_jax.passes.plan import Operation, QuantSpec
from lrq_jax.passes.rounding import with_held_ranges
from lrq_jax.passes.student import tensor_parameters
from lrq_jax.quantizers import adaround
from lrq_jax.quantizers.affine import AffineParameters, affine_parameters, dequantize
from lrq_jax.quantizers.ranges import stretched
from lrq_jax.quantizers.rounding import weight_at_codes
from lrq_jax.sharding import constrain_batch, replicated
from lrq_jax.training import compilation
from lrq_jax.training.compilation import compile_step, iterations_per_call, put_replicated
from lrq_jax.training.errors import TrainingDiverged
from lrq_jax.training.spec import StepSpec
from lrq_jax.training.steps import step_key

_REPORT_EVERY = 50


class BlockState(NamedTuple):
    """What the reconstruction of one block changes: `{"choice": {layer: V}, "stretch": {tensor:
    logarithm}}`, and its optimiser's state; `key` is raw data of that of its batches and drops."""

    step: jax.Array
    key: jax.Array
    trainable: Any
    opt: optax.OptState


class BlockImages(NamedTuple):
    """What a block reads and must make, for N images: `quantized` and `exact` are its input as
    the student and as the float network have it, `target` its output in the float network."""

    quantized: jax.Array
    exact: jax.Array
    target: jax.Array


def reconstructed(spec: StepSpec, variables: Variables, images: jax.Array, key: jax.Array, *,
                  steps_per_dispatch: int = 0) -> Variables:  # fmt: skip
    """The student with rounding and activation steps learned on images, block after block.

    Each block is to make of the student's input what the float network makes of its own; the
    next block then sees this one's result. Kernels end at the chosen codes as
    `passes.rounding.rounded_weights` leaves them.

    Blocks that differ in names alone share their compiled programs (`passes.blocks.canonical`),
    which changes no number. To rebuild them at once, as a batch (`jax.vmap`), would: a block is trained
    on what the one before it puts out quantized, which is not there before that one is finished.
    Batches are split over the mesh where their size can be; images and states are copies on each device.

    Args:
      spec: static description with its mesh, its student of the `integer` placement; of its method the
        `reconstruction_` fields.
      variables: calibrated, weights not yet rounded: they are the float network that is matched.
      images: `[N, H, W, C]` in the teacher's normalised input space.
      key: of batches and drops.
      steps_per_dispatch: the most iterations a program call runs; 0: what suits the platform.

    Raises:
      TrainingDiverged: a loss stopped being finite.
    """
    student, method = spec.student, spec.method
    mesh = spec.mesh
    say_if_whole(method, mesh)
    devices = mesh.devices.size
    size = -(-method.reconstruction_batch_size // devices) * devices  # of passes of all images
    most = compilation.steps_per_dispatch(steps_per_dispatch, mesh)
    count = iterations_per_call(method.reconstruction_iterations, most)
    programs: dict[Any, Any] = {}
    variables, inputs = put_replicated((with_held_ranges(student, variables), images), mesh)
    image_parameters = tensor_parameters(student, variables)[INPUT]
    quantized = fake_quantized(inputs, image_parameters, student.spec.boundary_bits)
    blocks = blocks_of(student)
    for number, block in enumerate(blocks):
        shared, names = canonical(block)
        own = variables_of(variables, names)
        target = _in_batches(_exact_block, inputs, own, size, mesh=mesh, block=shared)
        seen = BlockImages(quantized, inputs, target)
        state = initial_block(spec, shared, own, jax.random.fold_in(key, number))
        # On the variables' devices, as what a step returns.
        state, arguments = put_replicated((state, (own, seen)), mesh)
        form = shared, tuple(x.shape for x in seen)
        if form not in programs:
            programs[form] = compile_step(
                reconstruction_step, state, *arguments, mesh=mesh, count=count, spec=spec, block=shared
            )  # fmt: skip
        name = f"block {number + 1}/{len(blocks)} ({block.output})"
        trainable = _learned(programs[form], count, state, arguments, method, name)
        inputs = target
        del seen, arguments, state  # maps of all images, which the next pass need not hold
        learned = {
            kind: {old: entries[new] for old, new in names.items() if new in entries}
            for kind, entries in trainable.items()
        }
        variables = _with_choices(student.spec, block, variables, learned)
        own = variables_of(variables, names)
        quantized = _in_batches(
            _hard_block, quantized, own, size, mesh=mesh, spec=student.spec, block=shared
        )
    return variables


def say_if_whole(method: Method, mesh: Mesh) -> None:
    """Says where a batch cannot be split, so that more devices make nothing faster."""
    size, devices = method.reconstruction_batch_size, mesh.devices.size
    if size % devices:
        say(
            f"reconstruction: {size} images an iteration cannot be split "
            f"over {devices} devices; each computes them all (method.reconstruction_batch_size)"
        )


def _learned(program: Any, count: int, state: BlockState, arguments: tuple[Any, ...],
             method: Method, name: str) -> Any:  # fmt: skip
    """What a block's iterations, by a program of `count` of them, make of its trainable arrays."""
    iterations, pending = method.reconstruction_iterations, []
    with Progress(name, start=0, stop=iterations) as progress:
        for done in range(count, iterations + 1, count):
            state, metrics = program(state, *arguments)
            pending.append(metrics)
            if done % _REPORT_EVERY < count or done == iterations:
                found = jax.device_get(pending)
                values = {
                    term: float(np.mean(np.concatenate([m[term] for m in found])))
                    for term in metrics
                }
                pending = []
                if not all(map(np.isfinite, values.values())):
                    raise TrainingDiverged(
                        f"reconstruction of {name}: a loss is not finite before iteration {done}: "
                        f"{values}; lower method.reconstruction_learning_rate"
                    )
                progress.update(done, values)
    return state.trainable


def initial_block(spec: StepSpec, block: Block, variables: Variables, key: jax.Array) -> BlockState:
    """Choices that leave every weight where it is, and steps as calibrated; `key` is of the block."""
    stretch = variables["quant"]["stretch"]["activations"]
    trainable = {
        "choice": {
            op.layer.name: adaround.initial_choice(
                variables["params"][op.layer.name]["kernel"],
                kernel_parameters(spec.student.spec, variables, op),
            )
            for op in block.operations
            if op.weight_bits
        },
        "stretch": {  # copies: the state is donated
            op.output: jnp.array(stretch[op.output]) for op in block.operations if op.output_bits
        },
    }
    opt = _optimizer(spec.method).init(trainable)
    return BlockState(jnp.int32(0), jax.random.key_data(key), trainable, opt)


def reconstruction_step(state: BlockState, variables: Variables, images: BlockImages, *,
                        spec: StepSpec, block: Block) -> tuple[BlockState, dict[str, jax.Array]]:  # fmt: skip
    """One update on a random batch; pure."""
    method = spec.method
    pick_key, loss_key = jax.random.split(step_key(state))
    shape = (method.reconstruction_batch_size,)
    # Split before images are taken: each device then takes its own from its copy of them.
    picked = _split(jax.random.randint(pick_key, shape, 0, len(images.target)), spec.mesh)
    batch = BlockImages(*(_split(values[picked], spec.mesh) for values in images))
    loss = functools.partial(
        reconstruction_loss, spec=spec.student.spec, block=block, method=method
    )
    gradient = jax.grad(spec.resources.rematerialized(loss), has_aux=True)
    grads, metrics = gradient(state.trainable, variables, batch, loss_key, state.step)
    updates, opt = _optimizer(method).update(grads, state.opt, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    return BlockState(state.step + 1, state.key, trainable, opt), metrics


def _split(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """`[B, ...]` over the mesh, where it can be split evenly."""
    return x if mesh is None or len(x) % mesh.devices.size else constrain_batch(x, mesh)


def reconstruction_loss(trainable: Any, variables: Variables, batch: BlockImages, key: jax.Array,
                        step: jax.Array, *, spec: QuantSpec, block: Block, method: Method) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """`mean(sum over channels of (y_q - y)^2) + lambda * sum(1 - |2 h(V) - 1|^beta)`.

    The regulariser rests for the first share `reconstruction_warmup` of the iterations, then
    beta falls from 20 to 2 on a cosine. Each value of the block's input and of every tensor in it
    is left unquantized with `reconstruction_drop`.
    """
    quant = variables["quant"]
    stretch = {**quant["stretch"]["activations"], **trainable["stretch"]}
    with_steps = {
        **variables,
        "quant": {**quant, "stretch": {**quant["stretch"], "activations": stretch}},
    }
    tensors = _made_parameters(block, with_steps)
    kernels = {}
    for op in block.operations:
        if op.weight_bits:
            parameters = kernel_parameters(spec, variables, op)
            choice = trainable["choice"][op.layer.name]
            kernel = variables["params"][op.layer.name]["kernel"]
            codes = adaround.soft_codes(kernel, choice, parameters, op.weight_bits)
            kernels[op.layer.name] = dequantize(codes, parameters)
    keys = iter(jax.random.split(key, len(block.operations) + 1))

    def mixed(quantized: jax.Array, exact: jax.Array) -> jax.Array:
        drop = jax.random.bernoulli(next(keys), method.reconstruction_drop, exact.shape)
        return jnp.where(drop, exact, quantized)

    def finish(operation: Operation, value: jax.Array) -> jax.Array:
        if operation.output_bits is None:
            return value
        coarse = fake_quantized(value, tensors[operation.output], operation.output_bits)
        return mixed(coarse, value)

    made = block_forward(block, variables, kernels, mixed(batch.quantized, batch.exact), finish)
    error = jnp.mean(jnp.sum((made - batch.target) ** 2, -1))
    warmup = method.reconstruction_warmup * method.reconstruction_iterations
    rest = jnp.maximum(method.reconstruction_iterations - warmup, 1.0)
    share = jnp.clip((step - warmup) / rest, 0.0, 1.0)
    falling = (1 + jnp.cos(jnp.pi * share)) / 2
    beta = adaround.LAST_BETA + (adaround.FIRST_BETA - adaround.LAST_BETA) * falling
    open_choices = sum(adaround.undecided(choice, beta) for choice in trainable["choice"].values())
    weight = jnp.where(step < warmup, 0.0, method.reconstruction_regularizer)
    metrics: dict[str, Any] = {
        "reconstruction/error": error,
        "reconstruction/undecided": open_choices,
    }
    return error + weight * open_choices, metrics


def _optimizer(method: Method) -> optax.GradientTransformation:
    """Adam for the choices, Adam on a cosine for the steps."""
    schedule = optax.cosine_decay_schedule(
        method.reconstruction_step_rate, method.reconstruction_iterations
    )
    return optax.partition(
        {
            "choice": optax.adam(method.reconstruction_learning_rate),
            "stretch": optax.adam(schedule),
        },
        {"choice": "choice", "stretch": "stretch"},
    )


def _made_parameters(block: Block, variables: Variables) -> dict[str, AffineParameters]:
    """`tensor_parameters` of the tensors that a block makes."""
    quant = variables["quant"]
    limits, stretch = quant["activations"], quant["stretch"]["activations"]
    return {
        op.output: affine_parameters(
            **stretched(limits[op.output], stretch[op.output]), bits=op.output_bits
        )
        for op in block.operations
        if op.output_bits
    }


def _with_choices(spec: QuantSpec, block: Block, variables: Variables, trainable: Any) -> Variables:  # fmt: skip
    """The variables with a block's kernels at the codes chosen and its steps as learned."""
    quant, params = variables["quant"], dict(variables["params"])
    for op in block.operations:
        if op.weight_bits:
            entry, parameters = (
                params[op.layer.name],
                kernel_parameters(spec, variables, op),
            )
            choice = trainable["choice"][op.layer.name]
            codes = adaround.hard_codes(entry["kernel"], choice, parameters, op.weight_bits)
            kernel = weight_at_codes(entry["kernel"], codes, parameters, op.weight_bits)
            params[op.layer.name] = {**entry, "kernel": kernel}
    stretch = {**quant["stretch"]["activations"], **trainable["stretch"]}
    quant = {**quant, "stretch": {**quant["stretch"], "activations": stretch}}
    return {**variables, "params": params, "quant": quant}


@functools.partial(jax.jit, static_argnames=("mesh", "block"))
def _exact_block(x: jax.Array, variables: Variables, *, mesh: Mesh, block: Block) -> jax.Array:
    return _whole(block_forward(block, variables, {}, _split(x, mesh)), mesh)


@functools.partial(jax.jit, static_argnames=("mesh", "spec", "block"))
def _hard_block(x: jax.Array, variables: Variables, *, mesh: Mesh, spec: QuantSpec, block: Block) -> jax.Array:  # fmt: skip
    """The block as the student runs it, up to the order of its float arithmetic."""
    tensors = _made_parameters(block, variables)
    kernels = {
        op.layer.name: coarse_kernel(spec, variables, op)
        for op in block.operations
        if op.weight_bits
    }

    def finish(operation: Operation, value: jax.Array) -> jax.Array:
        bits = operation.output_bits
        return fake_quantized(value, tensors[operation.output], bits) if bits else value

    return _whole(block_forward(block, variables, kernels, _split(x, mesh), finish), mesh)


def _whole(x: jax.Array, mesh: Mesh) -> jax.Array:
    """A copy on each device, from which iterations take their batches."""
    return jax.lax.with_sharding_constraint(x, replicated(mesh))


def _in_batches(run: Any, x: jax.Array, variables: Variables, size: int, *, mesh: Mesh, **static: Any) -> jax.Array:  # fmt: skip
    with tracing_for(mesh.devices.flat[0].platform):
        parts = [
            run(x[start : start + size], variables, mesh=mesh, **static)
            for start in range(0, len(x), size)
        ]
    return jnp.concatenate(parts)
