"""DenseNet-BC (arXiv 1608.06993; torchvision's layout): batch norm before each convolution."""

from __future__ import annotations

from lrq_jax.graph import Graph, GraphBuilder

# depth: (growth rate, stem features, blocks of each stage)
_LAYOUTS = {
    121: (32, 64, (6, 12, 24, 16)),
    169: (32, 64, (6, 12, 32, 32)),
    201: (32, 64, (6, 12, 48, 32)),
    161: (48, 96, (6, 12, 36, 24)),
}
_BOTTLENECK = 4
"""Features of the 1x1 convolution for each one a block adds."""


def densenet(*, depth: int = 121, num_classes: int = 1000,
             input_shape: tuple[int, int, int] = (224, 224, 3)) -> Graph:  # fmt: skip
    """Graph of a DenseNet.

    Raises:
      ValueError: a depth that was not published.
    """
    if depth not in _LAYOUTS:
        raise ValueError(f"found depth {depth}, expected one of {sorted(_LAYOUTS)}")
    growth, stem, stages = _LAYOUTS[depth]
    net = GraphBuilder(f"densenet{depth}", input_shape=input_shape)
    x = net.conv(net.image, stem, 7, strides=2, name="conv1")
    x = net.relu(net.batch_norm(x, name="bn1"), name="relu1")
    x = net.max_pool(x, 3, strides=2, padding=1, name="maxpool")
    for stage, blocks in enumerate(stages, 1):
        for block in range(blocks):
            prefix = f"stage{stage}_block{block}"
            y = net.relu(net.batch_norm(x, name=f"{prefix}_bn1"), name=f"{prefix}_relu1")
            y = net.conv(y, _BOTTLENECK * growth, 1, name=f"{prefix}_conv1")
            y = net.relu(net.batch_norm(y, name=f"{prefix}_bn2"), name=f"{prefix}_relu2")
            y = net.conv(y, growth, 3, name=f"{prefix}_conv2")
            x = net.concat(x, y, name=f"{prefix}_concat")
        if stage < len(stages):
            prefix = f"transition{stage}"
            x = net.relu(net.batch_norm(x, name=f"{prefix}_bn"), name=f"{prefix}_relu")
            x = net.conv(x, net.shape(x)[2] // 2, 1, name=f"{prefix}_conv")
            x = net.avg_pool(x, 2, name=f"{prefix}_pool")
    x = net.relu(net.batch_norm(x, name="last_bn"), name="last_relu")
    net.dense(net.global_pool(x, name="pool"), num_classes, name="classifier")
    return net.build()
