"""Keras files of weights only: matched with a network by order and shapes, or refused."""

import jax
import numpy as np
import pytest
from keras_files import LAYOUTS, Node, write_weights

from lrq_jax.graph import layers as L
from lrq_jax.networks import build_network
from lrq_jax.passes.float_forward import float_logits
from lrq_jax.readers import ReaderError, convert_teacher

GIVEN = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def nodes_of(arch, rng, *, name=lambda layer, kind: layer, bias=False, **settings):
    """A file's layers with the shapes of a network of ours; kernels of depthwise ones as Keras
    keeps them."""
    graph, counts, nodes = build_network(arch, **settings), {}, []
    for layer in graph.layers:
        if not isinstance(layer, L.Conv | L.Dense | L.BatchNorm):
            continue
        shapes = layer.parameter_shapes(*(graph.shapes[i] for i in layer.inputs))
        kind = {L.Conv: "Conv2D", L.Dense: "Dense", L.BatchNorm: "BatchNormalization"}[type(layer)]
        if kind == "BatchNormalization":
            shape = shapes["batch_stats"]["mean"]
            weights = {n: rng.uniform(0.5, 1.5, shape) for n in ("gamma", "beta", "moving_mean", "moving_variance")}  # fmt: skip
        else:
            shape = shapes["params"]["kernel"]
            if isinstance(layer, L.Conv) and layer.groups > 1:
                kind, shape = "DepthwiseConv2D", (*shape[:2], layer.groups, 1)
            weights = {"kernel": rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:3]))}
            if bias or kind == "Dense":
                weights["bias"] = rng.normal(
                    size=shape[-1] if kind != "DepthwiseConv2D" else shape[2]
                )
        counts[kind] = counts.get(kind, -1) + 1
        called = name(layer.name, kind)
        auto = f"{kind.lower()}_{counts[kind]}" if counts[kind] else kind.lower()
        nodes.append(Node(kind, called or auto, weights={n: a.astype(np.float32) for n, a in weights.items()}))  # fmt: skip
    return nodes


def no_names(layer, kind):
    return None


@EACH_LAYOUT
@pytest.mark.parametrize("arch", ["resnet8_cifar", "mobilenet_v1_cifar"])
def test_layers_one_after_the_other_are_matched_in_order(tmp_path, rng, arch, layout):
    nodes = nodes_of(arch, rng, name=no_names, num_classes=7)
    teacher = convert_teacher(write_weights(tmp_path, nodes, layout), arch, **GIVEN)
    assert teacher.graph.num_classes == 7
    with_weights = [layer for layer in teacher.graph.layers if isinstance(layer, L.Conv | L.Dense | L.BatchNorm)]  # fmt: skip
    for layer, node in zip(with_weights, nodes, strict=True):
        found = teacher.variables["params"][layer.name]
        if isinstance(layer, L.BatchNorm):
            assert layer.eps == 1e-3
            np.testing.assert_array_equal(found["scale"], node.weights["gamma"])
            statistics = teacher.variables["batch_stats"][layer.name]
            np.testing.assert_array_equal(statistics["var"], node.weights["moving_variance"])
        else:
            kernel = node.weights["kernel"]
            if node.kind == "DepthwiseConv2D":
                kernel = kernel.transpose(0, 1, 3, 2)  # one output a channel
            np.testing.assert_array_equal(found["kernel"], kernel)
    strided = [layer for layer in with_weights if getattr(layer, "strides", None) == (2, 2)]
    assert strided
    assert all(layer.padding == ((0, 1), (0, 1)) for layer in strided)
    assert any("epsilon 0.001" in note for note in teacher.notes)


