"""lrq_jax.networks: the published architectures, by their published sizes and by their structure."""

import math
import re

import pytest

from lrq_jax.graph import graph_from_dict, graph_to_dict
from lrq_jax.graph import layers as L
from lrq_jax.networks import FAMILIES, build_network, list_networks
from lrq_jax.networks.cifar_resnet import cifar_resnet
from lrq_jax.networks.mobilenet import rounded
from lrq_jax.networks.resnet import resnet


@pytest.mark.parametrize("arch", list(FAMILIES))
def test_the_registrys_parameter_counts(arch):
    network = FAMILIES[arch]
    assert build_network(arch).num_parameters() == network.parameters
    assert build_network(arch).num_classes == network.num_classes


@pytest.mark.parametrize(
    ("arch", "settings", "parameters"),
    [
        # pytorchcv (shortcut B), 100 classes
        ("resnet20_cifar_b", {"num_classes": 100}, 278_324),
        # chenyaofo/pytorch-cifar-models' table
        ("vgg16_bn_cifar", {"hidden": (512, 512)}, 15_253_578),
        ("mobilenet_v2_cifar", {"width": 0.5, "num_classes": 100}, 815_780),
        # pytorchcv: biases left out, other widths, an expansion in the first block
        ("vgg11_bn", {"use_bias": False}, 132_866_088),
        ("mobilenet_v1", {"width": 0.25}, 470_072),
        ("mobilenet_v1", {"width": 0.5}, 1_331_592),
        ("mobilenet_v1", {"width": 0.75}, 2_585_560),
        # timm, torchvision and keras.applications: any width of MobileNetV2
        ("mobilenet_v2", {"width": 0.35}, 1_677_128),
        ("mobilenet_v2", {"width": 0.5}, 1_968_680),
        ("mobilenet_v2", {"width": 0.75}, 2_636_424),
        ("mobilenet_v2", {"width": 1.4}, 6_108_776),
    ],
)
def test_published_parameter_counts_of_other_settings(arch, settings, parameters):
    assert build_network(arch, **settings).num_parameters() == parameters


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
def test_every_network_is_a_sound_classifier(arch):
    graph, recipe = build_network(arch), FAMILIES[arch].recipe
    assert isinstance(graph.classifier, L.Dense)
    assert graph.classifier.use_bias
    assert len(graph.shapes[graph.features]) == 1
    assert graph_from_dict(graph_to_dict(graph)) == graph
    assert graph.input_shape == (recipe.size, recipe.size, 3)
    assert recipe.resize is None or recipe.resize > recipe.size
    assert build_network(arch, num_classes=7).num_classes == 7
    assert all(layer.affine for layer in graph.batch_norms)
    eps = 1e-3 if re.match(r"efficientnet_lite\d$|inception", arch) else 1e-5
    assert {layer.eps for layer in graph.batch_norms} == {eps}
    # Every convolution has a batch norm behind it or, in DenseNets, its input has.
    convs = [layer for layer in graph.weighted if isinstance(layer, L.Conv)]
    assert "densenet" in arch or len(convs) == len(graph.batch_norms)
    assert all(layer.use_bias == arch.startswith("vgg") for layer in convs)


