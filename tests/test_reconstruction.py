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
from lrq_jax.passes.blocks import block_forward, blocks_of, canonical, fake_quantized
from lrq_jax.passes.kernels import kernel_parameters
from lrq_jax.presets import preset
from lrq_jax.quantizers import adaround
from lrq_jax.quantizers.affine import quantize_weight, weight_parameters
from lrq_jax.resources import Resources
from lrq_jax.sharding import data_mesh, replicated
from lrq_jax.synthesis.generator import GeneratorSpec
from lrq_jax.training import reconstruction
from lrq_jax.training.compilation import compile_step, put_replicated
from lrq_jax.training.reconstruction import reconstructed, reconstruction_step
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


def spec_of(student, devices=1, **method):
    return StepSpec(
        student=student,
        generator=GeneratorSpec(image_shape=(8, 8, 3), num_classes=5),
        method=dataclasses.replace(METHOD, **method),
        mesh=data_mesh(devices),
    )


def calibrated(build, images):
    student, x = student_of(build), random_images(2, batch=images)
    before = student.initial_variables(random_variables(student.graph))
    _, before = jax.jit(lambda v, x: calibrate(student, v, x))(before, x)
    return student, before, x


@pytest.fixture(scope="module")
def rebuilt():
    """A calibrated student before and after, with its images."""
    student, before, x = calibrated(one_block, 64)
    return student, before, reconstructed(spec_of(student), before, x, jax.random.key(0)), x


def test_blocks_alike_share_their_programs_and_nothing_changes(monkeypatch):
    """Four blocks of three kinds, under common names and under their own."""
    student, before, x = calibrated(functools.partial(alike, 2), 32)
    spec = spec_of(student, reconstruction_iterations=3, reconstruction_step_rate=0.1)

    def run():
        with compiled_programs() as names:
            made = reconstructed(spec, before, x, jax.random.key(0))
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


@pytest.mark.parametrize("devices", [2, 8])
def test_a_split_step_is_one_devices_step_and_exchanges_no_images(rebuilt, devices):
    student, before, _, x = rebuilt
    block = blocks_of(student)[1]
    target = block_forward(block, before, {}, block_forward(blocks_of(student)[0], before, {}, x))

    def run(devices):
        spec = spec_of(student, devices, reconstruction_step_rate=0.1)
        seen = reconstruction.BlockImages(target * 0.9, target, target * 1.1)
        state = reconstruction.initial_block(spec, block, before, jax.random.key(3))
        state, *arguments = put_replicated((state, before, seen), spec.mesh)
        program = compile_step(
            reconstruction_step, state, *arguments, mesh=spec.mesh, spec=spec, block=block
        )
        losses = []
        for _ in range(3):
            state, metrics = program(state, *arguments)
            losses.append(metrics["reconstruction/error"][0])
        return jax.device_get((state.trainable, losses)), program.as_text()

    (one, errors), alone = run(1)
    (many, split_errors), text = run(devices)
    np.testing.assert_allclose(split_errors, errors, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), many, one)
    assert any(np.abs(value).max() > 0.1 for value in jax.tree.leaves(one["stretch"]))
    assert "all-reduce" not in alone
    assert "all-reduce" in text
    for moving in ("all-gather", "all-to-all", "collective-permute"):
        assert moving not in text
    own = METHOD.reconstruction_batch_size // devices
    assert f"f32[{own},8,8,4]" in text
    assert f"f32[{METHOD.reconstruction_batch_size},8,8,4]" not in text


def test_passes_of_the_images_are_split_and_leave_a_copy_on_each_device(rebuilt):
    student, before, _, x = rebuilt
    block, mesh = blocks_of(student)[0], data_mesh(8)
    before, x = put_replicated((before, x), mesh)
    for run, static in ((reconstruction._exact_block, {}), (reconstruction._hard_block, {"spec": student.spec})):  # fmt: skip
        program = run.lower(x, before, mesh=mesh, block=block, **static).compile()
        assert f"f32[{len(x) // 8},8,8,4]" in program.as_text()
        assert program(x, before).sharding.is_fully_replicated


def test_a_batch_that_cannot_be_split_is_said_and_rebuilt_the_same(capsys):
    """Of 12 images; the pool's last part, of 4, cannot be split over 8 devices either."""
    student, before, x = calibrated(one_block, 28)
    short = {"reconstruction_iterations": 4, "reconstruction_batch_size": 12}

    def run(devices):
        spec = spec_of(student, devices, **short)
        made = reconstructed(spec, before, x, jax.random.key(0))
        sharding = replicated(spec.mesh)
        assert all(
            leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf in jax.tree.leaves(made)
        )
        return jax.device_get(made), capsys.readouterr().out

    one, said = run(1)
    assert "cannot be split" not in said
    many, said = run(8)
    assert "12 images an iteration cannot be split over 8 devices; each computes them all" in said
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), many, one)


