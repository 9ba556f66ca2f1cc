"""Names of published files without the packages that made them: spot checks, what a file may have
instead, what names cannot tell, what is known by a file's hash."""

import hashlib
import re

import numpy as np
import pytest
import safetensors.numpy

from lrq_jax.networks import FAMILIES, build_network
from lrq_jax.passes import float_logits
from lrq_jax.readers import ReaderError, convert_teacher
from lrq_jax.readers.detection import best_match, detect_match, fit_graph
from lrq_jax.readers.names import _entries, match_variables
from lrq_jax.readers.published import NAMINGS, files
from lrq_jax.readers.published.files import find_published
from lrq_jax.readers.published.recipes import SOURCES, find_recipe

# Names as the packages print them: our layer, its module in a file of the naming.
SPOT_CHECKS = {
    ("torchvision", "resnet50"): {
        "conv1": "conv1", "stage3_block5_bn3": "layer3.5.bn3", "classifier": "fc",
        "stage2_block0_shortcut_bn": "layer2.0.downsample.1"},
    ("torchvision", "regnet_x_600mf"): {
        "bn1": "stem.1", "stage4_block6_conv2": "trunk_output.block4.block4-6.f.b.0",
        "stage1_block0_shortcut_conv": "trunk_output.block1.block1-0.proj.0", "classifier": "fc"},
    ("timm", "regnet_x_600mf"): {
        "stage4_block6_bn1": "s4.b7.conv1.bn", "stage1_block0_shortcut_conv": "s1.b1.downsample.conv",
        "classifier": "head.fc"},
    ("torchvision", "vgg16_bn"): {
        "stage1_conv0": "features.0", "stage1_bn1": "features.4", "stage2_conv0": "features.7",
        "stage5_conv2": "features.40", "dense1": "classifier.3", "classifier": "classifier.6"},
    ("timm", "vgg16_bn"): {"dense0": "pre_logits.fc1", "classifier": "head.fc"},
    ("torchvision", "mobilenet_v2"): {
        "stem_conv": "features.0.0", "stage1_block0_depthwise_bn": "features.1.conv.0.1",
        "stage1_block0_project_conv": "features.1.conv.1",
        "stage7_block0_project_bn": "features.17.conv.3", "head_bn": "features.18.1",
        "classifier": "classifier.1"},
    ("forge", "mobilenet_v2_cifar"): {
        "stage1_block0_project_conv": "blocks.0.conv.3",
        "stage7_block0_project_bn": "blocks.16.conv.7", "head_bn": "head.1", "classifier": "linear"},
    ("timm", "efficientnet_lite2"): {
        "stem_bn": "bn1", "stage1_block0_project_conv": "blocks.0.0.conv_pw",
        "stage5_block3_expand_conv": "blocks.4.3.conv_pw",
        "stage5_block3_project_bn": "blocks.4.3.bn3", "head_conv": "conv_head"},
    ("EfficientNet-PyTorch", "efficientnet_lite0"): {
        "stage1_block0_depthwise_bn": "_blocks.0._bn1", "head_bn": "_bn1",
        "stage7_block0_expand_bn": "_blocks.15._bn0", "classifier": "_fc"},
    ("timm", "mobilenet_v1"): {
        "stage5_block1_project_conv": "blocks.4.1.conv_pw", "classifier": "classifier"},
    ("pytorchcv", "mobilenet_v1"): {"stage4_block5_depthwise_bn": "features.stage4.unit6.dw_conv.bn"},
    ("Retinaface", "mobilenet_v1"): {
        "stem_conv": "stage1.0.0", "stage1_block0_depthwise_conv": "stage1.1.0",
        "stage2_block1_project_bn": "stage1.3.4", "stage3_block1_project_conv": "stage1.5.3",
        "stage4_block0_depthwise_conv": "stage2.0.0", "stage5_block1_project_bn": "stage3.1.4"},
    ("pytorchcv", "mobilenet_v2"): {
        "stage5_block0_expand_conv": "features.stage4.unit5.conv1.conv",
        "stage7_block0_project_bn": "features.stage5.unit4.conv3.bn", "classifier": "output"},
    ("torchvision", "shufflenet_v2_x1_0"): {
        "stage1_block0_shortcut_project_conv": "stage2.0.branch1.2", "head_conv": "conv5.0",
        "stage3_block3_project_bn": "stage4.3.branch2.6"},
    ("torchvision", "densenet121"): {
        "bn1": "features.norm0", "stage4_block15_conv2": "features.denseblock4.denselayer16.conv2",
        "transition3_bn": "features.transition3.norm", "last_bn": "features.norm5"},
    ("pytorchcv", "densenet121"): {
        "transition1_bn": "features.stage2.trans2.conv.bn",
        "stage4_block15_conv2": "features.stage4.unit16.conv2.conv"},
    ("torchvision", "inception_v3"): {
        "stem_4_conv": "Conv2d_3b_1x1.conv", "stage1_block2_branch3_3_bn": "Mixed_5d.branch3x3dbl_3.bn",
        "stage2_block0_branch1_1_conv": "Mixed_6a.branch3x3.conv",
        "stage2_block4_branch3_5_conv": "Mixed_6e.branch7x7dbl_5.conv",
        "stage3_block0_branch2_4_bn": "Mixed_7a.branch7x7x3_4.bn",
        "stage3_block2_branch2_split1_conv": "Mixed_7c.branch3x3_2a.conv",
        "stage3_block1_branch3_split2_bn": "Mixed_7b.branch3x3dbl_3b.bn"},
    ("pytorchcv", "inception_v3"): {
        "stage3_block1_branch2_split2_conv": "features.stage3.unit2.branches.branch2.conv3x1.conv",
        "stage2_block0_branch1_1_bn": "features.stage2.unit1.branches.branch1.conv_list.conv1.bn"},
}  # fmt: skip


