"""Where the indices of our channels-last tensors sit in the axes of an ONNX tensor.

Our tensors stay `[B, H, W, C]` or `[B, C]` whatever an exporter does with axes. An ONNX axis is a
tuple of factors, outermost first; each is a run of one of our indices: a reshape regroups them, a
transpose permutes them, and neither computes. So NCHW is `(N)(C)(H)(W)`, a flattened image is
`(N)(C H W)`, and a channel shuffle leaves `(C1 C0)` where `(C0 C1)` was.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np


class AxesError(ValueError):
    """An arrangement of axes that our layers cannot express."""


@dataclasses.dataclass(frozen=True)
class Factor:
    """`size` steps of `stride` along index `kind`: one of `N`, `H`, `W`, `C`."""

    kind: str
    stride: int
    size: int

    def __str__(self) -> str:
        return f"{self.kind}{self.size}" + (f"*{self.stride}" if self.stride > 1 else "")


Axis = tuple[Factor, ...]
Axes = tuple[Axis, ...]


def whole(kind: str, size: int) -> Axis:
    """All of an index; an index of one value needs no factor."""
    return (Factor(kind, 1, size),) if size > 1 or kind == "N" else ()


def image_axes(batch: int, shape: tuple[int, ...], channel_axis: int = 1) -> Axes:
    """Axes of an image `(H, W, C)`, or of a vector `(C,)` as one of a single pixel."""
    height, width, channels = shape if len(shape) == 3 else (1, 1, *shape)
    axes = [whole("N", batch), whole("H", height), whole("W", width)]
    axes.insert(channel_axis, whole("C", channels))
    return tuple(axes)


def vector_axes(batch: int, features: int) -> Axes:
    """Axes of a vector `(C,)`."""
    return whole("N", batch), whole("C", features)


def sizes(axes: Axes) -> tuple[int, ...]:
    """The ONNX tensor's shape."""
    return tuple(math.prod(factor.size for factor in axis) for axis in axes)


def describe(axes: Axes) -> str:
    """`(N1)(C8)(H4)(W4)`."""
    return "".join(f"({' '.join(map(str, axis))})" for axis in axes)


def merged(axis: Axis) -> Axis:
    """Neighbouring factors that are one run, as one."""
    result: list[Factor] = []
    for factor in axis:
        last = result[-1] if result else None
        if last and last.kind == factor.kind and last.stride == factor.stride * factor.size:
            result[-1] = Factor(factor.kind, factor.stride, last.size * factor.size)
        else:
            result.append(factor)
    return tuple(result)


def _check_batch(axes: Axes) -> Axes:
    if not axes or len(axes[0]) != 1 or axes[0][0].kind != "N":
        raise AxesError(f"found axes {describe(axes)}, expected the batch alone in the first")
    return axes


def reshaped(axes: Axes, dims: tuple[int, ...]) -> Axes:
    """The axes after a reshape to `dims`, batch first.

    Raises:
      AxesError: the batch would be mixed with other axes, or an index cut unevenly.
    """
    batch = axes[0]
    if not dims or dims[0] != math.prod(factor.size for factor in batch):
        raise AxesError(
            f"found a reshape of {sizes(axes)} to {dims}, expected the batch kept as first axis"
        )
    rest = [factor for axis in axes[1:] for factor in axis]
    made: list[Axis] = [batch]
    for dim in dims[1:]:
        axis: list[Factor] = []
        while dim > 1:
            if not rest:
                raise AxesError(f"found a reshape of {sizes(axes)} to {dims}: sizes differ")
            factor = rest.pop(0)
            if dim % factor.size == 0:
                axis.append(factor)
                dim //= factor.size
            elif factor.size % dim == 0:
                inner = factor.size // dim
                axis.append(Factor(factor.kind, factor.stride * inner, dim))
                rest.insert(0, Factor(factor.kind, factor.stride, inner))
                dim = 1
            else:
                raise AxesError(
                    f"found a reshape of {sizes(axes)} to {dims} that cuts {factor} unevenly"
                )
        made.append(merged(tuple(axis)))
    if rest:
        raise AxesError(f"found a reshape of {sizes(axes)} to {dims}: sizes differ")
    return tuple(made)


def transposed(axes: Axes, order: tuple[int, ...]) -> Axes:
    """The axes after a transpose; refuses to move the batch."""
    return _check_batch(tuple(axes[i] for i in order))


def flattened(axes: Axes, shape: tuple[int, int, int]) -> Axes:
    """The same axes over the row-major vector of an image `(H, W, C)`."""
    _, width, channels = shape
    strides = {"H": width * channels, "W": channels, "C": 1}
    return tuple(
        merged(
            tuple(
                f if f.kind == "N" else Factor("C", f.stride * strides[f.kind], f.size)
                for f in axis
            )
        )
        for axis in axes
    )


def channel_order(axis: Axis) -> np.ndarray:
    """Our channel for each position along an axis of channel factors only."""
    order = np.zeros(1, np.int64)
    for factor in axis:
        steps = np.arange(factor.size) * factor.stride
        order = (order[:, None] + steps).ravel()
    return order


def shuffle_groups(axis: Axis, channels: int) -> int | None:
    """Groups of the channel shuffle that an axis of all channels amounts to, else None."""
    if len(axis) != 2 or any(factor.kind != "C" for factor in axis):
        return None
    inner, outer = axis
    if inner.stride == 1 and outer.stride == inner.size and inner.size * outer.size == channels:
        return outer.size
    return None
