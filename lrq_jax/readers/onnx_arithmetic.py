"""Sums and products: of two tensors a layer, with a constant a scale and shift that waits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lrq_jax.graph import layers as L
from lrq_jax.readers.onnx_operators import activated, handles
from lrq_jax.readers.onnx_translation import Node, Numbers, Translation, Value

_GATED = {"sigmoid": "silu", "hard_sigmoid": "hard_swish"}


@handles("Add", "Sub", "Mul", "Div")
def _binary(t: Translation, node: Node) -> Value:
    constants = [t.constants.get(name) for name in node.inputs]
    if constants[1] is not None:
        return _affine(t, node, 0, constants[1])
    if constants[0] is not None:
        return _affine(t, node, 1, constants[0])
    if node.kind in ("Sub", "Div"):
        raise node.fail("two tensors made from the image", "a constant as second input")
    return (_sum if node.kind == "Add" else _product)(t, node)


@handles("Neg")
def _negative(t: Translation, node: Node) -> Value:
    return _scaled(t, node, 0, np.float64(-1), np.float64(0))


def _affine(t: Translation, node: Node, position: int, constant: np.ndarray) -> Value:
    """One constant operand; the other, at `position`, is made from the image."""
    value = t.raw(node, position)
    number = _per_channel(t, node, value, constant)
    one, nothing = np.float64(1), np.float64(0)
    if node.kind == "Mul":
        return _scaled(t, node, position, number, nothing)
    if node.kind == "Add":
        return _scaled(t, node, position, one, number)
    if node.kind == "Sub":
        return _scaled(t, node, position, *((one, -number) if position == 0 else (-one, number)))
    if position == 1:
        raise node.fail("a constant divided by a tensor", "a tensor divided by a constant")
    return _scaled(t, node, position, 1 / number, nothing)


def _per_channel(t: Translation, node: Node, value: Value, constant: np.ndarray) -> Numbers:
    """A constant operand as float64 `()` or `[C]`, in our channel order."""
    if constant.size == 1 and constant.ndim <= len(value.axes):
        return np.float64(constant.ravel()[0])
    sizes = (1,) * (len(value.axes) - constant.ndim) + constant.shape
    wide = [position for position, size in enumerate(sizes) if size > 1]
    if len(sizes) != len(value.axes) or len(wide) != 1:
        raise node.fail(f"a constant {constant.shape}", "one number, or one for each channel")
    (axis,) = wide
    factors = value.axes[axis]
    shape = t.shapes[value.tensor]
    if sum(f.size * f.stride for f in factors[:1]) != shape[-1] or factors[0].kind != "C":
        raise node.fail(f"a constant {constant.shape} along another axis", "one along channels")
    if len(factors) > 1:
        raise node.fail(f"a constant {constant.shape} along permuted channels", "them in order")
    return constant.ravel().astype(np.float64)


def _scaled(t: Translation, node: Node, position: int, scale: Numbers, shift: Numbers) -> Value:  # fmt: skip
    value = t.raw(node, position)
    alone = value.alone and t.readers[node.inputs[position]] == 1
    return dataclasses.replace(
        value, scale=value.scale * scale, shift=value.shift * scale + shift, alone=alone
    )


def _sum(t: Translation, node: Node) -> Value:
    x, y = _alike(t, t.value(node, 0), t.value(node, 1))
    if x.axes != y.axes:
        raise node.fail(f"shapes {x.shape} and {y.shape}", "two tensors of one shape")
    return Value(tensor=t.add(L.Add, x.tensor, y.tensor), axes=x.axes)


def _product(t: Translation, node: Node) -> Value:
    """A tensor times another of its shape, or times one gate a channel."""
    x, gate = t.raw(node, 0), t.raw(node, 1)
    scale: Numbers = np.float64(1)
    if _scales_only(t, x) and _scales_only(t, gate):
        # 6 * hard_sigmoid(x), which a later division by 6 makes whole.
        scale = x.scale * gate.scale
        x, gate = (Value(tensor=v.tensor, axes=v.axes) for v in (x, gate))
    x, gate = t.applied(x), t.applied(gate)
    for one, other in ((x, gate), (gate, x)):
        layer: Any = t.layers.get(other.tensor)
        gated = isinstance(layer, L.Activation) and layer.kind in _GATED
        if gated and layer.inputs == (one.tensor,) and one.axes == other.axes:
            return dataclasses.replace(activated(t, one, _GATED[layer.kind]), scale=scale)
    if np.prod(gate.shape) > np.prod(x.shape):
        x, gate = gate, x
    x, gate = _alike(t, x, gate)
    if not all(b in (a, ()) for a, b in zip(x.axes, gate.axes, strict=False)) or len(x.axes) != len(gate.axes):  # fmt: skip
        raise node.fail(f"shapes {x.shape} and {gate.shape}", "equal ones, or one gate a channel")
    return Value(tensor=t.add(L.Multiply, x.tensor, gate.tensor), axes=x.axes, scale=scale)


def _scales_only(t: Translation, value: Value) -> bool:
    """Whether at most one number waits, behind a layer that could not take it in."""
    kept = isinstance(t.layers.get(value.tensor), L.Activation | L.Multiply)
    return value.is_plain or (kept and value.scale.ndim == 0 and not np.any(value.shift))


def _alike(t: Translation, x: Value, y: Value) -> tuple[Value, Value]:
    """Both with their channels in order and both as images, unless they agree as they are."""
    if x.axes != y.axes:
        x, y = t.settled(x), t.settled(y)
    flat = [len(t.shapes[value.tensor]) == 1 for value in (x, y)]
    if any(flat) and not all(flat):
        x, y = (
            dataclasses.replace(value, tensor=t.add(L.Unflatten, value.tensor)) if one else value
            for value, one in zip((x, y), flat, strict=True)
        )
    return x, y
