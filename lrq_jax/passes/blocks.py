"""A student cut into blocks, each from one tensor to one tensor, to be rebuilt one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from lrq_jax.graph import INPUT
from lrq_jax.passes.float_forward import Variables, apply_layer
from lrq_jax.passes.plan import Operation
from lrq_jax.passes.student import Student
from lrq_jax.quantizers.affine import AffineParameters, dequantize, quantize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Operations between two tensors through which everything passes; static.

    Attributes:
      source: the tensor they read.
      output: the tensor they make; the last block's is the logits.
      operations: in order.
    """

    source: str
    output: str
    operations: tuple[Operation, ...]


def blocks_of(student: Student) -> tuple[Block, ...]:
    """The smallest blocks that a network's single-tensor points cut it into, each with at least
    one layer with a weight matrix; layers without go with the next such layer, or the last ones
    with the last."""
    graph, made = student.graph, {op.output for op in student.operations}
    blocks: list[Block] = []
    source, before = INPUT, {INPUT}
    pending: tuple[Operation, ...] = ()
    for cut in graph.block_outputs:
        if cut not in made:  # inside an operation
            continue
        within = graph.ancestors([cut])
        new = tuple(op for op in student.operations if op.output in within - before)
        before = within
        pending += new
        if any(op.weight_bits for op in new):
            blocks.append(Block(source=source, output=cut, operations=pending))
            source, pending = cut, ()
    if pending:
        last = blocks.pop()
        operations = last.operations + pending
        blocks.append(Block(source=last.source, output=graph.output, operations=operations))
    return tuple(blocks)


Finish = Callable[[Operation, jax.Array], jax.Array]
"""(operation, real value of the tensor it makes) -> the value its readers see."""


def block_forward(block: Block, variables: Variables, kernels: dict[str, jax.Array], x: jax.Array,
                  finish: Finish = lambda operation, value: value) -> jax.Array:  # fmt: skip
    """The block in floating point, with other kernels and something done to each tensor.

    Args:
      block: the block.
      variables: `params`, `batch_stats`.
      kernels: by layer, in place of those of `params`.
      x: `[B, ...]`, real values of `block.source`.
      finish: applied to what each operation makes; default: nothing.

    Returns:
      Real values `[B, ...]` of `block.output`.
    """
    values = {block.source: x}
    for operation in block.operations:
        inputs = [values[name] for name in operation.inputs]
        for layer in (operation.layer, operation.batch_norm, operation.activation):
            if layer is None:
                continue
            params = {
                **variables["params"].get(layer.name, {}),
                **variables["batch_stats"].get(layer.name, {}),
            }
            if layer.name in kernels:
                params["kernel"] = kernels[layer.name]
            inputs = [apply_layer(layer, params, *inputs)]
        values[operation.output] = finish(operation, inputs[0])
    return values[block.output]


def fake_quantized(x: jax.Array, parameters: AffineParameters, bits: int) -> jax.Array:
    """Real values a tensor's codes stand for, with LSQ's gradients."""
    return dequantize(quantize(x, parameters, bits, clip_mask=True), parameters)
