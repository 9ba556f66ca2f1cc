"""EfficientNet-Lite: EfficientNet (arXiv 1905.11946) without squeeze-and-excitation, with ReLU6.

Stem, head and the first and last stage keep their size at every scale (TensorFlow's
`efficientnet/lite`), so that only the middle grows.
"""

from __future__ import annotations

import math
from typing import Any

from lrq_jax.graph import Graph, GraphBuilder
from lrq_jax.networks.mobilenet import conv_bn, inverted_residual, rounded

# variant: (width, depth)
_SCALES = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2), 3: (1.2, 1.4), 4: (1.4, 1.8)}
# (kernel size, expansion, features, blocks, strides)
_STAGES = (
    (3, 1, 16, 1, 1), (3, 6, 24, 2, 2), (5, 6, 40, 2, 2), (3, 6, 80, 3, 2),
    (5, 6, 112, 3, 1), (5, 6, 192, 4, 2), (3, 6, 320, 1, 1),
)  # fmt: skip


def efficientnet_lite(*, variant: int = 0, padding: str = "tf_same", eps: float = 1e-3,
                      num_classes: int = 1000,
                      input_shape: tuple[int, int, int] = (224, 224, 3)) -> Graph:  # fmt: skip
    """Graph of an EfficientNet-Lite.

    Args:
      variant: 0 to 4.
      padding: `tf_same` (TensorFlow's, as published: asymmetric where stride 2 meets an even
        size) or `same` (symmetric: timm's own `efficientnet_lite0`).
      eps: of batch norm; timm's own `efficientnet_lite0` has 1e-5.

    Raises:
      ValueError: a variant that was not published.
    """
    if variant not in _SCALES:
        raise ValueError(f"found variant {variant}, expected one of {sorted(_SCALES)}")
    width, depth = _SCALES[variant]
    common: dict[str, Any] = {"activation": "relu6", "padding": padding, "eps": eps}
    net = GraphBuilder(f"efficientnet_lite{variant}", input_shape=input_shape)
    x = conv_bn(net, net.image, 32, 3, strides=2, prefix="stem", **common)
    for stage, (kernel_size, expansion, features, blocks, strides) in enumerate(_STAGES, 1):
        edge = stage in (1, len(_STAGES))
        for block in range(blocks if edge else math.ceil(depth * blocks)):
            x = inverted_residual(
                net, x, rounded(features * width), kernel_size, strides=1 if block else strides,
                expansion=expansion, prefix=f"stage{stage}_block{block}", **common,
            )  # fmt: skip
    x = conv_bn(net, x, 1280, 1, prefix="head", **common)
    net.dense(net.global_pool(x, name="pool"), num_classes, name="classifier")
    return net.build()
