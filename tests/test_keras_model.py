"""Whole Keras models: files written by hand with h5py, compared with numpy; Keras is not needed."""

import json
import os
import sys

import jax
import numpy as np
import pytest
from keras_files import LAYOUTS, Node, chain, config_of, image, write

from lrq_jax.data.pixels import normalise
from lrq_jax.graph import layers as L
from lrq_jax.passes.float_forward import float_logits
from lrq_jax.readers import ReaderError, convert_teacher, load_teacher, save_teacher

EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
H5, KERAS = "3.15.1 h5", "3.15.1 keras"
PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def normal(rng, *shape):
    return (rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]) or 1)).astype(np.float32)


def statistics(rng, channels):
    make = {"gamma": rng.uniform(-1, 1.5, channels), "beta": rng.normal(size=channels),
            "moving_mean": rng.normal(size=channels), "moving_variance": rng.uniform(0.01, 2, channels)}  # fmt: skip
    return {name: array.astype(np.float32) for name, array in make.items()}


def conv(name, kernel, bias=None, kind="Conv2D", **config):
    weights = {"kernel": kernel} | ({} if bias is None else {"bias": bias})
    height, width, _, features = kernel.shape
    sizes = {"kernel_size": [height, width]}
    sizes |= {"depth_multiplier": features} if kind[0] == "D" else {"filters": features}
    base = {"strides": [1, 1], "padding": "valid", "data_format": "channels_last",
            "dilation_rate": [1, 1], "groups": 1, "activation": "linear", "use_bias": bias is not None}  # fmt: skip
    return Node(kind, name, {**base, **sizes, **config}, weights=weights)


def norm(name, weights, eps=1e-3, **config):
    config = {"axis": -1, "epsilon": eps, "center": True, "scale": True, **config}
    return Node("BatchNormalization", name, config, weights=weights)


def dense(name, kernel, bias=None, activation="softmax"):
    config = {"units": kernel.shape[1], "activation": activation, "use_bias": bias is not None}
    weights = {"kernel": kernel} | ({} if bias is None else {"bias": bias})
    return Node("Dense", name, config, weights=weights)


def pool(name="gap", **config):
    return Node("GlobalAveragePooling2D", name, {"data_format": "channels_last", **config})


def tiny(rng, *extra, size=8, channels=3, classes=3, activation="softmax"):
    """A small classifier; `extra` nodes come before its pooling."""
    kernel = normal(rng, 3, 3, channels, 4)
    return chain(image(size, size, channels), conv("c", kernel, padding="same"), *extra, pool(),
                 dense("d", normal(rng, 4, classes), activation=activation))  # fmt: skip


def logits(teacher, images):
    return np.asarray(jax.jit(lambda v, x: float_logits(teacher.graph, v, x))(teacher.variables, images))  # fmt: skip


def apply_norm(x, w, eps=1e-3):
    gain = w.get("gamma", 1) / np.sqrt(w["moving_variance"] + eps)
    return (x - w["moving_mean"]) * gain + w.get("beta", 0)


# --- what is read --------------------------------------------------------------------------------


