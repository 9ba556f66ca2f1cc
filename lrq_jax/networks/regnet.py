"""RegNetX (arXiv 2003.13678): widths and depths from a line, quantized to stages."""

from __future__ import annotations

import math

from lrq_jax.graph import Graph, GraphBuilder
from lrq_jax.networks.mobilenet import rounded

# Published name: (depth, w_0, w_a, w_m, group width), the paper's table 7 and facebook/pycls.
PARAMETERS = {
    "200mf": (13, 24, 36.44, 2.49, 8),
    "400mf": (22, 24, 24.48, 2.54, 16),
    "600mf": (16, 48, 36.97, 2.24, 24),
    "800mf": (16, 56, 35.73, 2.28, 16),
    "1.6gf": (18, 80, 34.01, 2.25, 24),
    "3.2gf": (25, 88, 26.31, 2.25, 48),
    "4.0gf": (23, 96, 38.65, 2.43, 40),
    "6.4gf": (17, 184, 60.83, 2.07, 56),
    "8.0gf": (23, 80, 49.56, 2.88, 120),
    "12gf": (19, 168, 73.36, 2.37, 112),
    "16gf": (22, 216, 55.59, 2.1, 128),
    "32gf": (23, 320, 69.86, 2.0, 168),
}


ROUNDINGS = ("nearest", "up")


def stages(size: str, rounding: str = "nearest") -> tuple[tuple[int, int, int], ...]:
    """`(features, blocks, group width)` of each stage.

    Raises:
      ValueError: a size that was not published, or an unknown rounding.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"found rounding {rounding!r}, expected one of {ROUNDINGS}")
    if size not in PARAMETERS:
        raise ValueError(f"found size {size!r}, expected one of {sorted(PARAMETERS)}")
    depth, initial, slope, factor, group = PARAMETERS[size]
    widths = []
    for block in range(depth):
        power = round(math.log((initial + slope * block) / initial) / math.log(factor))
        widths.append(round(initial * factor**power / 8) * 8)
    found = []
    for width in sorted(set(widths)):
        narrow = min(group, width)
        nearest = round(width / narrow) * narrow
        features = rounded(width, narrow) if rounding == "up" else nearest
        found.append((features, widths.count(width), narrow))
    return tuple(found)


def regnet_x(*, size: str = "600mf", rounding: str = "nearest", num_classes: int = 1000,
             input_shape: tuple[int, int, int] = (224, 224, 3)) -> Graph:  # fmt: skip
    """Graph of a RegNetX.

    Args:
      size: its published number of multiply-adds.
      rounding: how widths become multiples of their groups: to the `nearest` (the paper, timm,
        pytorchcv) or, half a group and more, `up` (torchvision; only its 400 MF differs).

    Raises:
      ValueError: a size that was not published, or an unknown rounding.
    """
    net = GraphBuilder(f"regnet_x_{size}", input_shape=input_shape)
    x = net.conv(net.image, 32, 3, strides=2, name="conv1")
    x = net.relu(net.batch_norm(x, name="bn1"), name="relu1")
    for stage, (features, blocks, group) in enumerate(stages(size, rounding), 1):
        for block in range(blocks):
            x = _block(net, x, features, 1 if block else 2, features // group,
                       prefix=f"stage{stage}_block{block}")  # fmt: skip
    net.dense(net.global_pool(x, name="pool"), num_classes, name="classifier")
    return net.build()


def _block(net: GraphBuilder, x: str, features: int, strides: int, groups: int, *,
           prefix: str) -> str:  # fmt: skip
    y = net.conv(x, features, 1, name=f"{prefix}_conv1")
    y = net.relu(net.batch_norm(y, name=f"{prefix}_bn1"), name=f"{prefix}_relu1")
    y = net.conv(y, features, 3, strides=strides, groups=groups, name=f"{prefix}_conv2")
    y = net.relu(net.batch_norm(y, name=f"{prefix}_bn2"), name=f"{prefix}_relu2")
    y = net.batch_norm(net.conv(y, features, 1, name=f"{prefix}_conv3"), name=f"{prefix}_bn3")
    if strides != 1 or net.shape(x) != net.shape(y):
        x = net.conv(x, features, 1, strides=strides, name=f"{prefix}_shortcut_conv")
        x = net.batch_norm(x, name=f"{prefix}_shortcut_bn")
    return net.relu(net.add(y, x, name=f"{prefix}_add"), name=f"{prefix}_relu3")
