"""ImageNet ResNets with basic blocks (He et al., arXiv 1512.03385; torchvision's layout)."""

from __future__ import annotations

from lrq_jax.graph import Graph, GraphBuilder

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def resnet(*, depth: int = 18, num_classes: int = 1000,
           input_shape: tuple[int, int, int] = (224, 224, 3)) -> Graph:  # fmt: skip
    """Graph of ResNet-18 or ResNet-34: 7x7 stem, max pool, four stages of basic blocks.

    Raises:
      ValueError: a depth without a published layout of basic blocks.
    """
    if depth not in _BLOCKS:
        raise ValueError(f"found depth {depth}, expected one of {sorted(_BLOCKS)}")
    net = GraphBuilder(f"resnet{depth}", input_shape=input_shape)
    x = net.conv(net.image, 64, 7, strides=2, name="conv1")
    x = net.relu(net.batch_norm(x, name="bn1"), name="relu1")
    x = net.max_pool(x, 3, strides=2, padding=1, name="maxpool")
    for stage, blocks in enumerate(_BLOCKS[depth]):
        for block in range(blocks):
            strides = 2 if stage > 0 and block == 0 else 1
            prefix, features = f"stage{stage + 1}_block{block}", 64 * 2**stage
            y = net.conv(x, features, 3, strides=strides, name=f"{prefix}_conv1")
            y = net.relu(net.batch_norm(y, name=f"{prefix}_bn1"), name=f"{prefix}_relu1")
            y = net.batch_norm(
                net.conv(y, features, 3, name=f"{prefix}_conv2"), name=f"{prefix}_bn2"
            )
            if net.shape(x) != net.shape(y):
                x = net.conv(x, features, 1, strides=strides, name=f"{prefix}_shortcut_conv")
                x = net.batch_norm(x, name=f"{prefix}_shortcut_bn")
            x = net.relu(net.add(y, x, name=f"{prefix}_add"), name=f"{prefix}_relu2")
    net.dense(net.global_pool(x, name="pool"), num_classes, name="classifier")
    return net.build()