def namings_for(name, arch):
    graph = build_network(arch)
    found = [x for x in NAMINGS if x.name == name and re.fullmatch(x.archs, arch)]
    return [x for x in found if None not in x.modules(graph).values()]


def fake_state(arch, name, index=0, **settings):
    """Random arrays under a naming's names, in PyTorch's layouts."""
    naming = namings_for(name, arch)[index]
    rng = np.random.default_rng(0)
    graph = build_network(arch, **{**naming.settings, **settings})
    state = {}
    for entry in _entries(graph, naming):
        fan = max(1, int(np.prod(entry.shape[1:])))
        state[entry.name] = rng.standard_normal(entry.shape, np.float32) / np.float32(fan**0.5)
        if entry.variable in ("var", "scale"):
            state[entry.name] = np.abs(state[entry.name]) + 0.5
    return state


@pytest.mark.parametrize(("name", "arch"), SPOT_CHECKS)
def test_layers_have_the_names_of_the_packages(name, arch):
    found = namings_for(name, arch)[0].modules(build_network(arch))
    expected = SPOT_CHECKS[name, arch]
    assert {layer: found[layer] for layer in expected} == expected


def test_pytorchcvs_two_mobilenet_v2_differ_in_their_first_block():
    """`mobilenetv2` expands 32 channels to 32 there, `mobilenetv2b` and all others do not."""
    arch, first = "mobilenet_v2", "features.stage1.unit1.conv1.conv.weight"
    plain, expanding = (fake_state(arch, "pytorchcv", index) for index in (0, 1))
    assert (first in plain, first in expanding) == (False, True)
    assert expanding[first].shape == (32, 32, 1, 1)
    assert "output.bias" not in plain
    assert detect_match(plain).settings.get("expand_first") is None
    assert detect_match(expanding).settings["expand_first"]


def test_every_network_has_a_naming_and_every_naming_one_name_for_each_layer():
    for arch in FAMILIES:
        graph = build_network(arch)
        fitting = [x for x in NAMINGS if re.fullmatch(x.archs, arch)]
        assert fitting, arch
        for naming in fitting:
            modules = naming.modules(build_network(arch, **naming.settings))
            assert None not in modules.values(), (naming.name, arch)
            assert len(set(modules.values())) == len(modules)
        assert graph.num_classes in (10, 1000)


DECIDED = [
    ("torchvision", "mobilenet_v2", {"width": 0.75}),
    ("torchvision", "mobilenet_v2", {"width": 1.4}),
    ("forge", "mobilenet_v2_cifar", {"num_classes": 100}),
    ("timm", "efficientnet_lite1", {"num_classes": 5}),
    ("EfficientNet-PyTorch", "efficientnet_lite0", {}),
    ("timm", "mobilenet_v1", {"width": 0.5}),
    ("Retinaface", "mobilenet_v1", {"width": 0.25}),
    ("torchvision", "shufflenet_v2_x0_5", {"num_classes": 3}),
    ("pytorchcv", "shufflenet_v2_x1_0", {"features": (24, 48, 96, 128)}),
    ("kuangliu", "vgg11_bn_cifar", {}),
    ("kuangliu", "mobilenet_v1_cifar", {}),
    ("torchvision", "vgg13_bn_cifar", {"hidden": (32, 16), "num_classes": 100}),
    ("timm", "regnet_x_200mf", {}),
    ("pytorchcv", "mobilenet_v2", {"width": 0.25}),
]


