"""Every published network by its name: builder, settings, and how its makers feed and count it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from lrq_jax.graph import Graph
from lrq_jax.networks.cifar_resnet import cifar_resnet
from lrq_jax.networks.densenet import densenet
from lrq_jax.networks.efficientnet_lite import efficientnet_lite
from lrq_jax.networks.inception import inception_v3
from lrq_jax.networks.mobilenet import mobilenet_v1, mobilenet_v2
from lrq_jax.networks.regnet import PARAMETERS as REGNETS
from lrq_jax.networks.regnet import regnet_x
from lrq_jax.networks.resnet import resnet
from lrq_jax.networks.shufflenet import shufflenet_v2
from lrq_jax.networks.vgg import vgg_bn

Triple = tuple[float, float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How images were prepared where a network's accuracy was measured.

    Attributes:
      mean, std: per channel, in units of pixels scaled to [0, 1].
      size: side of the square input, pixels.
      resize: shorter side before the centre crop to `size`; None where images have that size.
      interpolation: of the resize.
    """

    mean: Triple
    std: Triple
    size: int
    resize: int | None = None
    interpolation: str = "bilinear"


IMAGENET = Recipe(
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=224, resize=256
)  # fmt: skip
"""torchvision's first weights, pytorchcv, and most others after them."""

CIFAR10 = Recipe(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), size=32)
INCEPTION = Recipe(mean=(0.5,) * 3, std=(0.5,) * 3, size=299, resize=342)
"""torchvision's `transform_input` turns ImageNet's normalisation into this one."""


