"""Graph builders of known networks, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lrq_jax.graph import Graph
from lrq_jax.networks.cifar_resnet import cifar_resnet
from lrq_jax.networks.resnet import resnet

FAMILIES: dict[str, tuple[Callable[..., Graph], dict[str, Any]]] = {
    **{
        f"resnet{depth}_cifar{suffix}": (cifar_resnet, {"depth": depth, "shortcut": shortcut})
        for depth in (8, 14, 20, 32, 44, 56, 110)
        for suffix, shortcut in (("", "A"), ("_b", "B"))
    },
    "resnet18": (resnet, {"depth": 18}),
    "resnet34": (resnet, {"depth": 34}),
}
"""Architecture name -> builder and its settings."""


def build_network(arch: str, **settings: Any) -> Graph:
    """Graph of a known architecture, e.g. `build_network("resnet20_cifar", num_classes=100)`.

    Args:
      arch: a key of `FAMILIES`; `resnetD_cifar` (shortcut A) and `resnetD_cifar_b` (shortcut B)
        take any depth D = 6n+2.
      **settings: passed to the family's builder (num_classes, input_shape, ...).

    Raises:
      ValueError: an unknown architecture, with the list of known ones.
    """
    if arch in FAMILIES:
        builder, defaults = FAMILIES[arch]
        return builder(**{**defaults, **settings})
    depth, _, family = arch.removeprefix("resnet").partition("_")
    if arch.startswith("resnet") and depth.isdigit() and family in ("cifar", "cifar_b"):
        shortcut = "B" if family == "cifar_b" else "A"
        return cifar_resnet(depth=int(depth), shortcut=shortcut, **settings)
    raise ValueError(f"found architecture {arch!r}, expected one of {sorted(FAMILIES)}")
