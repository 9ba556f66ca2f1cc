"""Operators that move values and compute nothing: reshapes, slices, padding, concatenation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from lrq_jax.graph import layers as L
from lrq_jax.readers import onnx_axes as ax
from lrq_jax.readers.onnx_axes import AxesError, Factor
from lrq_jax.readers.onnx_operators import handles
from lrq_jax.readers.onnx_translation import Node, Translation, Value

_INDEX = {"H": 0, "W": 1, "C": 2}


@handles("Identity", "Dropout")
def _identity(t: Translation, node: Node) -> Value:
    return t.passed(node)


@handles("Cast")
def _cast(t: Translation, node: Node) -> Value:
    if node.attributes.get("to") != 1:
        raise node.fail(f"a cast to type {node.attributes.get('to')}", "one to float32 (1)")
    return t.passed(node)


@handles("Expand")
def _expand(t: Translation, node: Node) -> Value:
    value, shape = t.passed(node), t.constant(node, 1, "shape")
    if np.broadcast_shapes(value.shape, tuple(shape.tolist())) != value.shape:
        raise node.fail(f"{value.shape} repeated to {shape.tolist()}", "no repetition")
    return value


@handles("Softmax", "LogSoftmax")
def _softmax(t: Translation, node: Node) -> Value:
    value = t.passed(node)
    kept = [axis for axis in value.axes[1:] if axis]
    if len(kept) > 1 or any(factor.kind != "C" for axis in kept for factor in axis):
        raise node.fail(f"it over {value.shape}", "it over the logits (N, classes)")
    t.notes.append(f"{node.kind} at the end left out: the network makes logits")
    return dataclasses.replace(value, probabilities=True)


# --- axes ----------------------------------------------------------------------------------------


def _axes_operand(t: Translation, node: Node) -> list[int] | None:
    """Axes of Squeeze and Unsqueeze: an attribute up to opset 12, an input since 13."""
    if "axes" in node.attributes:
        return list(node.attributes["axes"])
    found = t.constant(node, 1, "axes")
    return None if found is None else found.ravel().tolist()


def _viewed(t: Translation, node: Node, dims: list[int]) -> Value:
    value = t.passed(node)
    total = math.prod(value.shape)
    if dims.count(-1) == 1:
        dims[dims.index(-1)] = total // max(math.prod(d for d in dims if d != -1), 1)
    return dataclasses.replace(value, axes=ax.reshaped(value.axes, tuple(dims)))


@handles("Reshape")
def _reshape(t: Translation, node: Node) -> Value:
    shape = t.raw(node).shape
    wanted = t.constant(node, 1, "shape").ravel().tolist()
    if not node.attributes.get("allowzero", 0):
        wanted = [shape[i] if d == 0 and i < len(shape) else d for i, d in enumerate(wanted)]
    return _viewed(t, node, wanted)


@handles("Flatten")
def _flatten(t: Translation, node: Node) -> Value:
    shape = t.raw(node).shape
    axis = node.attributes.get("axis", 1) % len(shape)
    return _viewed(t, node, [math.prod(shape[:axis]), math.prod(shape[axis:])])


@handles("Squeeze")
def _squeeze(t: Translation, node: Node) -> Value:
    shape, axes = t.raw(node).shape, _axes_operand(t, node)
    gone = {a % len(shape) for a in axes} if axes is not None else {
        i for i, d in enumerate(shape) if d == 1
    }  # fmt: skip
    if 0 in gone:
        raise node.fail("the batch axis squeezed", "it kept: name the axes")
    return _viewed(t, node, [d for i, d in enumerate(shape) if i not in gone])


@handles("Unsqueeze")
def _unsqueeze(t: Translation, node: Node) -> Value:
    dims, axes = list(t.raw(node).shape), _axes_operand(t, node)
    rank = len(dims) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        dims.insert(axis, 1)
    return _viewed(t, node, dims)


@handles("Transpose")
def _transpose(t: Translation, node: Node) -> Value:
    value = t.passed(node)
    order = node.attributes.get("perm", range(len(value.axes))[::-1])
    return dataclasses.replace(value, axes=ax.transposed(value.axes, tuple(order)))


# --- parts ---------------------------------------------------------------------------------------


def _cut(t: Translation, node: Node, value: Value, axis: int, start: int, stop: int, step: int) -> Value:  # fmt: skip
    """`x[..., start:stop:step, ...]` along one ONNX axis, numbers as Python's slices."""
    axis %= len(value.axes)
    size = value.shape[axis]
    span = range(size)[start:stop:step]
    if step < 1 or not len(span):
        raise node.fail(f"{start}:{stop}:{step} of {size}", "step >= 1 and something left")
    if len(span) == size:
        return value
    value = t.applied(value)
    factors = value.axes[axis]
    if len(factors) != 1 or factors[0].kind == "N":
        value = t.settled(value)
        factors = value.axes[axis]
    if len(factors) != 1 or factors[0].kind == "N":
        raise AxesError(f"found a slice along {ax.describe((factors,))}, expected one index")
    factor, tensor = factors[0], value.tensor
    if len(t.shapes[tensor]) == 1:
        tensor = t.add(L.Unflatten, tensor)
    index = _INDEX[factor.kind]
    outer = factor.stride * factor.size == t.shapes[tensor][index]
    if not outer or (factor.stride > 1 and span.step > 1):
        raise AxesError(f"found a slice along {ax.describe(value.axes)}, expected whole indices")
    stops: list[int | None] = [None, None, None]
    starts, steps = [0, 0, 0], [1, 1, 1]
    starts[index] = span.start * factor.stride
    stops[index] = (span[-1] + 1) * factor.stride
    steps[index] = span.step
    made = t.add(L.Slice, tensor, start=tuple(starts), stop=tuple(stops), step=tuple(steps))
    axes = list(value.axes)
    left = Factor(factor.kind, factor.stride, len(span))
    axes[axis] = (left,) if left.size > 1 else ()
    return Value(tensor=made, axes=tuple(axes))


