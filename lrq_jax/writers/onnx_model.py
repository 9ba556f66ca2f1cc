"""A finished integer student as an ONNX file in quantize-dequantize (QDQ) form.

Opset 21, IR 10. ONNX Runtime fuses every group `DequantizeLinear -> operator -> QuantizeLinear`
into an integer operator whose arithmetic is `passes.integer_forward`'s, bit for bit. The shape of
the file decides whether it does:

* Weights below 8 bits are int8 `code - zero_point`, or UINT4 codes behind `Cast` and `Sub`, which
  the runtime folds into the same int8 at load; a UINT4 straight into `DequantizeLinear` would run
  in float.
* Activations below 8 bits are `QuantizeLinear` to uint8 and an integer `Clip` of the codes; a float
  `Clip` before `QuantizeLinear` would break the fusion.
* What only moves codes (max pool, pad, slice, shuffle, flatten) works on the uint8 codes.
* Activations other than ReLU are tables of codes, so no exponential is computed at run time.

Tensor `NAME` of the network is `NAME.codes` in the file (uint8, channels first).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lrq_jax.graph import INPUT
from lrq_jax.graph import layers as L
from lrq_jax.passes import Student
from lrq_jax.passes.plan import Operation
from lrq_jax.quantizers.affine import AffineParameters, quantize, top_code
from lrq_jax.writers.extras import require

OPSET, IR_VERSION = 21, 10
INPUTS = ("float", "uint8")
WEIGHT_STORAGES = ("uint4", "int8")
LOGITS = "logits"
METADATA = "lrq_jax"
"""Key of the JSON string in the file's metadata: what is needed to evaluate it."""


def codes_name(tensor: str) -> str:
    """Name in the file of a tensor's uint8 codes."""
    return f"{tensor}.codes"


def onnx_model(student: Student, codes: dict[str, Any], *, metadata: dict[str, Any],
               weight_storage: str = "uint4", input_kind: str = "float",
               table: Callable[[np.ndarray], np.ndarray] | None = None,
               batch: int | None = None) -> Any:  # fmt: skip
    """The `onnx.ModelProto` of a student.

    Args:
      student: of the `integer` placement.
      codes: its arrays, of `writers.codes.student_codes`.
      metadata: JSON-ready, kept in the file under `METADATA`.
      weight_storage: `uint4` packs weights of up to 4 bits, two a byte; `int8` does not.
      input_kind: `float`, normalised images `[B, C, H, W]`; or `uint8`, raw pixels
        `[B, H, W, C]`, whose normalisation becomes a table of codes.
      table: pixels `[256]` of one channel, all channels last `[256, C]`, to normalised values;
        needed for `uint8`.
      batch: images a call; None for any number.

    Raises:
      ValueError: a student that is not integer, or an unknown setting.
      ImportError: the package onnx is missing.
    """
    for name, value, known in (
        ("weight_storage", weight_storage, WEIGHT_STORAGES),
        ("input_kind", input_kind, INPUTS),
    ):
        if value not in known:
            raise ValueError(f"{name}: found {value!r}, expected one of {known}")
    if not student.is_integer:
        raise ValueError(
            f"found placement {student.spec.placement!r}, expected 'integer': only it is an "
            "integer network; quantize with --config.student.placement=integer"
        )
    writer = _Writer(student, codes, weight_storage)
    if input_kind == "float":
        image = writer.float_image(batch)
    else:
        if table is None:
            raise ValueError("found no table of normalised pixels, expected one for input 'uint8'")
        image = writer.pixel_image(batch, table)
    for operation in student.operations:
        _write(operation.layer, operation, writer)
    return writer.model(image, metadata, batch)


