"""Precision and memory of a step: settings that change its cost and not what it computes."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_steps import FIRING, START, TEACHER, tiny_settings

from lrq_jax import losses
from lrq_jax.quantize import step_spec
from lrq_jax.resources import PRECISIONS, Resources, accumulated_gradient
from lrq_jax.sharding import data_mesh
from lrq_jax.training import noise_steps, steps
from lrq_jax.training.comparison import lesson_of
from lrq_jax.training.compilation import put_replicated
from lrq_jax.training.student_loss import student_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

# As in test_steps.test_one_device_equals_eight: the step is a continuous function of its gradient.
SMOOTH = {**FIRING, "adam_epsilon": 1e-2, "student_optimizer": "sgd"}


def settings_with(**resources):
    return dataclasses.replace(tiny_settings(**SMOOTH), resources=Resources(**resources))


@functools.cache
def run_steps(settings, devices=1):
    """Final state, metrics of each step in turn, and the last step's compiled program as text."""
    mesh = data_mesh(devices)
    spec = step_spec(TEACHER, settings, mesh)
    variables = put_replicated(TEACHER.variables, mesh)
    state = put_replicated(START(spec, TEACHER.variables, 0), mesh)
    history = []
    for function, count in ((steps.calibration_step, 1), (steps.joint_step, 3)):
        jitted = jax.jit(functools.partial(function, spec=spec))
        program = jitted.lower(state, variables).compile()
        for _ in range(count):
            state, metrics = program(state, variables)
            history.append({name: float(value) for name, value in metrics.items()})
            state = put_replicated(jax.device_get(state), mesh)
    return jax.device_get(state), history, program.as_text()


def assert_same_losses(settings, other, *, tolerance=1e-5, devices=1):
    expected, found = run_steps(settings)[1], run_steps(other, devices)[1]
    for first, second in zip(expected, found, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name


def test_micro_batches_add_up_to_the_batch():
    """On two devices, each of which cuts its own half."""
    assert_same_losses(settings_with(), settings_with(micro_batches=4), devices=2)


def test_what_is_computed_again_is_the_same():
    plain, again = settings_with(), settings_with(rematerialize="elementwise")
    assert_same_losses(plain, again)
    assert run_steps(plain)[2] != run_steps(again)[2]


def test_noise_images_computed_again_are_the_same():
    def run(rematerialize):
        settings = dataclasses.replace(
            tiny_settings(), resources=Resources(rematerialize=rematerialize)
        )
        spec = step_spec(TEACHER, settings, data_mesh(1))
        centers = losses.initial_centers(10, spec.graph.shapes[spec.graph.features][0])
        state = noise_steps.initial_noise(spec, jax.random.key(0), centers)
        step = jax.jit(functools.partial(noise_steps.noise_step, spec=spec))
        program, found = step.lower(state, TEACHER.variables).compile(), []
        for _ in range(3):
            state, metrics = program(state, TEACHER.variables)
            found.append(metrics)
        return found, program.as_text()

    (plain, text), (again, other) = run("none"), run("elementwise")
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), again, plain)
    assert plain[0]["noise/loss"] != plain[2]["noise/loss"]
    assert text != other


@pytest.mark.parametrize("part", ["generator", "student", "noise images"])
def test_only_results_of_products_are_kept(part, capsys):
    """What jax keeps for the backward pass; what a program then takes is the compiler's business."""
    held = {}
    for rematerialize in ("none", "elementwise"):
        spec = step_spec(TEACHER, settings_with(rematerialize=rematerialize), None)
        state = START(spec, TEACHER.variables, 0)
        loss = differentiated(part, spec)
        jax.ad_checkpoint.print_saved_residuals(spec.resources.rematerialized(loss), state)
        lines = capsys.readouterr().out.splitlines()
        lines = [line for line in lines if not re.search("from (the argument|a constant)", line)]
        sizes = [re.match(r"\w+\[([\d,]*)\]", line)[1] for line in lines]
        large = {line: math.prod(map(int, size.split(","))) for line, size in zip(lines, sizes, strict=True)
                 if size and size.count(",") > 1}  # fmt: skip
        held[rematerialize] = sum(large.values())
    assert large
    assert not [line for line in large if "'product'" not in line]
    assert 0 < held["elementwise"] < held["none"] / 2


