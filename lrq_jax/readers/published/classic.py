"""Names of ResNet, RegNetX, VGG, DenseNet and Inception files."""

from __future__ import annotations

from lrq_jax.readers.naming import UNIT, Naming, Rules

CV_UNIT = "features.stage{stage}.unit{block+1}."
"""How pytorchcv names a block."""

# --- ResNets -------------------------------------------------------------------------------------


def _resnet(shortcut: str, head: str) -> Rules:
    return (
        (r"(?P<layer>conv1|bn1)", "{layer}"),
        (UNIT + r"(?P<layer>(conv|bn)\d)", "layer{stage}.{block}.{layer}"),
        (UNIT + r"shortcut_conv", "layer{stage}.{block}." + shortcut + ".0"),
        (UNIT + r"shortcut_bn", "layer{stage}.{block}." + shortcut + ".1"),
        (r"classifier", head),
    )


def _pytorchcv(stem: str) -> Rules:
    return (
        (r"(?P<layer>conv|bn)1", f"features.init_block.{stem}{{layer}}"),
        (UNIT + r"(?P<layer>conv|bn)(?P<index>\d)", CV_UNIT + "body.conv{index}.{layer}"),
        (UNIT + r"shortcut_(?P<layer>conv|bn)", CV_UNIT + "identity_conv.{layer}"),
        (r"classifier", "output"),
    )


_CIFAR_A, _CIFAR_B = r"resnet\d+_cifar", r"resnet\d+_cifar_b"
_BLOCK = "layer1.0.conv1.weight"
_CV_BODY = "features.stage1.unit1.body.conv1.conv.weight"

_RESNETS = (
    # akamaster/pytorch_resnet_cifar10 and those after it: option A has no shortcut parameters.
    Naming(name="akamaster", rules=_resnet("shortcut", "linear"), archs=rf"{_CIFAR_A}(_b)?",
           marks=(_BLOCK,)),
    # torchvision and timm, whose names are the same, and chenyaofo/pytorch-cifar-models for CIFAR.
    # Their bottlenecks stride in the 3x3.
    Naming(name="torchvision", rules=_resnet("downsample", "fc"),
           archs=rf"resnet(18|34|50|101)|{_CIFAR_B}", marks=(_BLOCK, "fc.weight")),
    Naming(name="pytorchcv CIFAR", rules=_pytorchcv(""), archs=_CIFAR_B,
           marks=(_CV_BODY, "features.init_block.conv.weight")),
    # Its `resnet50` strides in the first 1x1, its `resnet50b` in the 3x3, and names do not tell.
    Naming(name="pytorchcv", rules=_pytorchcv("conv."), archs=r"resnet\d+(_v1)?",
           marks=(_CV_BODY, "features.init_block.conv.conv.weight")),
)  # fmt: skip

# --- RegNetX -------------------------------------------------------------------------------------

_TV_TRUNK = "trunk_output.block{stage}.block{stage}-{block}."
_REGNETS = (
    Naming(
        name="torchvision",
        archs=r"regnet_x_.+",
        marks=("trunk_output.block1.block1-0.f.a.0.weight",),
        rules=(
            ("conv1", "stem.0"),
            ("bn1", "stem.1"),
            *(
                (UNIT + f"{kind}{index}", _TV_TRUNK + f"f.{letter}.{number}")
                for index, letter in enumerate("abc", 1)
                for number, kind in enumerate(("conv", "bn"))
            ),
            (UNIT + "shortcut_conv", _TV_TRUNK + "proj.0"),
            (UNIT + "shortcut_bn", _TV_TRUNK + "proj.1"),
            ("classifier", "fc"),
        ),
    ),
    Naming(
        name="timm",
        archs=r"regnet_x_.+",
        marks=("s1.b1.conv1.conv.weight",),
        rules=(
            (r"(?P<layer>conv|bn)1", "stem.{layer}"),
            (UNIT + r"(?P<layer>conv|bn)(?P<index>\d)", "s{stage}.b{block+1}.conv{index}.{layer}"),
            (UNIT + r"shortcut_(?P<layer>conv|bn)", "s{stage}.b{block+1}.downsample.{layer}"),
            ("classifier", "head.fc"),
        ),
    ),
    Naming(name="pytorchcv", archs=r"regnet_x_.+", rules=_pytorchcv(""),
           marks=(_CV_BODY, "features.init_block.conv.weight")),
)  # fmt: skip