class _Writer:
    """Collects nodes and constants; knows the student's codes and each tensor's parameters."""

    def __init__(self, student: Student, codes: dict[str, Any], weight_storage: str) -> None:
        self.onnx = require("onnx", extra="onnx")
        self.student, self.codes, self.weight_storage = student, codes, weight_storage
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.names: dict[str, str] = {}  # our tensor -> tensor of uint8 codes in the file
        self._reals: dict[str, str] = {}

    # --- pieces ---

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        made = self.onnx.helper.make_node(kind, list(inputs), [output], name=output, **attributes)
        self.nodes.append(made)
        return output

    def constant(self, name: str, value: np.ndarray) -> str:
        if name not in self.constants:
            array = np.ascontiguousarray(value).reshape(np.shape(value))
            self.constants[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def parameters(self, tensor: str) -> tuple[np.float32, np.uint8]:
        """Scale and zero point of a tensor's codes."""
        stored = self.codes["tensors"][self.student.origins[tensor]]
        return np.float32(stored["scale"]), np.uint8(stored["zero_point"])

    def _scale_and_zero(self, tensor: str) -> list[str]:
        origin = self.student.origins[tensor]
        scale, zero_point = self.parameters(tensor)
        return [
            self.constant(f"{origin}.scale", np.asarray(scale)),
            self.constant(f"{origin}.zero_point", np.asarray(zero_point)),
        ]

    def real(self, tensor: str) -> str:
        """The tensor dequantized, as the inputs of a fused group are."""
        if tensor not in self._reals:
            inputs = [self.names[tensor], *self._scale_and_zero(tensor)]
            self._reals[tensor] = self.node("DequantizeLinear", inputs, f"{tensor}.real")
        return self._reals[tensor]

    def new_codes(self, tensor: str, real: str, bits: int) -> None:
        """Quantizes a float tensor of the file as tensor `tensor` of the network."""
        output = codes_name(tensor)
        top = top_code(bits)
        whole = output if top == 255 else f"{tensor}.unclipped"
        self.node("QuantizeLinear", [real, *self._scale_and_zero(tensor)], whole)
        if whole != output:
            ends = [self.constant(f"uint8.{end}", np.asarray(np.uint8(end))) for end in (0, top)]
            self.node("Clip", [whole, *ends], output)
        self.names[tensor] = output

    def shape(self, tensor: str) -> tuple[int, ...]:
        return self.student.graph.shapes[tensor]

    def reshape(self, source: str, output: str, shape: Sequence[int]) -> str:
        """The batch and then `shape`."""
        wanted = np.array([0, *shape], np.int64)  # 0 keeps the axis
        name = "shape." + "x".join(map(str, shape))
        return self.node("Reshape", [source, self.constant(name, wanted)], output)

    # --- ends ---

    def float_image(self, batch: int | None) -> Any:
        height, width, channels = self.student.graph.input_shape
        self.new_codes(INPUT, INPUT, self.student.spec.boundary_bits)
        return self.value(INPUT, np.float32, [batch or "batch", channels, height, width])

    def pixel_image(self, batch: int | None, table: Callable[[np.ndarray], np.ndarray]) -> Any:
        """Looks the code of every pixel up: row `256*channel + pixel`."""
        height, width, channels = self.student.graph.input_shape
        pixels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], channels, axis=1)
        stored = self.codes["tensors"][INPUT]
        parameters = AffineParameters(
            jnp.float32(stored["scale"]), jnp.float32(stored["zero_point"])
        )
        found = quantize(jnp.asarray(table(pixels)), parameters, self.student.spec.boundary_bits)
        rows = np.asarray(found).T.reshape(-1).astype(np.uint8)
        offsets = (256 * np.arange(channels, dtype=np.int32)).reshape(1, channels, 1, 1)
        first = self.node("Transpose", [INPUT], f"{INPUT}.nchw", perm=[0, 3, 1, 2])
        wide = self.node("Cast", [first], f"{INPUT}.int32", to=self.onnx.TensorProto.INT32)
        row = self.node("Add", [wide, self.constant(f"{INPUT}.offsets", offsets)], f"{INPUT}.rows")
        self.node("Gather", [self.constant(f"{INPUT}.table", rows), row], codes_name(INPUT))
        self.names[INPUT] = codes_name(INPUT)
        return self.value(INPUT, np.uint8, [batch or "batch", height, width, channels])

    def value(self, name: str, dtype: Any, shape: Sequence[int | str]) -> Any:
        element = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.onnx.helper.make_tensor_value_info(name, element, list(shape))

    def model(self, image: Any, metadata: dict[str, Any], batch: int | None) -> Any:
        helper, graph = self.onnx.helper, self.student.graph
        logits = self.value(LOGITS, np.float32, [batch or "batch", graph.num_classes])
        made = helper.make_graph(
            self.nodes, graph.name, [image], [logits], list(self.constants.values())
        )
        model = helper.make_model(
            made,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="lrq_jax",
            producer_version=str(metadata.get("version", "")),
        )
        helper.set_model_props(model, {METADATA: json.dumps(metadata)})
        self.onnx.checker.check_model(model, full_check=True)
        return model

    # --- weights ---

    def kernel(self, operation: Operation, centred: np.ndarray, codes: np.ndarray,
               zero_point: np.ndarray, scale: np.ndarray, axis: int) -> str:  # fmt: skip
        """The dequantized weights, in the file's layout, output channels along `axis`."""
        name = operation.layer.name
        scales = self.constant(f"{name}.weight.scale", scale)
        zeros = self.constant(f"{name}.weight.zero_point", np.zeros(scale.shape, np.int8))
        if self.weight_storage == "uint4" and (operation.weight_bits or 8) <= 4:
            shape = [1] * codes.ndim
            shape[axis] = -1
            stored = self._packed(f"{name}.weight.codes", codes)
            cast = self.node("Cast", [stored], f"{name}.weight.cast", to=self.onnx.TensorProto.INT8)
            offset = self.constant(
                f"{name}.weight.offset", zero_point.astype(np.int8).reshape(shape)
            )
            weights = self.node("Sub", [cast, offset], f"{name}.weight.centred")
        else:
            weights = self.constant(f"{name}.weight.centred", centred.astype(np.int8))
        return self.node("DequantizeLinear", [weights, scales, zeros], f"{name}.weight", axis=axis)

    def _packed(self, name: str, codes: np.ndarray) -> str:
        """A UINT4 constant: two codes a byte, the first in the low half."""
        flat = codes.reshape(-1).astype(np.uint8)
        flat = np.pad(flat, (0, flat.size % 2))
        proto = self.onnx.TensorProto(
            data_type=self.onnx.TensorProto.UINT4,
            dims=codes.shape,
            name=name,
            raw_data=(flat[::2] | flat[1::2] << 4).tobytes(),
        )
        self.constants[name] = proto
        return name

    def bias(self, operation: Operation, bias: np.ndarray, scale: np.ndarray) -> str:
        """The dequantized int32 bias, in units of the accumulator."""
        name = operation.layer.name
        inputs = [
            self.constant(f"{name}.bias.codes", bias.astype(np.int32)),
            self.constant(f"{name}.bias.scale", scale),
        ]
        return self.node("DequantizeLinear", inputs, f"{name}.bias", axis=0)

    def weighted(self, operation: Operation, transpose: Callable[[np.ndarray], np.ndarray],
                 axis: int) -> list[str]:  # fmt: skip
        """Dequantized input, weights and bias of an operation that has them."""
        source = operation.inputs[0]
        stored = self.codes["weights"][operation.layer.name]
        codes, zero_point = (
            np.asarray(stored[n]).astype(np.int32) for n in ("codes", "zero_point")
        )
        scale = np.asarray(stored["scale"], np.float32)
        centred = codes - zero_point
        if centred.min() < -128 or centred.max() > 127:
            raise ValueError(
                f"layer {operation.layer.name!r}: found weights from {centred.min()} to "
                f"{centred.max()} beside their zero points, expected int8; quantize again"
            )
        kernel = self.kernel(
            operation, transpose(centred), transpose(codes), zero_point, scale, axis
        )
        units = self.parameters(source)[0] * scale
        return [self.real(source), kernel, self.bias(operation, stored["bias"], units)]

    def finish(self, operation: Operation, real: str) -> None:
        """Quantizes a group's result; the network's last group has float logits."""
        if operation.output_bits is not None:
            self.new_codes(operation.output, real, operation.output_bits)


