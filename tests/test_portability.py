"""Files called portable run alike on every processor, whatever their weights and images."""

import copy
import functools

import numpy as np
import pytest
from small_networks import random_images, random_variables, resnet_like

from lrq_jax.passes import QuantSpec, Student, calibrate
from lrq_jax.quantizers.affine import top_code
from lrq_jax.runtimes import Reference
from lrq_jax.runtimes.onnx_runtime import OnnxRunner
from lrq_jax.runtimes.processor import saturates_pairs
from lrq_jax.runtimes.trials import hostile_codes
from lrq_jax.writers.codes import student_codes
from lrq_jax.writers.onnx_model import WEIGHT_STORAGES, onnx_model
from lrq_jax.writers.tables import LARGEST_PAIR, is_portable, layer_table

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


CASES = [(8, 8, False), (8, 7, False), (7, 8, True), (4, 4, True)]


@functools.cache
def extreme_student(weight_bits, act_bits):
    """A student all of whose weights are the largest there are, and whose tensors are not
    saturated by them: any pair of products that is cut short shows."""
    spec = QuantSpec(weight_bits=weight_bits, act_bits=act_bits)
    student = Student(graph=resnet_like(), spec=spec, input_range=(-2.0, 2.5))
    variables = student.initial_variables(random_variables(student.graph))
    _, variables = calibrate(student, variables, random_images(1))
    codes = copy.deepcopy(student_codes(student, variables))
    rng = np.random.default_rng(0)
    for operation in student.operations:
        if (bits := operation.weight_bits) is None:
            continue
        weights = codes["weights"][operation.layer.name]
        shape = weights["codes"].shape
        if bits >= 7:
            reach = 2 ** (bits - 1) - 1
            zero_point = np.full(shape[-1], 2 ** (bits - 1))
            made = zero_point + reach * rng.choice([-1, 1, 1, 1, 1], shape)
        else:
            reach = top_code(bits)
            zero_point = rng.choice([0, reach], shape[-1])
            made = rng.choice([0, reach], shape)
        weights["codes"], weights["zero_point"] = made.astype(np.uint8), zero_point.astype(np.uint8)
        weights["bias"] = np.zeros_like(weights["bias"])
        source, output = (student.origins[n] for n in (operation.inputs[0], operation.output))
        sums = top_code(student.code_bits[source]) * reach * np.prod(shape[:-1])
        wanted = 1.0
        if operation.output_bits is not None:
            wanted = codes["tensors"][output]["scale"] * top_code(operation.output_bits)
        scale = wanted / (codes["tensors"][source]["scale"] * sums)
        weights["scale"] = np.full(shape[-1], scale, np.float32)
    return student, codes


@pytest.mark.parametrize(("weight_bits", "act_bits", "portable"), CASES)
def test_portable_files_are_identical_for_any_image(weight_bits, act_bits, portable):
    """8-bit weights meet an 8-bit image whatever the activations' bits."""
    student, codes = extreme_student(weight_bits, act_bits)
    assert is_portable(student, codes) is portable
    images = np.concatenate([hostile_codes(student, codes), np.asarray(random_images(3, batch=32))])
    ours = Reference(student, codes).logits(images)
    assert len(np.unique(ours, axis=0)) >= 5
    for storage in WEIGHT_STORAGES:
        file = onnx_model(student, codes, metadata={}, weight_storage=storage).SerializeToString()
        np.testing.assert_array_equal(OnnxRunner(file, wide_pairs=True).logits(images), ours)
        plain = OnnxRunner(file).logits(images)
        if portable or not saturates_pairs():
            np.testing.assert_array_equal(plain, ours)
        else:  # or the option would do nothing
            assert (plain != ours).any(-1).mean() > 0.5


@pytest.mark.parametrize(("weight_bits", "act_bits", "portable"), CASES)
def test_the_pair_of_a_layer_is_the_largest_there_is(weight_bits, act_bits, portable):
    """As x86 adds them without VNNI: two products of uint8 and int8, saturated at int16."""
    student, codes = extreme_student(weight_bits, act_bits)
    for row in layer_table(student, codes):
        stored = codes["weights"][row["layer"]]
        centred = (stored["codes"].astype(int) - stored["zero_point"]).reshape(-1)
        top = top_code(row["input_bits"])
        pairs = top * (centred[:, None] + centred[None, :])
        saturated = np.clip(pairs, -(2**15), 2**15 - 1)
        assert np.abs(pairs).max() == row["largest_pair"]
        assert (saturated == pairs).all() == (row["largest_pair"] <= LARGEST_PAIR)
    assert is_portable(student, codes) is portable
