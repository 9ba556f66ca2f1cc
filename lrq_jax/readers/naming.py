"""How published files name the layers of our networks: one table for each naming.

A rule reads "our layer name (a regular expression) -> module name in the file". `{stage}` and the
other named groups carry over; `{block_1}` is the group `block` counted from one instead of zero.
A further family is a further `Naming` in `NAMINGS`; nothing else has to change.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable

from lrq_jax.graph import Graph

_UNIT = r"stage(?P<stage>\d+)_block(?P<block>\d+)_"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
    """One way of naming layers.

    Attributes:
      name: what it is called in notes and errors.
      rules: (regular expression over our layer names, module name in the file).
      block: regular expression over file names, matched once for each block of a network;
        group 1 is the stage.
      propose: candidate architectures for the numbers of blocks of each stage; `detect_arch`
        keeps those whose names and shapes all fit.
    """

    name: str
    rules: tuple[tuple[str, str], ...]
    block: str
    propose: Callable[[tuple[int, ...]], Iterable[str]]

    def module(self, layer: str) -> str | None:
        """Name in the file of one of our layers, None where no rule knows it."""
        for pattern, template in self.rules:
            if match := re.fullmatch(pattern, layer):
                groups = match.groupdict()
                numbers = {key: int(value) for key, value in groups.items() if value.isdigit()}
                counted = {f"{key}_1": number + 1 for key, number in numbers.items()}
                return template.format(**groups, **counted)
        return None

    def knows(self, graph: Graph) -> bool:
        """Whether every layer with variables has a rule."""
        shapes = graph.variable_shapes()
        names = {name for collection in shapes.values() for name in collection}
        return all(self.module(name) is not None for name in names)

    def blocks(self, names: Iterable[str]) -> tuple[int, ...]:
        """Number of blocks of each stage, counted in a file's names."""
        stages = [int(m[1]) for name in names if (m := re.fullmatch(self.block, name))]
        return tuple(stages.count(stage) for stage in sorted(set(stages)))


def _cifar(*suffixes: str) -> Callable[[tuple[int, ...]], list[str]]:
    def propose(blocks: tuple[int, ...]) -> list[str]:
        if len(blocks) != 3 or len(set(blocks)) != 1:
            return []
        return [f"resnet{6 * blocks[0] + 2}_cifar{suffix}" for suffix in suffixes]

    return propose


_IMAGENET_DEPTHS = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"}


def _imagenet(blocks: tuple[int, ...]) -> list[str]:
    return [_IMAGENET_DEPTHS[blocks]] if blocks in _IMAGENET_DEPTHS else []


def _either(blocks: tuple[int, ...]) -> list[str]:
    return [*_imagenet(blocks), *_cifar("_b")(blocks)]


def _basic(shortcut: str, head: str) -> tuple[tuple[str, str], ...]:
    return (
        (r"(?P<layer>conv1|bn1)", "{layer}"),
        (_UNIT + r"(?P<layer>(conv|bn)[12])", "layer{stage}.{block}.{layer}"),
        (_UNIT + r"shortcut_conv", "layer{stage}.{block}." + shortcut + ".0"),
        (_UNIT + r"shortcut_bn", "layer{stage}.{block}." + shortcut + ".1"),
        (r"classifier", head),
    )


def _pytorchcv(stem: str) -> tuple[tuple[str, str], ...]:
    unit = "features.stage{stage}.unit{block_1}."
    return (
        (r"(?P<layer>conv|bn)1", f"features.init_block.{stem}{{layer}}"),
        (_UNIT + r"(?P<layer>conv|bn)(?P<index>[12])", unit + "body.conv{index}.{layer}"),
        (_UNIT + r"shortcut_(?P<layer>conv|bn)", unit + "identity_conv.{layer}"),
        (r"classifier", "output"),
    )


NAMINGS: tuple[Naming, ...] = (
    # akamaster/pytorch_resnet_cifar10 and those after it: option A has no shortcut parameters.
    Naming(
        name="akamaster",
        rules=_basic("shortcut", "linear"),
        block=r"layer(\d)\.\d+\.conv1\.weight",
        propose=_cifar("", "_b"),
    ),
    # torchvision, and chenyaofo/pytorch-cifar-models for CIFAR.
    Naming(
        name="torchvision",
        rules=_basic("downsample", "fc"),
        block=r"layer(\d)\.\d+\.conv1\.weight",
        propose=_either,
    ),
    Naming(
        name="pytorchcv CIFAR",
        rules=_pytorchcv(""),
        block=r"features\.stage(\d)\.unit\d+\.body\.conv1\.conv\.weight",
        propose=_cifar("_b"),
    ),
    Naming(
        name="pytorchcv",
        rules=_pytorchcv("conv."),
        block=r"features\.stage(\d)\.unit\d+\.body\.conv1\.conv\.weight",
        propose=_imagenet,
    ),
)
"""Every naming known, tried in this order."""
