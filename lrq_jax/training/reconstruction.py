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

from lrq_jax.console import Progress
from lrq_jax.graph import INPUT
from lrq_jax.method import Method
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
from lrq_jax.passes.student import Student, tensor_parameters
from lrq_jax.quantizers import adaround
from lrq_jax.quantizers.affine import AffineParameters, affine_parameters, dequantize
from lrq_jax.quantizers.ranges import stretched
from lrq_jax.quantizers.rounding import weight_at_codes
from lrq_jax.training.errors import TrainingDiverged

_REPORT_EVERY = 50


class BlockState(NamedTuple):
    """What the reconstruction of one block changes: `{"choice": {layer: V}, "stretch": {tensor:
    logarithm}}`, and its optimiser's state."""

    step: jax.Array
    trainable: Any
    opt: optax.OptState


class BlockImages(NamedTuple):
    """What a block reads and must make, for N images: `quantized` and `exact` are its input as
    the student and as the float network have it, `target` its output in the float network."""

    quantized: jax.Array
    exact: jax.Array
    target: jax.Array


def reconstructed(student: Student, variables: Variables, images: jax.Array, method: Method,
                  key: jax.Array) -> Variables:  # fmt: skip
    """The student with rounding and activation steps learned on images, block after block.

    Each block is to make of the student's input what the float network makes of its own; the
    next block then sees this one's result. Kernels end at the chosen codes as
    `passes.rounding.rounded_weights` leaves them.

    Blocks that differ in names alone share their compiled programs (`passes.blocks.canonical`),
    which changes no number. To rebuild them at once, as a batch (`jax.vmap`), would: a block is trained
    on what the one before it puts out quantized, which is not there before that one is finished.

    Args:
      student: of the `integer` placement.
      variables: calibrated, weights not yet rounded: they are the float network that is matched.
      images: `[N, H, W, C]` in the teacher's normalised input space.
      method: its `reconstruction_` fields.
      key: of batches and drops.

    Raises:
      TrainingDiverged: a loss stopped being finite.
    """
    variables = with_held_ranges(student, variables)
    image_parameters = tensor_parameters(student, variables)[INPUT]
    quantized = fake_quantized(images, image_parameters, student.spec.boundary_bits)
    inputs = images
    blocks = blocks_of(student)
    for number, block in enumerate(blocks):
        shared, names = canonical(block)
        own = variables_of(variables, names)
        target = _in_batches(_exact_block, inputs, method, own, block=shared)
        seen = BlockImages(quantized, inputs, target)
        name = f"block {number + 1}/{len(blocks)} ({block.output})"
        trainable = _reconstruct_block(
            student.spec, shared, own, seen, method, jax.random.fold_in(key, number), name
        )
        learned = {
            kind: {old: entries[new] for old, new in names.items() if new in entries}
            for kind, entries in trainable.items()
        }
        variables = _with_choices(student.spec, block, variables, learned)
        own, inputs = variables_of(variables, names), target
        quantized = _in_batches(
            _hard_block, quantized, method, own, spec=student.spec, block=shared
        )
    return variables


def _reconstruct_block(spec: QuantSpec, block: Block, variables: Variables, images: BlockImages,
                       method: Method, key: jax.Array, name: str) -> Any:  # fmt: skip
    # On the variables' devices, as is what a step returns: the second would be compiled anew.
    state = jax.device_put(
        initial_block(spec, block, variables, method), jax.tree.leaves(variables)[0].sharding
    )
    iterations, pending = method.reconstruction_iterations, []
    with Progress(name, start=0, stop=iterations) as progress:
        for done in range(1, iterations + 1):
            state, metrics = _compiled_step(
                state, variables, images, key, spec=spec, block=block, method=method
            )
            pending.append(metrics)
            if done % _REPORT_EVERY == 0 or done == iterations:
                found = jax.device_get(pending)
                values = {term: float(np.mean([m[term] for m in found])) for term in metrics}
                pending = []
                if not all(map(np.isfinite, values.values())):
                    raise TrainingDiverged(
                        f"reconstruction of {name}: a loss is not finite before iteration {done}: "
                        f"{values}; lower method.reconstruction_learning_rate"
                    )
                progress.update(done, values)
    return state.trainable


def initial_block(spec: QuantSpec, block: Block, variables: Variables, method: Method) -> BlockState:  # fmt: skip
    """Choices that leave every weight where it is, and steps as calibrated."""
    stretch = variables["quant"]["stretch"]["activations"]
    trainable = {
        "choice": {
            op.layer.name: adaround.initial_choice(
                variables["params"][op.layer.name]["kernel"],
                kernel_parameters(spec, variables, op),
            )
            for op in block.operations
            if op.weight_bits
        },
        "stretch": {  # copies: the state is donated
            op.output: jnp.array(stretch[op.output]) for op in block.operations if op.output_bits
        },
    }
    return BlockState(jnp.int32(0), trainable, _optimizer(method).init(trainable))


def reconstruction_step(state: BlockState, variables: Variables, images: BlockImages, key: jax.Array, *,
                        spec: QuantSpec, block: Block, method: Method) -> tuple[BlockState, dict[str, jax.Array]]:  # fmt: skip
    """One update on a random batch; pure."""
    pick_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
    shape = (method.reconstruction_batch_size,)
    picked = jax.random.randint(pick_key, shape, 0, len(images.target))
    batch = BlockImages(*(values[picked] for values in images))
    grads, metrics = jax.grad(reconstruction_loss, has_aux=True)(
        state.trainable, variables, batch, loss_key, state.step,
        spec=spec, block=block, method=method,
    )  # fmt: skip
    updates, opt = _optimizer(method).update(grads, state.opt, state.trainable)
    return BlockState(state.step + 1, optax.apply_updates(state.trainable, updates), opt), metrics


_compiled_step = jax.jit(
    reconstruction_step, static_argnames=("spec", "block", "method"), donate_argnums=0
)


def compile_reconstruction(*arguments: Any, **static: Any) -> Any:
    """The program of `reconstruction_step` for arguments like these, ahead of time."""
    return _compiled_step.lower(*arguments, **static).compile()


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


@functools.partial(jax.jit, static_argnames="block")
def _exact_block(x: jax.Array, variables: Variables, *, block: Block) -> jax.Array:
    return block_forward(block, variables, {}, x)


@functools.partial(jax.jit, static_argnames=("spec", "block"))
def _hard_block(x: jax.Array, variables: Variables, *, spec: QuantSpec, block: Block) -> jax.Array:
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

    return block_forward(block, variables, kernels, x, finish)


def _in_batches(run: Any, x: jax.Array, method: Method, variables: Variables, **static: Any) -> jax.Array:  # fmt: skip
    size = method.reconstruction_batch_size
    parts = [run(x[start : start + size], variables, **static) for start in range(0, len(x), size)]
    return jnp.concatenate(parts)
