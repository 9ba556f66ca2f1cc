"""The .tflite file of a student gives our codes and logits in LiteRT, bit for bit, as integers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import GRAPHS, calibrated, our_results, random_images

from lrq_jax.graph import INPUT, GraphBuilder
from lrq_jax.graph import layers as L
from lrq_jax.passes import QuantSpec, Student
from lrq_jax.passes.integer_forward import QuantizedTensor
from lrq_jax.quantizers.affine import AffineParameters
from lrq_jax.runtimes.litert import LiteRTModel
from lrq_jax.writers import extras, tflite_builder
from lrq_jax.writers import tflite_model as module
from lrq_jax.writers.codes import student_codes
from lrq_jax.writers.sum_constants import Sum, fixed_point_sum, int8_sum_is_ours, sum_constants
from lrq_jax.writers.tflite_float import tflite_float_twin
from lrq_jax.writers.tflite_model import LOGITS, tflite_model

interpreter = pytest.importorskip(
    "ai_edge_litert.interpreter", reason="the extra [litert] is not installed"
)


def assert_all_ours(student, codes, file, images, *, batch):
    ours = our_results(student, codes, images)
    names = [name for name in ours if name != LOGITS]
    logits, found = LiteRTModel(file, codes=names, batch=batch).run_with_codes(np.asarray(images))
    for name in names:
        np.testing.assert_array_equal(
            found[name].reshape(ours[name].shape), ours[name], err_msg=name
        )
    np.testing.assert_array_equal(logits, ours[LOGITS])
    np.testing.assert_array_equal(LiteRTModel(file).run(np.asarray(images)), ours[LOGITS])


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("build", GRAPHS, ids=lambda build: build.__name__)
def test_every_code_and_logit_is_ours(build, bits):
    student, variables, _ = calibrated(build, bits, "R" if bits == 3 else "U")
    codes = student_codes(student, variables)
    file = tflite_model(student, codes, metadata={})
    assert_all_ours(student, codes, file, random_images(7, batch=32), batch=32)


def test_signed_codes_of_few_bits_are_clipped_at_both_ends():
    """Convolution outputs before a sum at 5 bits, and images beyond the calibrated range."""
    student, variables, _ = calibrated(GRAPHS[0], 4)
    student = dataclasses.replace(
        student, spec=dataclasses.replace(student.spec, boundary_bits=5), input_range=(-6.0, 7.5)
    )
    codes = student_codes(student, variables)
    file = tflite_model(student, codes, metadata={})
    images = 3 * random_images(7, batch=16)
    ours = our_results(student, codes, images)
    convolutions = [op.output for op in student.operations if op.activation is None][:2]
    for name in convolutions:
        assert codes["tensors"][name]["zero_point"] > 0
        assert {0, 31} <= set(np.unique(ours[name]).astype(int))
    assert_all_ours(student, codes, file, images, batch=16)


def operators(file):
    """(operator, types of its inputs) of a file."""
    schema = tflite_builder.schema()
    model = schema.ModelT.InitFromPackedBuf(file)
    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if not k.startswith("_")}
    types = {v: k for k, v in vars(schema.TensorType).items() if not k.startswith("_")}
    (graph,) = model.subgraphs
    return [
        (
            names[model.operatorCodes[op.opcodeIndex].builtinCode],
            [types[graph.tensors[i].type] for i in op.inputs if i >= 0],
        )
        for op in graph.operators
    ]


SLICES = {
    "every second pixel": ({"step": (2, 2, 1)}, "DEPTHWISE_CONV_2D"),
    "every third column": ({"step": (1, 3, 1)}, "DEPTHWISE_CONV_2D"),
    "rows and columns at strides of their own": ({"step": (3, 2, 1)}, "DEPTHWISE_CONV_2D"),
    "not from the first pixel": ({"start": (1, 0, 0), "step": (2, 2, 1)}, "STRIDED_SLICE"),
    "not to the last pixel": ({"stop": (6, None, None), "step": (2, 2, 1)}, "STRIDED_SLICE"),
    "every second channel": ({"step": (2, 2, 2)}, "STRIDED_SLICE"),
    "a crop": ({"start": (1, 2, 0)}, "STRIDED_SLICE"),
}


@pytest.mark.parametrize("name", SLICES)
def test_slices_keep_every_code_in_an_operator_that_the_runtime_has(name):
    """XNNPACK has convolutions, and no slices with steps."""
    arguments, operator = SLICES[name]

    def build():
        net = GraphBuilder("sliced", input_shape=(8, 8, 3))
        x = net.batch_norm(net.conv(net.image, 4, 3))
        net.dense(net.global_pool(net.add(*2 * [net.slice(x, **arguments)])), 5, name="classifier")
        return net.build()

    student, variables, _ = calibrated(build, 4)
    codes = student_codes(student, variables)
    file = tflite_model(student, codes, metadata={})
    written = [kind for kind, _ in operators(file)]
    assert operator in written
    assert ("STRIDED_SLICE" in written) == (operator == "STRIDED_SLICE")
    assert_all_ours(student, codes, file, random_images(7, batch=16), batch=16)
    twin = [kind for kind, _ in operators(tflite_float_twin(student, codes))]
    assert operator in twin, "speed is compared with a twin that has the same advantage"


def test_convolutions_and_sums_run_as_integers():
    student, variables, _ = calibrated(GRAPHS[0], 4)
    found = operators(tflite_model(student, student_codes(student, variables), metadata={}))
    convolutions = [inputs for kind, inputs in found if "CONV" in kind]
    assert len(convolutions) == sum(isinstance(op.layer, L.Conv) for op in student.operations)
    assert {tuple(inputs) for inputs in convolutions} == {("INT8", "INT8", "INT32")}
    assert ("ADD", ["INT8", "INT8"]) in found


@pytest.mark.parametrize("bits", [4, 8])
def test_float_sums_give_our_codes_too(bits, monkeypatch):
    """The form for sums that the int8 addition does not compute exactly."""
    monkeypatch.setattr(module, "int8_sum_is_ours", lambda addition: False)
    for build in GRAPHS[:2]:
        student, variables, _ = calibrated(build, bits)
        codes = student_codes(student, variables)
        file = tflite_model(student, codes, metadata={})
        assert ("ADD", ["INT8", "INT8"]) not in operators(file)
        assert_all_ours(student, codes, file, random_images(5, batch=16), batch=16)


def random_sum(rng, bits, *, signed):
    zeros = rng.integers(1, 2**bits - 1, 3) if signed else np.zeros(3)
    scales = rng.uniform(0.3, 2, 3) / 2.0**bits
    a, b, c = (
        AffineParameters(np.float32(s), np.float32(z)) for s, z in zip(scales, zeros, strict=True)
    )
    return Sum(QuantizedTensor(None, a, bits), QuantizedTensor(None, b, bits), c, bits)


def run_sum(addition, a, b):
    """LiteRT's int8 addition of integers beside the zero points, its output beside -128."""
    builder = tflite_builder.TFLiteBuilder("sum", 1)
    scales = [x.parameters.scale for x in (addition.a, addition.b)]
    inputs = [
        builder.tensor(name, (a.size,), "int8", (scale, 0))
        for name, scale in zip("ab", scales, strict=True)
    ]
    output = builder.tensor("c", (a.size,), "int8", (addition.c.scale, -128))
    builder.node("ADD", inputs, output)
    file = builder.serialized(dict(zip("ab", inputs, strict=True)), {"c": output}, {}, "")
    runtime = interpreter.Interpreter(model_content=file, num_threads=1)
    runtime.allocate_tensors()
    for detail, values in zip(runtime.get_input_details(), (a, b), strict=True):
        runtime.set_tensor(detail["index"], values.astype(np.int8)[None])
    runtime.invoke()
    return runtime.get_tensor(runtime.get_output_details()[0]["index"])[0].astype(int) + 128