@pytest.mark.parametrize(("name", "arch", "settings"), DECIDED)
def test_names_and_shapes_decide_network_and_settings(name, arch, settings):
    state = fake_state(arch, name, **settings)
    match = detect_match(state)
    assert match.arch == arch
    assert match.naming.name == name
    naming = namings_for(name, arch)[0]
    wanted = build_network(arch, **{**naming.settings, **settings})
    assert build_network(arch, **match.settings) == wanted
    variables = match_variables(match.graph, state, namings=(match.naming,))
    used = sum(len(leaves) for layers in variables.values() for leaves in layers.values())
    assert used == len(state)


@pytest.mark.parametrize(
    ("name", "arch", "settings", "both"),
    [
        # strides, paddings and eps leave no trace
        ("torchvision", "mobilenet_v2", {"num_classes": 10}, "mobilenet_v2', 'mobilenet_v2_cifar"),
        ("timm", "efficientnet_lite0", {}, "efficientnet_lite0', 'efficientnet_lite0_timm"),
    ],
)
def test_what_names_do_not_decide_is_not_chosen(name, arch, settings, both):
    with pytest.raises(ReaderError, match=rf"\['{both}'\], expected one: choose with --arch"):
        detect_match(fake_state(arch, name, **settings))


def test_a_thousand_classes_are_imagenets():
    assert detect_match(fake_state("mobilenet_v2", "torchvision")).arch == "mobilenet_v2"
    assert best_match("mobilenet_v2_cifar", fake_state("mobilenet_v2", "torchvision")).lines == []


def test_arrays_of_one_shape_are_never_exchanged():
    """In a bottleneck's first block the last 1x1 and the projection have one shape."""
    state = fake_state("resnet50", "torchvision")
    third, projection = "layer1.0.conv3.weight", "layer1.0.downsample.0.weight"
    assert state[third].shape == state[projection].shape
    shuffled = dict(sorted(state.items(), reverse=True))
    graph = build_network("resnet50")
    params = match_variables(graph, shuffled)["params"]
    assert params["stage1_block0_conv3"]["kernel"][0, 0, 5, 7] == state[third][7, 5, 0, 0]
    assert params["stage1_block0_shortcut_conv"]["kernel"][0, 0, 5, 7] == state[projection][7, 5, 0, 0]  # fmt: skip
    renamed = {name.replace("layer1.0.conv3", "layer1.0.conv4"): a for name, a in state.items()}
    with pytest.raises(ReaderError, match="found no architecture of ours in the file"):
        detect_match(renamed)


def test_a_convolution_over_the_whole_image_is_read_as_a_dense_layer():
    """timm's VGG: 7x7 weights in the order of PyTorch's flattening."""
    settings = {"hidden": (6, 5), "num_classes": 4, "input_shape": (64, 64, 3)}
    state = fake_state("vgg11_bn", "timm", **settings)
    flat = state["pre_logits.fc1.weight"]
    state["pre_logits.fc1.weight"] = flat.reshape(6, 512, 2, 2)
    state["pre_logits.fc2.weight"] = state["pre_logits.fc2.weight"][:, :, None, None]
    graph = build_network("vgg11_bn", **settings)
    kernel = match_variables(graph, state)["params"]["dense0"]["kernel"]
    image = np.random.default_rng(1).standard_normal((512, 2, 2)).astype(np.float32)
    np.testing.assert_allclose(
        image.transpose(1, 2, 0).ravel() @ kernel, flat @ image.ravel(), rtol=1e-4, atol=1e-4
    )


def test_auxiliary_classifiers_and_names_of_old_densenets():
    state = fake_state("densenet121", "torchvision", 1)
    assert "features.denseblock2.denselayer3.norm.2.running_var" in state
    assert detect_match(state).arch == "densenet121"
    state = fake_state("inception_v3", "torchvision", num_classes=1000)
    auxiliary = {"AuxLogits.fc.weight": np.ones((1000, 768), np.float32)}
    assert detect_match(state | auxiliary).arch == "inception_v3"
    with pytest.raises(ReaderError, match=r"in the file only: 'Aux\.fc\.weight'"):
        detect_match(state | {"Aux.fc.weight": np.ones((1000, 768), np.float32)})


# --- what a file may have instead ----------------------------------------------------------------


def logits(state, images, arch="resnet8_cifar_b", **changes):
    match = detect_match(state)
    assert match.arch == arch
    graph, notes = fit_graph(build_network(arch, **match.settings), match.naming, state)
    variables = match_variables(graph, state, namings=(match.naming,))
    return np.asarray(float_logits(graph, variables, images)), notes


