"""One handler for each ONNX operator that computes: `OPERATORS[kind](translation, node)`.

Operators that only rearrange are in `onnx_shapes`. A handler returns the `Value` of the node's
first output, or None where it put all its outputs in place itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from lrq_jax.graph import layers as L
from lrq_jax.readers import onnx_axes as ax
from lrq_jax.readers.onnx_translation import Node, Numbers, Translation, Value

Handler = Callable[[Translation, Node], Value | None]
OPERATORS: dict[str, Handler] = {}

_THIRD = 1e-5  # exporters write 1/6 with four to eight digits


def handles(*kinds: str) -> Callable[[Handler], Handler]:
    """Registers a handler for some operators."""

    def register(handler: Handler) -> Handler:
        OPERATORS.update(dict.fromkeys(kinds, handler))
        return handler

    return register


def _hint(node: Node, position: int) -> str | None:
    """A layer's name from its weights' (`layer1.0.conv1.weight`), where that says something."""
    name = node.inputs[position]
    stem, _, leaf = name.rpartition("." if "." in name else "/")
    if leaf.split(":")[0].lower() in ("weight", "kernel", "gamma", "scale") and stem:
        return stem
    return None


# --- windows -------------------------------------------------------------------------------------


def _window(node: Node, shape: tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...],
            *, ceil: bool = False) -> dict[str, Any]:  # fmt: skip
    """Strides and explicit padding of a 2-D window; a ceil-mode rest is padding after."""
    strides = tuple(node.attributes.get("strides", (1, 1)))
    if not len(kernel) == len(strides) == len(dilation) == 2:
        raise node.fail(f"a window {kernel}", "two dimensions")
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    mode = node.attributes.get("auto_pad", "NOTSET")
    pads = node.attributes.get("pads", (0, 0, 0, 0))
    before, after = list(pads[:2]), list(pads[2:])
    if mode not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise node.fail(f"auto_pad {mode!r}", "one of the standard's")
    for axis in range(2):
        size, stride = shape[axis], strides[axis]
        if mode == "VALID":
            before[axis] = after[axis] = 0
        elif mode != "NOTSET":
            total = max((-(-size // stride) - 1) * stride + reach[axis] - size, 0)
            less, more = total // 2, total - total // 2
            before[axis], after[axis] = (less, more) if mode == "SAME_UPPER" else (more, less)
        elif ceil:
            rest = size + before[axis] + after[axis] - reach[axis]
            steps = -(-rest // stride)
            if steps * stride >= size + before[axis]:  # a window may not start in the padding
                steps -= 1
            after[axis] += max(steps * stride - rest, 0)
    padding = ((before[0], after[0]), (before[1], after[1]))
    return {"strides": strides, "padding": padding}


@handles("Conv")
def _conv(t: Translation, node: Node) -> Value:
    weight = t.required(node, 1, "weight")
    bias = t.constant(node, 2, "bias")
    if weight.ndim != 4:
        raise node.fail(f"a weight {weight.shape}", "a 2-D convolution's, of 4 dimensions")
    params = {"kernel": weight.transpose(2, 3, 1, 0)}
    if bias is not None and np.any(bias):  # one exporter writes zeros for no bias
        params["bias"] = bias
    dilation = tuple(node.attributes.get("dilations", (1, 1)))
    groups = node.attributes.get("group", 1)
    value = t.value(node)
    vector = len(t.shapes[value.tensor]) == 1 and value.axes == t.image_value(value.tensor).axes
    pads = any(node.attributes.get("pads", (0,)))
    if vector and weight.shape[2:] == (1, 1) and groups == 1 and not pads:
        # On pooled features a 1x1 convolution is a dense layer.
        params["kernel"] = params["kernel"][0, 0]
        return t.image_value(_dense(t, value.tensor, params, _hint(node, 1)))
    x = t.image(node)
    settings = _window(node, t.shapes[x], weight.shape[2:], dilation)
    made = t.add(
        L.Conv,
        x,
        hint=_hint(node, 1),
        arrays={"params": params},
        features=weight.shape[0],
        kernel_size=weight.shape[2:],
        dilation=dilation,
        groups=groups,
        use_bias="bias" in params,
        **settings,
    )
    return t.image_value(made)


@handles("MaxPool")
def _max_pool(t: Translation, node: Node) -> Value:
    if any(d != 1 for d in node.attributes.get("dilations", ())):
        raise node.fail(f"dilations {node.attributes['dilations']}", "none")
    if len(node.outputs) > 1 and t.readers[node.outputs[1]]:
        raise node.fail("its indices read", "its maxima only")
    x, kernel = t.image(node), tuple(node.attributes["kernel_shape"])
    ceil = bool(node.attributes.get("ceil_mode", 0))
    settings = _window(node, t.shapes[x], kernel, (1, 1), ceil=ceil)
    return t.image_value(t.add(L.MaxPool, x, window=kernel, **settings))


@handles("AveragePool")
def _avg_pool(t: Translation, node: Node) -> Value:
    if any(d != 1 for d in node.attributes.get("dilations", ())):
        raise node.fail(f"dilations {node.attributes['dilations']}", "none")
    x, kernel = t.image(node), tuple(node.attributes["kernel_shape"])
    ceil = bool(node.attributes.get("ceil_mode", 0))
    settings = _window(node, t.shapes[x], kernel, (1, 1), ceil=ceil)
    none = ((0, 0), (0, 0))
    if kernel == t.shapes[x][:2] and settings["padding"] == none:
        return _pooled(t, x)
    if (kernel, settings["strides"], settings["padding"]) == ((1, 1), (1, 1), none):
        return t.image_value(x)  # an adaptive pool with nothing to do
    counted = bool(node.attributes.get("count_include_pad", 0))
    written = _window(node, t.shapes[x], kernel, (1, 1))["padding"]
    if counted and written != settings["padding"]:
        if written != none:
            raise node.fail(
                "ceil_mode with counted padding", "one of them: pad the image to the size needed"
            )
        counted = False  # what ceil mode adds is never counted
    made = t.add(L.AvgPool, x, window=kernel, count_include_pad=counted, **settings)
    return t.image_value(made)


def _pooled(t: Translation, tensor: str) -> Value:
    """The mean over height and width; a vector is its own."""
    if len(t.shapes[tensor]) == 3:
        one = t.shapes[tensor][:2] == (1, 1)
        tensor = t.add(L.Flatten if one else L.GlobalPool, tensor)
    return t.image_value(tensor)


@handles("GlobalAveragePool")
def _global_pool(t: Translation, node: Node) -> Value:
    value = t.value(node)
    if value.axes == t.image_value(value.tensor).axes:
        return _pooled(t, value.tensor)
    return _pooled(t, t.image(node))


@handles("GlobalMaxPool")
def _global_max_pool(t: Translation, node: Node) -> Value:
    x = t.image(node)
    window = t.shapes[x][:2]
    return t.image_value(t.add(L.MaxPool, x, window=window, strides=window))


@handles("ReduceMean")
def _reduce_mean(t: Translation, node: Node) -> Value:
    value = t.value(node)
    axes = node.attributes.get("axes")
    if axes is None:
        found = t.constant(node, 1, "axes")
        axes = range(len(value.axes)) if found is None else found.ravel().tolist()
    over = {axis % len(value.axes) for axis in axes}
    shape = t.shapes[value.tensor]
    height, width = shape[:2] if len(shape) == 3 else (1, 1)
    reduced = {factor for axis in over for factor in value.axes[axis]}
    if reduced != {*ax.whole("H", height), *ax.whole("W", width)}:
        raise node.fail(
            f"a mean over axes {sorted(over)} of {ax.describe(value.axes)}",
            "one over all of height and width, and nothing else",
        )
    keep = node.attributes.get("keepdims", 1)
    left = tuple(
        () if i in over else axis for i, axis in enumerate(value.axes) if keep or i not in over
    )
    return Value(tensor=_pooled(t, value.tensor).tensor, axes=left)


# --- channels ------------------------------------------------------------------------------------


@handles("BatchNormalization")
def _batch_norm(t: Translation, node: Node) -> Value:
    if node.attributes.get("training_mode", 0):
        raise node.fail(
            "training_mode 1, the statistics of each batch",
            "running statistics: call model.eval() before the export",
        )
    scale, bias, mean, var = (
        t.required(node, i + 1, name) for i, name in enumerate(("scale", "bias", "mean", "var"))
    )
    value = t.settled(t.value(node))
    if len(value.axes) == 2:
        tensor, order = t.features(node, value)
        axes: Any = value.axes
        if tensor != value.tensor and len(t.shapes[value.tensor]) == 3:
            axes = ax.flattened(axes, cast(Any, t.shapes[value.tensor]))
        back = np.argsort(order)
        scale, bias, mean, var = (array[back] for array in (scale, bias, mean, var))
    else:
        tensor, axes = value.tensor, value.axes
        if axes[1] != ax.whole("C", t.shapes[tensor][-1]):
            raise node.fail(f"axes {ax.describe(axes)}", "channels as second axis")
    made = t.add(
        L.BatchNorm,
        tensor,
        hint=_hint(node, 1),
        arrays={
            "params": {"scale": scale, "bias": bias},
            "batch_stats": {"mean": mean, "var": var},
        },
        eps=node.attributes.get("epsilon", 1e-5),
        affine=True,
    )
    return Value(tensor=made, axes=axes)


def _dense(t: Translation, x: str, params: dict[str, np.ndarray], hint: str | None) -> str:
    return t.add(L.Dense, x, hint=hint, arrays={"params": params},
                 features=params["kernel"].shape[1], use_bias="bias" in params)  # fmt: skip


def _matrix(t: Translation, node: Node, kernel: np.ndarray, bias: np.ndarray | None) -> Value:
    """A dense layer whose kernel `[in, out]` has its rows in the file's order."""
    value = t.value(node)
    if len(value.axes) != 2 or kernel.ndim != 2:
        raise node.fail(f"{value.shape} times {kernel.shape}", "(N, features) times a matrix")
    x, order = t.features(node, value)
    params = {"kernel": kernel[np.argsort(order)]}
    if bias is not None:
        params["bias"] = np.broadcast_to(bias, kernel.shape[1:])
    made = _dense(t, x, params, _hint(node, 1))
    return Value(tensor=made, axes=ax.vector_axes(t.batch, kernel.shape[1]))