@EACH_LAYOUT
def test_names_tell_batch_norms_that_run_side_by_side_apart(tmp_path, rng, layout):
    arch = "resnet8_cifar_b"
    same = {"name": lambda layer, kind: layer.replace("bn", "x_bn").replace("conv", "x_conv")}
    nodes = nodes_of(arch, rng, bias=True, num_classes=3, **same)
    teacher = convert_teacher(write_weights(tmp_path, nodes, layout), arch, **GIVEN)
    by_name = {node.name: node.weights for node in nodes}
    for name in ("stage2_block0_bn2", "stage2_block0_shortcut_bn"):
        expected = by_name[name.replace("bn", "x_bn")]["moving_mean"]
        np.testing.assert_array_equal(teacher.variables["batch_stats"][name]["mean"], expected)
    # a bias before a batch norm is kept
    conv = teacher.variables["params"]["stage1_block0_conv1"]
    np.testing.assert_array_equal(conv["bias"], by_name["stage1_block0_x_conv1"]["bias"])
    x = rng.normal(size=(1, 32, 32, 3)).astype(np.float32)
    without = {"params": teacher.variables["params"] | {"stage1_block0_conv1": {**conv, "bias": 0 * conv["bias"]}},
               "batch_stats": teacher.variables["batch_stats"]}  # fmt: skip
    run = jax.jit(lambda v: float_logits(teacher.graph, v, x))
    assert np.abs(run(teacher.variables) - run(without)).max() > 1e-3


@EACH_LAYOUT
def test_numbers_alone_do_not_and_are_refused(tmp_path, rng, layout):
    nodes = nodes_of("resnet8_cifar_b", rng, name=no_names)
    path = write_weights(tmp_path, nodes, layout)
    with pytest.raises(
        ReaderError, match=r"(?s)several ways to match .*stage2_block0_.*whole model"
    ):
        convert_teacher(path, "resnet8_cifar_b", **GIVEN)


@EACH_LAYOUT
def test_what_does_not_fit_is_refused(tmp_path, rng, layout):
    nodes = nodes_of("resnet8_cifar", rng)
    path = write_weights(tmp_path, nodes, layout)

    def refused(message, arch="resnet8_cifar", given=GIVEN, **options):
        with pytest.raises(ReaderError, match=rf"(?s)^{path.name}: found {message}"):
            convert_teacher(path, arch, **given, **options)

    refused("weights only, expected --arch", None)
    refused(r"layers other than .*shape \(16,\): 3 in the file, expected 5", "resnet14_cifar")
    refused("10 classes in the file, expected the 7", num_classes=7)
    refused("no normalisation", given={})
    nodes[0].weights["kernel"][0, 0, 0, 0] = np.nan
    path = write_weights(tmp_path, nodes, layout)
    refused("kernel .* finite")
    path = write_weights(tmp_path, nodes[:-1], layout)
    refused("no Dense layer")
    with pytest.raises(ValueError, match="nonsense"):
        convert_teacher(write_weights(tmp_path, nodes, layout), "nonsense", **GIVEN)


def test_layouts_whose_order_is_not_in_the_file_are_refused(tmp_path, rng):
    import h5py

    nodes = nodes_of("resnet8_cifar", rng)
    path = write_weights(tmp_path, nodes, LAYOUTS[3])
    with h5py.File(path, "a") as file:  # a class of its own: folders are its attributes
        file.move("layers/conv2d", "stem")
    with pytest.raises(ReaderError, match=r"attribute 'stem'.*whole model"):
        convert_teacher(path, "resnet8_cifar", **GIVEN)
    nested = [Node("Functional", "base", inner=nodes[:4]), *nodes[4:]]
    with pytest.raises(ReaderError, match="in two models of the file"):
        convert_teacher(write_weights(tmp_path, nested, LAYOUTS[3]), "resnet8_cifar", **GIVEN)
    # the older layout lists a nested model's weights in order
    teacher = convert_teacher(write_weights(tmp_path, nested, LAYOUTS[1]), "resnet8_cifar", **GIVEN)
    found = teacher.variables["params"]["stage1_block0_conv1"]["kernel"]
    np.testing.assert_array_equal(found, nodes[2].weights["kernel"])
