"""Reads `.onnx` files safely and folds their constants, batch norms left whole.

Nothing in a file is executed but the standard operators that onnxruntime runs over constants:
custom operators are refused before it sees the file, external data is read only from inside the
file's folder, and sizes are bounded.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from lrq_jax.readers.errors import ReaderError

if TYPE_CHECKING:
    import onnx

MAX_BYTES = (2 << 30) - 1
"""Of a file with its external data: what one protobuf message, and so onnxruntime, can hold."""

MAX_FOLDED_BYTES = 1 << 28
"""Of one constant that folding may make, so that a small file cannot fill the memory."""

OLDEST_OPSET = 11

_STANDARD_DOMAINS = ("", "ai.onnx")
# Rewrites of onnxruntime that would take batch norms into the weights before them.
_DISABLED = ["ConvBNFusion", "MatMulBNFusion", "MatmulBNFusion"]
_ROUNDS = 4


def require(module: str) -> ModuleType:
    """An optional package of the extra `onnx`.

    Raises:
      ReaderError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ReaderError(
            f"found no package {module!r}, expected it to read an .onnx file: "
            'pip install "lrq_jax[onnx]"'
        ) from error


def read_onnx_file(path: str | Path, size: int | None = None) -> onnx.ModelProto:
    """The model of a file, constants folded, weights inside, one image a batch where it was open.

    Args:
      path: an `.onnx` file; its external data lies beside it.
      size: height and width where the file leaves them open, pixels.

    Raises:
      FileNotFoundError: no such file.
      ReaderError: a damaged, oversized or unsafe file, an opset before 11, operators of other
        domains, several inputs or outputs, or an input that is no image.
    """
    path = Path(path)
    onnx = require("onnx")
    if not path.is_file():
        raise FileNotFoundError(f"found no file {str(path)!r}, expected an .onnx file")
    if path.stat().st_size > MAX_BYTES:
        raise ReaderError(f"found over {MAX_BYTES} bytes, expected less")
    try:
        model = onnx.load_model(path, load_external_data=False)
    except Exception as error:  # protobuf's decoders differ in what they raise
        raise ReaderError(f"found a damaged or truncated ONNX file ({_line(error)})") from error
    if not model.graph.node:
        raise ReaderError("found no graph, expected an ONNX model: damaged or truncated")
    _check_opsets(model)
    _load_external_data(model, path)
    try:
        onnx.checker.check_model(model)
    except Exception as error:
        raise ReaderError(f"found an invalid ONNX model: {_line(error)}") from error
    _fix_input(model, size)
    if len(model.graph.output) != 1:
        raise ReaderError(
            f"found outputs {[value.name for value in model.graph.output]}, expected the logits "
            "alone: export without auxiliary heads, or cut with onnx.utils.extract_model"
        )
    return fold_constants(model)


def _line(error: Exception) -> str:
    """First lines of a library's error, short."""
    return " ".join(str(error).split())[:300] or type(error).__name__


# --- external data -------------------------------------------------------------------------------


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a graph and of the graphs inside it."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterator[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _load_external_data(model: onnx.ModelProto, path: Path) -> None:
    """Weights kept beside the file, into it: each inside the folder, in bounds, no links out."""
    onnx = require("onnx")
    # A model may be a link (Hugging Face's cache): its data lie beside the link, or what it leads to.
    folders = (path.absolute().parent, path.resolve().parent)
    total = path.stat().st_size
    tensors = list(_tensors(model.graph))
    for function in model.functions:
        tensors += _node_tensors(function.node)
    for tensor in tensors:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        file = _beside(folders, location) if location else None
        if file is None:
            raise ReaderError(
                f"found the data of {tensor.name!r} at {location!r}, expected a file inside the "
                "model's folder: refused"
            )
        if not file.is_file():
            raise ReaderError(
                f"found no file {location!r} with the data of {tensor.name!r}, expected it beside "
                "the model: copy both"
            )
        try:
            offset = int(entries.get("offset", 0))
            length = int(entries.get("length", file.stat().st_size - offset))
        except ValueError as error:
            raise ReaderError(f"found the data of {tensor.name!r} at {entries}") from error
        if min(offset, length) < 0 or offset + length > file.stat().st_size:
            raise ReaderError(
                f"found {file.stat().st_size} bytes in {location!r}, expected {offset + length} for "
                f"{tensor.name!r}: truncated"
            )
        total += length
        if total > MAX_BYTES:
            raise ReaderError(f"found over {MAX_BYTES} bytes with external data, expected less")
        with file.open("rb") as stream:
            stream.seek(offset)
            tensor.raw_data = stream.read(length)
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _beside(folders: tuple[Path, Path], location: str) -> Path | None:
    """The file of that name, links followed; None where that leads out of the model's folders."""
    inside = tuple(folder.resolve() for folder in folders)
    try:
        found = [(folder / location).resolve() for folder in folders]
        there = [file for file in found if file.is_file()] or found
    except (OSError, ValueError):  # names no file can have
        return None
    return there[0] if any(there[0].is_relative_to(folder) for folder in inside) else None


