"""A student cut into blocks, each from one tensor to one tensor, to be rebuilt one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

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


def canonical(block: Block) -> tuple[Block, dict[str, str]]:
    """The block with layers and tensors named in the order they come: blocks that differ in
    nothing but names become equal, and can share one compiled program.

    Settings of layers, bits of weights and tensors are kept, so that blocks of others stay unequal.

    Returns:
      The block, and the new name of each layer in it, of which its tensors have theirs.
    """
    parts = [
        layer
        for op in block.operations
        for layer in (op.layer, op.batch_norm, op.activation)
        if layer is not None
    ]
    names = {layer.name: f"layer{number}" for number, layer in enumerate(parts)}
    tensors = {block.source: "source", **names}

    def renamed(layer: Any) -> Any:
        if layer is None:
            return None
        inputs = tuple(tensors[name] for name in layer.inputs)
        return dataclasses.replace(layer, name=names[layer.name], inputs=inputs)

    operations = tuple(
        dataclasses.replace(
            op,
            layer=renamed(op.layer),
            batch_norm=renamed(op.batch_norm),
            activation=renamed(op.activation),
            output=names[op.output],
        )
        for op in block.operations
    )
    same = Block(source="source", output=names[block.output], operations=operations)
    return same, names


def variables_of(variables: Variables, names: dict[str, str]) -> Variables:
    """The variables of a block's layers and tensors alone, under other names.

    Args:
      variables: a student's.
      names: the new name of each layer and tensor, see `canonical`.
    """

    def chosen(entries: dict[str, Any]) -> dict[str, Any]:
        return {names[name]: value for name, value in entries.items() if name in names}

    quant = variables["quant"]
    return {
        "params": chosen(variables["params"]),
        "batch_stats": chosen(variables["batch_stats"]),
        "quant": {
            "activations": chosen(quant["activations"]),
            "weights": chosen(quant["weights"]),
            "stretch": {kind: chosen(entries) for kind, entries in quant["stretch"].items()},
        },
    }


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
