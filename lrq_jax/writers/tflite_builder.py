"""Tensors, operators and constants collected into the bytes of a .tflite file, without TensorFlow.

The schema's classes come with the package ai-edge-litert; a file is one of their `ModelT` objects
packed as a flatbuffer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lrq_jax.writers.extras import require

SCHEMA_VERSION = 3
IDENTIFIER = b"TFL3"
ALIGNMENT = 16
"""Of constants, in bytes; the runtime maps the file and reads them in place."""

# Of TensorFlow Lite's operator: class of its options, first version that has what we use.
_OPERATORS = {
    "ADD": ("AddOptions", 1),
    "AVERAGE_POOL_2D": ("Pool2DOptions", 1),
    "CAST": ("CastOptions", 1),
    "CONCATENATION": ("ConcatenationOptions", 1),
    "CONV_2D": ("Conv2DOptions", 3),
    "DEPTHWISE_CONV_2D": ("DepthwiseConv2DOptions", 3),
    "DEQUANTIZE": ("DequantizeOptions", 2),
    "DIV": ("DivOptions", 1),
    "FULLY_CONNECTED": ("FullyConnectedOptions", 4),
    "GATHER": ("GatherOptions", 2),
    "HARD_SWISH": ("HardSwishOptions", 1),
    "LEAKY_RELU": ("LeakyReluOptions", 1),
    "LOGISTIC": (None, 1),
    "MAX_POOL_2D": ("Pool2DOptions", 2),
    "MEAN": ("ReducerOptions", 1),
    "MUL": ("MulOptions", 1),
    "PAD": ("PadOptions", 2),
    "PADV2": ("PadV2Options", 2),
    "QUANTIZE": ("QuantizeOptions", 2),
    "RELU": (None, 1),
    "RELU6": (None, 1),
    "RESHAPE": ("ReshapeOptions", 1),
    "ROUND": (None, 1),
    "STRIDED_SLICE": ("StridedSliceOptions", 2),
    "SUM": ("ReducerOptions", 1),
    "TRANSPOSE": ("TransposeOptions", 2),
}
_TYPES = {"float32": "FLOAT32", "int8": "INT8", "uint8": "UINT8", "int32": "INT32"}


def schema() -> Any:
    """The module of the file format's classes."""
    return require("ai_edge_litert.schema_py_generated", extra="litert")


