"""Images optimised from noise, and what a pool of them is used for."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_steps import TEACHER, tiny_settings

from lrq_jax import losses
from lrq_jax.passes import float_forward
from lrq_jax.quantize import step_spec
from lrq_jax.synthesis.low_pass import low_pass
from lrq_jax.training import noise_steps, steps

pytestmark = pytest.mark.usefixtures("quick_compilation")

VARIABLES = jax.tree.map(jnp.asarray, TEACHER.variables)
CENTERS = losses.initial_centers(10, 8)


def spec_of(**method):
    return step_spec(TEACHER, tiny_settings(images="noise", **method), None)


def noise_loss(spec, images, labels):
    key = jax.random.key(0)
    return noise_steps.noise_loss(images, labels, key, VARIABLES, CENTERS, spec=spec)


def run_noise(spec, iterations):
    """The states before and after each iteration."""
    states = [noise_steps.initial_noise(spec, jax.random.key(3), CENTERS)]
    step = jax.jit(functools.partial(noise_steps.noise_step, spec=spec))
    for _ in range(iterations):
        states.append(step(states[-1], VARIABLES)[0])
    return states


@pytest.mark.parametrize("form", sorted(losses.STATISTICS))
@pytest.mark.parametrize("target", ["probability", "cross_entropy"])
def test_the_loss_is_the_weighted_sum_of_the_configured_terms(rng, form, target):
    spec = spec_of(
        noise_statistics=form, noise_target=target, noise_target_weight=0.3, noise_bns_weight=0.7,
        noise_augment_probability=0.0, noise_lowest_target=1.0, ama_weight=0.0,
    )  # fmt: skip
    images = jnp.asarray(rng.standard_normal((8, 8, 8, 1)), jnp.float32)
    labels = jnp.arange(8) % 10
    total, terms = noise_loss(spec, images, labels)
    graph = TEACHER.graph
    taps = [layer.inputs[0] for layer in graph.batch_norms]
    values = float_forward(graph, VARIABLES, images, (graph.output, *taps))
    running = [
        (VARIABLES["batch_stats"][layer.name]["mean"], VARIABLES["batch_stats"][layer.name]["var"])
        for layer in graph.batch_norms
    ]
    bns = losses.STATISTICS[form]([values[tap] for tap in taps], running)
    right = jax.nn.softmax(values[graph.output])[jnp.arange(8), labels]
    wanted = jnp.mean((right - 1) ** 2) if target == "probability" else -jnp.mean(jnp.log(right))
    np.testing.assert_allclose(terms["noise/bns"], bns, rtol=1e-5)
    np.testing.assert_allclose(terms["noise/target"], wanted, rtol=1e-5)
    np.testing.assert_allclose(total, 0.7 * bns + 0.3 * wanted, rtol=1e-5)


def test_clipped_images_stay_in_range_and_their_pixels_can_come_back():
    low, high = spec_of().student.input_range
    for clip in (False, True):
        spec = spec_of(noise_clip=clip, noise_augment_probability=0.0)
        state = noise_steps.initial_noise(spec, jax.random.key(3), CENTERS)
        finished, _ = noise_steps.finished_noise(state, VARIABLES, spec=spec)
        outside = (np.asarray(state.images) < low) | (np.asarray(state.images) > high)
        assert outside.any()
        expected = np.clip(state.images, low, high) if clip else state.images
        np.testing.assert_array_equal(finished, expected)
        gradient = jax.grad(noise_loss, argnums=1, has_aux=True)(spec, state.images, state.labels)[
            0
        ]
        assert np.all(np.asarray(gradient)[outside] != 0)


def test_optimised_images_are_shown_and_kept_without_high_frequencies():
    spec = spec_of(noise_low_pass=1.5, noise_augment_probability=0.0)
    state = noise_steps.initial_noise(spec, jax.random.key(3), CENTERS)
    finished, _ = noise_steps.finished_noise(state, VARIABLES, spec=spec)
    np.testing.assert_allclose(finished, low_pass(state.images, 1.5), atol=1e-6)
    assert np.std(finished) < 0.6 * np.std(state.images)
    loss, _ = noise_loss(spec, state.images, state.labels)
    plain = spec_of(noise_augment_probability=0.0)
    np.testing.assert_allclose(loss, noise_loss(plain, finished, state.labels)[0], rtol=1e-5)


@pytest.mark.parametrize("schedule", ["plateau", "cosine"])
def test_a_cosine_ends_at_rest_and_a_plateau_does_not(schedule):
    spec = spec_of(noise_schedule=schedule, noise_iterations=6, noise_learning_rate=0.1)
    states = run_noise(spec, 6)
    pairs = itertools.pairwise(state.images for state in states)
    moved = [float(jnp.abs(after - before).mean()) for before, after in pairs]
    assert (moved[-1] < 0.15 * moved[0]) == (schedule == "cosine")


def test_the_configured_augmentation_is_what_an_iteration_sees():
    found = {}
    for name in ("none", "crop_flip", "shift_flip"):
        spec = spec_of(noise_augmentation=name, noise_augment_probability=1.0)
        images = noise_steps.initial_noise(spec, jax.random.key(3), CENTERS).images
        found[name] = float(noise_loss(spec, images, jnp.arange(8) % 10)[0])
    plain = spec_of(noise_augment_probability=0.0)
    assert float(noise_loss(plain, images, jnp.arange(8) % 10)[0]) == found["none"]
    assert len(set(found.values())) == 3


def test_calibration_on_a_pool_changes_ranges_alone(rng):
    spec = spec_of(calibration_images="pool", augmentation="shift_flip")
    before = steps.initial_state(spec, VARIABLES, 0)
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