# --- the layers ----------------------------------------------------------------------------------


@functools.singledispatch
def _write(layer: L.Layer, operation: Operation, writer: _Writer) -> None:
    raise NotImplementedError(f"no ONNX form of layer type {type(layer).__name__}")


def _group_output(operation: Operation) -> str:
    return LOGITS if operation.output_bits is None else f"{operation.output}.unquantized"


@_write.register
def _conv(layer: L.Conv, operation: Operation, writer: _Writer) -> None:
    inputs = writer.weighted(operation, lambda w: np.transpose(w, (3, 2, 0, 1)), axis=0)
    (top, bottom), (left, right) = layer.padding
    real = writer.node(
        "Conv",
        inputs,
        _group_output(operation),
        kernel_shape=layer.kernel_size,
        strides=layer.strides,
        pads=(top, left, bottom, right),
        dilations=layer.dilation,
        group=layer.groups,
    )
    writer.finish(operation, real)


@_write.register
def _dense(layer: L.Dense, operation: Operation, writer: _Writer) -> None:
    inputs = writer.weighted(operation, lambda w: w, axis=1)
    writer.finish(operation, writer.node("Gemm", inputs, _group_output(operation)))


@_write.register
def _batch_norm(layer: L.BatchNorm, operation: Operation, writer: _Writer) -> None:
    """A depthwise convolution of one exact tap; a vector passes as an image of one pixel."""
    (source,) = operation.inputs
    *image, channels = writer.shape(source)
    inputs = writer.weighted(operation, lambda w: w.reshape(-1, 1, 1, 1), axis=0)
    if not image:
        inputs[0] = writer.reshape(inputs[0], f"{layer.name}.pixel", [channels, 1, 1])
    real = writer.node(
        "Conv", inputs, f"{operation.output}.unquantized", kernel_shape=[1, 1], group=channels
    )
    if not image:
        real = writer.reshape(real, f"{layer.name}.vector", [channels])
    writer.finish(operation, real)


