"""Bits per layer: sensitivities and costs from their definitions, the choice by brute force."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from small_networks import mobilenet_like, random_images, random_variables

from lrq_jax.passes import QuantSpec, Student, float_logits
from lrq_jax.passes.mixed_precision import allocate, costs, overrides, sensitivities
from lrq_jax.quantizers.affine import dequantize, quantize_weight, weight_parameters

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def student():
    graph = mobilenet_like()
    spec = QuantSpec(act_bits=3)
    return Student(graph=graph, spec=spec, input_range=(-2.0, 2.5))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_the_choice_is_the_best_of_all(share, rng):
    bits = (2, 4, 5)
    for _ in range(5):
        harm = {f"l{i}": dict(zip(bits, rng.exponential(size=3), strict=True)) for i in range(6)}
        sizes = rng.integers(1, 50, 6)
        cost = {f"l{i}": {b: float(b * sizes[i]) for b in bits} for i in range(6)}
        limit = float(sizes.sum() * (2 + 3 * share))
        best = np.inf
        for choice in itertools.product(bits, repeat=6):
            taken = sum(cost[f"l{i}"][b] for i, b in enumerate(choice))
            if taken <= limit:
                best = min(best, sum(harm[f"l{i}"][b] for i, b in enumerate(choice)))
        found = allocate(harm, cost, limit)
        assert set(found) == set(harm)
        assert sum(cost[layer][b] for layer, b in found.items()) <= limit * (1 + 1e-6)
        np.testing.assert_allclose(sum(harm[layer][b] for layer, b in found.items()), best)


def test_a_budget_below_the_fewest_bits_is_refused():
    with pytest.raises(ValueError, match=r"found a limit of 3, expected at least 4"):
        allocate({"a": {2: 1.0}}, {"a": {2: 4.0}}, 3)


def test_costs_are_weights_and_multiplications(student):
    size, work = costs(student, "size", (2, 5)), costs(student, "bit_operations", (2, 5))
    layers = {layer.name: layer for layer in student.graph.weighted}
    assert size["conv0"] == {2: 2 * 108, 5: 5 * 108}  # 3 x 3 x 3 x 4 weights
    assert work["conv0"] == {2: 2 * 8 * 108 * 16, 5: 5 * 8 * 108 * 16}  # at 4 x 4 pixels
    assert layers["conv2"].groups == 12
    assert work["conv2"][2] == 2 * 3 * 9 * 12 * 16  # depthwise, of codes of 3 bits
    assert work["classifier"][5] == 5 * 8 * 6 * 5  # of a pooled tensor of 8 bits
    with pytest.raises(ValueError, match=r"budget: found 'watts'"):
        costs(student, "watts")


def test_sensitivity_is_the_divergence_one_kernel_makes(student):
    graph, images = student.graph, random_images(1, batch=16)
    variables = random_variables(graph)
    table = sensitivities(student, variables, images, (2, 8))
    assert set(table) == {layer.name for layer in graph.weighted}
    entry = variables["params"]["conv1"]
    kernel = entry["kernel"]
    parameters = weight_parameters(kernel.min((0, 1, 2)), kernel.max((0, 1, 2)), 2)
    coarse = dequantize(quantize_weight(kernel, parameters, 2), parameters)
    params = {**variables["params"], "conv1": {**entry, "kernel": coarse}}
    p, q = (
        np.float64(jax.nn.softmax(float_logits(graph, v, images)))
        for v in (variables, {**variables, "params": params})
    )
    expected = np.mean([sum(a * np.log(a / b)) for a, b in zip(p, q, strict=True)])
    np.testing.assert_allclose(table["conv1"][2], expected, rtol=1e-3)
    assert all(0 <= by_bits[8] < by_bits[2] for by_bits in table.values())


def test_a_choice_becomes_overrides_of_the_student(student):
    bits = {layer.name: 2 + i % 5 for i, layer in enumerate(student.graph.weighted)}
    spec = dataclasses.replace(student.spec, overrides=overrides(bits))
    changed = dataclasses.replace(student, spec=spec)
    assert {op.layer.name: op.weight_bits for op in changed.operations if op.weight_bits} == bits