def differentiated(part, spec):
    """A function of the state: the part's loss on fixed images."""
    noise, labels = steps.draw_latents(jax.random.key(0), spec)
    images = jnp.zeros((16, *spec.graph.input_shape))
    if part == "noise images":
        return lambda state: noise_steps.noise_loss(
            images + jax.tree.leaves(state.generator)[0].sum(),  # something of the state
            labels, labels, jax.random.key(1), TEACHER.variables, state.centers, spec=spec,
        )[0]  # fmt: skip
    if part == "generator":
        return lambda state: steps.synthesis_loss(
            state.generator, TEACHER.variables, state.centers, noise, labels, spec=spec
        )[0]
    lesson = lesson_of(TEACHER.variables, images, spec)
    return lambda state: student_loss(
        spec.student.trainable(state.student), state.student, images, labels, lesson, spec=spec
    )[0]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("count", [1, 3])
def test_accumulated_gradients_are_those_of_the_whole_batch(platform, count, monkeypatch, rng):
    """Written out, as on a CPU, and in a loop, as elsewhere."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    x, y = (rng.normal(size=(6, 5)).astype(np.float32) for _ in range(2))

    def loss(weights, x, y):
        wrong = jnp.mean((jnp.tanh(x @ weights["kernel"]) - y) ** 2)
        return wrong, {"wrong": wrong, "mean": jnp.mean(x)}

    weights = {"kernel": jnp.asarray(rng.normal(size=(5, 5)).astype(np.float32))}
    expected = jax.grad(loss, has_aux=True)(weights, x, y)
    gradient = accumulated_gradient(loss, count, None)
    found = gradient(weights, x, y)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    text = str(jax.make_jaxpr(gradient)(weights, x, y))
    assert ("scan" in text) == (count > 1)
    assert ("unroll=1" in text) == (count > 1 and platform == "gpu")


def test_a_batch_that_does_not_divide_into_parts_is_refused():
    mesh = data_mesh(2)
    with pytest.raises(
        ValueError, match=r"found 16, expected a multiple of 6: 2 devices x 3 micro"
    ):
        step_spec(TEACHER, settings_with(micro_batches=3), mesh)


def test_bfloat16_is_used_where_it_is_said_and_stays_close():
    exact, coarse = (run_steps(settings_with(precision=p)) for p in ("float32", "bfloat16"))
    for first, second in zip(exact[1], coarse[1], strict=True):
        for name in ("generator/loss", "generator/bns"):
            assert second[name] == pytest.approx(first[name], rel=0.05), name
            assert second[name] != first[name]
    assert "bf16" in coarse[2]
    assert "bf16" not in exact[2]
    for leaf in jax.tree.leaves(coarse[0]):
        assert leaf.dtype != jnp.bfloat16, "states are float32 in every precision"


def test_the_student_is_float32_in_every_precision():
    """Of the same images and the same lesson it makes the same loss and gradient, bit for bit; in
    TF32, which a CPU computes as float32, by the argument of the next test."""
    calibrated = run_steps(settings_with())[0]
    noise = jax.random.normal(jax.random.key(0), (16, 8, 8, 1))
    plain = step_spec(TEACHER, settings_with(), None)
    lesson = lesson_of(TEACHER.variables, noise, plain)

    def run(precision):
        spec = step_spec(TEACHER, settings_with(precision=precision), None)

        def loss(trainable):
            student = calibrated.student
            return student_loss(trainable, student, noise, labels, lesson, spec=spec)[0]

        with jax.default_matmul_precision(spec.resources.matmul_precision):
            return jax.jit(jax.value_and_grad(loss))(spec.student.trainable(calibrated.student))

    labels = jnp.zeros(16, jnp.int32)
    exact = run("float32")
    assert sum(float(np.abs(x).sum()) for x in jax.tree.leaves(exact[1])) > 0
    for precision in ("tf32", "bfloat16"):
        jax.tree.map(np.testing.assert_array_equal, run(precision), exact)
    coarse = lesson_of(
        TEACHER.variables, noise, step_spec(TEACHER, settings_with(precision="bfloat16"), None)
    )
    assert coarse.logits.dtype == jnp.float32
    assert (coarse.logits != lesson.logits).any()


def test_centred_codes_are_exact_in_every_type_products_are_computed_in():
    """TF32 has 10 binary digits behind the point, bfloat16 has 7: 8 with the leading one."""
    centred = np.arange(-255, 256)
    np.testing.assert_array_equal(centred.astype(ml_dtypes.bfloat16).astype(int), centred)
    assert not np.array_equal(np.arange(512).astype(ml_dtypes.bfloat16).astype(int), np.arange(512))


@pytest.mark.parametrize("precision", sorted(PRECISIONS))
def test_jax_knows_the_precisions(precision):
    with jax.default_matmul_precision(Resources(precision=precision).matmul_precision):
        product = jnp.dot(jnp.ones((2, 2)), jnp.ones((2, 2)))
    np.testing.assert_array_equal(product, 2)  # a name jax does not know raises above