@pytest.fixture
def images():
    return np.random.default_rng(5).standard_normal((2, 32, 32, 3)).astype(np.float32)


def convolutions(state):
    return [name.removesuffix(".weight") for name, array in state.items() if array.ndim == 4]


def norm_behind(conv):
    head, _, last = conv.rpartition(".")
    return conv.replace("conv", "bn") if "conv" in last else f"{head}.1"


def test_biases_before_batch_norms_move_their_means(images):
    plain = fake_state("resnet8_cifar_b", "akamaster")
    biased, moved = dict(plain), dict(plain)
    rng = np.random.default_rng(2)
    for conv in convolutions(plain):
        bias = rng.standard_normal(plain[f"{conv}.weight"].shape[0]).astype(np.float32)
        mean = f"{norm_behind(conv)}.running_mean"
        biased[f"{conv}.bias"], moved[mean] = bias, plain[mean] - bias
    ours, notes = logits(biased, images)
    np.testing.assert_allclose(ours, logits(moved, images)[0], rtol=1e-3, atol=1e-4)
    assert np.abs(ours - logits(plain, images)[0]).max() > 0.01
    assert notes == ("its 9 convolutions have biases",)
    del biased["conv1.bias"]
    with pytest.raises(ReaderError, match="found no architecture"):
        detect_match(biased)


def test_batch_norms_without_scale_and_offset(images):
    bare = fake_state("resnet8_cifar_b", "akamaster")
    neutral = dict(bare)
    for conv in convolutions(bare):
        norm = norm_behind(conv)
        neutral[f"{norm}.weight"] = np.ones_like(bare.pop(f"{norm}.weight"))
        neutral[f"{norm}.bias"] = np.zeros_like(bare.pop(f"{norm}.bias"))
    ours, notes = logits(bare, images)
    np.testing.assert_allclose(ours, logits(neutral, images)[0], rtol=1e-5, atol=1e-5)
    assert notes == ("its 9 batch norms have no scale and offset",)
    bare["bn1.weight"] = np.ones(16, np.float32)
    with pytest.raises(ReaderError, match=r"missing in the file: 'bn1\.bias'"):
        detect_match(bare)


