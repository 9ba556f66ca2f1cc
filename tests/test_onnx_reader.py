"""ONNX files as teachers: opsets, layouts, normalisation, refusals, files that mean harm."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="reads ONNX: pip install '.[dev]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="reads ONNX: pip install '.[dev]'")

from onnx_models import Model, run  # noqa: E402

from lrq_jax.data import preprocess  # noqa: E402
from lrq_jax.graph import layers as L  # noqa: E402
from lrq_jax.passes import float_logits  # noqa: E402
from lrq_jax.readers import ReaderError, convert_teacher, load_teacher, onnx_file  # noqa: E402
from lrq_jax.readers.onnx_graph import read_onnx  # noqa: E402

REPOSITORY = Path(__file__).parents[1]
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


def newest_opset():
    """The newest opset that both packages know."""

    def loads(opset):
        model = Model(opset=opset)
        model = model.proto(model.head("image", 192))
        try:
            onnxruntime.InferenceSession(
                model.SerializeToString(), providers=["CPUExecutionProvider"]
            )
        except Exception:  # onnxruntime's errors share no base class of their own
            return False
        return True

    return next(filter(loads, range(onnx.defs.onnx_opset_version(), 0, -1)))


def compare(network, path, images, *, nhwc=False, tolerance=1e-5):
    """Our logits against onnxruntime's; images `[N, H, W, C]` as the file wants them."""
    expected = run(path, images if nhwc else np.ascontiguousarray(np.moveaxis(images, -1, 1)))
    ours = images
    if network.scale is not None:
        ours = np.float32(images * network.scale + network.shift)
    found = float_logits(network.graph, network.variables, jnp.asarray(ours))
    expected = expected.reshape(found.shape)
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(found, expected, atol=tolerance * abs(expected).max(), rtol=0)


def images_like(network, batch=2):
    shape = (batch, *network.graph.input_shape)
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def tiny(m, x="image", channels=3, classes=5):
    """Convolution, batch norm, ReLU, pool and classifier."""
    y = m.op("Relu", m.batch_norm(m.conv(x, 8, channels), 8))
    return m.head(m.op("GlobalAveragePool", y), 8, classes)


# --- opsets, layouts ----------------------------------------------------------------------------


def axes_operand(m, kind, x, axes, since=13):
    """Axes as an attribute, or as an input from some opset on."""
    if m.opset >= since:
        return m.op(kind, x, np.array(axes))
    return m.op(kind, x, axes=axes)


def of_every_version(m):
    """The operators whose form changed between opsets."""
    x = m.op("Dropout", m.op("Relu", m.batch_norm(m.conv("image", 8, 3), 8)))
    x = m.op("Clip", x, 0.0, 6.0)
    if m.opset >= 13:
        a, b = m.op("Split", x, np.array([2, 6]), outputs=2, axis=1)
    else:
        a, b = m.op("Split", x, outputs=2, axis=1, split=[2, 6])
    x = m.op("Concat", b, a, axis=1)
    x = m.op("Pad", x, np.array([0, 0, 1, 0, 0, 0, 0, 1]))
    x = m.op("Slice", x, np.array([1]), np.array([9]), np.array([2]))
    x = axes_operand(m, "ReduceMean", x, [2, 3], since=18)
    x = axes_operand(m, "Unsqueeze", axes_operand(m, "Squeeze", x, [-1]), [3])
    x = m.op("Gemm", m.op("Flatten", x), m.weights(5, 8), m.weights(5), transB=1)
    return m.op("Softmax", x, axis=1) if m.opset == 11 else m.op("LogSoftmax", x)


@pytest.mark.parametrize("opset", [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, "newest"])
def test_every_opset_is_read(opset, tmp_path):
    model = Model(opset=newest_opset() if opset == "newest" else opset)
    logits = of_every_version(model)
    path = model.save(tmp_path / "m.onnx", logits)
    network = read_onnx(path)
    assert any("Softmax at the end left out" in note for note in network.notes)
    model.save(tmp_path / "logits.onnx", model.nodes[-1].input[0])
    compare(network, tmp_path / "logits.onnx", images_like(network))


def test_opsets_before_11_are_refused_with_the_way_out(tmp_path):
    model = Model(opset=10)
    path = model.save(tmp_path / "m.onnx", tiny(model))
    with pytest.raises(ReaderError, match=r"opset 10, expected 11.*version_converter"):
        read_onnx(path)


