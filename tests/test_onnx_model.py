"""The ONNX file of a student gives our codes and logits in ONNX Runtime, bit for bit, as integers."""

import collections

import numpy as np
import pytest
from small_networks import GRAPHS, calibrated, our_results, random_images

from lrq_jax.graph import INPUT, GraphBuilder
from lrq_jax.passes import QuantSpec, Student
from lrq_jax.runtimes.onnx_runtime import WIDE_PAIRS
from lrq_jax.writers.codes import student_codes
from lrq_jax.writers.onnx_model import onnx_model
from lrq_jax.writers.onnx_writer import LOGITS, codes_name
from lrq_jax.writers.tables import is_portable

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def session_of(model, tmp_path=None, *, wide_pairs=False):
    options = onnxruntime.SessionOptions()
    if wide_pairs:
        options.add_session_config_entry(*WIDE_PAIRS)
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # that an optimised file is for this machine alone
    if tmp_path is not None:
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def with_codes(model, tensors):
    """The model with tensors of codes as further outputs."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in tensors:
        changed.graph.output.append(
            onnx.helper.make_tensor_value_info(codes_name(tensor), onnx.TensorProto.UINT8, None)
        )
    return changed


def channels_last(x):
    return np.moveaxis(x, 1, -1) if x.ndim == 4 else x


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("build", GRAPHS, ids=lambda build: build.__name__)
def test_every_code_and_logit_is_ours(build, bits):
    """On every CPU: codes called portable in a plain session, others without int16 pairs."""
    student, variables, _ = calibrated(build, bits, "R" if bits == 3 else "U")
    codes = student_codes(student, variables)
    portable = is_portable(student, codes)
    assert portable or bits == 8
    model = onnx_model(student, codes, metadata={}, weight_storage="uint4")
    images = random_images(7, batch=32)
    ours = our_results(student, codes, images)
    tensors = [name for name in ours if name != LOGITS]
    session = session_of(with_codes(model, tensors), wide_pairs=not portable)
    theirs = session.run(None, {INPUT: np.moveaxis(np.asarray(images), -1, 1)})
    for name, found in zip([LOGITS, *tensors], theirs, strict=True):
        expected = ours[name]
        np.testing.assert_array_equal(
            channels_last(found).reshape(expected.shape), expected, err_msg=name
        )
    alone = session_of(model, wide_pairs=not portable)  # no code asked for: more is fused
    found = alone.run(None, {INPUT: np.moveaxis(np.asarray(images), -1, 1)})
    np.testing.assert_array_equal(found[0], ours[LOGITS])


# Float operators that may stay: of the gates, and the pairs that turn codes into real numbers.
INTEGER_ONLY = (*GRAPHS[:5],)


@pytest.mark.parametrize("weight_storage", ["uint4", "int8"])
@pytest.mark.parametrize("build", INTEGER_ONLY, ids=lambda build: build.__name__)
def test_the_runtime_executes_integers(build, weight_storage, tmp_path):
    """What ONNX Runtime makes of the file holds no float convolution, sum or pool."""
    student, variables, _ = calibrated(build, 4)
    codes = student_codes(student, variables)
    session_of(onnx_model(student, codes, metadata={}, weight_storage=weight_storage), tmp_path)
    optimized = onnx.load(tmp_path / "optimized.onnx")
    kinds = collections.Counter(node.op_type for node in optimized.graph.node)
    floats = {"Conv", "Gemm", "MatMul", "Add", "GlobalAveragePool", "AveragePool", "Concat"}
    assert not floats & set(kinds), kinds
    weighted = [op for op in student.operations if op.has_weights]
    assert kinds["QLinearConv"] + kinds["QGemm"] == len(weighted)
    stored = {c.data_type for c in optimized.graph.initializer if len(c.dims) == 4}
    assert onnx.TensorProto.UINT4 not in stored


def wide():
    net = GraphBuilder("wide", input_shape=(8, 8, 3))
    x = net.relu(net.conv(net.image, 48, 3))
    net.dense(net.global_pool(net.relu(net.conv(x, 64, 3))), 5, name="classifier")
    return net.build()


def test_storages_and_inputs_give_the_same_logits():
    student, variables, _ = calibrated(wide, 4)
    codes = student_codes(student, variables)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)
    mean, std = np.float32([0.4, 0.5, 0.6]), np.float32([0.2, 0.25, 0.3])

    def normalised(pixels):
        return (pixels.astype(np.float32) / np.float32(255) - mean) / std

    images = normalised(pixels)
    ours = our_results(student, codes, images)[LOGITS]
    sizes = {}
    for storage in ("uint4", "int8"):
        for batch in (None, 16):
            model = onnx_model(student, codes, metadata={}, weight_storage=storage, batch=batch)
            sizes[storage] = model.ByteSize()
            found = session_of(model).run(None, {INPUT: np.moveaxis(images, -1, 1)})
            np.testing.assert_array_equal(found[0], ours)
        model = onnx_model(
            student, codes, metadata={}, weight_storage=storage, input_kind="uint8",
            table=normalised,
        )  # fmt: skip
        np.testing.assert_array_equal(session_of(model).run(None, {INPUT: pixels})[0], ours)
    assert sizes["uint4"] < 0.7 * sizes["int8"]


def standalone_batch_norm_of_a_vector():
    net = GraphBuilder("vector", input_shape=(8, 8, 3))
    x = net.global_pool(net.relu(net.conv(net.image, 6, 3)))
    net.dense(net.relu(net.batch_norm(x)), 5, name="classifier")
    return net.build()


def test_a_batch_norm_of_a_vector():
    student, variables, _ = calibrated(standalone_batch_norm_of_a_vector, 4)
    codes = student_codes(student, variables)
    images = random_images(3)
    session = session_of(onnx_model(student, codes, metadata={}))
    found = session.run(None, {INPUT: np.moveaxis(np.asarray(images), -1, 1)})
    np.testing.assert_array_equal(found[0], our_results(student, codes, images)[LOGITS])


def test_the_file_says_what_it_is():
    student, variables, _ = calibrated(GRAPHS[0], 4)
    model = onnx_model(student, student_codes(student, variables), metadata={"a": [1]}, batch=4)
    assert (model.ir_version, model.opset_import[0].version) == (10, 21)
    assert {p.key: p.value for p in model.metadata_props} == {"lrq_jax": '{"a": [1]}'}
    (image,) = model.graph.input
    assert [d.dim_value for d in image.type.tensor_type.shape.dim] == [4, 3, 8, 8]


def test_refusals():
    student, variables, _ = calibrated(GRAPHS[0], 4)
    codes = student_codes(student, variables)
    with pytest.raises(ValueError, match="weight_storage: found 'int4', expected one of"):
        onnx_model(student, codes, metadata={}, weight_storage="int4")
    with pytest.raises(ValueError, match="input_kind: found 'jpeg'"):
        onnx_model(student, codes, metadata={}, input_kind="jpeg")
    with pytest.raises(ValueError, match="found no table"):
        onnx_model(student, codes, metadata={}, input_kind="uint8")
    paper = Student(graph=student.graph, spec=QuantSpec(placement="paper"), input_range=(-1, 1))
    with pytest.raises(ValueError, match="found placement 'paper', expected 'integer'"):
        onnx_model(paper, codes, metadata={})
    name = student.operations[0].layer.name
    weights = {**codes["weights"][name], "codes": codes["weights"][name]["codes"] + 200}
    bad = {**codes, "weights": {**codes["weights"], name: weights}}
    with pytest.raises(ValueError, match=rf"layer '{name}': found weights from .* expected int8"):
        onnx_model(student, bad, metadata={})