@EACH_LAYOUT
def test_a_functional_model_is_read_as_it_is_computed(tmp_path, rng, naive_conv2d, layout):
    keras_2 = layout[0] == "2"
    stem, b1 = normal(rng, 3, 3, 3, 6), normal(rng, 6)
    n1, n2, n3 = (statistics(rng, c) for c in (6, 12, 5))
    del n1["gamma"]
    depth, db, d2, point = normal(rng, 3, 3, 6, 2), normal(rng, 12), normal(rng, 3, 3, 6, 1), normal(rng, 1, 1, 6, 12)  # fmt: skip
    inner, head, hb = normal(rng, 1, 1, 24, 5), normal(rng, 5, 4), normal(rng, 4)
    first = "stem/conv" if keras_2 else "stem_conv"  # Keras 3 allows no "/"
    separable = Node("SeparableConv2D", "sep", {"filters": 12, "kernel_size": [3, 3], "strides": [2, 2],
                     "padding": "same", "depth_multiplier": 1, "use_bias": False, "activation": "relu"},
                     [[("relu6", 0)]], {"depthwise_kernel": d2, "pointwise_kernel": point})  # fmt: skip
    nodes = chain(
        image(8, 8, 3),
        Node("Rescaling", "rescale", {"scale": 1 / 127.5, "offset": -1}),
        Node("ZeroPadding2D", "zp", {"padding": [[0, 2], [1, 0]], "data_format": "channels_last"}),
        conv(first, stem, b1, strides=[1, 1]),
        norm("bn1", n1, scale=False, axis=[3] if keras_2 else -1),
        Node("ReLU", "relu6", {"max_value": 6.0, "negative_slope": 0.0, "threshold": 0.0}),
        # 8 x 7 at stride 2: SAME pads 0 before and 1 after along H, 1 and 1 along W
        conv("dw", depth, db, kind="DepthwiseConv2D", strides=[2, 2], padding="same"),
        norm("bn2", n2),
        Node("LeakyReLU", "leaky", {"alpha" if keras_2 else "negative_slope": 0.25}),
        separable,
        Node("Add", "add", calls=[[("leaky", 0), ("sep", 0)]]),
        Node("Concatenate", "cat", {"axis": -1}, [[("add", 0), ("leaky", 0)]]),
        Node("Functional", "nested", inner=chain(
            image(4, 4, 24, name="input_2"), conv("c", inner), norm("bn", n3, eps=0.1))),
        pool(), Node("Dropout", "drop", {"rate": 0.2}), dense("top", head, hb),
    )  # fmt: skip
    teacher = convert_teacher(write(tmp_path, nodes, layout, name="my net"))
    pixels = rng.integers(0, 256, (2, 8, 8, 3), np.uint8)
    x = pixels / 127.5 - 1
    x = np.pad(x, ((0, 0), (0, 2), (1, 0), (0, 0)))
    x = np.clip(apply_norm(naive_conv2d(x, stem) + b1, n1), 0, 6)
    same = ((0, 1), (1, 1))
    y = naive_conv2d(x, depth.reshape(3, 3, 1, 12), (2, 2), same, groups=6) + db
    y = apply_norm(y, n2)
    y = np.where(y < 0, 0.25 * y, y)
    z = naive_conv2d(x, d2.reshape(3, 3, 1, 6), (2, 2), same, groups=6) @ point[0, 0]
    s = np.concatenate([y + np.maximum(z, 0), y], -1)
    expected = apply_norm(s @ inner[0, 0], n3, 0.1).mean((1, 2)) @ head + hb
    found = logits(teacher, normalise(pixels, teacher.preprocessing))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    assert teacher.graph.by_name["dw"].padding == same
    assert teacher.graph.by_name["stem_conv"].padding == ((0, 2), (1, 0))  # no layer of its own
    assert (teacher.arch, teacher.source) == ("my_net", f"model.{layout.split()[1]}")
    assert any("softmax" in note for note in teacher.notes)
    assert any("Dropout 'drop'" in note for note in teacher.notes)
    assert any("bn1" in note and "ones or zeros" in note for note in teacher.notes)
    save_teacher(teacher, tmp_path / "teacher")
    assert load_teacher(tmp_path / "teacher").graph == teacher.graph


@EACH_LAYOUT
def test_a_sequential_model_of_grey_images(tmp_path, rng, naive_conv2d, layout):
    kernel, n, head = normal(rng, 3, 3, 1, 4), statistics(rng, 4), normal(rng, 16, 3)
    mean, variance = np.float32([90]), np.float32([1600])
    nodes = [
        image(6, 6, 1),
        Node("Normalization", "n", {"axis": [-1]}, weights={
            "mean": mean, "variance": variance, "count": np.int64(3)}),
        Node("Sequential", "base", inner=[conv("c", kernel, strides=[2, 2], padding="same"), norm("b", n)]),
        Node("Activation", "act", {"activation": "relu"}),
        Node("MaxPooling2D", "pool", {"pool_size": [2, 2], "strides": [1, 1], "padding": "valid"}),
        Node("Flatten", "flat", {"data_format": "channels_last"}),
        dense("top", head, activation="linear"), Node("Softmax", "soft", {"axis": -1}),
    ]  # fmt: skip
    teacher = convert_teacher(write(tmp_path, nodes, layout, kind="Sequential"))
    pixels = rng.integers(0, 256, (2, 6, 6, 1), np.uint8)
    x = naive_conv2d((pixels - 90.0) / 40, kernel, (2, 2), ((0, 1), (0, 1)))
    x = np.maximum(apply_norm(x, n), 0)
    x = np.max([x[:, i : i + 2, j : j + 2] for i in (0, 1) for j in (0, 1)], 0)
    found = logits(teacher, normalise(pixels, teacher.preprocessing))
    np.testing.assert_allclose(found, x.reshape(2, -1) @ head, rtol=2e-5, atol=2e-5)
    assert teacher.graph.by_name["c"].padding == ((0, 1), (0, 1))  # not PyTorch's ((1, 1), (1, 1))


