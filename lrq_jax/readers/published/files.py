"""Files that their hash tells apart where names cannot: which training, which strides.

torchvision puts the first digits of a file's SHA-256 in its name, pytorchcv those of its SHA-1.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """A file known by its hash.

    Attributes:
      origin: who published it.
      arch: the network in it.
      top1: its published ImageNet accuracy, percent.
      resize: shorter side before the crop where it is not the network's usual one.
    """

    origin: str
    arch: str
    top1: float
    resize: int | None = None


# SHA-256 -> (network, top-1 [, resize]). Of two files of one network the second is torchvision's
# newer training (IMAGENET1K_V2), which was measured with a resize to 232 pixels.
_TORCHVISION: dict[str, tuple[str, float] | tuple[str, float, int]] = {
    "f37072fd": ("resnet18", 69.758),
    "b627a593": ("resnet34", 73.314),
    "0676ba61": ("resnet50", 76.130),
    "11ad3fa6": ("resnet50", 80.858, 232),
    "63fe2227": ("resnet101", 77.374),
    "cd907fc2": ("resnet101", 81.886, 232),
    "6002323d": ("vgg11_bn", 70.370),
    "abd245e5": ("vgg13_bn", 71.586),
    "6c64b313": ("vgg16_bn", 73.360),
    "c79401a0": ("vgg19_bn", 74.218),
    "b0353104": ("mobilenet_v2", 71.878),
    "7ebf99e0": ("mobilenet_v2", 72.154, 232),
    "f707e7126e": ("shufflenet_v2_x0_5", 60.552),
    "5666bf0f80": ("shufflenet_v2_x1_0", 69.362),
    "3c479a10": ("shufflenet_v2_x1_5", 72.996, 232),
    "8be3c8ee": ("shufflenet_v2_x2_0", 76.230, 232),
    "adf1edd5": ("regnet_x_400mf_tv", 72.834),
    "62229a5f": ("regnet_x_400mf_tv", 74.864, 232),
    "ad17e45c": ("regnet_x_800mf", 75.212),
    "94a99ebd": ("regnet_x_800mf", 77.522, 232),
    "e3633e7f": ("regnet_x_1_6gf", 77.040),
    "a12f2b72": ("regnet_x_1_6gf", 79.668, 232),
    "f342aeae": ("regnet_x_3_2gf", 78.364),
    "7071aa85": ("regnet_x_3_2gf", 81.196, 232),
    "03ceed89": ("regnet_x_8gf", 79.344),
    "2b70d774": ("regnet_x_8gf", 81.682, 232),
    "2007eb11": ("regnet_x_16gf", 80.058),
    "ba3796d7": ("regnet_x_16gf", 82.716, 232),
    "9d47f8d0": ("regnet_x_32gf", 80.622),
    "6eb8fdc6": ("regnet_x_32gf", 83.014, 232),
    "0cc3c7bd": ("inception_v3", 77.294),
    "a639ec97": ("densenet121", 74.434),
    "8d451a50": ("densenet161", 77.138),
    "b2777c0a": ("densenet169", 75.600),
    "c1103571": ("densenet201", 76.896),
}

# SHA-1 -> (network, top-1), from pytorchcv's own tables. The two resnet18 are both in papers:
# figures over one must not be compared with figures over the other.
_PYTORCHCV: dict[str, tuple[str, float]] = {
    "0126861b4cd7f7b14196b1e01827da688f8bab6d": ("resnet18", 71.47),
    "77a56f155214819bfc79ff09795370f955b20e6d": ("resnet18", 73.06),
    "3f775482a327e5fc4850fbb77785bfc55e171e5f": ("resnet34", 75.16),
    "b00d1c8e52aa7a2badc705b1545aaf6ccece6ce9": ("resnet50_v1", 77.72),
    "8a5473ef985d65076a3758117ad5700d726bd952": ("resnet50", 77.61),
    "ab0cf005bbe9b17e53f9e3c330c6147a8c80b3a5": ("resnet101_v1", 78.10),
    "f059ba3c7fa4a65f2da6e17f3718662d59836637": ("resnet101", 79.41),
    # earlier trainings
    "828686d7": ("resnet50_v1", 77.04),
    "a53df64c": ("resnet50", 77.39),
    "9fbf0696": ("resnet101", 79.12),
}


def find_published(sha1: str, sha256: str) -> PublishedFile | None:
    """The published file with these hashes (hexadecimal digits), or None."""
    for origin, digest, table in (
        ("torchvision", sha256, _TORCHVISION),
        ("pytorchcv", sha1, _PYTORCHCV),
    ):
        for prefix, (arch, top1, *resize) in table.items():
            if digest.startswith(prefix):
                return PublishedFile(
                    origin=origin, arch=arch, top1=top1, resize=resize[0] if resize else None
                )
    return None
