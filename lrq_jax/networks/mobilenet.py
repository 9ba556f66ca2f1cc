"""MobileNet (arXiv 1704.04861) and MobileNetV2 (arXiv 1801.04381) at any width."""

from __future__ import annotations

from typing import Any

from lrq_jax.graph import Graph, GraphBuilder
from lrq_jax.graph.builder import PaddingLike

# (features, blocks) of each stage; the first block of a stage takes its stride.
_V1 = ((64, 1), (128, 2), (256, 2), (512, 6), (1024, 2))
_V1_STRIDES: dict[str, tuple[int, ...]] = {
    "imagenet": (2, 1, 2, 2, 2, 2),
    "cifar": (1, 1, 2, 2, 2, 2),
}
# (expansion, features, blocks)
_V2 = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
_V2_STRIDES: dict[str, tuple[int, ...]] = {
    "imagenet": (2, 1, 2, 2, 2, 1, 2, 1),
    "cifar": (1, 1, 1, 2, 2, 1, 2, 1),
}
"""Stride of the stem, then of each stage. CIFAR: as kuangliu, chenyaofo and forge train them."""


def rounded(channels: float, divisor: int = 8) -> int:
    """Channels of a scaled layer: the nearest multiple of `divisor` that takes no more than a
    tenth away (TensorFlow's `_make_divisible`, as published)."""
    result = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return result + divisor if result < 0.9 * channels else result


def strides_of(table: dict[str, tuple[int, ...]], images: str) -> tuple[int, ...]:
    """Strides for a kind of images; raises ValueError where there are none."""
    if images not in table:
        raise ValueError(f"found strides {images!r}, expected one of {sorted(table)}")
    return table[images]


def conv_bn(net: GraphBuilder, x: str, features: int, kernel_size: int, *, prefix: str,
            activation: str | None, strides: int = 1, padding: PaddingLike = "same",
            groups: int = 1, eps: float = 1e-5) -> str:  # fmt: skip
    """Convolution, batch norm and, unless None, an activation: the unit of all mobile networks."""
    x = net.conv(x, features, kernel_size, strides=strides, padding=padding, groups=groups,
                 name=f"{prefix}_conv")  # fmt: skip
    x = net.batch_norm(x, eps=eps, name=f"{prefix}_bn")
    return x if activation is None else net.activation(x, activation, name=f"{prefix}_{activation}")


def mobilenet_v1(*, width: float = 1.0, strides: str = "imagenet", activation: str = "relu",
                 padding: str = "same", eps: float = 1e-5, num_classes: int = 1000,
                 input_shape: tuple[int, int, int] = (224, 224, 3)) -> Graph:  # fmt: skip
    """Graph of a MobileNet: depthwise and pointwise convolutions in turn.

    Args:
      width: factor of all channels; 0.25, 0.5, 0.75 and 1 are published.
      strides: `imagenet` or `cifar`.
      activation: `relu` (pytorchcv) or `relu6` (TensorFlow, timm).
      padding: `same` (PyTorch's, symmetric) or `tf_same` (TensorFlow's).
      eps: of batch norm; TensorFlow's is 1e-3.

    Raises:
      ValueError: unknown strides.
    """
    stem, *stage_strides = strides_of(_V1_STRIDES, strides)
    common: dict[str, Any] = {"activation": activation, "padding": padding, "eps": eps}
    net = GraphBuilder(f"mobilenet_v1_x{width:g}", input_shape=input_shape)
    x = conv_bn(net, net.image, rounded(32 * width), 3, strides=stem, prefix="stem", **common)
    for stage, ((features, blocks), stride) in enumerate(zip(_V1, stage_strides, strict=True), 1):
        for block in range(blocks):
            prefix, channels = f"stage{stage}_block{block}_", net.shape(x)[2]
            x = conv_bn(net, x, channels, 3, groups=channels, prefix=prefix + "depthwise",
                        strides=1 if block else stride, **common)  # fmt: skip
            x = conv_bn(net, x, rounded(features * width), 1, prefix=prefix + "project", **common)
    net.dense(net.global_pool(x, name="pool"), num_classes, name="classifier")
    return net.build()


def inverted_residual(net: GraphBuilder, x: str, features: int, kernel_size: int, *, strides: int,
                      expansion: int, activation: str, padding: str, eps: float, prefix: str,
                      always_expand: bool = False) -> str:  # fmt: skip
    """MobileNetV2's block: 1x1 up, depthwise, linear 1x1 down, and the sum where shapes agree."""
    y, hidden = x, expansion * net.shape(x)[2]
    common: dict[str, Any] = {"padding": padding, "eps": eps}
    if expansion != 1 or always_expand:
        y = conv_bn(net, y, hidden, 1, prefix=f"{prefix}_expand", activation=activation, **common)
    y = conv_bn(net, y, hidden, kernel_size, strides=strides, groups=hidden,
                prefix=f"{prefix}_depthwise", activation=activation, **common)  # fmt: skip
    y = conv_bn(net, y, features, 1, prefix=f"{prefix}_project", activation=None, **common)
    same = strides == 1 and net.shape(x) == net.shape(y)
    return net.add(y, x, name=f"{prefix}_add") if same else y


def mobilenet_v2(*, width: float = 1.0, strides: str = "imagenet", activation: str = "relu6",
                 padding: str = "same", eps: float = 1e-5, head_features: int | None = None,
                 divisor: int = 8, expand_first: bool = False, classifier_bias: bool = True,
                 num_classes: int = 1000,
                 input_shape: tuple[int, int, int] = (224, 224, 3)) -> Graph:  # fmt: skip
    """Graph of a MobileNetV2.

    Args:
      width: factor of all channels; the last convolution's only where it is above 1.
      strides: `imagenet` or `cifar`.
      activation: `relu6` as published.
      padding: `same` (PyTorch's, symmetric) or `tf_same` (TensorFlow's).
      eps: of batch norm; TensorFlow's is 1e-3.
      head_features: channels of the last convolution; None takes the published ones.
      divisor: channels are rounded to its multiples; 1 in pytorchcv.
      expand_first: the first block has a 1x1 convolution too, from 32 channels to as many
        (pytorchcv's `mobilenetv2`; its `mobilenetv2b` and all others have none).
      classifier_bias: pytorchcv's classifiers have none.

    Raises:
      ValueError: unknown strides.
    """
    stem, *stage_strides = strides_of(_V2_STRIDES, strides)
    common: dict[str, Any] = {"activation": activation, "padding": padding, "eps": eps}
    net = GraphBuilder(f"mobilenet_v2_x{width:g}", input_shape=input_shape)
    x = conv_bn(
        net, net.image, rounded(32 * width, divisor), 3, strides=stem, prefix="stem", **common
    )
    for stage, ((expansion, features, blocks), stride) in enumerate(
        zip(_V2, stage_strides, strict=True), 1
    ):
        for block in range(blocks):
            x = inverted_residual(
                net, x, rounded(features * width, divisor), 3, strides=1 if block else stride,
                expansion=expansion, always_expand=expand_first,
                prefix=f"stage{stage}_block{block}", **common,
            )  # fmt: skip
    head = rounded(1280 * max(width, 1.0), divisor) if head_features is None else head_features
    x = conv_bn(net, x, head, 1, prefix="head", **common)
    x = net.global_pool(x, name="pool")
    net.dense(x, num_classes, use_bias=classifier_bias, name="classifier")
    return net.build()