def saved(state, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(safetensors.numpy.save({n: np.ascontiguousarray(a) for n, a in state.items()}))
    return path


def test_one_channel_inputs(tmp_path, images):
    grey = fake_state("resnet8_cifar_b", "akamaster", input_shape=(32, 32, 1))
    coloured = grey | {"conv1.weight": np.repeat(grey["conv1.weight"], 3, axis=1) / 3}
    path = saved(grey, tmp_path)
    teacher = convert_teacher(path, mean=(0.5,), std=(0.25,))
    assert teacher.graph.input_shape == (32, 32, 1)
    assert teacher.preprocessing.channels == 1
    ours = np.asarray(float_logits(teacher.graph, teacher.variables, images[..., :1]))
    theirs, _ = logits(coloured, np.repeat(images[..., :1], 3, axis=-1))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(ReaderError, match=r"no published normalisation .*--mean VALUE --std VALUE"):
        convert_teacher(path)


def test_another_eps_is_as_more_variance(tmp_path, images):
    state = fake_state("resnet8_cifar_b", "akamaster")
    wider = {n: a + np.float32(0.25 - 1e-5) if n.endswith("running_var") else a for n, a in state.items()}  # fmt: skip
    teacher = convert_teacher(saved(state, tmp_path), bn_eps=0.25)
    assert {layer.eps for layer in teacher.graph.batch_norms} == {0.25}
    assert "eps of every batch norm: 0.25, as given" in teacher.notes
    ours = np.asarray(float_logits(teacher.graph, teacher.variables, images))
    np.testing.assert_allclose(ours, logits(wider, images)[0], rtol=1e-4, atol=1e-5)


def test_tensorflows_padding_begins_at_the_first_pixel(naive_conv2d):
    """Stride 2 on an even size: windows at 0, 2, 4, ..., the last one over the lower edge."""
    graph = build_network("efficientnet_lite0", input_shape=(8, 8, 3))
    image = np.random.default_rng(3).standard_normal((1, 8, 8, 3)).astype(np.float32)
    kernel = np.random.default_rng(4).standard_normal((3, 3, 3, 32)).astype(np.float32)
    below = np.pad(image, ((0, 0), (0, 1), (0, 1), (0, 0)))
    expected = naive_conv2d(below, kernel, strides=(2, 2))
    stem = graph.by_name["stem_conv"]
    found = naive_conv2d(image, kernel, strides=stem.strides, padding=stem.padding)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# --- known by their hash -------------------------------------------------------------------------


def test_the_two_resnet18_of_pytorchcv_are_told_apart():
    earlier = find_published("0126861b4cd7f7b14196b1e01827da688f8bab6d", "0" * 64)
    later = find_published("77a56f155214819bfc79ff09795370f955b20e6d", "0" * 64)
    assert [(x.origin, x.arch, x.top1) for x in (earlier, later)] == [
        ("pytorchcv", "resnet18", 71.47), ("pytorchcv", "resnet18", 73.06)]  # fmt: skip
    assert find_published("0" * 40, "11ad3fa6" + "0" * 56).resize == 232
    assert find_published("0" * 40, "0" * 64) is None


def test_tables_of_hashes_name_networks_of_ours():
    for table in (files._TORCHVISION, files._PYTORCHCV):
        for prefix, (arch, top1, *_) in table.items():
            assert re.fullmatch(r"[0-9a-f]{8,40}", prefix)
            assert arch in FAMILIES
            assert 50 < top1 < 90


def test_a_known_hash_decides_network_and_preprocessing(tmp_path, monkeypatch):
    path = saved(fake_state("shufflenet_v2_x0_5", "torchvision"), tmp_path)
    plain = convert_teacher(path)
    assert (plain.preprocessing.resize, plain.arch) == (256, "shufflenet_v2_x0_5")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(files._TORCHVISION, digest[:8], ("shufflenet_v2_x0_5", 60.5, 232))
    teacher = convert_teacher(path)
    assert teacher.preprocessing.resize == 232
    assert any("torchvision's shufflenet_v2_x0_5 with 60.50 % top-1" in x for x in teacher.notes)
    assert any("resized to 232 as this file was measured" in note for note in teacher.notes)
    monkeypatch.setitem(files._TORCHVISION, digest[:8], ("shufflenet_v2_x1_0", 60.5))
    with pytest.raises(ReaderError, match="differences between the file"):
        convert_teacher(path)


# --- preprocessing -------------------------------------------------------------------------------

HALF, IMAGENET = ((0.5,) * 3,) * 2, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LITE = ((127 / 255,) * 3, (128 / 255,) * 3)


@pytest.mark.parametrize(
    ("naming", "arch", "normalisation", "size", "resize", "interpolation"),
    [
        ("torchvision", "resnet50", IMAGENET, 224, 256, "bilinear"),
        ("torchvision", "inception_v3", HALF, 299, 342, "bilinear"),
        ("pytorchcv", "resnet18", IMAGENET, 224, 256, "bilinear"),
        ("pytorchcv", "inception_v3", IMAGENET, 299, 342, "bilinear"),
        ("EfficientNet-PyTorch", "efficientnet_lite0", LITE, 224, 256, "bicubic"),
        ("EfficientNet-PyTorch", "efficientnet_lite2", LITE, 260, 292, "bicubic"),
        ("timm", "efficientnet_lite1", HALF, 240, 272, "bicubic"),
        ("timm", "efficientnet_lite0_timm", IMAGENET, 224, 256, "bicubic"),
        ("timm", "mobilenet_v2", IMAGENET, 224, 256, "bicubic"),
        ("timm", "vgg16_bn", IMAGENET, 224, 256, "bilinear"),
        ("Retinaface", "mobilenet_v1", IMAGENET, 224, 256, "bilinear"),
    ],
)
def test_preprocessing_as_published(naming, arch, normalisation, size, resize, interpolation):
    recipe, text = find_recipe(naming, arch, 1000)
    assert (recipe.mean, recipe.std) == normalisation
    assert (recipe.size, recipe.resize, recipe.interpolation) == (size, resize, interpolation)
    assert "{" not in text
    assert find_recipe(naming, arch, 7) is None


def test_a_recipe_of_1000_classes_has_the_size_of_its_network():
    for arch, network in FAMILIES.items():
        for source in SOURCES:
            if source.num_classes == 1000 and source.recipe and re.fullmatch(source.arch, arch):
                assert source.recipe.size == network.recipe.size


def test_what_the_user_says_replaces_what_is_published(tmp_path):
    path = saved(fake_state("shufflenet_v2_x0_5", "torchvision"), tmp_path)
    how = convert_teacher(path, resize=300, interpolation="bicubic", size=192).preprocessing
    assert (how.size, how.resize, how.interpolation) == (192, 300, "bicubic")
    assert (how.mean, how.std) == IMAGENET
