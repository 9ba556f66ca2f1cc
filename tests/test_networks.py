"""lrq_jax.networks: the published architectures, by their published sizes and by their structure."""

import math
import re

import pytest

from lrq_jax.graph import graph_from_dict, graph_to_dict
from lrq_jax.graph import layers as L
from lrq_jax.networks import FAMILIES, build_network
from lrq_jax.networks.cifar_resnet import cifar_resnet
from lrq_jax.networks.resnet import resnet


@pytest.mark.parametrize(
    ("arch", "classes", "parameters"),
    [
        # akamaster/pytorch_resnet_cifar10's table, exact (shortcut A)
        ("resnet20_cifar", 10, 269_722),
        ("resnet32_cifar", 10, 464_154),
        ("resnet44_cifar", 10, 658_586),
        ("resnet56_cifar", 10, 853_018),
        ("resnet110_cifar", 10, 1_727_962),
        # pytorchcv (shortcut B)
        ("resnet20_cifar_b", 10, 272_474),
        ("resnet20_cifar_b", 100, 278_324),
        ("resnet56_cifar_b", 10, 855_770),
        ("resnet110_cifar_b", 10, 1_730_714),
        # torchvision
        ("resnet18", 1000, 11_689_512),
        ("resnet34", 1000, 21_797_672),
    ],
)
def test_published_parameter_counts(arch, classes, parameters):
    assert build_network(arch, num_classes=classes).num_parameters() == parameters


def _naive_cifar_count(depth, shortcut, classes, width, channels):
    """Parameters from the paper's table 6, layer by layer."""
    blocks, count, before = (depth - 2) // 6, 9 * channels * width + 2 * width, width
    for features in (width, 2 * width, 4 * width):
        for _ in range(blocks):
            count += 9 * before * features + 9 * features * features + 4 * features
            if before != features and shortcut == "B":
                count += before * features + 2 * features
            before = features
    return count + before * classes + classes


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("depth", [8, 14, 26, 62])
def test_any_depth_width_and_image(depth, shortcut):
    arch = f"resnet{depth}_cifar" + ("_b" if shortcut == "B" else "")
    settings = {"num_classes": 7, "width": 5, "input_shape": (28, 20, 1)}
    graph = build_network(arch, **settings)
    assert graph.num_parameters() == _naive_cifar_count(depth, shortcut, 7, 5, 1)
    assert graph == cifar_resnet(depth=depth, shortcut=shortcut, **settings)
    assert graph.num_classes == 7
    assert graph.shapes[graph.by_name["pool"].inputs[0]] == (7, 5, 20)
    extra = 2 if shortcut == "B" else 0
    assert len(graph.weighted) == depth + extra
    assert len(graph.batch_norms) == depth - 1 + extra
    assert len(graph.by_name) == len(graph.layers)


@pytest.mark.parametrize("arch", sorted(FAMILIES))
def test_every_family_is_a_sound_classifier(arch):
    graph = build_network(arch)
    assert isinstance(graph.classifier, L.Dense)
    assert len(graph.shapes[graph.features]) == 1
    assert graph_from_dict(graph_to_dict(graph)) == graph
    assert all(layer.padding == ((k // 2,) * 2,) * 2 for layer in graph.weighted
               if isinstance(layer, L.Conv) for k in layer.kernel_size)  # fmt: skip
    assert all(layer.eps == 1e-5 and layer.affine for layer in graph.batch_norms)
    assert not any(layer.use_bias for layer in graph.weighted[:-1])
    assert graph.classifier.use_bias
    size = graph.input_shape[0]
    assert graph.shapes[graph.by_name["pool"].inputs[0]][:2] == ((8, 8) if size == 32 else (7, 7))
    # A residual block is a block: cut points stand behind each addition, none inside a branch.
    cuts = set(graph.block_outputs)
    for layer in graph.layers:
        if isinstance(layer, L.Add):
            assert layer.name in cuts
        if re.search(r"block\d+_(conv|bn|relu1|slice|pad|shortcut)", layer.name):
            assert layer.name not in cuts


def test_shortcut_a_takes_every_second_pixel_and_pads_half_the_channels_on_each_side():
    graph = build_network("resnet20_cifar")
    slices = [layer for layer in graph.layers if isinstance(layer, L.Slice)]
    pads = [layer for layer in graph.layers if isinstance(layer, L.Pad)]
    assert [layer.step for layer in slices] == [(2, 2, 1)] * 2
    assert [layer.channels for layer in pads] == [(8, 8), (16, 16)]
    assert {(layer.height, layer.width) for layer in pads} == {((0, 0), (0, 0))}
    odd = build_network("resnet8_cifar", width=3)
    assert [x.channels for x in odd.layers if isinstance(x, L.Pad)] == [(1, 2), (3, 3)]


def test_resnet18_layout_is_torchvisions():
    graph = build_network("resnet18")
    assert graph.input_shape == (224, 224, 3)
    stem, pool = graph.by_name["conv1"], graph.by_name["maxpool"]
    assert (stem.kernel_size, stem.strides, stem.features) == ((7, 7), (2, 2), 64)
    assert (pool.window, pool.strides, pool.padding) == ((3, 3), (2, 2), ((1, 1), (1, 1)))
    sizes = [graph.shapes[f"stage{s}_block1_relu2"] for s in (1, 2, 3, 4)]
    assert sizes == [(56, 56, 64), (28, 28, 128), (14, 14, 256), (7, 7, 512)]
    shortcuts = [layer for layer in graph.layers if layer.name.endswith("shortcut_conv")]
    assert [(c.strides, c.kernel_size) for c in shortcuts] == [((2, 2), (1, 1))] * 3
    assert all(graph.by_name[f"stage{s}_block0_conv1"].strides == (2, 2) for s in (2, 3, 4)), (
        "torchvision's basic block strides in its first convolution"
    )
    macs = sum(
        math.prod(graph.shapes[c.name]) * math.prod(c.kernel_size) * graph.shapes[c.inputs[0]][2]
        for c in graph.weighted[:-1]
    )
    assert round((macs + 512_000) / 1e9, 2) == 1.81, "torchvision's GFLOPs"


@pytest.mark.parametrize("depth", [-4, 0, 1, 2, 9, 18, 21, 52])
def test_a_cifar_depth_must_be_6n_plus_2(depth):
    with pytest.raises(ValueError, match=rf"found depth {depth}, expected 6n\+2 such as 8"):
        cifar_resnet(depth=depth)


def test_other_refusals_name_what_is_known():
    with pytest.raises(ValueError, match="found depth 21, expected 6n"):
        build_network("resnet21_cifar")
    with pytest.raises(ValueError, match=r"found shortcut 'C', expected one of \('A', 'B'\)"):
        cifar_resnet(shortcut="C")
    with pytest.raises(ValueError, match=r"found depth 50, expected one of \[18, 34\]"):
        resnet(depth=50)
    for arch in ("", "resnet", "resnet20", "resnet_cifar", "resnet20_cifar_c", "20_cifar",
                 "Resnet20_cifar", "resnet-20_cifar", "resnet18_cifar_b_b"):  # fmt: skip
        with pytest.raises(
            ValueError, match=f"found architecture '{arch}', expected one of .*'resnet20_cifar'"
        ):
            build_network(arch)
    with pytest.raises(TypeError, match="colour"):
        build_network("resnet20_cifar", colour="red")