@_write.register
def _add(layer: L.Add, operation: Operation, writer: _Writer) -> None:
    inputs = [writer.real(name) for name in operation.inputs]
    writer.finish(operation, writer.node("Add", inputs, f"{operation.output}.unquantized"))


@_write.register
def _multiply(layer: L.Multiply, operation: Operation, writer: _Writer) -> None:
    inputs = [writer.real(name) for name in operation.inputs]
    writer.finish(operation, writer.node("Mul", inputs, f"{operation.output}.unquantized"))


@_write.register
def _concat(layer: L.Concat, operation: Operation, writer: _Writer) -> None:
    inputs = [writer.real(name) for name in operation.inputs]
    real = writer.node("Concat", inputs, f"{operation.output}.unquantized", axis=1)
    writer.finish(operation, real)


@_write.register
def _global_pool(layer: L.GlobalPool, operation: Operation, writer: _Writer) -> None:
    """Quantized as an image of one pixel, so that pool and quantizer stay one group."""
    (source,) = operation.inputs
    real = writer.node("GlobalAveragePool", [writer.real(source)], f"{layer.name}.unquantized")
    writer.finish(operation, real)
    codes = writer.names[operation.output]
    vector = writer.reshape(codes, f"{layer.name}.vector", [writer.shape(layer.name)[0]])
    writer.names[operation.output] = vector


@_write.register
def _avg_pool(layer: L.AvgPool, operation: Operation, writer: _Writer) -> None:
    real = writer.node(
        "AveragePool",
        [writer.real(operation.inputs[0])],
        f"{operation.output}.unquantized",
        count_include_pad=int(layer.count_include_pad),
        **_window(layer),
    )
    writer.finish(operation, real)