def test_the_model_of_the_runtimes_int8_sum_is_exact():
    """All 2^16 pairs; the proof that a sum is ours stands on it."""
    rng = np.random.default_rng(0)
    a, b = (x.reshape(-1) for x in np.meshgrid(np.arange(-128, 128), np.arange(-128, 128)))
    for _ in range(8):
        addition = random_sum(rng, 8, signed=False)
        expected = np.clip(fixed_point_sum(a, b, addition.ratios()), 0, 255)
        np.testing.assert_array_equal(run_sum(addition, a, b), expected)


@pytest.mark.parametrize("signed", [False, True])
def test_constants_of_sums_are_found(signed):
    rng = np.random.default_rng(1)
    one = np.float32(1)
    additions = [random_sum(rng, 8, signed=signed) for _ in range(12)]
    assert all(sum_constants(addition, (one, one)) for addition in additions)
    exact = [int8_sum_is_ours(addition) for addition in additions]
    assert any(exact)
    assert not all(exact)  # so that the other form is needed


def test_inputs_batches_and_metadata():
    student, variables, _ = calibrated(GRAPHS[0], 4)
    codes = student_codes(student, variables)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    mean, std = np.float32([0.4, 0.5, 0.6]), np.float32([0.2, 0.25, 0.3])

    def normalised(pixels):
        return (pixels.astype(np.float32) / np.float32(255) - mean) / std

    images = normalised(pixels)
    ours = our_results(student, codes, images)[LOGITS]
    for batch in (1, 2):
        model = LiteRTModel(tflite_model(student, codes, metadata={"a": [1]}, batch=batch))
        assert model.batch == batch
        np.testing.assert_array_equal(model.run(images), ours)
    assert model.metadata["a"] == [1]
    assert model.metadata["tensors"][INPUT]["zero_point"] == codes["tensors"][INPUT]["zero_point"]
    file = tflite_model(student, codes, metadata={}, input_kind="uint8", table=normalised)
    np.testing.assert_array_equal(LiteRTModel(file, batch=3).run(pixels), ours)


