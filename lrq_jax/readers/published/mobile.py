"""Names of MobileNet, EfficientNet-Lite and ShuffleNet files."""

from __future__ import annotations

from collections.abc import Mapping

from lrq_jax.readers.naming import UNIT, Naming, Rules
from lrq_jax.readers.published.classic import CV_UNIT

# --- mobile networks -----------------------------------------------------------------------------

_V1, _V2, _LITE = r"mobilenet_v1", r"mobilenet_v2", r"efficientnet_lite\d"
_LAYER = r"(?P<layer>conv|bn)"
_PARTS = ("expand", "depthwise", "project")
_TIMM_UNIT = "blocks.{stage-1}.{block}."


def _sequential(unit: str, names: Mapping[str, tuple[str, str]]) -> Rules:
    """Rules of a unit whose parts (expand, depthwise, project) have a convolution and a batch norm."""
    return tuple(
        (UNIT + f"{part}_{kind}", unit + name)
        for part, pair in names.items()
        for kind, name in zip(("conv", "bn"), pair, strict=True)
    )


def _first(rules: Rules) -> Rules:
    """The rules of the first block alone, which has no expansion."""
    return tuple((pattern.replace(UNIT, r"stage1_block0_"), name.replace("{unit}", "0")
                  .replace("{unit+1}", "1").replace("{stage-1}.{block}", "0.0"))
                 for pattern, name in rules)  # fmt: skip


def _stem_head(stem: tuple[str, str], head: tuple[str, str], classifier: str) -> Rules:
    return (
        *zip(("stem_conv", "stem_bn"), stem, strict=True),
        *zip(("head_conv", "head_bn"), head, strict=True),
        ("classifier", classifier),
    )


_TIMM_STEM = _stem_head(("conv_stem", "bn1"), ("conv_head", "bn2"), "classifier")
_TIMM_SEPARABLE = {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}
_TIMM_V2 = (
    *_TIMM_STEM,
    *_first(_sequential(_TIMM_UNIT, _TIMM_SEPARABLE)),
    *_sequential(_TIMM_UNIT, {"expand": ("conv_pw", "bn1"), "depthwise": ("conv_dw", "bn2"),
                              "project": ("conv_pwl", "bn3")}),
)  # fmt: skip
_TIMM_MARKS = ("conv_stem.weight", "blocks.1.0.conv_pwl.weight")
_CV_MOBILE: Rules = (
    (rf"stem_{_LAYER}", "features.init_block.{layer}"),
    (rf"head_{_LAYER}", "features.final_block.{layer}"),
    ("classifier", "output"),
)
# pytorchcv's stages begin where the stride does: its fourth holds our fourth and fifth, its fifth
# our last two.
_CV_V2_UNITS = {r"stage5_block(?P<block>\d+)_": "features.stage4.unit{block+5}.",
                r"stage6_block(?P<block>\d+)_": "features.stage5.unit{block+1}.",
                r"stage7_block(?P<block>\d+)_": "features.stage5.unit{block+4}.",
                UNIT: CV_UNIT}  # fmt: skip
_CV_V2: Rules = (
    *_CV_MOBILE,
    *((ours + rf"{part}_{_LAYER}", f"{theirs}conv{index}.{{layer}}")
      for ours, theirs in _CV_V2_UNITS.items() for index, part in enumerate(_PARTS, 1)),
)  # fmt: skip
_CV_V2_MARK = "features.stage1.unit1.conv2.conv.weight"


def _conv_list(unit: str) -> Rules:
    """`conv.N` of every convolution, activation and batch norm in turn (forge)."""
    return (
        *_first(_sequential(unit, {"depthwise": ("0", "1"), "project": ("3", "4")})),
        *_sequential(unit, {"expand": ("0", "1"), "depthwise": ("3", "4"), "project": ("6", "7")}),
    )


