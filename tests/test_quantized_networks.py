"""Every network goes through quantization, in both placements, at a reduced size."""

import dataclasses
import functools
import os

import jax
import numpy as np
import pytest
from test_steps import tiny_settings

from lrq_jax.data import Preprocessing
from lrq_jax.graph.layers import Add
from lrq_jax.networks import FAMILIES, build_network
from lrq_jax.passes import Student, calibrate, freeze, frozen_logits, student_forward
from lrq_jax.quantize import step_spec
from lrq_jax.readers import Teacher
from lrq_jax.training import steps

pytestmark = pytest.mark.usefixtures("quick_compilation")

PLACEMENTS = ("integer", "paper")
# One network of each kind of structure; the others differ from these in numbers.
KINDS = ("resnet8_cifar", "resnet50_v1", "vgg11_bn", "mobilenet_v1", "mobilenet_v2",
         "efficientnet_lite0", "shufflenet_v2_x0_5", "regnet_x_200mf", "inception_v3",
         "densenet121")  # fmt: skip


def trained(arch):
    """A case of the tests that train: those of `KINDS` take a minute each, the whole list hours."""
    asked = os.environ.get("LRQ_SLOW_TESTS")
    return pytest.param(
        arch,
        marks=pytest.mark.skipif(
            not asked if arch in KINDS else asked != "all",
            reason="compiles for minutes: set LRQ_SLOW_TESTS=1 for a network of each kind, =all for all",
        ),
    )


@functools.lru_cache(maxsize=1)
def small_teacher(arch):
    """The network on small images with random weights and statistics."""
    size = 75 if arch == "inception_v3" else 32
    settings = {"num_classes": 10, "input_shape": (size, size, 3)}
    if arch.startswith("vgg"):
        settings["hidden"] = (32, 16)
    graph = build_network(arch, **settings)
    rng = np.random.default_rng(0)
    blocks = sum(isinstance(layer, Add) for layer in graph.layers)
    calm = min(1, 4 / (blocks + 1) ** 0.5)  # of each block: what 54 of them add up stays finite

    def draw(name, shape):
        if name == "kernel":
            return rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1]))
        if name == "var":
            return rng.uniform(0.5, 1.5, shape)
        return (
            calm * rng.uniform(0.5, 1.5, shape) if name == "scale" else 0.3 * rng.normal(size=shape)
        )

    variables = {
        collection: {
            layer: {name: np.float32(draw(name, shape)) for name, shape in shapes.items()}
            for layer, shapes in layers.items()
        }
        for collection, layers in graph.variable_shapes().items()
    }
    preprocessing = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, size=size)
    return Teacher(graph=graph, variables=variables, preprocessing=preprocessing, arch=arch)


def specification(arch, placement):
    settings = tiny_settings(batch_size=4)
    student = dataclasses.replace(settings.student, placement=placement)
    return step_spec(small_teacher(arch), dataclasses.replace(settings, student=student), None)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("arch", KINDS)
def test_every_kind_is_planned_and_calibrated(arch, placement):
    """Shapes of a pass that finds ranges and of the frozen network: all but the numbers."""
    teacher = small_teacher(arch)
    spec = dataclasses.replace(tiny_settings().student, placement=placement)
    student = Student(graph=teacher.graph, spec=spec, input_range=(-2.0, 2.0))
    variables = jax.eval_shape(student.initial_variables, teacher.variables)
    images = jax.ShapeDtypeStruct((4, *teacher.graph.input_shape), np.float32)
    logits, after = jax.eval_shape(functools.partial(calibrate, student), variables, images)
    assert logits.shape == (4, 10)
    assert jax.tree.map(lambda a: a.shape, after) == jax.tree.map(lambda a: a.shape, variables)
    if placement == "integer":
        frozen = jax.eval_shape(functools.partial(freeze, student), after)
        shipped = jax.eval_shape(functools.partial(frozen_logits, student), frozen, images)
        assert shipped.shape == (4, 10)


def check_trains(arch, placement, count):
    """Ranges and `count` steps of lrq; a student that computes finite logits near its teacher's."""
    spec, teacher = specification(arch, placement), small_teacher(arch)
    variables = jax.tree.map(jax.numpy.asarray, teacher.variables)
    state = jax.jit(steps.initial_state, static_argnums=(0, 2))(spec, variables, 0)
    before = state.student
    plan = [steps.calibration_step] + [steps.joint_step] * count
    compiled = {step: jax.jit(functools.partial(step, spec=spec)) for step in dict.fromkeys(plan)}
    for step in plan:
        state, metrics = compiled[step](state, variables)
        assert all(np.isfinite(np.asarray(value)).all() for value in metrics.values()), metrics
    moved = [
        name
        for name, leaves in state.student["params"].items()
        if all(np.array_equal(leaves[key], before["params"][name][key]) for key in leaves)
    ]
    assert not [name for name in moved if name in {x.name for x in teacher.graph.weighted}]
    images = np.random.default_rng(1).standard_normal((4, *teacher.graph.input_shape), np.float32)
    student, graph = spec.student, teacher.graph
    forward = jax.jit(lambda v, x: student_forward(student, v, x, (graph.output,))[graph.output])
    logits = np.asarray(forward(state.student, images))
    assert logits.shape == (4, 10)
    assert np.isfinite(logits).all()
    assert logits.std() > 0
    if placement == "integer":
        frozen = jax.jit(lambda v: freeze(student, v))(state.student)
        shipped = jax.jit(lambda f, x: frozen_logits(student, f, x))(frozen, images)
        np.testing.assert_allclose(np.asarray(shipped), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("arch", [trained(arch) for arch in FAMILIES])
def test_every_network_is_quantized_and_trained(arch, placement):
    check_trains(arch, placement, 20)