# --- VGG -----------------------------------------------------------------------------------------

_VGG = r"vgg\d+_bn"
# Our layers stand where torchvision's Sequential has them: convolution, batch norm, ReLU, pool.
_SEQUENTIAL = ((r"stage\d+_(conv|bn)\d+", "features.{position}"),)
_THREE = ("classifier.0", "classifier.3", "classifier.6")


def _heads(first: str, second: str, last: str) -> Rules:
    return (("dense0", first), ("dense1", second), ("classifier", last))


_VGGS = (
    Naming(name="torchvision", archs=_VGG + "(_cifar)?", rules=(*_SEQUENTIAL, *_heads(*_THREE)),
           marks=("features.1.running_mean", "classifier.6.weight")),
    Naming(name="timm", archs=_VGG, marks=("features.1.running_mean", "pre_logits.fc1.weight"),
           rules=(*_SEQUENTIAL, *_heads("pre_logits.fc1", "pre_logits.fc2", "head.fc"))),
    Naming(name="kuangliu", archs=_VGG + "_cifar", rules=(*_SEQUENTIAL, ("classifier", "classifier")),
           marks=("features.1.running_mean", "classifier.weight")),
    Naming(
        name="pytorchcv",
        archs=_VGG,
        marks=("features.stage1.unit1.bn.running_mean", "output.fc3.weight"),
        rules=(
            (r"stage(?P<stage>\d+)_(?P<layer>conv|bn)(?P<index>\d+)",
             "features.stage{stage}.unit{index+1}.{layer}"),
            *_heads("output.fc1.fc", "output.fc2.fc", "output.fc3"),
        ),
    ),
)  # fmt: skip


# --- DenseNets -----------------------------------------------------------------------------------


def _densenet(index: str) -> Rules:
    layer = r"(?P<layer>conv)"
    return (
        ("conv1", "features.conv0"),
        ("bn1", "features.norm0"),
        (UNIT + r"bn(?P<index>\d)",
         f"features.denseblock{{stage}}.denselayer{{block+1}}.norm{index}{{index}}"),
        (UNIT + layer + r"(?P<index>\d)",
         f"features.denseblock{{stage}}.denselayer{{block+1}}.conv{index}{{index}}"),
        (r"transition(?P<stage>\d)_bn", "features.transition{stage}.norm"),
        (r"transition(?P<stage>\d)_conv", "features.transition{stage}.conv"),
        ("last_bn", "features.norm5"),
        ("classifier", "classifier"),
    )  # fmt: skip


_DENSE = r"densenet\d+"
_DENSENETS = (
    Naming(name="torchvision", archs=_DENSE, rules=_densenet(""),
           marks=("features.denseblock1.denselayer1.norm1.weight",)),
    # The files torchvision still serves: its loader rewrites their names.
    Naming(name="torchvision", archs=_DENSE, rules=_densenet("."),
           marks=("features.denseblock1.denselayer1.norm.1.weight",)),
    Naming(
        name="pytorchcv",
        archs=_DENSE,
        marks=("features.stage1.unit1.conv1.bn.weight", "features.post_activ.bn.weight"),
        rules=(
            (r"(?P<layer>conv|bn)1", "features.init_block.{layer}"),
            (UNIT + r"(?P<layer>conv|bn)(?P<index>\d)", CV_UNIT + "conv{index}.{layer}"),
            (r"transition(?P<stage>\d)_(?P<layer>conv|bn)",
             "features.stage{stage+1}.trans{stage+1}.conv.{layer}"),
            ("last_bn", "features.post_activ.bn"),
            ("classifier", "output"),
        ),
    ),
)  # fmt: skip

# --- Inception-v3 --------------------------------------------------------------------------------

