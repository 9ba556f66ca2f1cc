"""Where two ONNX files of one student differ, to the last bit of a constant."""

from __future__ import annotations

import json
from typing import Any

from lrq_jax.writers import value_difference
from lrq_jax.writers.extras import require
from lrq_jax.writers.onnx_writer import METADATA


def first_difference(found: Any, expected: Any) -> str | None:
    """A sentence on the first difference of two `onnx.ModelProto`s, None if there is none.

    Compared are inputs, outputs, nodes with their attributes, constants bit for bit, and what the
    file says of itself but for the version that wrote it; not names and texts that nothing reads.
    """
    onnx = require("onnx", extra="onnx")
    for what in ("input", "output"):
        texts = [
            [value.SerializeToString() for value in getattr(model.graph, what)]
            for model in (found, expected)
        ]
        if texts[0] != texts[1]:
            return f"the file's {what} is not the one expected"
    versions = [(m.ir_version, [(o.domain, o.version) for o in m.opset_import]) for m in (found, expected)]  # fmt: skip
    if versions[0] != versions[1]:
        return f"found IR and operator sets {versions[0]}, expected {versions[1]}"
    nodes = [[_node(onnx, node) for node in model.graph.node] for model in (found, expected)]
    for ours, theirs in zip(*nodes, strict=False):
        if ours != theirs:
            return f"node {theirs['output'][0]!r}: found {_brief(ours, theirs)}, expected {_brief(theirs, ours)}"  # fmt: skip
    if len(nodes[0]) != len(nodes[1]):
        return f"found {len(nodes[0])} nodes, expected {len(nodes[1])}"
    constants = [{c.name: _constant(c) for c in m.graph.initializer} for m in (found, expected)]
    for name, value in constants[1].items():
        if name not in constants[0]:
            return f"constant {name!r} is missing"
        if constants[0][name] != value:
            return f"constant {name!r} differs: {_values(onnx, found, expected, name)}"
    if extra := sorted(set(constants[0]) - set(constants[1])):
        return f"found constants {extra[:3]} that do not belong there"
    ours, theirs = (_metadata(model) for model in (found, expected))
    return value_difference.first_difference(ours, theirs, f"metadata {METADATA}")


def _metadata(model: Any) -> Any:
    """What the file says of itself, without the version that wrote it."""
    text = {entry.key: entry.value for entry in model.metadata_props}.get(METADATA)
    try:
        said = json.loads(text or "null")
    except ValueError:
        return text
    return {k: v for k, v in said.items() if k != "version"} if isinstance(said, dict) else said


def _node(onnx: Any, node: Any) -> dict[str, Any]:
    return {
        "kind": node.op_type,
        "domain": node.domain,
        "input": list(node.input),
        "output": list(node.output),
        "attributes": {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute},
    }


def _brief(node: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in node.items() if value != other[key]}


def _constant(tensor: Any) -> tuple[int, tuple[int, ...], bytes]:
    return tensor.data_type, tuple(tensor.dims), tensor.raw_data


def _values(onnx: Any, found: Any, expected: Any, name: str) -> str:
    """The first entry that differs."""
    arrays = []
    for model in (found, expected):
        (tensor,) = [c for c in model.graph.initializer if c.name == name]
        try:
            arrays.append(onnx.numpy_helper.to_array(tensor).reshape(-1))
        except ValueError as error:  # a constant that is cut short
            return str(error)
    if arrays[0].shape != arrays[1].shape or arrays[0].dtype != arrays[1].dtype:
        return f"found {arrays[0].dtype}{arrays[0].shape}, expected {arrays[1].dtype}{arrays[1].shape}"  # fmt: skip
    wrong = (arrays[0] != arrays[1]).nonzero()[0]
    if not len(wrong):
        return "only in its layout"
    index = int(wrong[0])
    return (
        f"{len(wrong)} of {arrays[0].size} values, entry {index} is {arrays[0][index]!r} and not "
        f"{arrays[1][index]!r}"
    )