@EACH_LAYOUT
def test_the_head_of_mobilenet_is_a_dense_layer(tmp_path, rng, layout):
    head, bias = normal(rng, 1, 1, 4, 3), normal(rng, 3)
    nodes = tiny(rng)[:2] + chain(
        pool(keepdims=True), Node("Dropout", "drop"), conv("preds", head, bias),
        Node("Reshape", "reshape", {"target_shape": [3]}), Node("Activation", "soft", {"activation": "softmax"}),
    )  # fmt: skip
    nodes[2].calls = [[("c", 0)]]
    teacher = convert_teacher(write(tmp_path, nodes, layout), **PLAIN)
    assert [type(layer) for layer in teacher.graph.layers] == [L.Conv, L.GlobalPool, L.Dense]
    np.testing.assert_array_equal(teacher.variables["params"]["preds"]["kernel"], head[0, 0])
    x = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    at = teacher.graph.classifier.inputs[0]
    assert logits(teacher, x).shape == (2, 3)
    assert at == "gap"


@pytest.mark.parametrize("layout", ["2.15.0 h5", KERAS])
def test_arithmetic_on_the_image_is_preprocessing_and_other_functions_are_layers(
    tmp_path, rng, layout
):
    keras_2 = layout[0] == "2"
    names = ("tf.math.truediv", "tf.math.subtract", "tf.nn.relu") if keras_2 else ("TrueDivide", "Subtract", "Relu")  # fmt: skip
    constants, nodes = (127.5, [0.5, 0.25, -1.0]), tiny(rng)
    more = []
    for name, constant in zip(names, constants, strict=False):
        node = Node("TFOpLambda" if keras_2 else name, name.lower(), {"function": name[3:]})
        node.calls = [[((more or nodes[:1])[-1].name, 0), constant]]
        more.append(node)
    nodes[1].calls = [[(more[-1].name, 0)]]
    relu = Node("TFOpLambda" if keras_2 else names[2], "r", {"function": "nn.relu"}, [[("c", 0)]])
    nodes[2].calls = [[("r", 0)]]
    teacher = convert_teacher(
        write(tmp_path, [*nodes[:1], *more, nodes[1], relu, *nodes[2:]], layout)
    )
    np.testing.assert_allclose(np.array(teacher.preprocessing.std), 0.5)
    np.testing.assert_allclose(
        teacher.preprocessing.mean, np.multiply(constants[1], 0.5), atol=1e-12
    )
    assert [layer.name for layer in teacher.graph.layers] == ["c", "r", "gap", "d"]


def test_given_normalisation_enters_before_the_models_own(tmp_path, rng):
    nodes = tiny(rng)
    nodes = chain(
        nodes[0], Node("Rescaling", "scale", {"scale": [2.0, 4.0, 1.0], "offset": 3.0}), *nodes[1:]
    )
    nodes[2].calls = [[("scale", 0)]]
    path = write(tmp_path, nodes, KERAS)
    teacher = convert_teacher(path, mean=(0.5, 0.25, 0), std=(1, 0.5, 1))
    pixels = np.arange(3, dtype=np.uint8)[None]
    given = (pixels / 255 - [0.5, 0.25, 0]) / [1, 0.5, 1]
    np.testing.assert_allclose(
        normalise(pixels, teacher.preprocessing), given * [2, 4, 1] + 3, rtol=1e-5
    )
    own = normalise(pixels, convert_teacher(path).preprocessing)
    np.testing.assert_allclose(own, pixels * [2.0, 4, 1] + 3, rtol=1e-5)