_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_POOL = ("branch_pool",)
_FIRST = (("branch1x1",), ("branch5x5_1", "branch5x5_2"),
          ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"), _POOL)  # fmt: skip
_SECOND = (("branch1x1",), tuple(f"branch7x7_{n}" for n in (1, 2, 3)),
           tuple(f"branch7x7dbl_{n}" for n in (1, 2, 3, 4, 5)), _POOL)  # fmt: skip
_THIRD = (("branch1x1",), ("branch3x3_1",), ("branch3x3dbl_1", "branch3x3dbl_2"), _POOL)
_TV_BLOCKS = {  # torchvision's block, and the convolutions of each of its branches
    **{(1, block): (f"Mixed_5{letter}", _FIRST) for block, letter in enumerate("bcd")},
    (2, 0): ("Mixed_6a", (("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"))),
    **{(2, block): (f"Mixed_6{letter}", _SECOND) for block, letter in enumerate("bcde", 1)},
    (3, 0): ("Mixed_7a", (("branch3x3_1", "branch3x3_2"),
                          tuple(f"branch7x7x3_{n}" for n in (1, 2, 3, 4)))),
    **{(3, block): (f"Mixed_7{letter}", _THIRD) for block, letter in enumerate("bc", 1)},
}  # fmt: skip
_LAYER = r"_(?P<layer>conv|bn)"


def _inception_rules() -> Rules:
    rules = [(f"stem_{n}{_LAYER}", f"{module}.{{layer}}") for n, module in enumerate(_STEM, 1)]
    for (stage, block), (module, branches) in _TV_BLOCKS.items():
        for index, convs in enumerate(branches, 1):
            prefix = f"stage{stage}_block{block}_branch{index}"
            rules += [(f"{prefix}_{n}{_LAYER}", f"{module}.{conv}.{{layer}}")
                      for n, conv in enumerate(convs, 1)]  # fmt: skip
            # The two halves of a split follow the branch's last number: 2a and 2b, 3a and 3b.
            split = f"{convs[0].removesuffix('_1')}_{len(convs) + 1}"
            rules += [(f"{prefix}_split{n}{_LAYER}", f"{module}.{split}{letter}.{{layer}}")
                      for n, letter in enumerate("ab", 1)]  # fmt: skip
    return (*rules, ("classifier", "fc"))


_CV_BRANCH = CV_UNIT + "branches.branch{branch}."
_CV_ROW = r"branch(?P<branch>\d)_"
_INCEPTIONS = (
    Naming(name="torchvision", archs="inception_v3", rules=_inception_rules(),
           marks=("Mixed_5b.branch1x1.conv.weight",), ignored=r"AuxLogits\..*"),
    Naming(
        name="pytorchcv",
        archs="inception_v3",
        marks=("features.stage1.unit1.branches.branch1.conv.conv.weight",),
        rules=(
            (rf"stem_(?P<index>\d){_LAYER}", "features.init_block.conv{index}.{layer}"),
            # A branch of one convolution is no list, but where it shrinks the image.
            (r"stage(?P<stage>2)_block(?P<block>0)_" + rf"{_CV_ROW}(?P<index>\d){_LAYER}",
             _CV_BRANCH + "conv_list.conv{index}.{layer}"),
            *((UNIT + rf"branch(?P<branch>{branch})_1{_LAYER}", _CV_BRANCH + "conv.{layer}")
              for branch in (4,)),
            (r"stage(?P<stage>[12])_block(?P<block>\d)_" + rf"branch(?P<branch>1)_1{_LAYER}",
             _CV_BRANCH + "conv.{layer}"),
            (r"stage(?P<stage>3)_block(?P<block>[12])_" + rf"branch(?P<branch>1)_1{_LAYER}",
             _CV_BRANCH + "conv.{layer}"),
            (UNIT + rf"{_CV_ROW}(?P<index>\d){_LAYER}",
             _CV_BRANCH + "conv_list.conv{index}.{layer}"),
            (UNIT + rf"{_CV_ROW}split1{_LAYER}", _CV_BRANCH + "conv1x3.{layer}"),
            (UNIT + rf"{_CV_ROW}split2{_LAYER}", _CV_BRANCH + "conv3x1.{layer}"),
            ("classifier", "output.fc"),
        ),
    ),
)  # fmt: skip

CLASSIC = (*_RESNETS, *_REGNETS, *_VGGS, *_DENSENETS, *_INCEPTIONS)
