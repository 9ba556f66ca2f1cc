"""ShuffleNetV2 (arXiv 1807.11164; torchvision's layout)."""

from __future__ import annotations

from lrq_jax.graph import Graph, GraphBuilder
from lrq_jax.networks.mobilenet import conv_bn

FEATURES = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}
"""Channels of the three stages and of the last convolution, for each width (the paper's table 5)."""

_BLOCKS = (4, 8, 4)


def shufflenet_v2(*, width: float = 1.0, features: tuple[int, ...] | None = None,
                  ceil_pool: bool = False, num_classes: int = 1000,
                  input_shape: tuple[int, int, int] = (224, 224, 3)) -> Graph:  # fmt: skip
    """Graph of a ShuffleNetV2: half the channels pass, half are convolved, then all are shuffled.

    Args:
      width: 0.5, 1, 1.5 or 2.
      features: channels of the three stages and the last convolution; None takes the paper's
        for the width.
      ceil_pool: the stem's max pool has no padding and rounds its size up (pytorchcv's
        `shufflenetv2`) instead of a padding of 1 on all sides (torchvision).

    Raises:
      ValueError: a width that was not published.
    """
    if features is None and width not in FEATURES:
        raise ValueError(f"found width {width}, expected one of {sorted(FEATURES)}")
    *stages, head = FEATURES[width] if features is None else features
    net = GraphBuilder(f"shufflenet_v2_x{width:g}", input_shape=input_shape)
    x = conv_bn(net, net.image, 24, 3, strides=2, prefix="stem", activation="relu")
    # What rounding up adds lies after the last row and column, where it never wins.
    rows, columns = ((0, (n - 3) % 2) for n in net.shape(x)[:2])
    x = net.max_pool(x, 3, strides=2, padding=(rows, columns) if ceil_pool else 1, name="maxpool")
    for stage, (channels, blocks) in enumerate(zip(stages, _BLOCKS, strict=True), 1):
        for block in range(blocks):
            x = _unit(net, x, channels // 2, downsample=block == 0,
                      prefix=f"stage{stage}_block{block}")  # fmt: skip
    x = conv_bn(net, x, head, 1, prefix="head", activation="relu")
    net.dense(net.global_pool(x, name="pool"), num_classes, name="classifier")
    return net.build()


def _unit(net: GraphBuilder, x: str, half: int, *, downsample: bool, prefix: str) -> str:
    strides, kept, y = (2, x, x) if downsample else (1, "", x)
    if downsample:
        channels = net.shape(x)[2]
        kept = conv_bn(net, x, channels, 3, strides=2, groups=channels,
                       prefix=f"{prefix}_shortcut_depthwise", activation=None)  # fmt: skip
        kept = conv_bn(net, kept, half, 1, prefix=f"{prefix}_shortcut_project", activation="relu")
    else:
        kept = net.slice(x, stop=(None, None, half), name=f"{prefix}_first_half")
        y = net.slice(x, start=(0, 0, half), name=f"{prefix}_second_half")
    y = conv_bn(net, y, half, 1, prefix=f"{prefix}_expand", activation="relu")
    y = conv_bn(net, y, half, 3, strides=strides, groups=half, prefix=f"{prefix}_depthwise",
                activation=None)  # fmt: skip
    y = conv_bn(net, y, half, 1, prefix=f"{prefix}_project", activation="relu")
    return net.channel_shuffle(net.concat(kept, y, name=f"{prefix}_concat"), 2,
                               name=f"{prefix}_shuffle")  # fmt: skip
