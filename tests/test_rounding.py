"""lrq_jax.quantizers.rounding against loops written from the paper, and what it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import mobilenet_like, random_images, random_variables

from lrq_jax.passes import QuantSpec, Student, calibrate, freeze, frozen_logits, student_forward
from lrq_jax.passes.kernels import weight_ranges
from lrq_jax.passes.rounding import rounded_weights
from lrq_jax.quantizers.affine import AffineParameters, quantize_weight, weight_parameters
from lrq_jax.quantizers.rounding import ROUNDINGS, nearest, squant, weight_at_codes

_squant = jax.jit(squant, static_argnums=2)
_nearest = jax.jit(nearest, static_argnums=2)
_at_codes = jax.jit(weight_at_codes, static_argnums=3)
_codes = jax.jit(quantize_weight, static_argnums=2)

SHAPES = [(3, 3, 5, 4), (1, 1, 12, 3), (5, 5, 1, 6), (20, 4)]


def exact_case(shape, bits, seed):
    """Weights in 64ths of a code, so that no sum depends on its order; some beyond the range."""
    rng = np.random.default_rng(seed)
    low, high = int(bits >= 7), 2**bits - 1
    zero_point = rng.integers(low, high + 1, shape[-1])
    value = rng.integers(64 * (low - 1), 64 * (high + 1) + 1, shape) / 64 - zero_point
    scale = 2.0 ** rng.integers(-8, 3, shape[-1])
    parameters = AffineParameters(jnp.float32(scale), jnp.float32(zero_point))
    return jnp.asarray(value * scale, jnp.float32), parameters, (value, zero_point, low, high)


def squant_by_loops(value, zero_point, low, high):
    """Algorithm 1 of SQuant, weight by weight; codes less zero point."""
    codes = np.empty(value.shape)
    for o in range(value.shape[-1]):
        w = np.clip(value[..., o], low - zero_point[o], high - zero_point[o])
        w = w.reshape(-1, w.shape[-1])
        q = np.rint(w)
        for i in range(w.shape[1]):
            total = sum(q[:, i] - w[:, i])
            for _ in range(int(np.rint(abs(total)))):
                worst = max(range(len(w)), key=lambda t: np.sign(total) * (q[t, i] - w[t, i]))
                q[worst, i] -= np.sign(total)
        sums = [sum(q[:, i] - w[:, i]) for i in range(w.shape[1])]
        total = sum(sums)
        offers = []
        for i in range(w.shape[1]):
            if sums[i] * total > 0:
                gains = [np.sign(total) * (q[t, i] - w[t, i]) for t in range(len(w))]
                offers.append((-max(gains), i, int(np.argmax(gains))))
        for _, i, t in sorted(offers)[: int(np.rint(abs(total)))]:
            q[t, i] -= np.sign(total)
        codes[..., o] = q.reshape(value.shape[:-1])
    return codes


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squant_equals_the_loops(shape, bits):
    moved = 0
    for seed in range(5):
        weight, parameters, case = exact_case(shape, bits, seed)
        expected = squant_by_loops(*case) + case[1]
        found = np.asarray(_squant(weight, parameters, bits))
        np.testing.assert_array_equal(found, expected)
        moved += (found != np.asarray(_nearest(weight, parameters, bits))).sum()
    assert moved > 5


@pytest.mark.parametrize("bits", [2, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_of_squant_cancel_in_every_kernel_and_channel(shape, bits, rng):
    """Any weights: each code is one of its weight's two neighbours, in range; |sum| <= 1/2 over a
    channel and <= 1 over a kernel, where nearest codes leave more."""
    weight = jnp.asarray(rng.normal(size=shape) * rng.uniform(0.1, 3, shape[-1]), jnp.float32)
    axes = tuple(range(len(shape) - 1))
    parameters = weight_parameters(jnp.min(weight, axes), jnp.max(weight, axes), bits)
    ends = int(bits >= 7), 2**bits - 1
    value = np.float64(weight) / np.float64(parameters.scale) + np.asarray(parameters.zero_point)
    value = np.clip(value, *ends)

    def sums(codes):
        error = (np.asarray(codes) - value).reshape(-1, *shape[-2:])
        return np.abs(error).max(), np.abs(error.sum(0)).max(), np.abs(error.sum((0, 1))).max()

    codes = np.asarray(_squant(weight, parameters, bits))
    assert codes.min() >= ends[0]
    assert codes.max() <= ends[1]
    largest, kernel, channel = sums(codes)
    assert largest < 1
    assert kernel <= 1 + 1e-4
    assert channel <= 0.5 + 1e-4
    if shape[0] != 1:
        assert max(sums(_nearest(weight, parameters, bits))[1:]) > 0.5


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rounding", sorted(ROUNDINGS))
def test_a_weight_at_its_codes_rounds_to_them_and_moves_as_little_as_it_must(rounding, bits, rng):
    weight = jnp.asarray(rng.normal(size=(3, 3, 8, 5)), jnp.float32)
    limits = 0.8 * weight.min((0, 1, 2)), 0.8 * weight.max((0, 1, 2))  # some saturate
    parameters = weight_parameters(*limits, bits)
    codes = jax.jit(ROUNDINGS[rounding], static_argnums=2)(weight, parameters, bits)
    moved = _at_codes(weight, codes, parameters, bits)
    np.testing.assert_array_equal(_codes(moved, parameters, bits), codes)
    same = np.asarray(_codes(weight, parameters, bits) == codes)
    np.testing.assert_array_equal(np.asarray(moved)[same], np.asarray(weight)[same])
    assert same.all() == (rounding == "nearest")
    distance = np.abs(np.float64(moved) - np.float64(weight)) / np.float64(parameters.scale)
    to_cell = np.abs(np.asarray(codes - parameters.zero_point) - weight / parameters.scale) - 0.5
    assert (distance <= np.maximum(to_cell, 0) + 0.05 + 1e-4).all()


def test_a_rounded_student_trains_and_ships_with_the_codes_that_were_chosen():
    """Depthwise layers, negative gains and one of 0; the range search would find other ranges in
    the moved kernels."""
    graph = mobilenet_like()
    spec = QuantSpec(weight_bits=3, weight_observer="smallest_error")
    student = Student(graph=graph, spec=spec, input_range=(-2.0, 2.5))
    before = student.initial_variables(random_variables(graph))
    after = rounded_weights(student, before, "squant")

    @jax.jit
    def forwards(variables, images):
        _, variables = calibrate(student, variables, images)
        frozen = freeze(student, variables)
        trained = student_forward(student, variables, images, (graph.output,))[graph.output]
        return frozen, trained, frozen_logits(student, frozen, images)

    frozen, trained, shipped = forwards(after, random_images(5))
    np.testing.assert_array_equal(trained, shipped)
    ranges, moved = weight_ranges(spec, student.operations, before["params"]), 0
    for op in student.operations:
        if not op.weight_bits:
            continue
        kernel = before["params"][op.layer.name]["kernel"]
        parameters = weight_parameters(**ranges[op.layer.name], bits=3)
        chosen = _squant(kernel, parameters, 3)
        moved += int((chosen != _nearest(kernel, parameters, 3)).sum())
        found = frozen["weights"][op.layer.name].codes
        if op.batch_norm:
            gain = after["params"][op.batch_norm.name]["scale"]
            chosen = jnp.where(gain < 0, 7 - chosen, chosen)
            found = jnp.where(gain == 0, chosen, found)  # a constant channel has no weights
        np.testing.assert_array_equal(found, chosen, err_msg=op.layer.name)
    assert moved > 10


def test_a_rounding_for_the_paper_placement_is_refused():
    graph = mobilenet_like()
    spec = QuantSpec(placement="paper")
    student = Student(graph=graph, spec=spec, input_range=(-2.0, 2.5))
    variables = student.initial_variables(random_variables(graph))
    assert rounded_weights(student, variables, "nearest") is variables
    with pytest.raises(ValueError, match=r"rounding: found 'squant' for placement 'paper'"):
        rounded_weights(student, variables, "squant")
