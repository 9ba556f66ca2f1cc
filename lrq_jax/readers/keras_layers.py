"""What each Keras layer is in a graph: one function a class, in `LAYERS`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lrq_jax.graph.layers import Padding
from lrq_jax.readers.keras_config import Call
from lrq_jax.readers.keras_translator import Translator, Value, number, numbers

Translate = Callable[..., Value]
"""`(translator, call, *inputs) -> output`."""

# --- activations ---------------------------------------------------------------------------------

_ACTIVATIONS = {
    "relu": "relu", "relu6": "relu6", "leaky_relu": "leaky_relu", "sigmoid": "sigmoid",
    "silu": "silu", "swish": "silu", "hard_sigmoid": "hard_sigmoid", "hard_silu": "hard_swish",
    "hard_swish": "hard_swish",
}  # fmt: skip
_KERAS_LEAK = 0.2
"""Slope of the activation called `leaky_relu`; the layer's own default is 0.3."""


def _activate(t: Translator, call: Call, tensor: str, activation: Any, suffix: str) -> Value:
    if isinstance(activation, dict) and activation.get("class_name") in ("ReLU", "LeakyReLU"):
        inner = activation["config"]
        kind, slope = (_relu_kind if activation["class_name"] == "ReLU" else _leaky_kind)(t, call, inner)  # fmt: skip
    elif activation in (None, "linear"):
        return Value(tensor=tensor)
    elif activation == "softmax":
        return Value(tensor=tensor, softmax=True)
    else:
        kind, slope = _ACTIVATIONS.get(str(activation), ""), _KERAS_LEAK
        if not kind or (t.keras_2 and activation == "hard_sigmoid"):
            # Keras 2's hard_sigmoid is clip(0.2 x + 0.5), not the field's relu6(x + 3) / 6.
            raise t.refuse(call, f"activation {activation!r}",
                           f"one of {['linear', 'softmax', *_ACTIVATIONS]}")  # fmt: skip
    name = t.name(f"{call.name}{suffix}")
    return Value(tensor=t.net.activation(tensor, kind, negative_slope=slope, name=name))


def _relu_kind(t: Translator, call: Call, config: dict[str, Any]) -> tuple[str, float]:
    top, slope, threshold = (
        t.setting(call, name, config) for name in ("max_value", "negative_slope", "threshold")
    )
    slope = number(slope or 0)
    if number(threshold or 0) == 0:
        if slope == 0 and (top is None or number(top) == 6):
            return ("relu" if top is None else "relu6"), 0.01
        if top is None:
            return "leaky_relu", slope
    raise t.refuse(call, f"max_value {top}, negative_slope {slope}, threshold {threshold}",
                   "ReLU, ReLU6 or LeakyReLU")  # fmt: skip


def _leaky_kind(t: Translator, call: Call, config: dict[str, Any]) -> tuple[str, float]:
    slope = "alpha" if "alpha" in config else "negative_slope"  # Keras 2 and 3
    return "leaky_relu", number(t.setting(call, slope, config))


def _activation(t: Translator, call: Call, x: Value) -> Value:
    return _activate(t, call, t.tensor(call, x), t.setting(call, "activation"), "")


def _rectifier(kind_of: Callable[..., tuple[str, float]]) -> Translate:
    def translate(t: Translator, call: Call, x: Value) -> Value:
        (kind, slope), tensor = kind_of(t, call, call.config), t.tensor(call, x)
        name = t.name(call.name)
        return Value(tensor=t.net.activation(tensor, kind, negative_slope=slope, name=name))

    return translate


def _function(kind: str) -> Translate:
    """A function such as `tf.nn.relu`, or Keras 3's operation of that name."""

    def translate(t: Translator, call: Call, x: Value) -> Value:
        if call.constants:
            raise t.refuse(call, f"arguments {call.constants}", "none")
        return Value(tensor=t.net.activation(t.tensor(call, x), kind, name=t.name(call.name)))

    return translate