@pytest.mark.parametrize("first", ["Transpose", "Relu"])
def test_nhwc_input(first, tmp_path):
    """TensorFlow's layout: transposed at the edge, or elementwise before; flattened as NHWC."""
    model = Model(("n", 8, 6, 3), opset=15)
    x = "image" if first == "Transpose" else model.op("LeakyRelu", "image", alpha=0.3)
    x = model.op("Transpose", x, perm=[0, 3, 1, 2])
    x = model.op("Relu", model.batch_norm(model.conv(x, 4, 3), 4))
    x = model.op("Transpose", x, perm=[0, 2, 3, 1])
    path = model.save(tmp_path / "m.onnx", model.head(x, 8 * 6 * 4))
    network = read_onnx(path)
    assert network.graph.input_shape == (8, 6, 3)
    compare(network, path, images_like(network), nhwc=True)


def test_rows_of_a_dense_layer_follow_a_flattened_image(tmp_path):
    """Image not square, and a batch norm between flatten and the dense layer."""
    model = Model(("n", 3, 5, 4))
    x = model.op("Flatten", model.op("Relu", model.conv("image", 6, 3)))
    path = model.save(tmp_path / "m.onnx", model.head(model.batch_norm(x, 120), 120))
    network = read_onnx(path)
    compare(network, path, images_like(network))


@pytest.mark.parametrize("batch", ["n", 1, 4, None])
def test_batches_open_and_fixed(batch, tmp_path):
    model = Model((batch, 3, 8, 8))
    path = model.save(tmp_path / "m.onnx", tiny(model))
    network = read_onnx(path)
    compare(network, path, images_like(network, batch if isinstance(batch, int) else 3))


def test_open_sides_need_a_size(tmp_path):
    model = Model(("n", 3, "h", "w"))
    path = model.save(tmp_path / "m.onnx", tiny(model))
    with pytest.raises(ReaderError, match="--size"):
        read_onnx(path)
    assert read_onnx(path, size=12).graph.input_shape == (12, 12, 3)
    fixed = Model()
    path = fixed.save(tmp_path / "fixed.onnx", tiny(fixed))
    with pytest.raises(ReaderError, match="8 x 8 pixels in the file, expected the size 12"):
        read_onnx(path, size=12)


def test_weights_that_are_inputs_too_are_constants(tmp_path):
    """keep_initializers_as_inputs=True, the habit of IR version 3."""
    model = Model()
    output = tiny(model)
    values = [
        onnx.helper.make_tensor_value_info(c.name, c.data_type, c.dims) for c in model.constants
    ]
    path = tmp_path / "m.onnx"
    onnx.save_model(model.proto(output, inputs=values), path)
    compare(read_onnx(path), path, images_like(read_onnx(path)))


def test_function_of_the_model_is_inlined(tmp_path):
    model = Model(opset=18)
    x = model.op("Block", model.batch_norm(model.conv("image", 8, 3), 8), domain="own")
    proto = model.proto(model.head(model.op("GlobalAveragePool", x), 8))
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    opsets = [onnx.helper.make_opsetid("", 18)]
    proto.functions.append(onnx.helper.make_function("own", "Block", ["x"], ["y"], [node], opsets))
    proto.opset_import.append(onnx.helper.make_opsetid("own", 1))
    onnx.save_model(proto, tmp_path / "m.onnx")
    network = read_onnx(tmp_path / "m.onnx")
    assert any(isinstance(layer, L.Activation) for layer in network.graph.layers)
    compare(network, tmp_path / "m.onnx", images_like(network))


def test_batch_norms_keep_their_statistics_and_names(tmp_path):
    model = Model()
    path = model.save(tmp_path / "m.onnx", tiny(model))
    proto = onnx.load(path)
    named = {"constant0": "stem.conv.weight", "constant1": "stem.bn.weight"}
    for node in proto.graph.node:
        node.input[:] = [named.get(name, name) for name in node.input]
    for tensor in proto.graph.initializer:
        tensor.name = named.get(tensor.name, tensor.name)
    onnx.save_model(proto, path)
    network = read_onnx(path)
    (norm,) = network.graph.batch_norms
    assert (norm.name, norm.inputs) == ("stem_bn", ("stem_conv",))
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    stats = network.variables["batch_stats"]["stem_bn"]
    np.testing.assert_array_equal(stats["mean"], arrays["constant3"])
    np.testing.assert_array_equal(stats["var"], arrays["constant4"])