@EACH_LAYOUT
def test_a_layer_called_twice_is_two_layers_of_the_same_weights(
    tmp_path, rng, naive_conv2d, layout
):
    nodes, kernel = tiny(rng), normal(rng, 3, 3, 4, 4)
    nodes[2].calls = [[("twice", 1)]]
    twice = conv("twice", kernel, padding="same", activation="relu")
    twice.calls = [[("c", 0)], [("twice", 0)]]
    teacher = convert_teacher(write(tmp_path, [*nodes[:2], twice, *nodes[2:]], layout), **PLAIN)
    x = rng.normal(size=(1, 8, 8, 3)).astype(np.float32)
    y = naive_conv2d(x, nodes[1].weights["kernel"], padding=((1, 1), (1, 1)))
    for _ in range(2):
        y = np.maximum(naive_conv2d(y, kernel, padding=((1, 1), (1, 1))), 0)
    expected = y.mean((1, 2)) @ nodes[3].weights["kernel"]
    np.testing.assert_allclose(logits(teacher, x), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("extra", "layers"), [
    ([Node("ReLU", "r", {"max_value": None, "negative_slope": 0.5})], [("r", "leaky_relu", 0.5)]),
    ([Node("Activation", "a", {"activation": "leaky_relu"})], [("a", "leaky_relu", 0.2)]),
    ([Node("Activation", "a", {"activation": "hard_swish"})], [("a", "hard_swish", 0.2)]),
    ([Node("Activation", "a", {"activation": {"class_name": "ReLU", "config": {
        "max_value": 6, "negative_slope": 0.0, "threshold": 0.0}}})],
     [("a", "relu6", 0.01)]),
])  # fmt: skip
def test_activations(tmp_path, rng, extra, layers):
    teacher = convert_teacher(write(tmp_path, tiny(rng, *extra), KERAS), **PLAIN)
    found = [(a.name, a.kind, a.negative_slope) for a in teacher.graph.layers if isinstance(a, L.Activation)]  # fmt: skip
    assert found == layers


