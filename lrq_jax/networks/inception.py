"""Inception-v3 (arXiv 1512.00567; torchvision's layout, without the auxiliary classifier).

A block is a table: the branches, each a row of convolutions `(features, kernel size, settings)`
or a pool; `"split"` ends a branch in a 1x3 and a 3x1 convolution side by side.
"""

from __future__ import annotations

from typing import Any

from lrq_jax.graph import Graph, GraphBuilder

Pair = tuple[int, int]
Row = tuple[Any, ...]
"""Convolutions `(features, kernel size, settings)`, and words for pools and splits."""

_EPS = 1e-3
_VALID = {"padding": 0}
_DOWN = {"strides": 2, "padding": 0}
_STEM: Row = (
    (32, 3, _DOWN),
    (32, 3, _VALID),
    (64, 3, {}),
    "max",
    (80, 1, {}),
    (192, 3, _VALID),
    "max",
)


def _stage1(pool: int) -> tuple[Row, ...]:
    return (
        ((64, 1, {}),),
        ((48, 1, {}), (64, 5, {})),
        ((64, 1, {}), (96, 3, {}), (96, 3, {})),
        ("average", (pool, 1, {})),
    )


def _stage2(narrow: int) -> tuple[Row, ...]:
    row, column = (1, 7), (7, 1)
    return (
        ((192, 1, {}),),
        ((narrow, 1, {}), (narrow, row, {}), (192, column, {})),
        ((narrow, 1, {}), (narrow, column, {}), (narrow, row, {}), (narrow, column, {}),
         (192, row, {})),
        ("average", (192, 1, {})),
    )  # fmt: skip


_STAGE3: tuple[Row, ...] = (
    ((320, 1, {}),),
    ((384, 1, {}), "split"),
    ((448, 1, {}), (384, 3, {}), "split"),
    ("average", (192, 1, {})),
)
_BLOCKS: tuple[tuple[tuple[Row, ...], ...], ...] = (
    (_stage1(32), _stage1(64), _stage1(64)),
    (
        (((384, 3, _DOWN),), ((64, 1, {}), (96, 3, {}), (96, 3, _DOWN)), ("max",)),
        _stage2(128), _stage2(160), _stage2(160), _stage2(192),
    ),
    (
        (((192, 1, {}), (320, 3, _DOWN)),
         ((192, 1, {}), (192, (1, 7), {}), (192, (7, 1), {}), (192, 3, _DOWN)), ("max",)),
        _STAGE3, _STAGE3,
    ),
)  # fmt: skip


def inception_v3(*, num_classes: int = 1000, input_shape: tuple[int, int, int] = (299, 299, 3)) -> Graph:  # fmt: skip
    """Graph of Inception-v3; inputs normalised to [-1, 1] (torchvision's `transform_input`)."""
    net = GraphBuilder("inception_v3", input_shape=input_shape)
    x = _row(net, net.image, _STEM, "stem")
    for stage, blocks in enumerate(_BLOCKS, 1):
        for block, branches in enumerate(blocks):
            prefix = f"stage{stage}_block{block}"
            made = [_row(net, x, row, f"{prefix}_branch{n}") for n, row in enumerate(branches, 1)]
            x = net.concat(*made, name=f"{prefix}_concat")
    net.dense(net.global_pool(x, name="pool"), num_classes, name="classifier")
    return net.build()


def _row(net: GraphBuilder, x: str, row: Row, prefix: str) -> str:
    """The output of one branch."""
    convs = pools = 0
    for part in row:
        if part == "split":
            sides = [
                _conv(net, x, 384, kernel_size, f"{prefix}_split{n}")
                for n, kernel_size in enumerate(((1, 3), (3, 1)), 1)
            ]
            return net.concat(*sides, name=f"{prefix}_concat")
        if isinstance(part, str):
            pools += 1
            name = f"{prefix}_pool{pools}"
            x = (
                net.max_pool(x, 3, strides=2, name=name)
                if part == "max"
                else net.avg_pool(x, 3, strides=1, padding=1, name=name)
            )
            continue
        convs += 1
        features, kernel_size, settings = part
        x = _conv(net, x, features, kernel_size, f"{prefix}_{convs}", **settings)
    return x


def _conv(net: GraphBuilder, x: str, features: int, kernel_size: int | Pair, prefix: str,
          **settings: Any) -> str:  # fmt: skip
    x = net.conv(x, features, kernel_size, name=f"{prefix}_conv", **settings)
    return net.relu(net.batch_norm(x, eps=_EPS, name=f"{prefix}_bn"), name=f"{prefix}_relu")