def test_a_network_without_a_dense_layer_gets_an_identity(tmp_path):
    """SqueezeNet ends in a pool: every pass asks for a classifier."""
    model = Model()
    x = model.op("Relu", model.conv(model.batch_norm("image", 3), 5, 3))
    output = model.op("Flatten", model.op("GlobalAveragePool", x))
    path = model.save(tmp_path / "m.onnx", output)
    network = read_onnx(path)
    assert network.graph.classifier.features == 5
    assert any("identity" in note for note in network.notes)
    compare(network, path, images_like(network))


def test_a_network_that_ends_in_a_1x1_convolution_has_a_classifier(tmp_path):
    model = Model()
    x = model.op("GlobalAveragePool", model.batch_norm(model.conv("image", 8, 3), 8))
    output = model.op("Flatten", model.conv(x, 5, 8, 1, bias=True))
    path = model.save(tmp_path / "m.onnx", output)
    network = read_onnx(path)
    assert [type(layer) for layer in network.graph.layers[-2:]] == [L.GlobalPool, L.Dense]
    compare(network, path, images_like(network))


# --- normalisation ------------------------------------------------------------------------------

MEAN, STD = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.25, 0.3])


def of_unit_pixels(m, x, shape):
    return m.op("Div", m.op("Sub", x, MEAN.reshape(shape)), STD.reshape(shape))


def of_bytes(m, x, shape):
    return of_unit_pixels(m, m.op("Mul", x, 1 / 255), shape)


def of_bytes_at_once(m, x, shape):
    return m.op("Div", m.op("Sub", x, 255 * MEAN.reshape(shape)), 255 * STD.reshape(shape))


def as_scale_and_shift(m, x, shape):
    y = m.op("Mul", (1 / STD).reshape(shape), x)
    return m.op("Add", y, (-MEAN / STD).reshape(shape))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("prefix", "unit"),
    [(of_unit_pixels, 1), (of_bytes, 255), (of_bytes_at_once, 255), (as_scale_and_shift, 1)],
)
def test_normalisation_inside_the_file_becomes_the_teachers(prefix, unit, layout, tmp_path):
    nhwc = layout == "NHWC"
    model = Model(("n", 8, 8, 3) if nhwc else ("n", 3, 8, 8))
    x = prefix(model, "image", (1, 1, 1, 3) if nhwc else (1, 3, 1, 1))
    x = model.op("Transpose", x, perm=[0, 3, 1, 2]) if nhwc else x
    path = model.save(tmp_path / "m.onnx", tiny(model, x))
    teacher = convert_teacher(path)
    assert f"0 to {unit}" in " ".join(teacher.notes)
    np.testing.assert_allclose(teacher.preprocessing.mean, MEAN, atol=1e-6)
    np.testing.assert_allclose(teacher.preprocessing.std, STD, atol=1e-6)
    assert type(teacher.graph.layers[0]) is L.Conv
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    fed = (pixels[None] * np.float32(unit / 255)).astype(np.float32)
    expected = run(path, fed if nhwc else np.ascontiguousarray(np.moveaxis(fed, -1, 1)))
    ours = preprocess(pixels, teacher.preprocessing)[None]
    found = float_logits(teacher.graph, teacher.variables, jnp.asarray(ours))
    np.testing.assert_allclose(found, expected, atol=1e-5 * abs(expected).max(), rtol=0)


def test_bytes_as_input(tmp_path):
    model = Model(("n", 3, 8, 8), element=onnx.TensorProto.UINT8)
    x = model.op("Div", model.op("Cast", "image", to=1), 255.0)
    path = model.save(tmp_path / "m.onnx", tiny(model, x))
    teacher = convert_teacher(path)
    np.testing.assert_allclose(teacher.preprocessing.std, 1, atol=1e-6)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    expected = run(path, np.ascontiguousarray(np.moveaxis(pixels[None], -1, 1)))
    ours = preprocess(pixels, teacher.preprocessing)[None]
    found = float_logits(teacher.graph, teacher.variables, jnp.asarray(ours))
    np.testing.assert_allclose(found, expected, atol=1e-5 * abs(expected).max(), rtol=0)


