"""The float twin of an integer student as ONNX: what its speed is compared with.

The same network in float32 with batch norms folded and weights dequantized: the model a person
would deploy without quantization, up to the values of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lrq_jax.graph import INPUT
from lrq_jax.graph import layers as L
from lrq_jax.passes import Student
from lrq_jax.passes.plan import Operation
from lrq_jax.writers.onnx_layers import write_layer
from lrq_jax.writers.onnx_model import require_integer
from lrq_jax.writers.onnx_writer import OnnxWriter, codes_name


def onnx_float_twin(student: Student, codes: dict[str, Any], *, batch: int | None = None) -> Any:
    """The `onnx.ModelProto`, normalised images `[B, C, H, W]` to logits `[B, K]`.

    Args:
      student: of the `integer` placement.
      codes: its arrays, of `writers.codes.student_codes`.
      batch: B; None for any number.
    """
    require_integer(student)
    writer = _FloatWriter(student, codes, "int8")
    image = writer.float_image(batch)
    for operation in student.operations:
        write_layer(operation.layer, operation, writer)
    return writer.model(image, {"float_twin": True}, batch)


class _FloatWriter(OnnxWriter):
    """Leaves every quantizer out and computes activations as they are."""

    def real(self, tensor: str) -> str:
        return self.names[tensor]

    def real_zero(self, tensor: str) -> np.ndarray:
        return np.asarray(np.float32(0))

    def float_image(self, batch: int | None) -> Any:
        height, width, channels = self.student.graph.input_shape
        self.names[INPUT] = INPUT
        return self.value(INPUT, np.float32, [batch or "batch", channels, height, width])

    def weighted(self, operation: Operation, transpose: Callable[[np.ndarray], np.ndarray],
                 axis: int) -> list[str]:  # fmt: skip
        name, source = operation.layer.name, operation.inputs[0]
        stored = self.codes["weights"][name]
        centred = stored["codes"].astype(np.float32) - stored["zero_point"]
        units = self.parameters(source)[0] * stored["scale"]
        return [
            self.real(source),
            self.constant(f"{name}.weight", transpose(centred * stored["scale"])),
            self.constant(f"{name}.bias", (stored["bias"] * units).astype(np.float32)),
        ]

    def finish(self, operation: Operation, real: str) -> None:
        if operation.activation is not None:
            real = self._activation(operation.activation, real, operation.output)
        self.names[operation.output] = real

    def lone_activation(self, layer: L.Activation, operation: Operation) -> None:
        source = self.names[operation.inputs[0]]
        self.names[operation.output] = self._activation(layer, source, operation.output)

    def _activation(self, layer: L.Activation, source: str, tensor: str) -> str:
        output = codes_name(tensor)
        if layer.kind == "relu6":
            ends = [self.constant(f"float.{end}", np.asarray(np.float32(end))) for end in (0, 6)]
            return self.node("Clip", [source, *ends], output)
        if layer.kind == "silu":
            gate = self.node("Sigmoid", [source], f"{tensor}.gate")
            return self.node("Mul", [source, gate], output)
        kinds = {
            "relu": ("Relu", {}),
            "sigmoid": ("Sigmoid", {}),
            "hard_sigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
            "hard_swish": ("HardSwish", {}),
            "leaky_relu": ("LeakyRelu", {"alpha": layer.negative_slope}),
        }
        kind, attributes = kinds[layer.kind]
        return self.node(kind, [source], output, **attributes)