def test_iterations_in_one_dispatch_are_those_of_single_ones(monkeypatch):
    student, before, x = calibrated(one_block, 32)
    counts = []

    def counting(*arguments, count, **options):
        counts.append(count)
        return compile_step(*arguments, count=count, **options)

    monkeypatch.setattr(reconstruction, "compile_step", counting)
    spec = spec_of(student, reconstruction_iterations=6, reconstruction_step_rate=0.1)

    def run(most):
        made = reconstructed(spec, before, x, jax.random.key(0), steps_per_dispatch=most)
        return jax.device_get(made)

    single, several = run(1), run(4)
    assert counts == [1, 1, 1, 3, 3, 3]  # 4 do not divide 6
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), several, single
    )


def test_what_is_computed_again_is_the_same(rebuilt):
    student, before, _, x = rebuilt
    plain = spec_of(student, reconstruction_iterations=3, reconstruction_step_rate=0.1)
    again = dataclasses.replace(plain, resources=Resources(rematerialize="elementwise"))

    def program(spec):
        block = blocks_of(student)[1]
        target = jnp.zeros((16, 8, 8, 4))
        seen = reconstruction.BlockImages(target, target, target)
        state = reconstruction.initial_block(spec, block, before, jax.random.key(0))
        step = functools.partial(reconstruction_step, spec=spec, block=block)
        return str(jax.make_jaxpr(step)(state, before, seen))

    assert "remat" in program(again)
    assert "remat" not in program(plain)
    kept, made = (reconstructed(spec, before, x, jax.random.key(0)) for spec in (plain, again))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), made, kept)


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
    spec = spec_of(student, reconstruction_drop=1.0)
    state = reconstruction.initial_block(spec, block, before, jax.random.key(0))
    target = block_forward(block, before, {}, x) + 0.5
    images = reconstruction.BlockImages(jnp.zeros_like(x), x, target)
    loss = jax.jit(
        lambda step: reconstruction.reconstruction_loss(
            state.trainable, before, images, jax.random.key(0), step,
            spec=student.spec, block=block, method=spec.method,
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


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_each_value_of_each_tensor_is_left_unquantized_by_chance(rebuilt, monkeypatch, share):
    """QDrop (arXiv 2203.05740) on the block's input and on every tensor in it."""
    student, before, _, x = rebuilt
    block = blocks_of(student)[0]
    spec = spec_of(student, reconstruction_drop=share)
    state = reconstruction.initial_block(spec, block, before, jax.random.key(0))
    parameters = reconstruction._made_parameters(block, before)
    seen = []

    def watched(block, variables, kernels, image, finish):
        def left(operation, value):
            mixed = finish(operation, value)
            bits = operation.output_bits
            if bits:
                coarse = fake_quantized(value, parameters[operation.output], bits)
                seen.append((mixed, value, coarse))
            return mixed

        seen.append((image, jnp.ones_like(x), jnp.zeros_like(x)))
        return block_forward(block, variables, kernels, image, left)

    monkeypatch.setattr(reconstruction, "block_forward", watched)
    images = reconstruction.BlockImages(
        jnp.zeros_like(x), jnp.ones_like(x), block_forward(block, before, {}, x)
    )
    masks = []
    for key in (0, 1):
        reconstruction.reconstruction_loss(
            state.trainable, before, images, jax.random.key(key), jnp.int32(0),
            spec=student.spec, block=block, method=spec.method,
        )  # fmt: skip
    for mixed, exact, coarse in seen:
        dropped = np.asarray((mixed == exact) & (exact != coarse))
        np.testing.assert_allclose(mixed, np.where(dropped, exact, coarse), atol=1e-6)
        of_interest = np.asarray(exact != coarse)
        spread = np.sqrt(share * (1 - share) / of_interest.sum())
        assert abs(dropped.sum() / of_interest.sum() - share) <= 4 * spread
        masks.append(dropped)
    assert len(masks) == 2 * (1 + sum(bool(op.output_bits) for op in block.operations))
    half = len(masks) // 2
    if share:  # anew for each batch
        assert all((a != b).any() for a, b in zip(masks[:half], masks[half:], strict=True))


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