@pytest.mark.parametrize(("number", "unit"), [(1 / 255, 255), (1 / 0.5, 1)])
def test_pixels_only_scaled(number, unit, tmp_path):
    """No mean to tell the unit by."""
    model = Model()
    path = model.save(tmp_path / "m.onnx", tiny(model, model.op("Mul", "image", number)))
    teacher = convert_teacher(path)
    assert f"0 to {unit}" in " ".join(teacher.notes)
    np.testing.assert_allclose(teacher.preprocessing.std, 1 if unit == 255 else 0.5, rtol=1e-6)


def test_given_normalisation_comes_before_the_files_own(tmp_path):
    """torchvision's InceptionV3 renormalises images that were normalised already."""
    model = Model()
    x = of_unit_pixels(model, "image", (1, 3, 1, 1))
    path = model.save(tmp_path / "m.onnx", tiny(model, x))
    how = convert_teacher(path, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).preprocessing
    pixels = np.array([0.3, 0.6, 0.9])
    twice = ((pixels - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7] - MEAN) / STD
    np.testing.assert_allclose((pixels - how.mean) / np.array(how.std), twice, atol=1e-5)


def test_without_any_normalisation_it_must_be_given(tmp_path):
    model = Model()
    path = model.save(tmp_path / "m.onnx", tiny(model))
    with pytest.raises(ReaderError, match=r"m\.onnx: found no normalisation.*--mean"):
        convert_teacher(path)
    with pytest.raises(ReaderError, match="only one of mean and std"):
        convert_teacher(path, mean=(0, 0, 0))
    with pytest.raises(ReaderError, match="units of pixels scaled"):
        convert_teacher(path, mean=(120, 120, 120), std=(60, 60, 60))
    assert convert_teacher(path, **HALF).preprocessing.mean == (0.5, 0.5, 0.5)


def test_two_normalisations_are_refused(tmp_path):
    model = Model()
    one = model.conv(model.op("Mul", "image", 2.0), 8, 3)
    other = model.batch_norm(model.conv(model.op("Mul", "image", 3.0), 8, 3), 8)
    path = model.save(tmp_path / "m.onnx", model.head(model.op("Add", one, other), 512))
    with pytest.raises(ReaderError, match="two normalisations"):
        read_onnx(path)


def test_channels_normalised_one_by_one(tmp_path):
    """torchvision's transform_input: slices, each scaled, joined again."""
    model = Model()
    parts = []
    for i in range(3):
        part = model.op(
            "Unsqueeze", model.op("Gather", "image", np.array(i), axis=1), np.array([1])
        )
        parts.append(model.op("Add", model.op("Mul", part, 0.4 + i / 10), -0.03 * i))
    path = model.save(tmp_path / "m.onnx", tiny(model, model.op("Concat", *parts, axis=1)))
    network = read_onnx(path)
    compare(network, path, images_like(network))


def test_grey_images(tmp_path):
    model = Model(("n", 1, 8, 8))
    x = model.op("Div", model.op("Sub", "image", 0.5), 0.25)
    path = model.save(tmp_path / "m.onnx", tiny(model, x, channels=1))
    assert convert_teacher(path).preprocessing.mean == pytest.approx((0.5,))
    compare(read_onnx(path), path, images_like(read_onnx(path)))


# --- the command, and where a teacher is named ---------------------------------------------------


def test_command_converts_and_a_run_takes_the_file_itself(tmp_path):
    model = Model()
    x = of_unit_pixels(model, "image", (1, 3, 1, 1))
    path = model.save(tmp_path / "my net.onnx", tiny(model, x))
    command = [sys.executable, str(REPOSITORY / "scripts" / "convert_teacher.py")]
    done = subprocess.run(
        [*command, "--source", str(path), "--out", str(tmp_path / "out")],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "my_net" in done.stdout
    stored, direct = load_teacher(tmp_path / "out"), load_teacher(path)
    assert stored.graph == direct.graph
    assert stored.source == "my net.onnx"
    assert len(stored.source_sha256) == 64
    with pytest.raises(ReaderError, match="3 asked for"):
        convert_teacher(path, num_classes=3)
    with pytest.raises(ReaderError, match="carries its own"):
        convert_teacher(path, "resnet18")
    with pytest.raises(ReaderError, match=r"with an \.onnx file only"):
        convert_teacher(tmp_path / "x.pt", assume_bn="unit")


def test_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    model = Model()
    path = model.save(tmp_path / "m.onnx", tiny(model))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ReaderError, match=r"onnxruntime.*lrq_jax\[onnx\]"):
        read_onnx(path)