# --- what the model is ---------------------------------------------------------------------------


def _check_opsets(model: onnx.ModelProto) -> None:
    version = next((e.version for e in model.opset_import if e.domain in _STANDARD_DOMAINS), 0)
    if version < OLDEST_OPSET:
        raise ReaderError(
            f"found opset {version}, expected {OLDEST_OPSET} or newer: export again, or convert "
            f"with onnx.version_converter.convert_version(model, {OLDEST_OPSET})"
        )
    own = {(function.domain, function.name) for function in model.functions}
    for node in (*model.graph.node, *(n for f in model.functions for n in f.node)):
        if node.domain not in _STANDARD_DOMAINS and (node.domain, node.op_type) not in own:
            raise ReaderError(
                f"found operator {node.domain}::{node.op_type} (node {node.name!r}), expected "
                "operators of the ONNX standard only: export without custom or fused operators"
            )


def _fix_input(model: onnx.ModelProto, size: int | None) -> None:
    """One input, its open dimensions filled in: one image a batch, `size` pixels a side."""
    onnx = require("onnx")
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    # Weights that are inputs too (IR 3's habit) could be overridden, so they are not folded.
    del graph.input[:]
    graph.input.extend(inputs)
    if len(inputs) != 1:
        raise ReaderError(
            f"found inputs {[value.name for value in inputs]}, expected one, the image"
        )
    tensor = graph.input[0].type.tensor_type
    allowed = (onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8)
    if tensor.elem_type not in allowed:
        found = onnx.TensorProto.DataType.Name(tensor.elem_type)
        raise ReaderError(f"found an input of {found}, expected FLOAT or UINT8: export in float32")
    dims = tensor.shape.dim
    if len(dims) != 4:
        raise ReaderError(f"found an input of {len(dims)} dimensions, expected 4: images")
    shape = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in dims]
    channels = 1 if shape[1] in (1, 3) else 3
    if shape[channels] not in (1, 3):
        raise ReaderError(
            f"found an input of shape {shape} (0: open), expected 1 or 3 channels, first or last"
        )
    sides = (2, 3) if channels == 1 else (1, 2)
    if any(shape[axis] < 1 for axis in sides) and size is None:
        raise ReaderError(
            f"found an input of shape {shape} (0: open), expected height and width: give them "
            "with --size"
        )
    for axis in sides:
        if shape[axis] >= 1 and size is not None and shape[axis] != size:
            raise ReaderError(
                f"found images of {shape[sides[0]]} x {shape[sides[1]]} pixels in the file, "
                f"expected the size {size} asked for: leave --size out or export again"
            )
        dims[axis].dim_value = max(shape[axis], size or 0)
    dims[0].dim_value = max(shape[0], 1)
    # Shapes the exporter wrote for other sizes would contradict these.
    del graph.value_info[:]
    for output in graph.output:
        output.type.tensor_type.ClearField("shape")


# --- folding -------------------------------------------------------------------------------------


def fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with everything that depends on no image computed (shape arithmetic too), by
    onnxruntime's basic optimisation without the rewrites that merge batch norms.

    Raises:
      ReaderError: a model onnxruntime refuses.
    """
    onnx = require("onnx")
    for done in range(_ROUNDS):
        before = len(model.graph.node)
        model = onnx.load_model_from_string(_optimised(model.SerializeToString()))
        # Functions (CastLike, HardSwish) that one round inlines, only the next one folds.
        if done and len(model.graph.node) == before:
            break
    return model


def _optimised(data: bytes) -> bytes:
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.add_session_config_entry(
        "optimization.constant_folding_max_output_size_in_bytes", str(MAX_FOLDED_BYTES)
    )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "folded.onnx"
        options.optimized_model_filepath = str(target)
        try:
            runtime.InferenceSession(
                data,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=_DISABLED,
            )
            return target.read_bytes()
        except Exception as error:  # onnxruntime's errors share no base class of their own
            raise ReaderError(f"found a model that onnxruntime refuses: {_line(error)}") from error
