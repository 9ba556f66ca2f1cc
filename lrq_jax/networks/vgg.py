"""VGG with batch norm (Simonyan and Zisserman, arXiv 1409.1556, configurations A, B, D, E)."""

from __future__ import annotations

from lrq_jax.graph import Graph, GraphBuilder

_CONVS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_FEATURES = (64, 128, 256, 512, 512)


def vgg_bn(*, depth: int = 16, hidden: tuple[int, ...] = (4096, 4096), use_bias: bool = True,
           num_classes: int = 1000, input_shape: tuple[int, int, int] = (224, 224, 3)) -> Graph:  # fmt: skip
    """Graph of a BN-VGG: five stages of 3x3 convolutions, each ended by a max pool, dense heads.

    Dropout, which does nothing at inference, is left out, and so is torchvision's average pool to
    7x7, which does nothing at its published size: the first dense layer reads the image as it is.

    Args:
      depth: 11, 13, 16 or 19.
      hidden: widths of the dense layers before the classifier; none in the CIFAR networks of
        kuangliu/pytorch-cifar.
      use_bias: whether convolutions have biases, which batch norm makes idle (torchvision's do).

    Raises:
      ValueError: a depth without a published layout.
    """
    if depth not in _CONVS:
        raise ValueError(f"found depth {depth}, expected one of {sorted(_CONVS)}")
    net = GraphBuilder(f"vgg{depth}_bn", input_shape=input_shape)
    x = net.image
    for stage, (convs, features) in enumerate(zip(_CONVS[depth], _FEATURES, strict=True), 1):
        for index in range(convs):
            name = f"stage{stage}_{{}}{index}"
            x = net.conv(x, features, 3, use_bias=use_bias, name=name.format("conv"))
            x = net.relu(net.batch_norm(x, name=name.format("bn")), name=name.format("relu"))
        x = net.max_pool(x, 2, name=f"stage{stage}_pool")
    x = net.flatten(x, name="flatten")
    for index, features in enumerate(hidden):
        x = net.relu(net.dense(x, features, name=f"dense{index}"), name=f"dense_relu{index}")
    net.dense(x, num_classes, name="classifier")
    return net.build()