# --- what is refused ----------------------------------------------------------------------------


def test_folded_batch_norms_are_refused_with_the_way_out(tmp_path):
    model = Model()
    path = model.save(tmp_path / "m.onnx", model.head(model.conv("image", 8, 3, bias=True), 512))
    with pytest.raises(ReaderError, match=r"TrainingMode\.PRESERVE.*optimize=False.*assume-bn"):
        read_onnx(path)
    with pytest.raises(ValueError, match="expected one of"):
        read_onnx(path, assume_bn="zero")
    teacher = convert_teacher(path, assume_bn="unit", **HALF)
    assert "data-free rounding only" in " ".join(teacher.notes)
    assert not teacher.graph.batch_norms


def test_batch_norms_that_normalise_by_the_batch_are_refused(tmp_path):
    model = Model()
    x = model.conv("image", 8, 3)
    y = model.batch_norm(x, 8)
    node = model.nodes.pop()
    node.attribute.append(onnx.helper.make_attribute("training_mode", 1))
    node.output.extend(["mean_out", "var_out"])
    model.nodes.append(node)
    path = model.save(tmp_path / "m.onnx", model.head(y, 512))
    with pytest.raises(ReaderError, match=r"training_mode|Training mode"):
        read_onnx(path)


def test_unsupported_operators_are_named_with_place_and_list(tmp_path):
    model = Model()
    x = model.batch_norm(model.op("Elu", model.op("Elu", "image")), 3)
    path = model.save(tmp_path / "m.onnx", model.head(model.op("Sqrt", x), 192))
    with pytest.raises(ReaderError) as caught:
        read_onnx(path)
    text = str(caught.value)
    assert "Elu, 2 times, first node 'node0' (1 of 6)" in text
    assert "Sqrt, 1 times" in text
    assert "AveragePool, BatchNormalization" in text