@handles("Gemm")
def _gemm(t: Translation, node: Node) -> Value:
    kernel, bias = t.required(node, 1, "weight"), t.constant(node, 2, "bias")
    if node.attributes.get("transA", 0):
        raise node.fail("transA 1", "0")
    kernel = kernel.T if node.attributes.get("transB", 0) else kernel
    kernel = kernel * np.float32(node.attributes.get("alpha", 1.0))
    if bias is not None:
        bias = bias.reshape(-1) * np.float32(node.attributes.get("beta", 1.0))
    return _matrix(t, node, kernel, bias)


@handles("MatMul")
def _matmul(t: Translation, node: Node) -> Value:
    return _matrix(t, node, t.required(node, 1, "weight"), None)


# --- activations ---------------------------------------------------------------------------------


def activated(t: Translation, value: Value, kind: str, **settings: Any) -> Value:
    """The value behind an activation; `x * sigmoid(x)` and `x * hard_sigmoid(x)` come later."""
    value = t.applied(value)
    made = t.add(L.Activation, value.tensor, kind=kind, **settings)
    return Value(tensor=made, axes=value.axes)


@handles("Relu", "Sigmoid", "HardSwish", "Swish")
def _activation(t: Translation, node: Node) -> Value:
    kinds = {"Relu": "relu", "Sigmoid": "sigmoid", "HardSwish": "hard_swish", "Swish": "silu"}
    if node.attributes.get("alpha", 1.0) != 1.0:
        raise node.fail(f"alpha {node.attributes['alpha']:g}", 1)
    return activated(t, t.raw(node), kinds[node.kind])


