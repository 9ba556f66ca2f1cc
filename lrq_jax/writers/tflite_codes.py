"""Tensors of codes, and the numbers that make them, in a .tflite file; see `tflite_model`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lrq_jax.graph import INPUT
from lrq_jax.graph import layers as L
from lrq_jax.passes import Student
from lrq_jax.passes.plan import Operation
from lrq_jax.quantizers.affine import AffineParameters, quantize, top_code
from lrq_jax.writers.tflite_builder import TFLiteBuilder

LARGEST_MULTIPLIER = 256.0
"""XNNPACK refuses larger factors from accumulators to codes."""


def codes_name(tensor: str) -> str:
    """Name in the file of a tensor's int8 codes."""
    return f"{tensor}.codes"


def unit_tensors(student: Student) -> set[str]:
    """Tensors whose scale in the file must be 1, so that float operators read integers: what a
    global pool or the logits sum up; and inputs of layers with weights that make such ones,
    since their multiplier would not be exact otherwise."""
    operations, origins, units = student.operations, student.origins, set()
    for operation in reversed(operations):
        reads_integers = isinstance(operation.layer, L.GlobalPool) or (
            operation.has_weights
            and (operation.output_bits is None or origins[operation.output] in units)
        )
        if reads_integers:
            units.add(origins[operation.inputs[0]])
    return units