REFUSED = {
    "Clip": (lambda m, x: m.op("Clip", m.op("Sigmoid", x), -1.0, 1.0), "bounds -1 and 1"),
    "HardSigmoid": (lambda m, x: m.op("HardSigmoid", x), "1/6 and 0.5"),
    "PRelu": (lambda m, x: m.op("PRelu", x, np.arange(8.0).reshape(8, 1, 1)), "one slope"),
    "MaxPool": (
        lambda m, x: m.op("MaxPool", x, kernel_shape=[2, 2], dilations=[2, 2]), "dilations",
    ),
    "AveragePool": (
        lambda m, x: m.op("AveragePool", x, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1,
                          pads=[1, 1, 1, 1], count_include_pad=1), "ceil_mode",
    ),
    "ReduceMean": (lambda m, x: m.op("ReduceMean", x, axes=[1]), "height and width"),
    "Pad": (
        lambda m, x: m.op("Pad", x, np.array([0, 0, 1, 1, 0, 0, 1, 1]), mode="reflect"),
        "padding with reflect",
    ),
    "Concat": (lambda m, x: m.op("Concat", x, x, axis=2), "along channels"),
    "Slice": (
        lambda m, x: m.op("Slice", x, np.array([7]), np.array([0]), np.array([2]), np.array([-1])),
        "step >= 1",
    ),
    "Reshape": (lambda m, x: m.op("Reshape", x, np.array([8, -1])), "batch kept"),
    "Transpose": (lambda m, x: m.op("Transpose", x, perm=[1, 0, 2, 3]), "batch alone"),
    "Add": (lambda m, x: m.op("Add", x, m.weights(1, 8, 8, 8)), "one for each channel"),
    "Mul": (
        lambda m, x: m.op("Mul", x, m.op("Slice", x, *map(np.array, ([0], [1], [2])))),
        "expected the second to be",
    ),
    "Div": (lambda m, x: m.op("Div", 1.0, x), "a constant divided"),
    "Sub": (lambda m, x: m.op("Sub", m.op("Relu", x), x), "a constant as second input"),
    "Gather": (lambda m, x: m.op("Gather", x, np.array([2, 1]), axis=1), "2 indices"),
    "Conv": (
        lambda m, x: m.op("Conv", m.op("Reshape", x, np.array([0, 8, 64])), m.weights(8, 8, 3)),
        "2-D",
    ),
    "Gemm": (lambda m, x: m.op("Relu", m.op("Softmax", m.op("Flatten", m.op("GlobalMaxPool", x)))), "behind a softmax"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_forms_that_cannot_be_read_are_refused_by_name_and_place(kind, tmp_path):
    build, message = REFUSED[kind]
    model = Model()
    x = model.op("Relu", model.batch_norm(model.conv("image", 8, 3), 8))
    y = model.op("LeakyRelu", build(model, x))
    path = model.save(tmp_path / "m.onnx", model.op("Flatten", y))
    with pytest.raises(ReaderError, match=message) as caught:
        read_onnx(path)
    assert "node" in str(caught.value)
    assert " of " in str(caught.value)


def test_several_inputs_or_outputs_and_other_inputs_are_refused(tmp_path):
    model = Model()
    x = tiny(model)
    y = model.op("Relu", x)
    onnx.save_model(model.proto(x, y), tmp_path / "two.onnx")
    with pytest.raises(ReaderError, match=r"outputs \[.*expected the logits alone"):
        read_onnx(tmp_path / "two.onnx")
    other = onnx.helper.make_tensor_value_info("other", 1, (1, 3))
    onnx.save_model(model.proto(y, inputs=[other]), tmp_path / "inputs.onnx")
    with pytest.raises(ReaderError, match=r"inputs \['image', 'other'\]"):
        read_onnx(tmp_path / "inputs.onnx")
    for shape, message in (((1, 3, 8), "3 dimensions"), ((1, 7, 8, 8), "1 or 3 channels")):
        odd = Model(shape)
        odd.save(tmp_path / "odd.onnx", odd.op("Relu", "image"))
        with pytest.raises(ReaderError, match=message):
            read_onnx(tmp_path / "odd.onnx")
    half = Model(element=onnx.TensorProto.FLOAT16)
    half.save(tmp_path / "half.onnx", half.op("Relu", "image"))
    with pytest.raises(ReaderError, match="FLOAT16"):
        read_onnx(tmp_path / "half.onnx")


# --- files that mean harm -----------------------------------------------------------------------


def test_no_file_and_no_onnx_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_onnx(tmp_path / "none.onnx")
    for content in (b"", b"\x08", b"not a model", os.urandom(1000)):
        (tmp_path / "m.onnx").write_bytes(content)
        with pytest.raises(ReaderError):
            read_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_truncated_files(share, tmp_path):
    model = Model()
    path = model.save(tmp_path / "m.onnx", tiny(model))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ReaderError):
        read_onnx(path)


def test_cycle(tmp_path):
    model = Model()
    x = tiny(model)
    model.nodes[0].input[0] = model.nodes[2].output[0]
    with pytest.raises(ReaderError, match=r"invalid ONNX model.*topologically"):
        read_onnx(model.save(tmp_path / "m.onnx", x))


def test_broken_weights_are_refused_in_every_format(tmp_path):
    model = Model()
    path = model.save(tmp_path / "m.onnx", tiny(model))
    proto = onnx.load(path)
    weight = proto.graph.initializer[0]
    weight.raw_data = np.full(weight.dims, np.nan, np.float32).tobytes()
    onnx.save_model(proto, path)
    with pytest.raises(ReaderError, match=r"^m\.onnx: found NaN.*params/.*/kernel"):
        convert_teacher(path, mean=(0.0,) * 3, std=(1.0,) * 3)


def external(tmp_path, location, **entries):
    """A model in `tmp_path/model` whose first weight lies at `location`."""
    model = Model()
    tiny_output = tiny(model)
    proto = model.proto(tiny_output)
    tensor = proto.graph.initializer[0]
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return folder / "m.onnx", data


def test_external_data_beside_the_file(tmp_path):
    path, data = external(tmp_path, "sub/weights.bin", offset=3, length=864)
    assert len(data) == 864
    (path.parent / "sub").mkdir()
    (path.parent / "sub" / "weights.bin").write_bytes(b"xyz" + data)
    network = read_onnx(path)
    kernel = next(iter(network.variables["params"].values()))["kernel"]
    expected = np.frombuffer(data, np.float32).reshape(8, 3, 3, 3).transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(kernel, expected)


def test_external_data_of_a_linked_model(tmp_path):
    """Hugging Face's cache: both files are links into one folder of blobs."""
    path, data = external(tmp_path, "m.onnx.data", length=864)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    path.rename(blobs / "aaa")
    (blobs / "bbb").write_bytes(data)
    (snapshot / "m.onnx").symlink_to("../blobs/aaa")
    (snapshot / "m.onnx.data").symlink_to("../blobs/bbb")
    assert read_onnx(snapshot / "m.onnx").variables
    (tmp_path / "secret").write_bytes(data)
    (snapshot / "m.onnx.data").unlink()
    (snapshot / "m.onnx.data").symlink_to("../secret")
    with pytest.raises(ReaderError, match="inside the model's folder: refused"):
        read_onnx(snapshot / "m.onnx")


@pytest.mark.parametrize("location", ["a\0b", "n" * 5000])
def test_external_data_under_names_that_no_file_has(location, tmp_path):
    path, _ = external(tmp_path, location)
    with pytest.raises(ReaderError, match="expected a file inside the model's folder"):
        read_onnx(path)


def test_external_data_outside_the_folder_is_refused(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(864))
    for location in ("../secret", str(tmp_path / "secret"), "sub/../../secret", ""):
        path, _ = external(tmp_path, location)
        with pytest.raises(ReaderError, match="inside the model's folder: refused"):
            read_onnx(path)
    path, _ = external(tmp_path, "link")
    (path.parent / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ReaderError, match="inside the model's folder: refused"):
        read_onnx(path)


def test_external_data_missing_or_short(tmp_path):
    path, data = external(tmp_path, "weights.bin", offset=0, length=864)
    with pytest.raises(ReaderError, match="copy both"):
        read_onnx(path)
    (path.parent / "weights.bin").write_bytes(data[:800])
    with pytest.raises(ReaderError, match="truncated"):
        read_onnx(path)
    for entries in ({"offset": -8}, {"length": -1}, {"offset": "many"}, {"length": 10**18}):
        path, data = external(tmp_path, "weights.bin", **entries)
        (path.parent / "weights.bin").write_bytes(data)
        with pytest.raises(ReaderError):
            read_onnx(path)


def test_sizes_are_bounded(tmp_path, monkeypatch):
    model = Model()
    path = model.save(tmp_path / "m.onnx", tiny(model))
    monkeypatch.setattr(onnx_file, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(ReaderError, match=r"found over \d+ bytes"):
        read_onnx(path)
    path, data = external(tmp_path, "weights.bin")
    (path.parent / "weights.bin").write_bytes(data)
    monkeypatch.setattr(onnx_file, "MAX_BYTES", path.stat().st_size + 100)
    with pytest.raises(ReaderError, match="bytes with external data"):
        read_onnx(path)


def test_a_small_file_cannot_fill_the_memory(tmp_path):
    """Terabytes of zeros from forty bytes: not folded, and so refused by name."""
    model = Model()
    zeros = model.op("ConstantOfShape", np.array([1, 3, 10**6, 10**6]))
    x = model.op("Add", "image", model.op("ReduceMean", zeros, axes=[2, 3]))
    path = model.save(tmp_path / "m.onnx", tiny(model, x))
    with pytest.raises(ReaderError):
        read_onnx(path)


def test_operators_of_other_domains_are_refused_before_anything_runs(tmp_path, monkeypatch):
    model = Model()
    x = model.op("Payload", tiny(model), domain="evil")
    proto = model.proto(x)
    proto.opset_import.append(onnx.helper.make_opsetid("evil", 1))
    onnx.save_model(proto, tmp_path / "m.onnx")
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    with pytest.raises(ReaderError, match="evil::Payload"):
        read_onnx(tmp_path / "m.onnx")


def test_a_refused_file_leaves_nothing_behind(tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr("tempfile.tempdir", str(work))
    model = Model()
    path = model.save(tmp_path / "m.onnx", model.op("Sqrt", tiny(model)))
    with pytest.raises(ReaderError, match="Sqrt"):
        read_onnx(path)
    assert not list(work.iterdir())
