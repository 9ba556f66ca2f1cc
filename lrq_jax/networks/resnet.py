"""ImageNet ResNets (He et al., arXiv 1512.03385; torchvision's layout)."""

from __future__ import annotations

from lrq_jax.graph import Graph, GraphBuilder

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
_EXPANSION = 4
"""Output channels of a bottleneck for each of its inner ones."""


def resnet(*, depth: int = 18, stride_in_1x1: bool = False, num_classes: int = 1000,
           input_shape: tuple[int, int, int] = (224, 224, 3)) -> Graph:  # fmt: skip
    """Graph of a ResNet: 7x7 stem, max pool, four stages of basic or bottleneck blocks.

    Args:
      depth: 18 and 34 have basic blocks, 50 and 101 bottlenecks.
      stride_in_1x1: a bottleneck's stride is that of its first 1x1 convolution (v1, the paper)
        instead of its 3x3 (v1.5, torchvision and Nvidia).

    Raises:
      ValueError: a depth without a published layout.
    """
    if depth not in _BLOCKS:
        raise ValueError(f"found depth {depth}, expected one of {sorted(_BLOCKS)}")
    bottleneck = depth >= 50
    suffix = "_v1" if bottleneck and stride_in_1x1 else ""
    net = GraphBuilder(f"resnet{depth}{suffix}", input_shape=input_shape)
    x = net.conv(net.image, 64, 7, strides=2, name="conv1")
    x = net.relu(net.batch_norm(x, name="bn1"), name="relu1")
    x = net.max_pool(x, 3, strides=2, padding=1, name="maxpool")
    for stage, blocks in enumerate(_BLOCKS[depth]):
        features = 64 * 2**stage
        for block in range(blocks):
            strides = 2 if stage > 0 and block == 0 else 1
            plan: tuple[tuple[int, int, int], ...]
            if not bottleneck:
                plan = ((features, 3, strides), (features, 3, 1))
            else:
                first, second = (strides, 1) if stride_in_1x1 else (1, strides)
                plan = ((features, 1, first), (features, 3, second), (_EXPANSION * features, 1, 1))
            x = _block(net, x, plan, strides, prefix=f"stage{stage + 1}_block{block}")
    net.dense(net.global_pool(x, name="pool"), num_classes, name="classifier")
    return net.build()


def _block(net: GraphBuilder, x: str, plan: tuple[tuple[int, int, int], ...], strides: int, *,
           prefix: str) -> str:  # fmt: skip
    """A residual block of convolutions `(features, kernel size, strides)`."""
    y = x
    for index, (features, kernel_size, stride) in enumerate(plan, 1):
        y = net.conv(y, features, kernel_size, strides=stride, name=f"{prefix}_conv{index}")
        y = net.batch_norm(y, name=f"{prefix}_bn{index}")
        if index < len(plan):
            y = net.relu(y, name=f"{prefix}_relu{index}")
    # As published: the first block of each stage but a basic network's first has a projection.
    if net.shape(x) != net.shape(y):
        x = net.conv(x, plan[-1][0], 1, strides=strides, name=f"{prefix}_shortcut_conv")
        x = net.batch_norm(x, name=f"{prefix}_shortcut_bn")
    return net.relu(net.add(y, x, name=f"{prefix}_add"), name=f"{prefix}_relu{len(plan)}")