@handles("Slice")
def _slice(t: Translation, node: Node) -> Value:
    value = t.passed(node)
    starts, ends, axes, steps = (
        None if (found := t.constant(node, i + 1, name)) is None else found.ravel().tolist()
        for i, name in enumerate(("starts", "ends", "axes", "steps"))
    )
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for axis, start, stop, step in zip(axes, starts, ends, steps, strict=True):
        value = _cut(t, node, value, axis, start, stop, step)
    return value


@handles("Gather")
def _gather(t: Translation, node: Node) -> Value:
    """One index of an axis, as `x[:, 0]` is exported."""
    value, found = t.passed(node), t.constant(node, 1, "indices")
    axis = node.attributes.get("axis", 0) % len(value.axes)
    if found.size != 1 or found.ndim > 1:
        raise node.fail(f"{found.size} indices", "one, or a slice")
    index = int(found.ravel()[0]) % value.shape[axis]
    value = _cut(t, node, value, axis, index, index + 1, 1)
    if found.ndim == 0:
        axes = tuple(a for i, a in enumerate(value.axes) if i != axis)
        value = dataclasses.replace(value, axes=axes)
    return value


@handles("Split")
def _split(t: Translation, node: Node) -> None:
    """A slice for each output."""
    value = t.passed(node)
    axis = node.attributes.get("axis", 0) % len(value.axes)
    size, lengths = value.shape[axis], node.attributes.get("split")
    if lengths is None and (found := t.constant(node, 1, "split")) is not None:
        lengths = found.ravel().tolist()
    if lengths is None:
        lengths = _even(size, -(-size // len(node.outputs)))
    parts = _parts(t, node, value, axis, lengths)
    t.values.update(zip(node.outputs, parts, strict=True))


@handles("SplitToSequence")
def _split_to_sequence(t: Translation, node: Node) -> None:
    """What torch's newer exporter writes for a chunk; SequenceAt picks the slices."""
    value, found = t.passed(node), t.constant(node, 1, "split")
    axis = node.attributes.get("axis", 0) % len(value.axes)
    if found is None:
        raise node.fail("no lengths", "them: parts of one value each are not supported")
    size = value.shape[axis]
    lengths = found.tolist() if found.ndim else _even(size, int(found))
    t.sequences[node.outputs[0]] = _parts(t, node, value, axis, lengths)


@handles("SequenceAt")
def _sequence_at(t: Translation, node: Node) -> Value:
    parts, position = t.sequences.get(node.inputs[0]), t.constant(node, 1, "position")
    if parts is None or position is None or not -len(parts) <= int(position) < len(parts):
        raise node.fail("no such part", "one of a SplitToSequence")
    return parts[int(position)]


def _even(size: int, length: int) -> list[int]:
    """Parts of one length, the last what is left."""
    return [min(length, size - start) for start in range(0, size, max(length, 1))]


def _parts(t: Translation, node: Node, value: Value, axis: int, lengths: list[int]) -> list[Value]:
    """Slices of these lengths, one after the other."""
    if sum(lengths) != value.shape[axis] or min(lengths) < 1:
        raise node.fail(f"lengths {lengths} of {value.shape[axis]}", "lengths that add up to it")
    value = dataclasses.replace(value, alone=False)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [
        _cut(t, node, value, axis, start, start + length, 1)
        for start, length in zip(starts, lengths, strict=True)
    ]


# --- wholes --------------------------------------------------------------------------------------


def _channel_axis(t: Translation, node: Node, preferred: int = 1) -> int:
    """1 for an operand that is NCHW, 3 for NHWC."""
    value = t.settled(t.value(node))
    other = 4 - preferred
    fits = value.axes == t.image_value(value.tensor, other).axes
    unfit = value.axes != t.image_value(value.tensor, preferred).axes
    return other if fits and unfit else preferred


@handles("Pad")
def _pad(t: Translation, node: Node) -> Value:
    """Zeros around; a negative amount cuts away."""
    mode = node.attributes.get("mode", "constant")
    fill = t.constant(node, 2, "value")
    if mode != "constant" or (fill is not None and np.any(fill != 0)):
        what = mode if mode != "constant" else f"{float(fill.ravel()[0]):g}"
        raise node.fail(f"padding with {what}", "zeros")
    value, pads = t.value(node), t.constant(node, 1, "pads").ravel().tolist()
    axes: Any = t.constant(node, 3, "axes")
    rank = len(value.axes)
    axes = list(range(rank)) if axes is None else [a % rank for a in axes.ravel().tolist()]
    before, after = pads[: len(axes)], pads[len(axes) :]
    for axis, first, last in zip(axes, before, after, strict=True):
        size = value.shape[axis]
        value = _cut(t, node, value, axis, max(-first, 0), size - max(-last, 0), 1)
    amounts = {
        axis: (max(first, 0), max(last, 0))
        for axis, first, last in zip(axes, before, after, strict=True)
    }
    if not any(map(any, amounts.values())):
        return value
    if any(amounts.get(0, ())) or rank != 4:
        raise node.fail(f"padding {pads} of {value.shape}", "an image padded, the batch not")
    place = "cut " + node.outputs[0]
    t.values[place] = value
    node = dataclasses.replace(node, inputs=(place, *node.inputs[1:]))
    channel_axis = _channel_axis(t, node)
    x = t.image(node, channel_axis=channel_axis)
    rows, columns = (2, 3) if channel_axis == 1 else (1, 2)
    none = (0, 0)
    made = t.add(L.Pad, x, height=amounts.get(rows, none), width=amounts.get(columns, none),
                 channels=amounts.get(channel_axis, none))  # fmt: skip
    return t.image_value(made, channel_axis)


@handles("Concat")
def _concat(t: Translation, node: Node) -> Value:
    """Along channels; blocks of constant zeros at the ends are padding."""
    live = [i for i, name in enumerate(node.inputs) if name not in t.constants]
    zeros = [t.constants.get(name) for name in node.inputs]
    if any(z is not None and np.any(z) for z in zeros) or not live:
        raise node.fail("a constant that is not zero", "tensors made from the image, or zeros")
    if live != list(range(live[0], live[-1] + 1)):
        raise node.fail("zeros between tensors", "them before or after")
    rank = len(t.raw(node, live[0]).axes)
    axis = node.attributes["axis"] % rank
    if rank == 2 and axis == 1 and len(live) == len(node.inputs):
        return _joined_vectors(t, node)
    if rank != 4 or axis not in (1, 3):
        raise node.fail(f"it along axis {axis} of {rank}", "it along channels")
    tensors = [t.image(node, i, channel_axis=axis) for i in live]
    joined = t.add(L.Concat, *tensors) if len(tensors) > 1 else tensors[0]
    before = sum(z.shape[axis] for z in zeros[: live[0]])
    after = sum(z.shape[axis] for z in zeros[live[-1] + 1 :])
    if before or after:
        joined = t.add(L.Pad, joined, channels=(before, after))
    return t.image_value(joined, axis)


def _joined_vectors(t: Translation, node: Node) -> Value:
    """Matrices `(N, features)` side by side; where features stand in another order than ours, so
    do the joined ones."""
    tensors, axis, start = [], [], 0
    for i in range(len(node.inputs)):
        tensor, order = t.features(node, t.value(node, i))
        if not np.array_equal(order, np.arange(len(order))):
            raise node.fail("flattened images side by side", "pooled features, or one image")
        tensors.append(tensor)
        axis.append(order + start)
        start += len(order)
    return Value(tensor=t.add(L.Concat, *tensors), axes=ax.vector_axes(t.batch, start))