def _softmax(t: Translator, call: Call, x: Value) -> Value:
    t.last_axis(call, x)
    return Value(tensor=t.tensor(call, x), softmax=True)


# --- layers with weights -------------------------------------------------------------------------


def _convolve(t: Translator, call: Call, x: Value, kernel: np.ndarray, groups: int,
              bias: np.ndarray | None, name: str) -> str:  # fmt: skip
    """One convolution; padding that waits before it becomes its own."""
    padding: Padding | str | int = t.padding(call)
    if padding == 0:
        tensor, padding = t.bare(call, x), x.padding
    else:
        tensor = t.tensor(call, x)
    made = t.net.conv(
        tensor,
        kernel.shape[3],
        (kernel.shape[0], kernel.shape[1]),
        strides=t.pair(call, "strides"),
        padding=padding,
        dilation=t.pair(call, "dilation_rate"),
        groups=groups,
        use_bias=bias is not None,
        name=t.name(name),
    )
    arrays: dict[str, Any] = {} if bias is None else {"bias": bias}
    t.put(made, kernel=kernel, **arrays)
    return made


def _bias(t: Translator, call: Call, features: int) -> dict[str, tuple[int, ...]]:
    return {"bias": (features,)} if t.setting(call, "use_bias") else {}


def _conv(t: Translator, call: Call, x: Value) -> Value:
    t.channels_last(call)
    features = t.setting(call, "filters")
    groups = call.config.get("groups", 1)  # since Keras 2.3; a wrong one shows in the kernel
    shape = (*t.pair(call, "kernel_size"), _channels(t, call, x) // groups, features)
    found = t.weights(call, {"kernel": shape, **_bias(t, call, features)})
    made = _convolve(t, call, x, found["kernel"], groups, found.get("bias"), call.name)
    return _activate(t, call, made, t.setting(call, "activation"), "_activation")


def _channels(t: Translator, call: Call, x: Value) -> int:
    shape = t.shape(x)
    if len(shape) != 3:
        raise t.refuse(call, f"an input of shape {shape}", "an image (H, W, C)")
    return shape[2]


def _depthwise(t: Translator, call: Call, x: Value) -> Value:
    t.channels_last(call)
    channels, copies = _channels(t, call, x), t.setting(call, "depth_multiplier")
    shape = (*t.pair(call, "kernel_size"), channels, copies)
    found = t.weights(call, {"kernel": shape, **_bias(t, call, channels * copies)})
    kernel = found["kernel"].reshape(*shape[:2], 1, channels * copies)
    made = _convolve(t, call, x, kernel, channels, found.get("bias"), call.name)
    return _activate(t, call, made, t.setting(call, "activation"), "_activation")


def _separable(t: Translator, call: Call, x: Value) -> Value:
    t.channels_last(call)
    channels, copies = _channels(t, call, x), t.setting(call, "depth_multiplier")
    features, shape = t.setting(call, "filters"), (*t.pair(call, "kernel_size"), channels, copies)
    inner = channels * copies
    found = t.weights(call, {"depthwise_kernel": shape, "pointwise_kernel": (1, 1, inner, features),
                             **_bias(t, call, features)})  # fmt: skip
    kernel = found["depthwise_kernel"].reshape(*shape[:2], 1, inner)
    depthwise = _convolve(t, call, x, kernel, channels, None, f"{call.name}_depthwise")
    bias = found.get("bias")
    made = t.net.conv(depthwise, features, 1, use_bias=bias is not None, name=t.name(call.name))
    t.put(made, kernel=found["pointwise_kernel"], **({} if bias is None else {"bias": bias}))
    return _activate(t, call, made, t.setting(call, "activation"), "_activation")


def _dense(t: Translator, call: Call, x: Value) -> Value:
    shape, features = t.shape(x), t.setting(call, "units")
    if len(shape) != 1:
        raise t.refuse(
            call, f"an input of shape {shape}", "a vector: GlobalAveragePooling2D or Flatten before"
        )
    found = t.weights(call, {"kernel": (shape[0], features), **_bias(t, call, features)})
    bias = "bias" in found
    made = t.net.dense(t.tensor(call, x), features, use_bias=bias, name=t.name(call.name))
    t.put(made, **found)
    return _activate(t, call, made, t.setting(call, "activation"), "_activation")


def _batch_norm(t: Translator, call: Call, x: Value) -> Value:
    t.last_axis(call, x)
    channels = t.shape(x)[-1:]
    affine = [name for name, on in (("gamma", "scale"), ("beta", "center"))
              if t.setting(call, on)]  # fmt: skip
    found = t.weights(call, dict.fromkeys((*affine, "moving_mean", "moving_variance"), channels))
    made = t.net.batch_norm(
        t.tensor(call, x),
        eps=number(t.setting(call, "epsilon")),
        affine=bool(affine),
        name=t.name(call.name),
    )
    t.put(made, "batch_stats", mean=found["moving_mean"], var=found["moving_variance"])
    if affine:
        ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
        t.put(made, scale=found.get("gamma", ones), bias=found.get("beta", zeros))
    if len(affine) == 1:
        t.completed.append(call.name)
    return Value(tensor=made)


# --- windows, shapes, sums -----------------------------------------------------------------------


def _pool(average: bool) -> Translate:
    def translate(t: Translator, call: Call, x: Value) -> Value:
        t.channels_last(call)
        window = t.pair(call, "pool_size")
        strides = window if t.setting(call, "strides") is None else t.pair(call, "strides")
        settings: dict[str, Any] = {"strides": strides, "padding": t.padding(call)}
        if average:  # TensorFlow never counts padding in a mean
            settings["count_include_pad"] = False
        pool = t.net.avg_pool if average else t.net.max_pool
        return Value(tensor=pool(t.tensor(call, x), window, name=t.name(call.name), **settings))

    return translate


def _global_average(t: Translator, call: Call, x: Value) -> Value:
    t.channels_last(call)
    made = t.net.global_pool(t.tensor(call, x), name=t.name(call.name))
    if call.config.get("keepdims"):  # since Keras 2.6
        made = t.net.unflatten(made, name=t.name(f"{call.name}_keepdims"))
    return Value(tensor=made)


def _global_maximum(t: Translator, call: Call, x: Value) -> Value:
    t.channels_last(call)
    tensor, (height, width, _) = t.tensor(call, x), t.shape(x)
    made = t.net.max_pool(tensor, (height, width), name=t.name(call.name))
    if not call.config.get("keepdims"):
        made = t.net.flatten(made, name=t.name(f"{call.name}_flatten"))
    return Value(tensor=made)


def _zero_padding(t: Translator, call: Call, x: Value) -> Value:
    t.channels_last(call)
    _channels(t, call, x)
    new = _two_pairs(t, call, "padding")
    height, width = (
        (old[0] + more[0], old[1] + more[1]) for old, more in zip(x.padding, new, strict=True)
    )
    return Value(tensor=x.tensor, padding=(height, width), scale=x.scale, offset=x.offset,
                 softmax=x.softmax)  # fmt: skip


def _cropping(t: Translator, call: Call, x: Value) -> Value:
    t.channels_last(call)
    (top, bottom), (left, right) = _two_pairs(t, call, "cropping")
    tensor, (height, width, _) = t.tensor(call, x), t.shape(x)
    stop = (height - bottom, width - right, None)
    return Value(tensor=t.net.slice(tensor, start=(top, left, 0), stop=stop, name=t.name(call.name)))  # fmt: skip


def _two_pairs(t: Translator, call: Call, setting: str) -> Padding:
    found = t.setting(call, setting)
    rows: Any = [found, found] if isinstance(found, int) else list(found)
    rows = [[row, row] if isinstance(row, int) else list(row) for row in rows]
    if [len(row) for row in rows] != [2, 2] or min(min(row) for row in rows) < 0:
        raise t.refuse(call, f"{setting} {found}", "two pairs of numbers from zero up")
    return (rows[0][0], rows[0][1]), (rows[1][0], rows[1][1])


def _flatten(t: Translator, call: Call, x: Value) -> Value:
    t.channels_last(call)
    tensor = t.tensor(call, x)
    if len(t.shape(x)) == 1:
        return Value(tensor=tensor)
    return Value(tensor=t.net.flatten(tensor, name=t.name(call.name)))


def _reshape(t: Translator, call: Call, x: Value) -> Value:
    shape, wanted = t.shape(x), tuple(t.setting(call, "target_shape"))
    if wanted.count(-1) == 1:
        rest = -math.prod(wanted)
        wanted = tuple(math.prod(shape) // rest if n == -1 else n for n in wanted)
    tensor = t.tensor(call, x)
    if wanted == shape:
        return Value(tensor=tensor)
    if wanted == (math.prod(shape),):
        return Value(tensor=t.net.flatten(tensor, name=t.name(call.name)))
    if len(shape) == 1 and wanted == (1, 1, *shape):
        return Value(tensor=t.net.unflatten(tensor, name=t.name(call.name)))
    raise t.refuse(call, f"{shape} reshaped to {wanted}", "a flat vector, or one as (1, 1, C)")


def _add(t: Translator, call: Call, *values: Value) -> Value:
    if len(values) == 1 and call.constants:
        return _affine("add")(t, call, *values)
    tensors = [t.tensor(call, value) for value in values]
    if len(tensors) < 2:
        raise t.refuse(call, f"{len(tensors)} inputs", "two or more")
    total = tensors[0]
    for index, tensor in enumerate(tensors[1:], 2):
        name = call.name if index == len(tensors) else f"{call.name}_{index}"
        total = t.net.add(total, tensor, name=t.name(name))
    return Value(tensor=total)


def _multiply(t: Translator, call: Call, *values: Value) -> Value:
    if len(values) == 1 and call.constants:
        return _affine("multiply")(t, call, *values)
    if len(values) != 2:
        raise t.refuse(call, f"{len(values)} inputs", "two")
    # The gate of one value a channel comes second in a graph.
    first, second = sorted(values, key=lambda value: -math.prod(t.shape(value)[:-1]))
    tensors = t.tensor(call, first), t.tensor(call, second)
    return Value(tensor=t.net.multiply(*tensors, name=t.name(call.name)))


def _concatenate(t: Translator, call: Call, *values: Value) -> Value:
    t.last_axis(call, values[0])
    return Value(tensor=t.net.concat(*(t.tensor(call, v) for v in values), name=t.name(call.name)))


def _nothing(t: Translator, call: Call, x: Value) -> Value:
    """Layers that do nothing once a network is trained."""
    t.left_out.append(f"{call.kind} {call.name!r}")
    return x


# --- the image's normalisation -------------------------------------------------------------------


def _normalised(t: Translator, call: Call, x: Value, scale: np.ndarray, offset: np.ndarray) -> Value:  # fmt: skip
    """`scale*x + offset` of an image: no layer, but part of the preprocessing."""
    if not x.is_image or x.scale is None or x.offset is None:
        raise t.refuse(call, "it after other layers", "a normalisation of the image only")
    if any(array.ndim and array.shape != x.scale.shape for array in (scale, offset)):
        raise t.refuse(call, f"{scale.shape} values", f"one, or one for each of {x.scale.shape}")
    return Value(tensor=x.tensor, scale=scale * x.scale, offset=scale * x.offset + offset)


def _rescaling(t: Translator, call: Call, x: Value) -> Value:
    scale, offset = (numbers(t.setting(call, name)) for name in ("scale", "offset"))
    return _normalised(t, call, x, scale, offset)


def _normalization(t: Translator, call: Call, x: Value) -> Value:
    t.last_axis(call, x)
    if call.config.get("invert"):  # since Keras 2.11
        raise t.refuse(call, "invert=True", "a normalisation")
    if call.config.get("mean") is not None:
        mean, variance = (numbers(call.config[name]) for name in ("mean", "variance"))
    else:
        channels = t.shape(x)[-1:]
        shapes = {"mean": channels, "variance": channels, "count": ()}
        found = t.weights(call, shapes)
        mean, variance = (np.asarray(found[name], np.float64) for name in ("mean", "variance"))
    deviation = np.maximum(np.sqrt(variance), 1e-7)  # Keras' own guard
    return _normalised(t, call, x, 1 / deviation, -mean / deviation)


def _affine(operation: str) -> Translate:
    """Arithmetic of the image with constants, as `preprocess_input` in a model is written."""

    def translate(t: Translator, call: Call, *values: Value) -> Value:
        if len(values) == 2 and operation in ("add", "multiply"):
            return {"add": _add, "multiply": _multiply}[operation](t, call, *values)
        if len(values) != 1 or len(call.constants) != 1:
            raise t.refuse(call, f"{len(values)} tensors and constants {call.constants}",
                           "the image and one constant")  # fmt: skip
        value = numbers(call.constants[0])
        if operation == "divide" and not value.all():
            raise t.refuse(call, "a division by zero", "another number")
        one, zero = np.ones(()), np.zeros(())
        scale, offset = {"add": (one, value), "subtract": (one, -value),
                         "multiply": (value, zero), "divide": (1 / value, zero)}[operation]  # fmt: skip
        return _normalised(t, call, values[0], scale, offset)

    return translate


_RANDOM = ("Flip", "Rotation", "Zoom", "Translation", "Contrast", "Brightness")

LAYERS: dict[str, Translate] = {
    "Conv2D": _conv, "Convolution2D": _conv, "DepthwiseConv2D": _depthwise,
    "SeparableConv2D": _separable, "SeparableConvolution2D": _separable, "Dense": _dense,
    "BatchNormalization": _batch_norm, "SyncBatchNormalization": _batch_norm,
    "Activation": _activation, "ReLU": _rectifier(_relu_kind),
    "LeakyReLU": _rectifier(_leaky_kind), "Softmax": _softmax,
    "MaxPooling2D": _pool(False), "AveragePooling2D": _pool(True),
    "GlobalAveragePooling2D": _global_average, "GlobalMaxPooling2D": _global_maximum,
    "ZeroPadding2D": _zero_padding, "Cropping2D": _cropping,
    "Flatten": _flatten, "Reshape": _reshape, "Add": _add, "Multiply": _multiply,
    "Concatenate": _concatenate, "Rescaling": _rescaling, "Normalization": _normalization,
    **dict.fromkeys(("Dropout", "SpatialDropout2D", "GaussianDropout", "GaussianNoise",
                     "AlphaDropout", "ActivityRegularization", "Identity",
                     *(f"Random{name}" for name in _RANDOM)), _nothing),
    # Functions called on tensors: of TensorFlow in Keras 2, of keras.ops in Keras 3.
    "tf.nn.relu": _function("relu"), "tf.nn.relu6": _function("relu6"),
    "Relu": _function("relu"), "Relu6": _function("relu6"),
    "tf.math.add": _affine("add"), "tf.__operators__.add": _affine("add"),
    "tf.math.multiply": _affine("multiply"), "tf.math.subtract": _affine("subtract"),
    "tf.math.truediv": _affine("divide"), "Subtract": _affine("subtract"),
    "TrueDivide": _affine("divide"), "Divide": _affine("divide"),
}  # fmt: skip
"""Every layer class that is read."""