def lite_recipe(size: int) -> Recipe:
    """EfficientNet-Lite's: pixels `(x - 127) / 128`, a margin of 16 pixels on each side, bicubic
    (TensorFlow's `efficientnet/lite`)."""
    return Recipe(
        mean=(127 / 255,) * 3, std=(128 / 255,) * 3, size=size, resize=size + 32,
        interpolation="bicubic",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A published network.

    Attributes:
      family: name of its builder, which readers find names by.
      build: makes the graph.
      settings: passed to `build`.
      recipe: the published preprocessing.
      num_classes: of the published weights.
      parameters: number of trainable parameters as published, with those classes.
    """

    family: str
    build: Callable[..., Graph]
    settings: dict[str, Any]
    recipe: Recipe
    num_classes: int
    parameters: int


def _network(build: Callable[..., Graph], parameters: int, *, recipe: Recipe = IMAGENET,
             num_classes: int = 1000, **settings: Any) -> Network:  # fmt: skip
    size = recipe.size
    return Network(family=build.__name__, build=build, recipe=recipe, num_classes=num_classes,
                   settings={"input_shape": (size, size, 3), **settings},
                   parameters=parameters)  # fmt: skip


def _cifar(build: Callable[..., Graph], parameters: int, **settings: Any) -> Network:
    return _network(build, parameters, recipe=CIFAR10, num_classes=10, **settings)


_CIFAR_RESNETS = {  # depth: parameters with shortcut A (akamaster's table), with B (pytorchcv's)
    8: (75_290, 78_042),
    14: (172_506, 175_258),
    20: (269_722, 272_474),
    32: (464_154, 466_906),
    44: (658_586, 661_338),
    56: (853_018, 855_770),
    110: (1_727_962, 1_730_714),
}
_REGNET_COUNTS = {  # facebook/pycls and timm
    "200mf": 2_684_792, "400mf": 5_157_512, "600mf": 6_196_040, "800mf": 7_259_656,
    "1.6gf": 9_190_136, "3.2gf": 15_296_552, "4.0gf": 22_118_248, "6.4gf": 26_209_256,
    "8.0gf": 39_572_648, "12gf": 46_106_056, "16gf": 54_278_536, "32gf": 107_811_560,
}  # fmt: skip


def _regnet_name(size: str) -> str:
    """torchvision's name: `1.6gf` is `regnet_x_1_6gf`, `8.0gf` is `regnet_x_8gf`."""
    return f"regnet_x_{size.replace('.0', '').replace('.', '_')}"


FAMILIES: dict[str, Network] = {
    **{
        f"resnet{depth}_cifar{suffix}": _cifar(cifar_resnet, counts[index], depth=depth,
                                               shortcut=shortcut)
        for depth, counts in _CIFAR_RESNETS.items()
        for index, (suffix, shortcut) in enumerate((("", "A"), ("_b", "B")))
    },
    "resnet18": _network(resnet, 11_689_512, depth=18),
    "resnet34": _network(resnet, 21_797_672, depth=34),
    "resnet50": _network(resnet, 25_557_032, depth=50),
    "resnet50_v1": _network(resnet, 25_557_032, depth=50, stride_in_1x1=True),
    "resnet101": _network(resnet, 44_549_160, depth=101),
    "resnet101_v1": _network(resnet, 44_549_160, depth=101, stride_in_1x1=True),
    "vgg11_bn": _network(vgg_bn, 132_868_840, depth=11),
    "vgg13_bn": _network(vgg_bn, 133_053_736, depth=13),
    "vgg16_bn": _network(vgg_bn, 138_365_992, depth=16),
    "vgg19_bn": _network(vgg_bn, 143_678_248, depth=19),
    # kuangliu/pytorch-cifar: one dense layer
    "vgg11_bn_cifar": _cifar(vgg_bn, 9_231_114, depth=11, hidden=()),
    "vgg13_bn_cifar": _cifar(vgg_bn, 9_416_010, depth=13, hidden=()),
    "vgg16_bn_cifar": _cifar(vgg_bn, 14_728_266, depth=16, hidden=()),
    "vgg19_bn_cifar": _cifar(vgg_bn, 20_040_522, depth=19, hidden=()),
    "mobilenet_v1": _network(mobilenet_v1, 4_231_976),
    "mobilenet_v1_cifar": _cifar(mobilenet_v1, 3_217_226, strides="cifar"),
    "mobilenet_v2": _network(mobilenet_v2, 3_504_872),
    "mobilenet_v2_cifar": _cifar(mobilenet_v2, 2_236_682, strides="cifar"),
    **{
        f"efficientnet_lite{variant}": _network(
            efficientnet_lite, parameters, recipe=lite_recipe(size), variant=variant)
        for variant, size, parameters in (
            (0, 224, 4_652_008), (1, 240, 5_416_680), (2, 260, 6_092_072), (3, 280, 8_197_096),
            (4, 300, 13_006_568),
        )
    },
    # timm's own training of the first: PyTorch's padding, and another normalisation.
    "efficientnet_lite0_timm": _network(
        efficientnet_lite, 4_652_008, variant=0, padding="same", eps=1e-5,
        recipe=dataclasses.replace(IMAGENET, interpolation="bicubic")),
    **{
        f"shufflenet_v2_x{name}": _network(shufflenet_v2, parameters, width=width)
        for name, width, parameters in (
            ("0_5", 0.5, 1_366_792), ("1_0", 1.0, 2_278_604), ("1_5", 1.5, 3_503_624),
            ("2_0", 2.0, 7_393_996),
        )
    },
    **{
        _regnet_name(size): _network(regnet_x, _REGNET_COUNTS[size], size=size) for size in REGNETS
    },
    # torchvision's widths of this one size are rounded another way.
    "regnet_x_400mf_tv": _network(regnet_x, 5_495_976, size="400mf", rounding="up"),
    "inception_v3": _network(inception_v3, 23_834_568, recipe=INCEPTION),
    "densenet121": _network(densenet, 7_978_856, depth=121),
    "densenet161": _network(densenet, 28_681_000, depth=161),
    "densenet169": _network(densenet, 14_149_480, depth=169),
    "densenet201": _network(densenet, 20_013_928, depth=201),
}  # fmt: skip
"""Architecture name -> network."""


def build_network(arch: str, **settings: Any) -> Graph:
    """Graph of a known architecture, e.g. `build_network("resnet20_cifar", num_classes=100)`.

    Args:
      arch: a key of `FAMILIES`; `resnetD_cifar` (shortcut A) and `resnetD_cifar_b` (shortcut B)
        take any depth D = 6n+2.
      **settings: passed to the family's builder (num_classes, input_shape, width, ...).

    Raises:
      ValueError: an unknown architecture, with the list of known ones; settings it cannot have.
    """
    network = find_network(arch)
    return network.build(**{"num_classes": network.num_classes, **network.settings, **settings})


def find_network(arch: str) -> Network:
    """The network of a name; see `build_network`."""
    if arch in FAMILIES:
        return FAMILIES[arch]
    depth, _, kind = arch.removeprefix("resnet").partition("_")
    if arch.startswith("resnet") and depth.isdigit() and kind in ("cifar", "cifar_b"):
        shortcut = "B" if kind == "cifar_b" else "A"
        graph = cifar_resnet(depth=int(depth), shortcut=shortcut)
        return _cifar(cifar_resnet, graph.num_parameters(), depth=int(depth), shortcut=shortcut)
    raise ValueError(f"found architecture {arch!r}, expected one of {sorted(FAMILIES)}")


def list_networks() -> str:
    """A table of all networks: name, published parameters, input, classes, preprocessing."""
    rows = [("network", "parameters", "input", "classes", "resize", "mean", "std")]
    for arch, network in FAMILIES.items():
        how = network.recipe
        resize = "-" if how.resize is None else f"{how.resize} {how.interpolation}"
        mean, std = (",".join(f"{value:.4g}" for value in x) for x in (how.mean, how.std))
        rows.append((arch, f"{network.parameters:,}", f"{how.size}x{how.size}",
                     str(network.num_classes), resize, mean, std))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in rows]  # fmt: skip
    return "\n".join([*lines, "", "Also resnetD_cifar and resnetD_cifar_b of any depth D = 6n+2; "
                      "mobilenet_v1 and mobilenet_v2 of any width (found in the file)."])  # fmt: skip
