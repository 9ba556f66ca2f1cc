"""Collects the nodes and constants of an ONNX file of integers; see `onnx_model` for its form."""

from __future__ import annotations

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
METADATA = "lrq_jax"
"""Key of the JSON string in the file's metadata: what is needed to evaluate it."""

LOGITS = "logits"


def codes_name(tensor: str) -> str:
    """Name in the file of a tensor's uint8 codes."""
    return f"{tensor}.codes"


class OnnxWriter:
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
        """Adds a node of one output; returns that."""
        # Nodes stay nameless: what they make has a name, and names weigh.
        made = self.onnx.helper.make_node(kind, list(inputs), [output], **attributes)
        self.nodes.append(made)
        return output

    def constant(self, name: str, value: np.ndarray) -> str:
        """Adds a constant unless it is there; returns its name."""
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
            self.constant(f"uint8.{zero_point}", np.asarray(zero_point)),
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

    def real_zero(self, tensor: str) -> np.ndarray:
        """The entry that stands for 0.0 in a tensor."""
        return np.asarray(self.parameters(tensor)[1])

    def lone_activation(self, layer: L.Activation, operation: Operation) -> None:
        """A table from the input's codes to the output's."""
        (source,) = operation.inputs
        table = self.constant(f"{layer.name}.table", self.codes["tables"][operation.output])
        index = self.node(
            "Cast", [self.names[source]], f"{layer.name}.index", to=self.onnx.TensorProto.INT32
        )
        self.node("Gather", [table, index], codes_name(operation.output))
        self.names[operation.output] = codes_name(operation.output)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Of a tensor of the network, the batch left out, channels last."""
        return self.student.graph.shapes[tensor]

    def reshape(self, source: str, output: str, shape: Sequence[int]) -> str:
        """The batch and then `shape`."""
        wanted = np.array([0, *shape], np.int64)  # 0 keeps the axis
        name = "shape." + "x".join(map(str, shape))
        return self.node("Reshape", [source, self.constant(name, wanted)], output)

    # --- ends ---

    def float_image(self, batch: int | None) -> Any:
        """The input as normalised float32 `[batch, C, H, W]`, quantized; batch None is any."""
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
        """Description of an input or output of the graph."""
        element = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.onnx.helper.make_tensor_value_info(name, element, list(shape))

    def model(self, image: Any, metadata: dict[str, Any], batch: int | None) -> Any:
        """The whole model of the nodes and constants so far, checked by onnx."""
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
        zeros = []
        if isinstance(operation.layer, L.Dense):  # or the runtime leaves it in float
            # Of its own: the runtime's option for wide pairs fails on one that layers share.
            zeros = [self.constant(f"{name}.weight.zero_point", np.zeros(scale.shape, np.int8))]
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
        return self.node("DequantizeLinear", [weights, scales, *zeros], f"{name}.weight", axis=axis)

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
        if self.weight_storage == "uint4":
            inputs = self._packed_bias(operation, bias)
        else:
            inputs = [
                self.constant(f"{name}.bias.codes", bias.astype(np.int32)),
                self.constant(f"{name}.bias.scale", scale),
            ]
        return self.node("DequantizeLinear", inputs, f"{name}.bias", axis=0)

    def _packed_bias(self, operation: Operation, bias: np.ndarray) -> list[str]:
        """Codes in int16 where they fit, and units multiplied from the two scales the file holds
        already; the runtime folds both at load."""
        name, to = operation.layer.name, self.onnx.TensorProto.INT32
        narrow = bias.astype(np.int16)
        if (narrow == bias).all():
            stored = self.constant(f"{name}.bias.int16", narrow)
            codes = self.node("Cast", [stored], f"{name}.bias.codes", to=to)
        else:
            codes = self.constant(f"{name}.bias.codes", bias.astype(np.int32))
        scales = [f"{name}.weight.scale", self._scale_and_zero(operation.inputs[0])[0]]
        return [codes, self.node("Mul", scales, f"{name}.bias.scale")]

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