class CodesWriter:
    """Knows the student's numbers, and where in the file each tensor is."""

    def __init__(self, student: Student, stored: dict[str, Any], batch: int) -> None:
        self.student, self.stored = student, stored
        self.builder = TFLiteBuilder(student.graph.name, batch)
        self.node = self.builder.node
        self.codes: dict[str, int] = {}  # our tensor -> tensor of int8 codes in the file
        self.zeros: dict[str, int] = {}  # our tensor -> the int8 of 0.0
        self.units = unit_tensors(student)  # origins whose scale in the file is 1
        self.logits = -1
        self._floats: dict[str, int] = {}

    # --- the student's numbers ---

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Without the batch."""
        return self.student.graph.shapes[tensor]

    def parameters(self, tensor: str) -> AffineParameters:
        """float32 scale and (as a Python integer) zero point of a tensor's codes."""
        stored = self.stored["tensors"][self.student.origins[tensor]]
        return AffineParameters(np.float32(stored["scale"]), int(stored["zero_point"]))

    def unit(self, tensor: str) -> np.float32:
        """Scale of a tensor's codes in the file: its own, or 1."""
        origin = self.student.origins[tensor]
        return np.float32(1) if origin in self.units else self.parameters(tensor).scale

    def meaning(self, tensor: str) -> tuple[np.float32, int]:
        """Scale of a written tensor's codes in the file, and the int8 of 0.0."""
        return self.unit(tensor), self.zeros[tensor]

    def bits(self, tensor: str) -> int:
        """Of a tensor's codes."""
        return self.student.code_bits[self.student.origins[tensor]]

    def weights(self, operation: Operation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights beside their zero points (int32, our layout), bias (int64) and scale `s_w`."""
        stored = self.stored["weights"][operation.layer.name]
        codes, zero_point = (
            np.asarray(stored[name]).astype(np.int32) for name in ("codes", "zero_point")
        )
        centred = codes - zero_point
        if abs(centred).max() > 127:
            raise ValueError(
                f"layer {operation.layer.name!r}: found weights from {centred.min()} to "
                f"{centred.max()} beside their zero points, expected -127 to 127; quantize again"
            )
        bias = np.asarray(stored["bias"]).astype(np.int64)
        return centred, bias, np.asarray(stored["scale"], np.float32)

    def integer_weights(self, operation: Operation, transpose: Callable[[np.ndarray], np.ndarray],
                        axis: int) -> list[int]:  # fmt: skip
        """int8 weights, laid out by `transpose` with output channels along `axis`, and int32 bias
        of an operation that makes codes. From them XNNPACK computes the multiplier
        `s_x*s_w/s_y`, in this order and in float32, whichever of `s_x` and `s_y` are 1."""
        name, constant = operation.layer.name, self.builder.constant
        source, output = operation.inputs[0], operation.output
        centred, bias, scale = self.weights(operation)
        x, y = self.parameters(source).scale, self.parameters(output).scale
        multiplier: Any = x * scale / y
        if self.unit(source) == 1 != x:
            scale = multiplier if self.unit(output) == 1 else x * scale
        # A channel without weights makes one code whatever its multiplier: the bias becomes it.
        empty = ~centred.reshape(-1, centred.shape[-1]).any(axis=0)
        code = np.rint(np.clip(bias.astype(np.float32) * multiplier, -255, 255))
        bias = np.where(empty, code, bias)
        scale = np.where(empty, self.unit(output) / self.unit(source), scale).astype(np.float32)
        multiplier = np.where(empty, 1, multiplier)
        if not (multiplier < LARGEST_MULTIPLIER).all():
            raise ValueError(
                f"layer {name!r}: found a factor of {multiplier.max():g} from accumulators to "
                f"codes, expected less than {LARGEST_MULTIPLIER:g}; the range of its output is "
                "too narrow for this runtime: calibrate on other images"
            )
        weights = transpose(centred).astype(np.int8)
        return [
            constant(f"{name}.weight", weights, scale=scale, axis=axis),
            constant(f"{name}.bias", bias.astype(np.int32), scale=self.unit(source) * scale),
        ]

    # --- pieces ---

    def integers(self, name: str, values: Any) -> int:
        """An int32 constant."""
        return self.builder.constant(name, np.asarray(values, np.int32))

    def numbers(self, name: str, *values: Any) -> int:
        """A float32 vector."""
        return self.builder.constant(name, np.asarray(values, np.float32))

    def floats(self, kind: str, inputs: Sequence[int], name: str, shape: Sequence[int],
               **options: Any) -> int:  # fmt: skip
        """An operator that makes a float tensor."""
        return self.node(kind, inputs, self.builder.tensor(name, shape, "float32"), **options)

    def dequantized(self, tensor: str) -> int:
        """Float tensor of codes beside the zero point, times `unit(tensor)`."""
        name = f"{tensor}.dequantized"
        if name not in self._floats:
            inputs = [self.codes[tensor]]
            self._floats[name] = self.floats("DEQUANTIZE", inputs, name, self.shape(tensor))
        return self._floats[name]

    def centred(self, tensor: str) -> int:
        """Float tensor of codes beside the zero point: integers."""
        if self.unit(tensor) != 1:
            raise AssertionError(f"tensor {tensor!r} is not in units of its codes")
        return self.dequantized(tensor)

    def real(self, tensor: str) -> int:
        """Float tensor of real values."""
        name, scale = f"{tensor}.real", self.parameters(tensor).scale
        if self.unit(tensor) == scale:
            return self.dequantized(tensor)
        if name not in self._floats:
            inputs = [self.dequantized(tensor), self.numbers(f"{tensor}.scale", scale)]
            self._floats[name] = self.floats("MUL", inputs, name, self.shape(tensor))
        return self._floats[name]

    def moved(self, tensor: str, origin: str, kind: str, inputs: Sequence[int], **options: Any) -> None:  # fmt: skip
        """Makes a tensor of the same codes as `origin`'s, elsewhere."""
        self.zeros[tensor] = self.zeros[origin]
        name, shape = codes_name(tensor), self.shape(tensor)
        made = self.builder.tensor(name, shape, "int8", self.meaning(tensor))
        self.codes[tensor] = self.node(kind, inputs, made, **options)

    def reshaped(self, source: int, name: str, shape: Sequence[int],
                 meaning: tuple[np.float32, int]) -> int:  # fmt: skip
        """int8 values as the batch and then `shape`."""
        wanted = np.asarray([-1, *shape], np.int32)
        made = self.builder.tensor(name, shape, "int8", meaning)
        inputs = [source, self.integers(f"{name}.shape", wanted)]
        return self.node("RESHAPE", inputs, made, newShape=wanted)

    # --- new codes ---

    def new_codes(self, tensor: str, make: Callable[[int, str], object],
                  shape: Sequence[int] | None = None) -> None:  # fmt: skip
        """Makes a tensor's codes, clipped to its bits.

        Args:
          make: writes the operator that makes codes: (int8 tensor, fused activation) -> None.
          shape: which they are made in, if it is not the tensor's own.
        """
        zero_point, top = self.parameters(tensor).zero_point, top_code(self.bits(tensor))
        name, builder, unit = codes_name(tensor), self.builder, self.unit(tensor)
        shape = self.shape(tensor) if shape is None else shape
        zero = 127 - top + zero_point  # so that int8 saturates at the top code
        if zero_point == 0 or top == 255:
            made = builder.tensor(name, shape, "int8", (unit, zero))
            make(made, "RELU" if top < 255 else "NONE")
        else:
            unclipped = builder.tensor(f"{tensor}.unclipped", shape, "int8", (unit, zero))
            make(unclipped, "NONE")
            zero = zero_point - 128  # so that it saturates at code 0
            made = builder.tensor(name, shape, "int8", (unit, zero))
            self.node("QUANTIZE", [unclipped], made)
        self.codes[tensor], self.zeros[tensor] = made, zero

    def rounded_codes(self, tensor: str, kind: str, inputs: Sequence[int]) -> None:
        """Makes a tensor's codes by rounding what an operator makes in units of its scale. From
        here on the tensor's scale in the file is 1: `QUANTIZE` multiplies by its inverse."""
        self.units.add(tensor)

        def make(codes: int, activation: str) -> None:
            name, shape = f"{tensor}.steps", self.shape(tensor)
            steps = self.floats(kind, inputs, name, shape, activation=activation)
            self.node("QUANTIZE", [steps], codes)

        self.new_codes(tensor, make)

    def rounded_with_zero_point(self, tensor: str, steps: int) -> None:
        """Makes a tensor's codes by rounding float values that its zero point is part of: a tie
        rounds to an even code, and not to an even distance from the zero point."""
        whole = self.floats("ROUND", [steps], f"{tensor}.rounded", self.shape(tensor))
        zero_point = self.parameters(tensor).zero_point
        inputs = [whole, self.numbers(f"{tensor}.minus_zero_point", -zero_point)]
        self.rounded_codes(tensor, "ADD", inputs)

    def looked_up(self, tensor: str, source: int, first_rows: int, table: np.ndarray) -> None:
        """Makes the codes `table[source + first_rows]`."""
        shape, builder = self.shape(tensor), self.builder
        unit, zero = self.unit(tensor), self.parameters(tensor).zero_point - 128
        wide = self.node("CAST", [source], builder.tensor(f"{tensor}.int32", shape, "int32"))
        rows = builder.tensor(f"{tensor}.rows", shape, "int32")
        self.node("ADD", [wide, first_rows], rows)
        int8 = (np.asarray(table, np.int32) - 128).astype(np.int8)
        stored = builder.constant(f"{tensor}.table", int8, scale=unit.reshape(1), zero=zero)
        made = builder.tensor(codes_name(tensor), shape, "int8", (unit, zero))
        self.codes[tensor], self.zeros[tensor] = self.node("GATHER", [stored, rows], made), zero

    # --- the image ---

    def float_image(self) -> int:
        """Divided by the scale as we do: `QUANTIZE` itself would multiply by its inverse."""
        image = self.builder.tensor(INPUT, self.shape(INPUT), "float32")
        scale = self.numbers(f"{INPUT}.scale", self.parameters(INPUT).scale)
        self.rounded_codes(INPUT, "DIV", [image, scale])
        return image

    def pixel_image(self, table: Callable[[np.ndarray], np.ndarray]) -> int:
        """Looks the code of every pixel up: row `256*channel + pixel`."""
        shape = self.shape(INPUT)
        pixels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], shape[2], axis=1)
        parameters = AffineParameters(*map(jnp.float32, self.parameters(INPUT)))
        found = quantize(jnp.asarray(table(pixels)), parameters, self.bits(INPUT))
        image = self.builder.tensor(INPUT, shape, "uint8")
        first_rows = self.integers(f"{INPUT}.first_rows", 256 * np.arange(shape[2]))
        self.looked_up(INPUT, image, first_rows, np.asarray(found).T.reshape(-1))
        return image