@pytest.mark.parametrize("arch", [arch for arch in sorted(FAMILIES) if arch.startswith("resnet")])
def test_every_resnet_is_cut_between_its_blocks(arch):
    graph = build_network(arch)
    assert all(layer.padding == ((k // 2,) * 2,) * 2 for layer in graph.weighted
               if isinstance(layer, L.Conv) for k in layer.kernel_size)  # fmt: skip
    size = graph.input_shape[0]
    assert graph.shapes[graph.by_name["pool"].inputs[0]][:2] == ((8, 8) if size == 32 else (7, 7))
    # A residual block is a block: cut points stand behind each addition, none inside a branch.
    cuts = set(graph.block_outputs)
    for layer in graph.layers:
        if isinstance(layer, L.Add):
            assert layer.name in cuts
        if re.search(r"block\d+_(conv|bn|relu1|relu2_|slice|pad|shortcut)", layer.name):
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


@pytest.mark.parametrize(
    ("arch", "strided"),
    [("resnet50", "conv2"), ("resnet50_v1", "conv1"), ("resnet101", "conv2"), ("resnet101_v1", "conv1")],
)  # fmt: skip
def test_a_bottleneck_strides_in_its_3x3_or_in_its_first_1x1(arch, strided):
    graph = build_network(arch)
    found = {layer.name for layer in graph.weighted[1:-1] if layer.strides == (2, 2)}
    expected = {f"stage{s}_block0_{c}" for s in (2, 3, 4) for c in (strided, "shortcut_conv")}
    assert found == expected
    assert graph.shapes["stage4_block2_relu3"] == (7, 7, 2048)


def test_tensorflows_padding_is_asymmetric_where_stride_2_meets_an_even_size():
    graph = build_network("efficientnet_lite0")
    found = {
        (layer.kernel_size[0], graph.shapes[layer.inputs[0]][0]): layer.padding
        for layer in graph.weighted[:-1]
        if layer.strides == (2, 2)
    }
    assert found == {
        (3, 224): ((0, 1), (0, 1)), (3, 112): ((0, 1), (0, 1)), (5, 56): ((1, 2), (1, 2)),
        (3, 28): ((0, 1), (0, 1)), (5, 14): ((1, 2), (1, 2)),
    }  # fmt: skip
    symmetric = build_network("efficientnet_lite0", padding="same")
    assert {layer.padding for layer in symmetric.weighted[:1]} == {((1, 1), (1, 1))}


@pytest.mark.parametrize(
    ("arch", "sizes"),
    [
        ("mobilenet_v1", (112, 112, 56, 28, 14, 7)),
        ("mobilenet_v1_cifar", (32, 32, 16, 8, 4, 2)),
        ("mobilenet_v2", (112, 112, 56, 28, 14, 14, 7, 7)),
        ("mobilenet_v2_cifar", (32, 32, 32, 16, 8, 8, 4, 4)),
    ],
)
def test_strides_of_the_mobile_networks(arch, sizes):
    graph = build_network(arch)
    blocks = [f"stage{stage}_block0_project_bn" for stage in range(1, len(sizes))]
    assert tuple(graph.shapes[name][0] for name in ("stem_bn", *blocks)) == sizes


def test_channels_are_rounded_to_eights_never_down_by_more_than_a_tenth():
    pairs = {32 * 0.35: 16, 24 * 0.35: 8, 32 * 1.4: 48, 96 * 1.4: 136, 160 * 0.75: 120, 3: 8}
    assert {channels: rounded(channels) for channels in pairs} == pairs


def test_the_list_names_every_network_with_its_numbers():
    table = list_networks()
    for arch, network in FAMILIES.items():
        (line,) = (line for line in table.splitlines() if line.split()[0:1] == [arch])
        assert f"{network.parameters:,}" in line
        assert f"{network.recipe.size}x{network.recipe.size}" in line


@pytest.mark.parametrize("depth", [-4, 0, 1, 2, 9, 18, 21, 52])
def test_a_cifar_depth_must_be_6n_plus_2(depth):
    with pytest.raises(ValueError, match=rf"found depth {depth}, expected 6n\+2 such as 8"):
        cifar_resnet(depth=depth)


def test_other_refusals_name_what_is_known():
    with pytest.raises(ValueError, match="found depth 21, expected 6n"):
        build_network("resnet21_cifar")
    with pytest.raises(ValueError, match=r"found shortcut 'C', expected one of \('A', 'B'\)"):
        cifar_resnet(shortcut="C")
    with pytest.raises(ValueError, match=r"found depth 152, expected one of \[18, 34, 50, 101\]"):
        resnet(depth=152)
    for call, message in (
        (lambda: build_network("vgg16_bn", depth=12), r"found depth 12, expected one of \[11, 13"),
        (lambda: build_network("mobilenet_v1", strides="svhn"), "found strides 'svhn', expected"),
        (lambda: build_network("mobilenet_v2", strides="svhn"), "found strides 'svhn', expected"),
        (lambda: build_network("efficientnet_lite0", variant=9), "found variant 9, expected one"),
        (lambda: build_network("shufflenet_v2_x1_0", width=3), "found width 3, expected one of"),
        (lambda: build_network("regnet_x_600mf", size="1gf"), "found size '1gf', expected one of"),
        (lambda: build_network("regnet_x_600mf", rounding="x"), "found rounding 'x', expected one"),
        (lambda: build_network("densenet121", depth=1), "found depth 1, expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for arch in ("", "resnet", "resnet20", "resnet_cifar", "resnet20_cifar_c", "20_cifar",
                 "Resnet20_cifar", "resnet-20_cifar", "resnet18_cifar_b_b"):  # fmt: skip
        with pytest.raises(
            ValueError, match=f"found architecture '{arch}', expected one of .*'resnet20_cifar'"
        ):
            build_network(arch)
    with pytest.raises(TypeError, match="colour"):
        build_network("resnet20_cifar", colour="red")