@_write.register
def _activation(layer: L.Activation, operation: Operation, writer: _Writer) -> None:
    """A table from the input's codes to the output's."""
    (source,) = operation.inputs
    table = writer.constant(f"{layer.name}.table", writer.codes["tables"][operation.output])
    index = writer.node(
        "Cast", [writer.names[source]], f"{layer.name}.index", to=writer.onnx.TensorProto.INT32
    )
    writer.node("Gather", [table, index], codes_name(operation.output))
    writer.names[operation.output] = codes_name(operation.output)


def _window(layer: L.MaxPool) -> dict[str, Any]:
    (top, bottom), (left, right) = layer.padding
    return {
        "kernel_shape": layer.window,
        "strides": layer.strides,
        "pads": (top, left, bottom, right),
    }


# --- layers that keep the codes ------------------------------------------------------------------


def _moves(kind: str, operation: Operation, writer: _Writer, *constants: str, **attributes: Any) -> None:  # fmt: skip
    """A node on uint8 codes."""
    (source,) = operation.inputs
    writer.node(
        kind, [writer.names[source], *constants], codes_name(operation.output), **attributes
    )
    writer.names[operation.output] = codes_name(operation.output)


@_write.register
def _max_pool(layer: L.MaxPool, operation: Operation, writer: _Writer) -> None:
    _moves("MaxPool", operation, writer, **_window(layer))


@_write.register
def _pad(layer: L.Pad, operation: Operation, writer: _Writer) -> None:
    """Real zeros: codes of the zero point."""
    pairs = [(0, 0), layer.channels, layer.height, layer.width]
    amounts = np.array([list(ends) for ends in zip(*pairs, strict=True)], np.int64).reshape(-1)
    _, zero_point = writer.parameters(operation.inputs[0])
    constants = [
        writer.constant(f"{layer.name}.amounts", amounts),
        writer.constant(f"{layer.name}.value", np.asarray(zero_point)),
    ]
    _moves("Pad", operation, writer, *constants)


@_write.register
def _slice(layer: L.Slice, operation: Operation, writer: _Writer) -> None:
    order = (2, 0, 1)  # C, H, W
    limits = {
        "start": [layer.start[i] for i in order],
        "stop": [np.iinfo(np.int64).max if layer.stop[i] is None else layer.stop[i] for i in order],
        "axes": [1, 2, 3],
        "step": [layer.step[i] for i in order],
    }
    constants = [
        writer.constant(f"{layer.name}.{name}", np.array(values, np.int64))
        for name, values in limits.items()
    ]
    _moves("Slice", operation, writer, *constants)


@_write.register
def _flatten(layer: L.Flatten, operation: Operation, writer: _Writer) -> None:
    """In channels-last order, as the dense weights behind it."""
    (source,) = operation.inputs
    shape, codes = writer.shape(source), writer.names[source]
    if len(shape) == 3 and shape[:2] != (1, 1):
        codes = writer.node("Transpose", [codes], f"{layer.name}.nhwc", perm=[0, 2, 3, 1])
    writer.reshape(codes, codes_name(operation.output), writer.shape(layer.name))
    writer.names[operation.output] = codes_name(operation.output)


@_write.register
def _unflatten(layer: L.Unflatten, operation: Operation, writer: _Writer) -> None:
    (source,) = operation.inputs
    (channels,) = writer.shape(source)
    writer.reshape(writer.names[source], codes_name(operation.output), [channels, 1, 1])
    writer.names[operation.output] = codes_name(operation.output)


@_write.register
def _channel_shuffle(layer: L.ChannelShuffle, operation: Operation, writer: _Writer) -> None:
    (source,) = operation.inputs
    height, width, channels = writer.shape(source)
    groups = layer.groups
    split = writer.reshape(
        writer.names[source], f"{layer.name}.split", [groups, channels // groups, height, width]
    )
    dealt = writer.node("Transpose", [split], f"{layer.name}.dealt", perm=[0, 2, 1, 3, 4])
    writer.reshape(dealt, codes_name(operation.output), [channels, height, width])
    writer.names[operation.output] = codes_name(operation.output)