def test_pools_crops_and_sums_as_keras_computes_them(tmp_path, rng):
    nodes = chain(
        image(7, 7, 3),
        Node("AveragePooling2D", "avg", {"pool_size": [2, 2], "strides": [2, 2], "padding": "same"}),
        Node("Cropping2D", "crop", {"cropping": [[1, 0], [0, 1]]}),
        Node("Add", "sum", calls=[[("crop", 0), ("crop", 0), ("crop", 0)]]),
        Node("GlobalMaxPooling2D", "gmp"), dense("d", np.eye(3, dtype=np.float32)),
    )  # fmt: skip
    teacher = convert_teacher(write(tmp_path, nodes, KERAS), **PLAIN)
    x = rng.normal(size=(2, 7, 7, 3)).astype(np.float32)
    blocks = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=np.nan)
    means = np.nanmean(blocks.reshape(2, 4, 2, 4, 2, 3), (2, 4))  # padding does not count
    np.testing.assert_allclose(logits(teacher, x), 3 * means[:, 1:, :-1].max((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("kind", ["float16", "float64", "bfloat16"])
def test_other_float_types_become_float32(tmp_path, rng, kind):
    import h5py
    import ml_dtypes

    nodes = tiny(rng)
    wide = np.arange(12, dtype=np.float32).reshape(4, 3) - 5.5
    nodes[3].weights["kernel"] = wide if kind == "bfloat16" else wide.astype(kind)
    path = write(tmp_path, nodes, H5)
    if kind == "bfloat16":  # h5py keeps it as two opaque bytes, Keras adds the name
        with h5py.File(path, "a") as file:
            group = file["model_weights/d/d"]
            del group["kernel"]
            made = group.create_dataset("kernel", data=wide.astype(ml_dtypes.bfloat16).view("V2"))
            made.attrs["dtype"] = "bfloat16"
    kernel = convert_teacher(path, **PLAIN).variables["params"]["d"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, wide)


def test_a_size_left_free_is_chosen(tmp_path, rng):
    nodes = tiny(rng)
    nodes[0].config["shape"] = [None, None, 3]
    path = write(tmp_path, nodes, KERAS)
    with pytest.raises(ReaderError, match=r"free size.*--size"):
        convert_teacher(path, **PLAIN)
    teacher = convert_teacher(path, size=224, **PLAIN)
    assert teacher.graph.input_shape == (224, 224, 3)
    assert teacher.preprocessing.resize == 256
    assert any("256" in note for note in teacher.notes)


# --- what is refused -----------------------------------------------------------------------------


def bad(kind, name="x", **config):
    return Node(kind, name, config)


@pytest.mark.parametrize(("extra", "message"), [
    (bad("Lambda", function=["4wEAAAAAAAAA", None, None]), r"Lambda 'x'.*BatchNormalization.*never executed"),
    (bad("LSTM"), r"not supported: LSTM 'x'; expected only .*Conv2D"),
    (bad("MyLayer"), "MyLayer 'x'"),
    (bad("ReLU", max_value=5.0), "'x'.*max_value 5.0"),
    (bad("Activation", activation="gelu"), "activation 'gelu'"),
    (bad("Activation", activation={"class_name": "function", "config": "mine"}), "mine"),
    (bad("BatchNormalization", axis=1), "axis 1"),
    (bad("Softmax", axis=-1), "softmax as its input"),
    (bad("MaxPooling2D", pool_size=[2, 2], data_format="channels_first"), "channels_first"),
    (bad("MaxPooling2D", pool_size=[2, 2], padding="causal"), "padding 'causal'"),
    (bad("Reshape", target_shape=[2, 2, 64]), r"reshaped to \(2, 2, 64\)"),
    (bad("Rescaling", scale=2.0), "after other layers"),
    (bad("ZeroPadding2D", padding=[[1, -1], [0, 0]]), "from zero up"),
    (bad("Cropping2D", cropping=[[4, 4], [0, 0]]), "cannot be"),
    (bad("Dense", units=3), "GlobalAveragePooling2D or Flatten"),
])  # fmt: skip
@pytest.mark.parametrize("layout", [H5, KERAS])
def test_layers_that_do_not_fit_are_refused_by_name(tmp_path, rng, extra, message, layout):
    with pytest.raises(ReaderError, match=rf"^model\.(h5|keras): .*{message}"):
        convert_teacher(write(tmp_path, tiny(rng, extra), layout), **PLAIN)


def damaged(change):
    def make(nodes):
        model = json.loads(json.dumps(config_of(nodes, "m", "3")))
        change(model, model["config"]["layers"])
        return model

    return make


@pytest.mark.parametrize(("node", "setting"), [
    *(("Conv2D", s) for s in ("filters", "kernel_size", "strides", "padding", "dilation_rate",
                              "activation", "use_bias", "data_format")),
    *(("DepthwiseConv2D", s) for s in ("depth_multiplier", "strides")),
    *(("SeparableConv2D", s) for s in ("depth_multiplier", "filters", "use_bias")),
    *(("Dense", s) for s in ("units", "activation", "use_bias")),
    *(("BatchNormalization", s) for s in ("axis", "epsilon", "center", "scale")),
    *(("ReLU", s) for s in ("max_value", "negative_slope", "threshold")),
    ("LeakyReLU", "negative_slope"), ("Activation", "activation"),
    *(("MaxPooling2D", s) for s in ("pool_size", "strides", "padding", "data_format")),
    ("ZeroPadding2D", "padding"), ("Cropping2D", "cropping"), ("Concatenate", "axis"),
    ("Softmax", "axis"), ("Reshape", "target_shape"), *(("Rescaling", s) for s in ("scale", "offset")),
])  # fmt: skip
def test_a_setting_under_another_name_is_missed_and_not_assumed(tmp_path, rng, node, setting):
    """All layers at once, those of the image first; one setting is misspelled."""
    image_first = [Node("Rescaling", "Rescaling", {"scale": 2.0})]
    rest = [
        conv("Conv2D", normal(rng, 3, 3, 3, 4), padding="same"),
        norm("BatchNormalization", statistics(rng, 4)),
        conv("DepthwiseConv2D", normal(rng, 3, 3, 4, 1), kind="DepthwiseConv2D", padding="same"),
        Node("SeparableConv2D", "SeparableConv2D",
             {"filters": 4, "kernel_size": [3, 3], "depth_multiplier": 1, "use_bias": False},
             weights={"depthwise_kernel": normal(rng, 3, 3, 4, 1),
                      "pointwise_kernel": normal(rng, 1, 1, 4, 4)}),
        Node("ReLU", "ReLU"), Node("LeakyReLU", "LeakyReLU", {"negative_slope": 0.3}),
        Node("Activation", "Activation", {"activation": "relu"}), Node("MaxPooling2D", "MaxPooling2D"),
        Node("Cropping2D", "Cropping2D", {"cropping": [[1, 0], [0, 1]]}),
        Node("Concatenate", "Concatenate", {}, [[("Cropping2D", 0), ("Cropping2D", 0)]]),
        Node("ZeroPadding2D", "ZeroPadding2D", {"padding": [[1, 1], [1, 1]]}),
        pool(), Node("Reshape", "Reshape", {"target_shape": [8]}),
        dense("Dense", normal(rng, 8, 3), activation="linear"), Node("Softmax", "Softmax"),
    ]  # fmt: skip
    nodes = chain(image(12, 12, 3), *image_first, *rest)
    convert_teacher(write(tmp_path, nodes, KERAS), **PLAIN)

    def misspell(_, layers):
        config = next(layer for layer in layers if layer["config"]["name"] == node)["config"]
        config[f"{setting}s"] = config.pop(setting)

    path = write(tmp_path, nodes, KERAS, model=damaged(misspell)(nodes))
    with pytest.raises(
        ReaderError, match=rf"'{node}'.*no setting '{setting}' among .*'{setting}s'"
    ):
        convert_teacher(path, **PLAIN)


@pytest.mark.parametrize(("change", "message"), [
    (lambda m, at: m.update(class_name="MyModel"), "class 'MyModel'.*code is not in the file"),
    (lambda m, at: m.update(config=3), "Keras does not write"),
    (lambda m, at: m["config"].update(output_layers=[["d", 0, 0], ["c", 0, 0]]), "2 outputs"),
    (lambda m, at: m["config"].update(output_layers=["d", 1, 0]), "no call 1 of a layer 'd'"),
    (lambda m, at: at[1]["inbound_nodes"][0]["args"][0]["config"].update(keras_history=["gap", 0, 0]), "read each other"),
    (lambda m, at: at[1]["inbound_nodes"][0]["args"][0]["config"].update(keras_history=["no", 0, 0]), "layer 'no'"),
    (lambda m, at: at[1]["inbound_nodes"][0]["kwargs"].update(training=True), "training=True"),
    (lambda m, at: at.append(at[1]), "two layers of one name"),
    (lambda m, at: at[0]["config"].update(batch_shape=[None, 8, 9, 3]), "square"),
    (lambda m, at: at[0]["config"].update(batch_shape=[None, 8]), "expected an image"),
    (lambda m, at: at[1]["config"].update(filters=5), r"'c' \(Conv2D\): found kernel float32 \(3, 3, 3, 4\)"),
    (lambda m, at: at[1]["config"].update(use_bias=True), "'c'|bias"),
    (lambda m, at: at[1]["config"].pop("kernel_size"), "kernel_size"),
    (lambda m, at: at[1]["config"].update(kernel_size="3"), "two whole numbers"),
    (lambda m, at: at[3]["config"].update(activation="sigmoid"), "at the end, expected a Dense"),
])  # fmt: skip
@pytest.mark.parametrize("layout", [H5, KERAS])
def test_configurations_that_do_not_fit_are_refused(tmp_path, rng, change, message, layout):
    nodes = tiny(rng)
    path = write(tmp_path, nodes, layout, model=damaged(change)(nodes))
    with pytest.raises(ReaderError, match=rf"^model\.(h5|keras): .*({message})"):
        convert_teacher(path, **PLAIN)


def test_what_else_does_not_fit(tmp_path, rng):
    def refused(nodes, message, layout=KERAS, arch=None, **options):
        with pytest.raises(ReaderError, match=message):
            convert_teacher(write(tmp_path, nodes, layout), arch, **options)

    refused(tiny(rng), "no normalisation in the model.*--mean.*MobileNet")
    refused(tiny(rng), "only one of mean and std", mean=(0, 0, 0))
    refused(tiny(rng), "divide", mean=(127, 127, 127), std=(1, 1, 1))
    refused(tiny(rng), "3 classes in the file, expected the 4", num_classes=4, **PLAIN)
    refused(tiny(rng), "carries its architecture", arch="resnet18", **PLAIN)
    refused(tiny(rng, classes=1), "two classes or more", **PLAIN)
    refused(tiny(rng, Node("Activation", "a", {"activation": "hard_sigmoid"})), "hard_sigmoid",
            "2.15.0 h5", **PLAIN)  # fmt: skip
    nodes = tiny(rng)
    nodes[1].weights["kernel"][0, 0, 0, 0] = np.nan
    refused(nodes, "NaN, infinity .* in kernel", **PLAIN)
    nodes = tiny(rng, norm("b", statistics(rng, 4)))
    nodes[2].weights["moving_variance"][1] = -1
    refused(nodes, "negative variance in moving_variance", **PLAIN)
    nodes[2].weights["moving_variance"] = np.ones(4, np.int32)
    refused(nodes, "moving_variance int32", **PLAIN)


def test_without_h5py_the_error_names_the_extra(tmp_path, rng, monkeypatch):
    paths = [write(tmp_path, tiny(rng), layout) for layout in (H5, KERAS)]
    monkeypatch.setitem(sys.modules, "h5py", None)
    for path in paths:
        with pytest.raises(ReaderError, match=r"pip install 'lrq_jax\[keras\]'"):
            convert_teacher(path, **PLAIN)


# --- Keras itself --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_keras_computes_the_same(tmp_path, rng):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="keras is not installed: by choice, never needed")
    layers, here = keras.layers, keras.applications
    inner = keras.Sequential([layers.Conv2D(8, 2, groups=2, dilation_rate=2, activation="silu"),
                              layers.BatchNormalization(center=False)])  # fmt: skip
    x = first = layers.Input((16, 16, 3))
    x = inner(layers.Conv2D(6, 3, strides=2, padding="same")(layers.Rescaling(1 / 127.5, -1)(x)))
    y = layers.SeparableConv2D(8, 3, padding="same")(x)
    gate = layers.Conv2D(8, 1, activation="sigmoid")(
        layers.GlobalAveragePooling2D(keepdims=True)(y)
    )
    x = layers.AveragePooling2D(2, 1, "same")(layers.Add()([layers.Multiply()([gate, y]), x]))
    x = layers.Dense(4, activation="softmax")(
        layers.Flatten()(layers.MaxPooling2D(2, 2, "same")(x))
    )
    models = {
        "own": keras.Model(first, x),
        "mobilenet": here.MobileNet((32, 32, 3), alpha=0.25, weights=None, classes=5),
        "mobilenetv2": here.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=5),
    }
    for name, model in models.items():
        for weight in model.weights:
            values = rng.normal(size=weight.shape) / np.sqrt(max(np.prod(weight.shape[:-1]), 1))
            low, high = (
                (0.5, 1.5) if "variance" in weight.path or "gamma" in weight.path else (0, 0)
            )
            weight.assign(rng.uniform(low, high, weight.shape) if high else values)
        pixels = rng.integers(0, 256, (2, *model.input_shape[1:]), np.uint8)
        given = {} if name == "own" else {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        images = pixels.astype(np.float32) if name == "own" else pixels / np.float32(127.5) - 1
        expected = np.log(model.predict(images, verbose=0))
        for suffix in ("h5", "keras"):
            model.save(tmp_path / f"{name}.{suffix}")
            teacher = convert_teacher(tmp_path / f"{name}.{suffix}", **given)
            found = jax.nn.log_softmax(logits(teacher, normalise(pixels, teacher.preprocessing)))
            np.testing.assert_allclose(found, expected, atol=1e-4)