class TFLiteBuilder:
    """One graph under construction; tensors are the numbers that its methods return."""

    def __init__(self, name: str, batch: int) -> None:
        self.schema, self.name, self.batch = schema(), name, batch
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.buffers: list[bytes] = [b""]  # by convention the first one is empty
        self.codes: dict[str, int] = {}
        self._constants: dict[tuple, int] = {}

    def tensor(self, name: str, shape: Sequence[int], dtype: str,
               meaning: tuple[np.float32, int] | None = None) -> int:  # fmt: skip
        """A tensor that an operator makes or the caller gives.

        Args:
          name: unique.
          shape: the batch left out.
          dtype: numpy's name.
          meaning: of int8 codes: scale, and the one of 0.0.
        """
        scale, zero = meaning or (None, 0)
        scales = None if scale is None else np.asarray([scale], np.float32)
        return self._add(name, (self.batch, *shape), dtype, 0, scales, zero)

    def constant(self, name: str, value: np.ndarray, *, scale: np.ndarray | None = None,
                 zero: int = 0, axis: int = 0) -> int:  # fmt: skip
        """A constant; the same one is stored once.

        Args:
          scale: of quantized values, one a tensor or one an index of `axis`.
          zero: their value that stands for 0.0.
        """
        data, dtype = np.ascontiguousarray(value).tobytes(), value.dtype.name
        key = (data, value.shape, dtype, None if scale is None else scale.tobytes(), zero, axis)
        if key not in self._constants:
            self.buffers.append(data)
            buffer = len(self.buffers) - 1
            made = self._add(name, value.shape, dtype, buffer, scale, zero, axis)
            self._constants[key] = made
        return self._constants[key]

    def unpacked(self, constant: int, name: str) -> int:
        """Float tensor of a quantized constant, which the runtime unpacks once, at load."""
        shape = self.tensors[constant].shape
        return self.node("DEQUANTIZE", [constant], self._add(name, shape, "float32", 0, None, 0))

    def _add(self, name: str, shape: Sequence[int], dtype: str, buffer: int,
             scales: np.ndarray | None, zero: int, axis: int = 0) -> int:  # fmt: skip
        made = self.schema.TensorT()
        made.name, made.buffer, made.hasRank = name, buffer, True
        made.shape = np.asarray(shape, np.int32)
        made.type = getattr(self.schema.TensorType, _TYPES[dtype])
        if scales is not None:
            made.quantization = self.schema.QuantizationParametersT()
            made.quantization.scale = np.asarray(scales, np.float32).reshape(-1)
            made.quantization.zeroPoint = np.full(scales.size, zero, np.int64)
            made.quantization.quantizedDimension = axis
        self.tensors.append(made)
        return len(self.tensors) - 1

    def node(self, kind: str, inputs: Sequence[int], output: int, *, activation: str = "NONE",
             padding: str | None = None, **options: Any) -> int:  # fmt: skip
        """An operator that makes `output`.

        Args:
          kind: a key of `_OPERATORS`.
          activation: fused, by its name in the schema.
          padding: `SAME` or `VALID`, where there is such an option.
          options: the rest of the schema's options of this operator.
        """
        made = self.schema.OperatorT()
        made.opcodeIndex = self.codes.setdefault(kind, len(self.codes))
        made.inputs, made.outputs = np.asarray(inputs, np.int32), np.asarray([output], np.int32)
        if (options_class := _OPERATORS[kind][0]) is not None:
            chosen = getattr(self.schema, f"{options_class}T")()
            if padding is not None:
                chosen.padding = getattr(self.schema.Padding, padding)
            if activation != "NONE":
                options["fusedActivationFunction"] = getattr(
                    self.schema.ActivationFunctionType, activation
                )
            for name, value in options.items():
                if not hasattr(chosen, name):
                    raise AttributeError(f"{options_class} has no field {name!r}")
                setattr(chosen, name, value)
            made.builtinOptionsType = getattr(self.schema.BuiltinOptions, options_class)
            made.builtinOptions = chosen
        self.operators.append(made)
        return output

    def serialized(self, inputs: dict[str, int], outputs: dict[str, int],
                   metadata: dict[str, Any], description: str) -> bytes:  # fmt: skip
        """The file.

        Args:
          inputs, outputs: names by which callers know tensors.
          metadata: JSON-ready values by their key in the file.
        """
        graph = self.schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = self.name, self.tensors, self.operators
        graph.inputs = np.asarray(list(inputs.values()), np.int32)
        graph.outputs = np.asarray(list(outputs.values()), np.int32)
        model = self.schema.ModelT()
        model.version, model.description, model.subgraphs = SCHEMA_VERSION, description, [graph]
        model.operatorCodes = [self._operator_code(kind) for kind in self.codes]
        model.metadata = []
        buffers = list(self.buffers)
        for name, value in metadata.items():
            entry = self.schema.MetadataT()
            entry.name, entry.buffer = name, len(buffers)
            buffers.append(json.dumps(value).encode())
            model.metadata.append(entry)
        model.buffers = [self._buffer(data) for data in buffers]
        signature = self.schema.SignatureDefT()
        signature.signatureKey = "serving_default"
        signature.inputs, signature.outputs = map(self._named, (inputs, outputs))
        model.signatureDefs = [signature]
        return packed(model)

    def _operator_code(self, kind: str) -> Any:
        code = self.schema.OperatorCodeT()
        code.builtinCode = getattr(self.schema.BuiltinOperator, kind)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
        code.version = _OPERATORS[kind][1]
        return code

    def _buffer(self, data: bytes) -> Any:
        made = self.schema.BufferT()
        made.data = np.frombuffer(data, np.uint8) if data else None
        return made

    def _named(self, tensors: dict[str, int]) -> list[Any]:
        entries = []
        for name, index in tensors.items():
            entry = self.schema.TensorMapT()
            entry.name, entry.tensorIndex = name, index
            entries.append(entry)
        return entries


def packed(model: Any) -> bytes:
    """The bytes of a `ModelT`, its constants aligned."""
    flatbuffers = require("flatbuffers", extra="litert")
    aligned = _aligned_buffer(schema())
    model.buffers = [aligned(buffer.data) for buffer in model.buffers]
    size = sum(0 if buffer.data is None else buffer.data.size for buffer in model.buffers)
    builder = flatbuffers.Builder(size + (1 << 16))
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def _aligned_buffer(module: Any) -> type:
    """`BufferT` that packs its data aligned: the generated class aligns bytes to 1, although the
    schema asks for 16."""

    class AlignedBuffer(module.BufferT):
        def Pack(self, builder: Any) -> int:  # the name in the generated class
            data = None
            if self.data is not None:
                content = self.data.tobytes()
                builder.Prep(ALIGNMENT, len(content))
                data = builder.CreateByteVector(content)
            module.BufferStart(builder)
            if data is not None:
                module.BufferAddData(builder, data)
            return module.BufferEnd(builder)

    return AlignedBuffer
