"""Images optimised from noise, and what a pool of them is used for."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import random_variables
from test_steps import TEACHER, tiny_settings

from lrq_jax import losses
from lrq_jax.graph import GraphBuilder
from lrq_jax.graph.layers import Conv
from lrq_jax.passes import float_forward
from lrq_jax.quantize import step_spec
from lrq_jax.sharding import data_mesh
from lrq_jax.synthesis.generator import generate
from lrq_jax.synthesis.spectrum import coloured, low_pass
from lrq_jax.training import noise_pool, noise_steps, steps
from lrq_jax.training.compilation import compile_step, put_replicated
from lrq_jax.training.optimizers import noise_optimizer

pytestmark = pytest.mark.usefixtures("quick_compilation")

VARIABLES = jax.tree.map(jnp.asarray, TEACHER.variables)
CENTERS = losses.initial_centers(10, 8)


def spec_of(**method):
    return step_spec(TEACHER, tiny_settings(images="noise", **method), None)


def noise_loss(spec, images, labels, targets=1.0):
    key, targets = jax.random.key(0), jnp.full(8, targets)
    return noise_steps.noise_loss(images, labels, targets, key, VARIABLES, CENTERS, spec=spec)


def run_noise(spec, iterations):
    """The states before and after each iteration."""
    states = [noise_steps.initial_noise(spec, jax.random.key(3), CENTERS)]
    step = jax.jit(functools.partial(noise_steps.noise_step, spec=spec))
    for _ in range(iterations):
        states.append(step(states[-1], VARIABLES)[0])
    return states


def test_images_keep_their_class_targets():
    """Drawn anew each iteration they would pull every image to the same mean."""
    spec = spec_of(noise_target="probability", noise_lowest_target=0.2)
    first, *later = (
        noise_steps.class_targets(state, spec=spec) for state in run_noise(spec, iterations=2)
    )
    assert 0.2 < first.min() < 0.9 < first.max() == 1
    for targets in later:
        np.testing.assert_array_equal(targets, first)
    other = noise_steps.initial_noise(spec, jax.random.key(4), CENTERS)
    assert (noise_steps.class_targets(other, spec=spec) != first).any()


@pytest.mark.parametrize("form", sorted(losses.STATISTICS))
@pytest.mark.parametrize("target", ["probability", "cross_entropy"])
def test_the_loss_is_the_weighted_sum_of_the_configured_terms(rng, form, target):
    spec = spec_of(
        noise_statistics=form, noise_target=target, noise_target_weight=0.3, noise_bns_weight=0.7,
        noise_image_weight=0.2, noise_augment_probability=0.0, ama_weight=0.0,
    )  # fmt: skip
    images = jnp.asarray(rng.standard_normal((8, 8, 8, 1)), jnp.float32)
    labels = jnp.arange(8) % 10
    total, terms = noise_loss(spec, images, labels, targets=0.7)
    graph = TEACHER.graph
    taps = [layer.inputs[0] for layer in graph.batch_norms]
    values = float_forward(graph, VARIABLES, images, (graph.output, *taps))
    running = [
        (VARIABLES["batch_stats"][layer.name]["mean"], VARIABLES["batch_stats"][layer.name]["var"])
        for layer in graph.batch_norms
    ]
    bns = losses.STATISTICS[form]([values[tap] for tap in taps], running)
    right = jax.nn.softmax(values[graph.output])[jnp.arange(8), labels]
    wanted = jnp.mean((right - 0.7) ** 2) if target == "probability" else -jnp.mean(jnp.log(right))
    np.testing.assert_allclose(terms["noise/bns"], bns, rtol=1e-5)
    np.testing.assert_allclose(terms["noise/target"], wanted, rtol=1e-5)
    own = losses.image_statistics(images)
    np.testing.assert_allclose(terms["noise/image"], own, rtol=1e-5)
    np.testing.assert_allclose(total, 0.7 * bns + 0.3 * wanted + 0.2 * own, rtol=1e-5)


def test_clipped_images_stay_in_range_and_their_pixels_can_come_back():
    low, high = spec_of().student.input_range
    for clip in (False, True):
        spec = spec_of(noise_clip=clip, noise_augment_probability=0.0)
        state = noise_steps.initial_noise(spec, jax.random.key(3), CENTERS)
        finished, _ = noise_steps.finished_noise(state, VARIABLES, spec=spec)
        outside = (np.asarray(state.parameters) < low) | (np.asarray(state.parameters) > high)
        assert outside.any()
        expected = np.clip(state.parameters, low, high) if clip else state.parameters
        np.testing.assert_array_equal(finished, expected)
        gradient = jax.grad(noise_loss, argnums=1, has_aux=True)(
            spec, state.parameters, state.labels
        )[0]
        assert np.all(np.asarray(gradient)[outside] != 0)


def test_optimised_noise_is_shown_and_kept_coloured():
    spec = spec_of(noise_spectrum=1.0, noise_augment_probability=0.0)
    state = noise_steps.initial_noise(spec, jax.random.key(3), CENTERS)
    finished, _ = noise_steps.finished_noise(state, VARIABLES, spec=spec)
    np.testing.assert_allclose(finished, coloured(state.parameters, 1.0), atol=1e-5)
    plain = spec_of(noise_augment_probability=0.0)
    expected, _ = noise_loss(plain, finished, state.labels)
    np.testing.assert_allclose(
        noise_loss(spec, state.parameters, state.labels)[0], expected, rtol=1e-4
    )


def test_optimised_images_are_shown_and_kept_without_high_frequencies():
    spec = spec_of(noise_low_pass=1.5, noise_augment_probability=0.0)
    state = noise_steps.initial_noise(spec, jax.random.key(3), CENTERS)
    finished, _ = noise_steps.finished_noise(state, VARIABLES, spec=spec)
    np.testing.assert_allclose(finished, low_pass(state.parameters, 1.5), atol=1e-6)
    assert np.std(finished) < 0.6 * np.std(state.parameters)
    loss, _ = noise_loss(spec, state.parameters, state.labels)
    plain = spec_of(noise_augment_probability=0.0)
    np.testing.assert_allclose(loss, noise_loss(plain, finished, state.labels)[0], rtol=1e-5)


@pytest.mark.parametrize("schedule", ["plateau", "cosine"])
def test_a_cosine_ends_at_rest_and_a_plateau_does_not(schedule):
    spec = spec_of(noise_schedule=schedule, noise_iterations=6, noise_learning_rate=0.1)
    states = run_noise(spec, 6)
    pairs = itertools.pairwise(state.parameters for state in states)
    moved = [float(jnp.abs(after - before).mean()) for before, after in pairs]
    assert (moved[-1] < 0.15 * moved[0]) == (schedule == "cosine")


def test_the_configured_augmentation_is_what_an_iteration_sees():
    found = {}
    for name in ("none", "crop_flip", "shift_flip"):
        spec = spec_of(noise_augmentation=name, noise_augment_probability=1.0)
        images = noise_steps.initial_noise(spec, jax.random.key(3), CENTERS).parameters
        found[name] = float(noise_loss(spec, images, jnp.arange(8) % 10)[0])
    plain = spec_of(noise_augment_probability=0.0)
    assert float(noise_loss(plain, images, jnp.arange(8) % 10)[0]) == found["none"]
    assert len(set(found.values())) == 3


def test_only_strided_convolutions_swing_each_by_its_own_draw(rng):
    net = GraphBuilder("strided", input_shape=(8, 8, 1))
    x = net.relu(net.batch_norm(net.conv(net.image, 2, 3)))
    x = net.conv(net.conv(x, 2, 3, strides=2), 2, 1, strides=(1, 2))
    net.dense(net.global_pool(x), 3)
    graph, x = net.build(), jnp.asarray(rng.standard_normal((2, 8, 8, 2)), jnp.float32)
    moves = set()
    for seed in range(8):
        move = noise_steps.swung(graph, jax.random.key(seed), reach=1)
        first, *strided = (layer for layer in graph.layers if isinstance(layer, Conv))
        assert move(first, x) is x
        moved = [np.asarray(move(layer, x)) for layer in strided]
        np.testing.assert_array_equal(moved[0], move(strided[0], x))
        moves.add(np.array_equal(*moved))
    assert False in moves


def test_a_swing_changes_what_images_are_optimised_for(rng):
    teacher = strided_teacher()
    images, labels = jnp.asarray(rng.standard_normal((8, 8, 8, 1)), jnp.float32), jnp.arange(8)
    found = {}
    for reach in (0, 1):
        spec = step_spec(teacher, tiny_settings(images="noise", noise_augment_probability=0.0,
                                                noise_swing=reach), None)  # fmt: skip
        found[reach] = [
            float(noise_steps.noise_loss(images, labels, jnp.ones(8), jax.random.key(seed),
                                         teacher.variables, CENTERS, spec=spec)[1]["noise/bns"])
            for seed in range(4)
        ]  # fmt: skip
    assert len(set(found[0])) == 1
    assert len(set(found[1])) > 1


def strided_teacher():
    net = GraphBuilder("strided", input_shape=(8, 8, 1))
    x = net.relu(net.batch_norm(net.conv(net.image, 8, 3, strides=2)))
    net.dense(net.global_pool(x), 10, name="classifier")
    graph = net.build()
    return dataclasses.replace(TEACHER, graph=graph, variables=random_variables(graph))


def test_each_device_optimises_its_share_of_the_batch():
    mesh, teacher = data_mesh(8), strided_teacher()
    method = {"images": "noise", "noise_augment_probability": 0.0, "noise_bns_weight": 1.0}
    spec = step_spec(teacher, tiny_settings(**method), mesh)
    state = noise_steps.initial_noise(spec, jax.random.key(3), CENTERS)
    state, variables = (put_replicated(tree, mesh) for tree in (state, teacher.variables))
    step = compile_step(noise_steps.noise_step, state, variables, mesh=mesh, spec=spec)
    text = step.as_text()
    assert "f32[1,4,4,8]" in text, "the batch of 8 is not split over 8 devices"
    assert "f32[8,4,4,8]" not in text, "a device computes feature maps of the whole batch"


def test_each_device_trains_on_its_share_of_the_pool():
    mesh, teacher = data_mesh(8), strided_teacher()
    spec = step_spec(teacher, tiny_settings(images="noise"), mesh)
    state = steps.initial_state(spec, teacher.variables, 0)
    pool = jnp.zeros((16, 8, 8, 1)), jnp.zeros(16, jnp.int32)
    arguments = put_replicated((state, teacher.variables, *pool), mesh)
    text = compile_step(steps.pool_step, *arguments, mesh=mesh, spec=spec).as_text()
    assert "f32[2,4,4,8]" in text, "the batch of 16 is not split over 8 devices"
    assert "f32[16,4,4,8]" not in text, "a device computes feature maps of the whole batch"
    assert "all-reduce" in text


def test_a_batch_of_the_pool_is_mixed_with_another_and_so_are_its_labels():
    pool, labels = jnp.arange(10.0)[:, None, None, None] * jnp.ones((10, 8, 8, 1)), jnp.arange(10)
    drawn = {}
    for probability in (0.0, 1.0):
        spec = step_spec(TEACHER, tiny_settings(images="noise", mixup=probability), None)
        drawn[probability] = steps.training_batch(jax.random.key(1), pool, labels, spec)
    plain, of_plain = drawn[0.0]
    assert np.array_equal(plain[:, 0, 0, 0], of_plain)
    mixed, weights = drawn[1.0]
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(mixed[:, 0, 0, 0], weights @ jnp.arange(10.0), atol=1e-5)
    assert np.max(np.count_nonzero(weights, axis=1)) == 2
    assert not np.array_equal(np.argmax(weights, 1), of_plain)


# ---- latents -------------------------------------------------------------------------------------


LATENTS = {"noise_parameters": "latents", "noise_augment_probability": 0.0}


def test_latents_and_their_generator_are_optimised_together():
    """Each batch with a generator of its own; its images of the latents' classes are the pool's."""
    method = {"noise_image_weight": 1.0, "noise_statistics": "deviation", "noise_swing": 1}
    teacher = strided_teacher()
    settings = tiny_settings(images="noise", **LATENTS, **method)
    spec, variables = step_spec(teacher, settings, None), teacher.variables
    first = state = noise_steps.initial_noise(spec, jax.random.key(3), CENTERS)
    step, found = jax.jit(functools.partial(noise_steps.noise_step, spec=spec)), []
    for _ in range(8):
        state, terms = step(state, variables)
        found.append(float(terms["noise/loss"]))
    assert found[-1] < found[0]
    assert state.parameters["latents"].shape == (8, spec.generator.latent_dim)
    pairs = zip(*(jax.tree.leaves(s.parameters) for s in (first, state)), strict=True)
    assert all(not np.array_equal(a, b) for a, b in pairs)
    finish = jax.jit(functools.partial(noise_steps.finished_noise, spec=spec))
    make = jax.jit(functools.partial(generate, spec.generator))
    parameters = state.parameters
    expected = make(parameters["generator"], parameters["latents"], state.labels)
    np.testing.assert_allclose(finish(state, variables)[0], expected, atol=1e-4)
    other = noise_steps.initial_noise(spec, jax.random.key(4), CENTERS).parameters["generator"]
    assert not np.array_equal(
        other["dense"]["kernel"], first.parameters["generator"]["dense"]["kernel"]
    )


@pytest.mark.parametrize("schedule", ["plateau", "cosine"])
def test_latents_and_generator_have_rates_of_their_own(schedule):
    """Adam moves by its rate where the gradient is always the same."""
    method = spec_of(
        **LATENTS, noise_schedule=schedule, noise_iterations=6, noise_learning_rate=0.5,
        noise_plateau_patience=2, noise_generator_rate=0.01, noise_generator_decay=0.5,
        noise_generator_decay_every=2,
    ).method  # fmt: skip
    optimizer = noise_optimizer(method)
    parameters = {"latents": jnp.zeros(1), "generator": {"kernel": jnp.zeros(1)}}
    state, moved = optimizer.init(parameters), []
    for _ in range(6):
        grads = jax.tree.map(jnp.ones_like, parameters)
        updates, state = optimizer.update(grads, state, parameters, value=jnp.float32(1))
        moved.append([-float(x[0]) for x in jax.tree.leaves(updates)])
    of_generator, of_latents = np.array(moved).T
    if schedule == "cosine":
        falling = (1 + np.cos(np.pi * np.arange(6) / 6)) / 2
        np.testing.assert_allclose(of_latents, 0.5 * falling, rtol=1e-4)
        np.testing.assert_allclose(of_generator, 0.01 * falling, rtol=1e-4)
    else:
        halved = 0.5 ** (np.arange(6) // 2)
        np.testing.assert_allclose(of_generator, 0.01 * halved, rtol=1e-4)
        assert of_latents[0] == pytest.approx(0.5, rel=1e-4)
        assert set(np.round(np.log10(of_latents / of_latents[0]))) >= {0, -1}


def test_a_pool_depends_on_the_generator_that_made_it():
    def recipe(**method):
        settings = tiny_settings(images="noise", **method)
        config = {**settings.to_dict(), "teacher_sha256": "t"}
        return noise_pool._recipe(config)

    wider = {"generator_width": 24}
    assert recipe() == recipe(**wider)
    for name, value in (*wider.items(), ("latent_dim", 9), ("attention", "after_block1"),
                        ("conditioning", "batch_norm")):  # fmt: skip
        assert recipe(**LATENTS) != recipe(**LATENTS, **{name: value})
    for name in ("noise_swing", "noise_image_weight", "noise_generator_decay_every"):
        assert recipe(**LATENTS) != recipe(**LATENTS, **{name: 7})
    for name in ("channel_alignment", "cam_alignment", "perturbation"):
        assert recipe(**LATENTS) == recipe(**LATENTS, **{name: 7.0})


def test_calibration_on_a_pool_changes_ranges_alone(rng):
    spec = spec_of(calibration_images="pool", augmentation="shift_flip")
    before = jax.jit(steps.initial_state, static_argnums=(0, 2))(spec, VARIABLES, 0)
    images = jnp.asarray(rng.standard_normal((16, 8, 8, 1)), jnp.float32)
    step = jax.jit(functools.partial(steps.pool_calibration_step, spec=spec))
    after, _ = step(before, VARIABLES, images, jnp.arange(16) % 10)
    assert int(after.step) == 1
    assert int(after.student["quant"]["updates"]) == 1
    ranges = after.student["quant"]["activations"]
    assert all(float(r["high"]) > 0 for r in ranges.values())
    restored = {**after.student, "quant": before.student["quant"]}
    jax.tree.map(
        np.testing.assert_array_equal,
        after._replace(step=before.step, student=restored),
        before,
    )
