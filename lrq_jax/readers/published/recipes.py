"""How the makers of published files prepare images, found by naming, architecture and classes."""

from __future__ import annotations

import dataclasses
import re

from lrq_jax.networks import Recipe, find_network


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Preprocessing of the files of some namings, architectures and one number of classes.

    Attributes:
      naming, arch: regular expressions.
      num_classes: of the files.
      recipe: what they take; None takes that of the network's registry entry.
      text: where it comes from.
    """

    naming: str
    arch: str
    num_classes: int
    recipe: Recipe | None
    text: str


def _cifar(naming: str, arch: str, num_classes: int, mean: tuple[float, float, float],
           std: tuple[float, float, float], text: str) -> Source:  # fmt: skip
    recipe = Recipe(mean=mean, std=std, size=32)
    return Source(naming=naming, arch=arch, num_classes=num_classes, recipe=recipe, text=text)


def _timm(arch: str, size: int, resize: int, interpolation: str, *, half: bool = False) -> Source:
    """timm's evaluation: its `crop_pct` is `size / resize`; `half` normalises to [-1, 1]."""
    mean, std = ((0.5,) * 3,) * 2 if half else (_IMAGENET_MEAN, _IMAGENET_STD)
    recipe = Recipe(mean=mean, std=std, size=size, resize=resize, interpolation=interpolation)
    return Source(naming="timm", arch=arch, num_classes=1000, recipe=recipe, text="timm's settings")


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CIFAR10_MEAN, _CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_A, _B = r"resnet\d+_cifar", r"resnet\d+_cifar_b"
_FORGE = "Rehan000/forge-tta, whose names these are"
_PAPERS = "the zero-shot quantization papers' evaluation of pytorchcv's files"
_CHENYAOFO = "chenyaofo/pytorch-cifar-models, whose names these are"

SOURCES: tuple[Source, ...] = (
    _cifar("akamaster", _A, 10, _IMAGENET_MEAN, _IMAGENET_STD,
           "akamaster/pytorch_resnet_cifar10, which normalises CIFAR-10 with ImageNet's numbers"),
    _cifar("akamaster", _B, 10, _CIFAR10_MEAN, _CIFAR10_STD, _FORGE),
    _cifar("akamaster", _B, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), _FORGE),
    _cifar("forge", r".*", 10, _CIFAR10_MEAN, _CIFAR10_STD, _FORGE),
    # pytorchcv's own scripts divide by (.2023, .1994, .2010) for both data sets; the papers on
    # zero-shot quantization evaluate its files with the numbers below (GDFQ's data loader).
    _cifar("pytorchcv CIFAR", _B, 10, _CIFAR10_MEAN, _CIFAR10_STD, _PAPERS),
    _cifar("pytorchcv CIFAR", _B, 100, (0.5071, 0.4865, 0.4408), (0.2675, 0.2565, 0.2761), _PAPERS),
    _cifar("torchvision", r".*_cifar(_b)?", 10, _CIFAR10_MEAN, (0.2023, 0.1994, 0.2010), _CHENYAOFO),
    _cifar("torchvision", r".*_cifar(_b)?", 100, (0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761),
           _CHENYAOFO),
    _cifar("kuangliu", r".*", 10, _CIFAR10_MEAN, (0.2023, 0.1994, 0.2010),
           "kuangliu/pytorch-cifar, whose names these are"),
    # timm's configurations; its TensorFlow weights keep TensorFlow's normalisation in its words.
    _timm(r"efficientnet_lite0", 224, 256, "bicubic", half=True),
    _timm(r"efficientnet_lite1", 240, 272, "bicubic", half=True),
    _timm(r"efficientnet_lite2", 260, 292, "bicubic", half=True),
    _timm(r"efficientnet_lite0_timm|mobilenet_v2|regnet_x_.+", 224, 256, "bicubic"),
    _timm(r"mobilenet_v1", 224, 256, "bicubic", half=True),
    _timm(r"vgg\d+_bn", 224, 256, "bilinear"),
    Source(naming="EfficientNet-PyTorch", arch=r"efficientnet_lite\d", num_classes=1000,
           recipe=None, text="TensorFlow's efficientnet/lite, whose weights these are"),
    Source(naming="Retinaface", arch="mobilenet_v1", num_classes=1000, recipe=None,
           text="biubug6/Pytorch_Retinaface's MobileNet, with torchvision's ImageNet recipe"),
    # Its networks all take ImageNet's usual normalisation, Inception-v3 too.
    Source(naming="pytorchcv", arch="inception_v3", num_classes=1000, text="pytorchcv's settings",
           recipe=Recipe(mean=_IMAGENET_MEAN, std=_IMAGENET_STD, size=299, resize=342)),
    Source(naming="torchvision|pytorchcv", arch=r"(?!.*_cifar).*", num_classes=1000, recipe=None,
           text="{naming}'s ImageNet recipe"),
)  # fmt: skip
"""The first that fits counts."""


def find_recipe(naming: str, arch: str, num_classes: int) -> tuple[Recipe, str] | None:
    """The published preprocessing, and a phrase on where it comes from; None where unknown."""
    for source in SOURCES:
        if (
            source.num_classes == num_classes
            and re.fullmatch(source.naming, naming)
            and re.fullmatch(source.arch, arch)
        ):
            recipe = source.recipe or find_network(arch).recipe
            return recipe, source.text.format(naming=naming)
    return None
