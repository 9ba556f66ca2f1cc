"""CIFAR ResNets of depth 6n+2 (He et al., arXiv 1512.03385, section 4.2).

Three stages of n basic blocks with 16, 32, 64 channels. Shortcut A: stride-2 slice and zero
channels (half on each side, as in akamaster/pytorch_resnet_cifar10); shortcut B: 1x1
convolution and batch norm where the shape changes.
"""

from __future__ import annotations

from lrq_jax.graph import Graph, GraphBuilder

SHORTCUTS = ("A", "B")


def cifar_resnet(*, depth: int = 20, shortcut: str = "A", num_classes: int = 10,
                 input_shape: tuple[int, int, int] = (32, 32, 3), width: int = 16) -> Graph:  # fmt: skip
    """Graph of a CIFAR ResNet.

    Args:
      depth: 6n+2, e.g. 20, 32, 44, 56, 110.
      shortcut: `A` (no parameters) or `B` (1x1 convolution).
      num_classes: length of the logits.
      input_shape: `(H, W, C)` of one image.
      width: channels of the first stage; 16 in the paper.

    Raises:
      ValueError: a depth that is not 6n+2 or an unknown shortcut.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"found depth {depth}, expected 6n+2 such as 8, 14, 20, 32, 56 or 110")
    if shortcut not in SHORTCUTS:
        raise ValueError(f"found shortcut {shortcut!r}, expected one of {SHORTCUTS}")
    net = GraphBuilder(f"resnet{depth}_cifar", input_shape=input_shape)
    x = net.conv(net.image, width, 3, name="conv1")
    x = net.relu(net.batch_norm(x, name="bn1"), name="relu1")
    for stage in range(3):
        for block in range(blocks):
            strides = 2 if stage > 0 and block == 0 else 1
            x = _basic_block(net, x, width * 2**stage, strides, shortcut,
                             prefix=f"stage{stage + 1}_block{block}")  # fmt: skip
    net.dense(net.global_pool(x, name="pool"), num_classes, name="classifier")
    return net.build()


def _basic_block(net: GraphBuilder, x: str, features: int, strides: int, shortcut: str, *,
                 prefix: str) -> str:  # fmt: skip
    y = net.conv(x, features, 3, strides=strides, name=f"{prefix}_conv1")
    y = net.relu(net.batch_norm(y, name=f"{prefix}_bn1"), name=f"{prefix}_relu1")
    y = net.conv(y, features, 3, name=f"{prefix}_conv2")
    y = net.batch_norm(y, name=f"{prefix}_bn2")
    if net.shape(x) != net.shape(y) and shortcut == "A":
        x = net.slice(x, step=(strides, strides, 1), name=f"{prefix}_slice")
        missing = features - net.shape(x)[2]
        x = net.pad(x, channels=(missing // 2, missing - missing // 2), name=f"{prefix}_pad")
    elif net.shape(x) != net.shape(y):
        x = net.conv(x, features, 1, strides=strides, name=f"{prefix}_shortcut_conv")
        x = net.batch_norm(x, name=f"{prefix}_shortcut_bn")
    return net.relu(net.add(y, x, name=f"{prefix}_add"), name=f"{prefix}_relu2")