@handles("LeakyRelu", "PRelu")
def _leaky_relu(t: Translation, node: Node) -> Value:
    slopes: Any = np.float32(node.attributes.get("alpha", 0.01))
    if node.kind == "PRelu":
        slopes = t.required(node, 1, "slope")
    if np.ptp(slopes) > 0:
        raise node.fail("a slope for each channel", "one slope for all")
    slope = float(slopes.ravel()[0])
    return activated(t, t.raw(node), "leaky_relu", negative_slope=slope)


@handles("HardSigmoid")
def _hard_sigmoid(t: Translation, node: Node) -> Value:
    slope = node.attributes.get("alpha", 0.2), node.attributes.get("beta", 0.5)
    if not np.allclose(slope, (1 / 6, 0.5), atol=_THIRD):
        raise node.fail(f"alpha, beta {slope}", "1/6 and 0.5, the slope of relu6(x + 3) / 6")
    return activated(t, t.raw(node), "hard_sigmoid")


@handles("Clip")
def _clip(t: Translation, node: Node) -> Value:
    bounds = [node.attributes.get("min"), node.attributes.get("max")]
    for i in range(2):
        if (found := t.constant(node, i + 1, ("min", "max")[i])) is not None:
            bounds[i] = float(found.ravel()[0])
    low = -np.inf if bounds[0] is None else bounds[0]
    high = np.inf if bounds[1] is None else bounds[1]
    value = t.raw(node)
    waiting = (value.scale, value.shift)
    plain = Value(tensor=value.tensor, axes=value.axes)
    if low == 0 and high == 6 and _is(waiting, 1, 3):
        gate = activated(t, plain, "hard_sigmoid")
        return Value(tensor=gate.tensor, axes=gate.axes, scale=np.float64(6))
    if low == 0 and high == 1 and _is(waiting, 1 / 6, 0.5):
        return activated(t, plain, "hard_sigmoid")
    if low == 0 and high == 6:
        return activated(t, value, "relu6")
    if low == 0 and high >= np.finfo(np.float32).max:
        return activated(t, value, "relu")
    raise node.fail(f"bounds {low:g} and {high:g}", "0 and 6, or 0 and no upper bound")


def _is(waiting: tuple[Numbers, Numbers], scale: float, shift: float) -> bool:
    return all(
        v.ndim == 0 and abs(float(v) - e) < _THIRD
        for v, e in zip(waiting, (scale, shift), strict=True)
    )