_MOBILE = (
    Naming(
        name="torchvision",
        archs=_V2 + "(_cifar)?",
        marks=("features.0.0.weight", "features.1.conv.0.0.weight"),
        rules=(
            *_stem_head(("features.0.0", "features.0.1"), ("features.18.0", "features.18.1"),
                        "classifier.1"),
            *_first(_sequential("features.{unit+1}.conv.",
                                {"depthwise": ("0.0", "0.1"), "project": ("1", "2")})),
            *_sequential("features.{unit+1}.conv.", {"expand": ("0.0", "0.1"),
                         "depthwise": ("1.0", "1.1"), "project": ("2", "3")}),
        ),
    ),
    Naming(name="forge", archs=_V2 + "_cifar", marks=("stem.0.weight", "blocks.0.conv.0.weight"),
           rules=(*_stem_head(("stem.0", "stem.1"), ("head.0", "head.1"), "linear"),
                  *_conv_list("blocks.{unit}.conv."))),
    Naming(name="timm", archs=_V2, marks=_TIMM_MARKS, rules=_TIMM_V2),
    # timm's `tf_efficientnet_lite0` and `efficientnet_lite0` differ in padding and eps alone.
    Naming(name="timm", archs=rf"{_LITE}(_timm)?", marks=_TIMM_MARKS, rules=_TIMM_V2),
    Naming(
        name="EfficientNet-PyTorch",
        archs=_LITE,
        marks=("_conv_stem.weight", "_blocks.0._depthwise_conv.weight"),
        rules=(
            *_stem_head(("_conv_stem", "_bn0"), ("_conv_head", "_bn1"), "_fc"),
            *_sequential("_blocks.{unit}.", {"expand": ("_expand_conv", "_bn0"), "depthwise":
                         ("_depthwise_conv", "_bn1"), "project": ("_project_conv", "_bn2")}),
        ),
    ),
    Naming(name="pytorchcv", archs=_V2, marks=(_CV_V2_MARK,), rules=_CV_V2,
           settings={"classifier_bias": False, "divisor": 1}),
    Naming(name="pytorchcv", archs=_V2, rules=_CV_V2,
           settings={"expand_first": True, "classifier_bias": False, "divisor": 1},
           marks=(_CV_V2_MARK, "features.stage1.unit1.conv1.conv.weight")),
    Naming(
        name="pytorchcv",
        archs=_V1,
        marks=("features.stage1.unit1.dw_conv.conv.weight",),
        rules=(
            *_CV_MOBILE,
            (UNIT + rf"depthwise_{_LAYER}", CV_UNIT + "dw_conv.{layer}"),
            (UNIT + rf"project_{_LAYER}", CV_UNIT + "pw_conv.{layer}"),
        ),
    ),
    Naming(name="timm", archs=_V1, settings={"activation": "relu6"},
           marks=("conv_stem.weight", "blocks.1.0.conv_pw.weight", "blocks.0.0.conv_dw.weight"),
           rules=(*_TIMM_STEM, *_sequential(_TIMM_UNIT, _TIMM_SEPARABLE))),
    Naming(name="kuangliu", archs=_V1 + "_cifar", marks=("layers.0.conv2.weight", "linear.weight"),
           rules=(("stem_conv", "conv1"), ("stem_bn", "bn1"), ("classifier", "linear"),
                  *_sequential("layers.{unit}.", {"depthwise": ("conv1", "bn1"),
                                                  "project": ("conv2", "bn2")}))),
    # biubug6/Pytorch_Retinaface: the first three of our stages lie in its first.
    Naming(
        name="Retinaface",
        archs=_V1,
        marks=("stage1.0.0.weight", "stage3.0.0.weight"),
        rules=(
            ("stem_conv", "stage1.0.0"),
            ("stem_bn", "stage1.0.1"),
            ("classifier", "fc"),
            *((f"stage{stage}_block(?P<block>\\d)_{part}_{kind}", f"{unit}.{number}")
              for stage, unit in enumerate(("stage1.{block+1}", "stage1.{block+2}",
                                            "stage1.{block+4}", "stage2.{block}",
                                            "stage3.{block}"), 1)
              for part, numbers in (("depthwise", "01"), ("project", "34"))
              for kind, number in zip(("conv", "bn"), numbers, strict=True)),
        ),
    ),
)  # fmt: skip

# --- ShuffleNetV2 --------------------------------------------------------------------------------

_SHUFFLE = r"shufflenet_v2_x.+"
_SHUFFLE_PARTS = {
    "expand": ("branch2.0", "branch2.1"), "depthwise": ("branch2.3", "branch2.4"),
    "project": ("branch2.5", "branch2.6"), "shortcut_depthwise": ("branch1.0", "branch1.1"),
    "shortcut_project": ("branch1.2", "branch1.3"),
}  # fmt: skip
_CV_SHUFFLE_PARTS = {
    "expand": ("compress_conv1", "compress_bn1"), "depthwise": ("dw_conv2", "dw_bn2"),
    "project": ("expand_conv3", "expand_bn3"), "shortcut_depthwise": ("dw_conv4", "dw_bn4"),
    "shortcut_project": ("expand_conv5", "expand_bn5"),
}  # fmt: skip
_SHUFFLENETS = (
    Naming(
        name="torchvision",
        archs=_SHUFFLE,
        marks=("conv1.0.weight", "stage2.0.branch1.0.weight"),
        rules=(
            *_stem_head(("conv1.0", "conv1.1"), ("conv5.0", "conv5.1"), "fc"),
            *_sequential("stage{stage+1}.{block}.", _SHUFFLE_PARTS),
        ),
    ),
    Naming(
        name="pytorchcv",
        archs=_SHUFFLE,
        settings={"ceil_pool": True},
        marks=("features.stage1.unit1.compress_conv1.weight",),
        rules=(
            (rf"stem_{_LAYER}", "features.init_block.conv.{layer}"),
            *_CV_MOBILE[1:],
            *_sequential(CV_UNIT, _CV_SHUFFLE_PARTS),
        ),
    ),
)

MOBILE = (*_MOBILE, *_SHUFFLENETS)