def test_refusals(monkeypatch):
    student, variables, _ = calibrated(GRAPHS[0], 4)
    codes = student_codes(student, variables)
    with pytest.raises(ValueError, match="input_kind: found 'jpeg'"):
        tflite_model(student, codes, metadata={}, input_kind="jpeg")
    with pytest.raises(ValueError, match="found no table"):
        tflite_model(student, codes, metadata={}, input_kind="uint8")
    with pytest.raises(ValueError, match="batch: found 0"):
        tflite_model(student, codes, metadata={}, batch=0)
    paper = Student(graph=student.graph, spec=QuantSpec(placement="paper"), input_range=(-1, 1))
    with pytest.raises(ValueError, match="found placement 'paper', expected 'integer'"):
        tflite_model(paper, codes, metadata={})
    name = student.operations[0].layer.name
    weights = {**codes["weights"][name], "codes": codes["weights"][name]["codes"] + 200}
    bad = {**codes, "weights": {**codes["weights"], name: weights}}
    with pytest.raises(ValueError, match=rf"layer '{name}': found weights from .* expected -127"):
        tflite_model(student, bad, metadata={})
    file = tflite_model(student, codes, metadata={})
    with pytest.raises(ValueError, match=r"found no tensors \['nowhere.codes'\]"):
        LiteRTModel(file, codes=["nowhere"])
    with pytest.raises(ValueError, match=r"no \.tflite file"):
        LiteRTModel(b"not a model")
    with pytest.raises(ValueError, match=r"found images \(1, 4, 4, 3\) of float32"):
        LiteRTModel(file).run(np.zeros((1, 4, 4, 3), np.float32))

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"lrq_jax\[litert\]"):
        tflite_model(student, codes, metadata={})


def test_a_layer_without_a_form_is_refused_by_name():
    student, _, _ = calibrated(GRAPHS[0], 4)
    operation = dataclasses.replace(
        student.operations[0], layer=L.Layer(name="odd", inputs=(INPUT,))
    )
    with pytest.raises(ValueError, match=r"layer 'odd': found type Layer, which has no \.tflite"):
        module._write(operation.layer, operation, None)


def test_logits_that_float32_cannot_sum_are_refused():
    net = GraphBuilder("long", input_shape=(8, 8, 3))
    net.dense(net.flatten(net.image), 2, name="classifier")
    student = Student(graph=net.build(), spec=QuantSpec(weight_bits=8), input_range=(0.0, 1.0))
    length = 8 * 8 * 3
    weights = {
        "codes": np.full((length, 2), 255, np.uint8),
        "zero_point": np.full(2, 128, np.uint8),
        "scale": np.ones(2, np.float32),
        "bias": np.zeros(2, np.int32),
    }
    codes = {
        "weights": {"classifier": weights},
        "tensors": {INPUT: {"scale": np.float32(1 / 255), "zero_point": np.uint8(0)}},
        "tables": {},
    }
    images = jnp.full((1, 8, 8, 3), 1.0)
    file = tflite_model(student, codes, metadata={})
    np.testing.assert_array_equal(
        LiteRTModel(file).run(np.asarray(images)), our_results(student, codes, images)[LOGITS]
    )
    wide = {**weights, "codes": np.repeat(weights["codes"], 4, axis=0)}
    with pytest.raises(ValueError, match="layer 'classifier': found sums up to 24871680"):
        tflite_model(student, {**codes, "weights": {"classifier": wide}}, metadata={})
