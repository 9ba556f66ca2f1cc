"""A network from an `.onnx` file: our graph, its variables and the normalisation it carries."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrq_jax.graph import Graph, GraphError
from lrq_jax.graph import layers as L
from lrq_jax.readers import onnx_arithmetic, onnx_shapes
from lrq_jax.readers import onnx_axes as ax
from lrq_jax.readers.errors import ReaderError
from lrq_jax.readers.onnx_axes import AxesError
from lrq_jax.readers.onnx_file import read_onnx_file, require
from lrq_jax.readers.onnx_operators import OPERATORS
from lrq_jax.readers.onnx_translation import Node, Translation

if TYPE_CHECKING:
    import onnx

_REGISTERED = (onnx_arithmetic, onnx_shapes)  # importing them fills OPERATORS

ASSUMPTIONS = ("unit",)
"""What may be assumed of batch norms that a file no longer has; see `read_onnx`."""

KEEP_BATCH_NORMS = (
    "export again with batch norms kept: torch.onnx.export(model.eval(), ..., dynamo=False, "
    "training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False), or dynamo=True with "
    "optimize=False"
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OnnxNetwork:
    """What an `.onnx` file holds.

    Attributes:
      graph, variables: the network, behind its normalisation; float32 arrays.
      scale, shift: `[C]`, the file's own normalisation `scale*image + shift`; None without one.
      pixels_255: whether that is of pixels of 0 to 255 rather than scaled to [0, 1].
      notes: what was done.
    """

    graph: Graph
    variables: dict[str, Any]
    scale: np.ndarray | None
    shift: np.ndarray | None
    pixels_255: bool
    notes: tuple[str, ...]


def read_onnx(path: str | Path, *, size: int | None = None, assume_bn: str | None = None) -> OnnxNetwork:  # fmt: skip
    """The network of an `.onnx` file, opset 11 or newer.

    Args:
      path: the file; external data lies in its folder.
      size: height and width in pixels where the file leaves them open.
      assume_bn: a file without batch norms is refused unless this is `unit`: then it is read as
        it is, every layer's statistics taken to be what they need not be known to be. The float
        forward is the file's; images cannot be synthesised from it, weights can be rounded.

    Raises:
      FileNotFoundError: no such file.
      ReaderError: a file that cannot be read, or an operator that is not supported.
      ValueError: an unknown assumption.
    """
    if assume_bn is not None and assume_bn not in ASSUMPTIONS:
        raise ValueError(f"assume_bn: found {assume_bn!r}, expected one of {ASSUMPTIONS}")
    model = read_onnx_file(path, size)
    nodes, constants = _nodes(model)
    _check_operators(nodes)
    notes: list[str] = []
    if not any(node.kind == "BatchNormalization" for node in nodes):
        if assume_bn is None:
            raise ReaderError(
                "found no BatchNormalization, expected some: their running statistics are what "
                f"images are synthesised from. Way out: {KEEP_BATCH_NORMS}. For data-free "
                "rounding alone, which needs no images: --assume-bn unit (assume_bn='unit')"
            )
        notes.append("no batch norms: for data-free rounding only (assume_bn='unit')")
    value = model.graph.input[0]
    shape = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    translation = Translation(value.name, shape, constants, nodes)
    for node in nodes:
        _translate(translation, node)
    output = _logits(translation, model.graph.output[0].name)
    name = re.sub(r"\W+", "_", Path(path).stem).strip("_") or "onnx"
    try:
        graph, variables = translation.graph(name, output)
    except GraphError as error:
        raise ReaderError(str(error)) from error
    scale, shift = translation.normalisation or (None, None)
    if scale is not None and np.all(scale == 1) and np.all(shift == 0):
        scale = shift = None
    is_byte = value.type.tensor_type.elem_type == require("onnx").TensorProto.UINT8
    # (x - mean) / std: a mean or std of more than 2 is one of pixels from 0 to 255.
    large = scale is not None and bool(np.any(abs(1 / scale) > 2) or np.any(abs(shift / scale) > 2))
    return OnnxNetwork(
        graph=graph,
        variables=variables,
        scale=scale,
        shift=shift,
        pixels_255=is_byte or large,
        notes=(*notes, *translation.notes),
    )


def _nodes(model: onnx.ModelProto) -> tuple[list[Node], dict[str, np.ndarray]]:
    """Operators and constants of a folded model."""
    onnx = require("onnx")
    constants = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer
    }
    total, nodes = len(model.graph.node), []
    for position, proto in enumerate(model.graph.node):
        attributes = {a.name: _attribute(onnx, a) for a in proto.attribute}
        if proto.op_type == "Constant" and "value" in attributes:
            constants[proto.output[0]] = onnx.numpy_helper.to_array(attributes["value"])
            continue
        nodes.append(
            Node(
                name=proto.name or proto.output[0],
                kind=proto.op_type,
                inputs=tuple(proto.input),
                outputs=tuple(proto.output),
                attributes=attributes,
                place=f"{position + 1} of {total}",
            )
        )
    return nodes, constants


def _attribute(onnx: Any, attribute: Any) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _check_operators(nodes: Sequence[Node]) -> None:
    unknown: dict[str, list[Node]] = {}
    for node in nodes:
        if node.kind not in OPERATORS:
            unknown.setdefault(node.kind, []).append(node)
    if unknown:
        found = "; ".join(
            f"{kind}, {len(some)} times, first node {some[0].name!r} ({some[0].place})"
            for kind, some in unknown.items()
        )
        raise ReaderError(
            f"found operators that are not supported: {found}; expected some of "
            f"{', '.join(sorted(OPERATORS))}"
        )


def _translate(translation: Translation, node: Node) -> None:
    try:
        value = OPERATORS[node.kind](translation, node)
    except (GraphError, AxesError) as error:
        message = f"{node.kind} (node {node.name!r}, {node.place}): {error}"
        raise ReaderError(message) from error
    if value is not None:
        translation.values[node.outputs[0]] = value


def _logits(t: Translation, name: str) -> str:
    """Our tensor of the logits, made by a dense layer."""
    if name not in t.values:
        raise ReaderError(f"found an output {name!r} that depends on no image, expected logits")
    value = t.applied(t.values[name])
    end = Node(name=name, kind="output", inputs=(name,), outputs=(), attributes={}, place="the end")
    if len(value.axes) != 2:
        value = dataclasses.replace(
            value, axes=ax.reshaped(value.axes, (t.batch, int(np.prod(value.shape[1:]))))
        )
    tensor, order = t.features(end, value)
    if isinstance(t.layers[tensor], L.Dense) and np.array_equal(order, np.arange(len(order))):
        return tensor
    t.notes.append(
        "the network ends in no dense layer: an identity matrix stands in as its classifier"
    )
    kernel = np.eye(len(order), dtype=np.float32)[:, order]
    return t.add(L.Dense, tensor, hint="classifier", arrays={"params": {"kernel": kernel}},
                 features=len(order), use_bias=False)  # fmt: skip
