"""Learned rounding and block reconstruction on small networks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_programs import compiled_programs
from small_networks import GRAPHS, random_images, random_variables, resnet_like

from lrq_jax.graph import GraphBuilder
from lrq_jax.method import Method
from lrq_jax.passes import (
    QuantSpec,
    Student,
    calibrate,
    float_forward,
    freeze,
    frozen_logits,
    student_forward,
)
from lrq_jax.passes.blocks import block_forward, blocks_of, canonical
from lrq_jax.passes.kernels import kernel_parameters
from lrq_jax.presets import preset
from lrq_jax.quantizers import adaround
from lrq_jax.quantizers.affine import quantize_weight, weight_parameters
from lrq_jax.synthesis.generator import GeneratorSpec
from lrq_jax.training import reconstruction
from lrq_jax.training.reconstruction import reconstructed
from lrq_jax.training.spec import StepSpec
from lrq_jax.training.steps import initial_state

pytestmark = pytest.mark.usefixtures("quick_compilation")


def student_of(build, **spec):
    graph = build()
    settings = {"weight_bits": 3, "act_bits": 4, **spec}
    return Student(graph=graph, spec=QuantSpec(**settings), input_range=(-2.0, 2.5))


# ---- soft rounding -------------------------------------------------------------------------------


def test_soft_rounding_starts_at_the_weight_and_ends_at_one_of_its_two_codes(rng):
    weight = jnp.asarray(rng.normal(size=(3, 3, 4, 5)), jnp.float32)
    parameters = weight_parameters(weight.min((0, 1, 2)), weight.max((0, 1, 2)), 3)
    value = np.float64(weight) / np.asarray(parameters.scale)
    zero_point = np.asarray(parameters.zero_point)
    choice = adaround.initial_choice(weight, parameters)
    soft = adaround.soft_codes(weight, choice, parameters, 3)
    np.testing.assert_allclose(soft, np.clip(value + zero_point, 0, 7), atol=1e-4)
    sure = np.abs(value - np.floor(value) - 0.5) > 1e-3
    hard = np.asarray(adaround.hard_codes(weight, choice, parameters, 3))
    nearest = np.asarray(quantize_weight(weight, parameters, 3))
    np.testing.assert_array_equal(hard[sure], nearest[sure])
    for made, expected in ((9.0, np.floor(value) + 1), (-9.0, np.floor(value))):
        found = adaround.soft_codes(weight, jnp.full(weight.shape, made), parameters, 3)
        np.testing.assert_array_equal(found, np.clip(expected + zero_point, 0, 7))


def test_the_regulariser_is_the_formula_and_zero_when_all_is_decided(rng):
    choice = rng.normal(size=(4, 5)) * 2
    for beta in (20.0, 2.0):
        total = 0.0
        for v in choice.ravel():
            h = min(max(1.2 / (1 + np.exp(-v)) - 0.1, 0.0), 1.0)
            total += 1 - abs(2 * h - 1) ** beta
        np.testing.assert_allclose(adaround.undecided(jnp.float32(choice), beta), total, rtol=1e-4)
    assert adaround.undecided(jnp.asarray([-9.0, 9.0]), 2.0) == 0


# ---- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", GRAPHS, ids=lambda build: build.__name__)
def test_blocks_chained_are_the_network(build):
    student = student_of(build)
    blocks = blocks_of(student)
    assert [op for block in blocks for op in block.operations] == list(student.operations)
    assert all(any(op.weight_bits for op in block.operations) for block in blocks)
    variables, x = random_variables(student.graph), random_images(1, batch=2)
    outputs = [block.output for block in blocks]
    whole = float_forward(student.graph, variables, x, outputs)
    source = "image"
    for block in blocks:
        assert block.source == source
        source = block.output
        x = block_forward(block, variables, {}, x)
        np.testing.assert_allclose(x, whole[block.output], rtol=1e-4, atol=1e-4)
    assert source == student.graph.output


def test_residual_blocks_are_cut_where_everything_passes_one_tensor():
    blocks = blocks_of(student_of(resnet_like))
    sizes = [sum(bool(op.weight_bits) for op in block.operations) for block in blocks]
    assert sizes == [1, 2, 3, 1]


def alike(count):
    """Residual blocks that differ in nothing but names, between two others."""
    net = GraphBuilder("alike", input_shape=(8, 8, 3))
    x = net.relu(net.batch_norm(net.conv(net.image, 4, 3)))
    for _ in range(count):
        x = net.relu(net.add(x, net.batch_norm(net.conv(x, 4, 3))))
    net.dense(net.global_pool(x), 5, name="classifier")
    return net.build()


def test_blocks_are_equal_but_for_names_if_all_else_is():
    def forms(**spec):
        student = student_of(functools.partial(alike, 3), **spec)
        return [canonical(block)[0] for block in blocks_of(student)]

    plain = forms()
    assert plain[1] == plain[2] == plain[3]
    assert len(set(plain)) == 3
    for bits in ("w5", "a5"):
        changed = forms(overrides=(f"conv2={bits}",))
        assert [a == b for a, b in zip(plain, changed, strict=True)] == [1, 1, 0, 1, 1]
    edges = forms(policy="R")  # other weights at both ends
    assert [a == b for a, b in zip(plain, edges, strict=True)] == [0, 1, 1, 1, 0]
    assert not set(plain) & set(forms(weight_bits=5))


# ---- reconstruction ------------------------------------------------------------------------------


METHOD = Method(
    rounding="adaround",
    reconstruction_iterations=200,
    reconstruction_batch_size=16,
    reconstruction_learning_rate=0.03,
    reconstruction_step_rate=1e-2,
    reconstruction_regularizer=1e-3,
)


def one_block():
    """As little as has a residual block, a layer without batch norm and one without codes."""
    net = GraphBuilder("one_block", input_shape=(8, 8, 3))
    x = net.relu(net.batch_norm(net.conv(net.image, 4, 3)))
    x = net.relu(net.add(x, net.batch_norm(net.conv(x, 4, 3))))
    net.dense(net.global_pool(x), 5, name="classifier")
    return net.build()


@pytest.fixture(scope="module")
def rebuilt():
    """A calibrated student before and after, with its images."""
    student, x = student_of(one_block), random_images(2, batch=64)
    before = student.initial_variables(random_variables(student.graph))
    _, before = jax.jit(lambda v, x: calibrate(student, v, x))(before, x)
    return student, before, reconstructed(student, before, x, METHOD, jax.random.key(0)), x


def test_blocks_alike_share_their_programs_and_nothing_changes(monkeypatch):
    """Four blocks of three kinds, under common names and under their own."""
    method = dataclasses.replace(METHOD, reconstruction_iterations=3, reconstruction_step_rate=0.1)
    student, x = student_of(functools.partial(alike, 2)), random_images(2, batch=32)
    before = student.initial_variables(random_variables(student.graph))
    _, before = jax.jit(lambda v, x: calibrate(student, v, x))(before, x)

    def run():
        with compiled_programs() as names:
            made = reconstructed(student, before, x, method, jax.random.key(0))
        ours = ("reconstruction_step", "_exact_block", "_hard_block")
        return made, [sum(name == f"jit({own})" for name in names) for own in ours]

    shared, programs = run()
    assert programs == [3, 3, 3]
    own_names = {layer.name: layer.name for layer in student.graph.layers}
    monkeypatch.setattr(reconstruction, "canonical", lambda block: (block, own_names))
    separate, programs = run()
    assert programs == [4, 4, 4]
    jax.tree.map(np.testing.assert_array_equal, shared, separate)
    assert all(float(value) for value in shared["quant"]["stretch"]["activations"].values())
    for name in ("conv1", "conv2"):
        old, new = (values["params"][name]["kernel"] for values in (before, shared))
        assert (old != new).any()


def test_reconstruction_brings_the_student_nearer_to_the_float_network(rebuilt):
    student, before, after, x = rebuilt
    output = student.graph.output
    exact = float_forward(student.graph, before, x, (output,))[output]
    forward = jax.jit(lambda v, x: student_forward(student, v, x, (output,))[output])
    errors = [float(jnp.mean((forward(v, x) - exact) ** 2)) for v in (before, after)]
    assert errors[1] < 0.8 * errors[0]


def test_a_rebuilt_student_ships_what_it_trained_with(rebuilt):
    """Hard codes, each the floor or ceiling of the float weight; forwards equal bit for bit."""
    student, before, after, x = rebuilt
    output, changed = student.graph.output, 0
    forward = jax.jit(lambda v, x: student_forward(student, v, x, (output,))[output])
    shipped = jax.jit(lambda v, x: frozen_logits(student, freeze(student, v), x))
    np.testing.assert_array_equal(forward(after, x), shipped(after, x))
    for op in student.operations:
        if not op.weight_bits:
            continue
        parameters = kernel_parameters(student.spec, after, op)
        name = op.layer.name
        old, new = (v["params"][name]["kernel"] for v in (before, after))
        codes = quantize_weight(new, parameters, 3) - parameters.zero_point
        assert np.abs(np.asarray(codes - old / parameters.scale)).max() < 1 + 1e-4
        changed += int((quantize_weight(old, parameters, 3) != codes + parameters.zero_point).sum())
    assert changed > 10
    stretch = after["quant"]["stretch"]["activations"].values()
    assert all(float(value) != 0 for value in stretch)


def test_the_loss_is_the_mean_over_pixels_of_the_error_and_of_choices_not_made(rebuilt):
    """All left unquantized but the weights, which start where they are but for those few that the
    range clips."""
    student, before, _, x = rebuilt
    block = blocks_of(student)[0]
    method = dataclasses.replace(METHOD, reconstruction_drop=1.0)
    state = reconstruction.initial_block(student.spec, block, before, method)
    target = block_forward(block, before, {}, x) + 0.5
    images = reconstruction.BlockImages(jnp.zeros_like(x), x, target)
    loss = jax.jit(
        lambda step: reconstruction.reconstruction_loss(
            state.trainable, before, images, jax.random.key(0), step,
            spec=student.spec, block=block, method=method,
        )
    )  # fmt: skip
    channels = target.shape[-1]
    early, metrics = loss(jnp.int32(0))
    np.testing.assert_allclose(early, channels * 0.25, rtol=0.01)
    late, metrics = loss(jnp.int32(59))
    np.testing.assert_allclose(
        late, channels * 0.25 + 1e-3 * metrics["reconstruction/undecided"], rtol=0.01
    )
    assert metrics["reconstruction/undecided"] > 1


def test_a_state_has_its_structure_before_reconstruction(rebuilt):
    """A run resumed after the reconstruction restores into a state as it is at the start."""
    student, before, after, _ = rebuilt
    method = preset("fast", image_size=8).method
    spec = StepSpec(
        student=student,
        generator=GeneratorSpec(image_shape=(8, 8, 3), num_classes=5),
        method=dataclasses.replace(method, rounding="adaround"),
    )
    teacher = {name: before[name] for name in ("params", "batch_stats")}
    state = jax.eval_shape(lambda v: initial_state(spec, v, 0), teacher)
    assert jax.tree.structure(state.student) == jax.tree.structure(after)
