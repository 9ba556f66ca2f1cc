"""The training steps: what they update, how they shard, and that their ingredients are real."""

import dataclasses
import functools
import itertools
from collections import Counter

import jax
import jax.extend
import numpy as np
import pytest
from small_networks import random_variables

from lrq_jax import losses
from lrq_jax.config import base_config, resolve
from lrq_jax.data import Preprocessing
from lrq_jax.graph import GraphBuilder
from lrq_jax.passes import QuantSpec, calibrate, float_forward, freeze, student_forward
from lrq_jax.passes.kernels import coarse_kernel, kernel_steps, lineage_kernel
from lrq_jax.quantize import step_spec
from lrq_jax.readers import Teacher
from lrq_jax.resources import Resources
from lrq_jax.sharding import data_mesh
from lrq_jax.training import steps
from lrq_jax.training.comparison import Compared, aligned_blocks, lesson_of
from lrq_jax.training.compilation import compile_step, put_replicated
from lrq_jax.training.loop import phases
from lrq_jax.training.student_loss import perturbed_images, student_loss, training_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

START = jax.jit(steps.initial_state, static_argnums=(0, 2))
CALIBRATED = (steps.calibration_step, steps.joint_step, steps.joint_step)
FIRING = {"ama_lower": 1.9}
"""A hinge that is sure to fire: from the first step on the margin has a gradient."""


def tiny_settings(*, steps=3, **method):
    """Settings of a few steps on a tiny teacher; `method` overrides fields of the Method."""
    config = base_config()
    config.method.preset = "lrq"
    tiny = {
        "attention": "none",  # large kernels take long to compile
        "batch_size": 16,
        "warmup_steps": 2,
        "calibration_start": 1,
        "calibration_steps": 1,
        "generator_width": 16,
        "latent_dim": 8,
        "noise_batches": 2,
        "noise_batch_size": 8,
        "noise_iterations": 3,
    }
    for name, value in {**tiny, **method}.items():
        config.method[name] = value
    config.steps = steps
    return resolve(config, image_size=8)


def tiny_teacher():
    """A network of one residual block with random weights and statistics; compiles in seconds."""
    net = GraphBuilder("tiny", input_shape=(8, 8, 1))
    x = net.relu(net.batch_norm(net.conv(net.image, 8, 3), name="bn1"))
    y = net.relu(net.batch_norm(net.conv(x, 8, 3), name="bn2"))
    y = net.batch_norm(net.conv(y, 8, 3), name="bn3")
    x = net.relu(net.add(y, x))
    net.dense(net.global_pool(x), 10, name="classifier")
    graph = net.build()
    rng = np.random.default_rng(0)

    def draw(name, shape):
        if name == "kernel":
            return rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1]))
        return rng.uniform(0.5, 1.5, shape) if name in ("scale", "var") else rng.normal(size=shape)

    variables = {
        collection: {
            layer: {name: np.float32(draw(name, shape)) for name, shape in shapes.items()}
            for layer, shapes in layers.items()
        }
        for collection, layers in graph.variable_shapes().items()
    }
    preprocessing = Preprocessing(mean=(0.5,), std=(0.5,), size=8)
    return Teacher(graph=graph, variables=variables, preprocessing=preprocessing, arch="tiny")


TEACHER = tiny_teacher()


@functools.cache
def run_steps(settings, functions):
    """State after these steps, and metrics of each in turn.

    Operation by operation: these are compiled once for all tests, a whole step for each setting.
    """
    spec = step_spec(TEACHER, settings, None)
    variables = jax.tree.map(jax.numpy.asarray, TEACHER.variables)
    if not functions:
        return START(spec, variables, 0), []
    state, history = run_steps(settings, functions[:-1])
    with jax.disable_jit():
        state, metrics = functions[-1](state, variables, spec=spec)
    assert all(np.isfinite(np.asarray(value)).all() for value in metrics.values()), metrics
    return state, [*history, {name: float(value) for name, value in metrics.items()}]


def compiled_steps(settings, functions, devices):
    """Metrics of each step in turn, and the last step's compiled program as text."""
    mesh = data_mesh(devices)
    spec = step_spec(TEACHER, settings, mesh)
    variables = put_replicated(TEACHER.variables, mesh)
    state = put_replicated(START(spec, TEACHER.variables, settings.seed), mesh)
    history, programs = [], {}
    for function in functions:
        if function not in programs:
            programs[function] = compile_step(function, state, variables, mesh=mesh, spec=spec)
        state, metrics = programs[function](state, variables)
        history.append({name: float(value[0]) for name, value in metrics.items()})
    return history, programs[functions[-1]].as_text()


def _rounded_shapes(jaxpr):
    """Shapes of all that a program rounds, programs inside it included."""
    shapes = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "round":
            shapes.append(equation.outvars[0].aval.shape)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            shapes += _rounded_shapes(inner)
    return shapes


@pytest.mark.parametrize("placement", ["integer", "paper"])
@pytest.mark.parametrize("step", [steps.joint_step, steps.calibration_step])
def test_a_step_quantizes_each_kernel_once(step, placement):
    """Whatever the losses read of it, forward and backward."""
    settings = tiny_settings()
    student = dataclasses.replace(settings.student, placement=placement)
    spec = step_spec(TEACHER, dataclasses.replace(settings, student=student), None)
    state = jax.eval_shape(functools.partial(steps.initial_state, spec, seed=0), TEACHER.variables)
    program = jax.make_jaxpr(functools.partial(step, spec=spec))(state, TEACHER.variables)
    found = Counter(shape for shape in _rounded_shapes(program.jaxpr) if len(shape) > 1)
    for layer, count in (("conv0", 1), ("conv1", 2), ("classifier", 1)):
        kernel = TEACHER.variables["params"][layer]["kernel"].shape
        assert found[kernel] == count


def test_the_generators_forward_of_the_teacher_is_the_students_lesson(monkeypatch):
    """One pass of the teacher a joint step, whose numbers are those of a pass of its own."""
    alignments = {"channel_alignment": 10.0, "cam_alignment": 1.0}
    spec = step_spec(TEACHER, tiny_settings(**alignments), None)
    variables = jax.tree.map(jax.numpy.asarray, TEACHER.variables)
    state, _ = run_steps(tiny_settings(**alignments), ())
    noise, labels = steps.draw_latents(jax.random.key(0), spec)
    _, aux = steps.synthesis_loss(
        state.generator, variables, state.centers, noise, labels, spec=spec
    )
    own = lesson_of(variables, aux["images"], spec)
    assert len(own.blocks) > 1
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), aux["lesson"], own)

    passes = []

    def counted(graph, teacher, images, *arguments, **options):
        passes.append(images.shape)
        return float_forward(graph, teacher, images, *arguments, **options)

    monkeypatch.setattr("lrq_jax.training.comparison.float_forward", counted)
    jax.eval_shape(functools.partial(steps.joint_step, spec=spec), state, variables)
    assert passes == [(16, 8, 8, 1)]


def test_each_step_updates_what_it_should_and_nothing_else():
    plan = (steps.warmup_step, steps.calibration_step, steps.joint_step)
    states = [run_steps(tiny_settings(), plan[:count])[0] for count in range(4)]

    def changed(before, after):
        parts = [
            (name, getattr(before, name), getattr(after, name)) for name in ("generator", "centers")
        ]
        parts += [
            (f"student.{name}", before.student[name], after.student[name])
            for name in ("params", "batch_stats", "quant")
        ]
        assert int(after.step) == int(before.step) + 1
        return {
            name
            for name, *trees in parts
            if any(
                not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, trees), strict=True)
            )
        }

    assert [changed(*pair) for pair in itertools.pairwise(states)] == [
        {"generator", "centers"},
        {"generator", "centers", "student.quant"},
        {"generator", "centers", "student.params"},
    ]


@pytest.mark.parametrize("learned_steps", ["none", "both"])
@pytest.mark.parametrize("placement", ["integer", "paper"])
def test_every_student_parameter_gets_a_gradient(placement, learned_steps):
    settings = tiny_settings()
    student = dataclasses.replace(
        settings.student, placement=placement, learned_steps=learned_steps
    )
    settings = dataclasses.replace(settings, student=student)
    spec = step_spec(TEACHER, settings, None)
    state, _ = run_steps(settings, CALIBRATED[:1])
    images = jax.random.normal(jax.random.key(1), (16, 8, 8, 1))
    labels = jax.numpy.arange(16) % 10
    lesson = Compared(jax.random.normal(jax.random.key(2), (16, 10)))
    trainable = spec.student.trainable(state.student)
    assert len(trainable["stretch"]) == (2 if learned_steps == "both" else 0)
    with jax.disable_jit():
        grads, _ = jax.grad(student_loss, has_aux=True)(
            trainable, state.student, images, labels, lesson, spec=spec
        )
    zero = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
        if not np.any(np.asarray(leaf))
    ]
    assert not zero


@pytest.mark.parametrize(
    ("learned_steps", "kinds"),
    [("none", ()), ("activations", ("activations",)), ("weights", ("weights",)),
     ("both", ("activations", "weights"))],
)  # fmt: skip
def test_a_step_stretches_the_ranges_it_was_told_to(learned_steps, kinds):
    settings = tiny_settings()
    student = dataclasses.replace(settings.student, learned_steps=learned_steps)
    state, *_ = run_steps(dataclasses.replace(settings, student=student), CALIBRATED)
    stretch = state.student["quant"]["stretch"]
    moved = {k for k, tree in stretch.items() if any(np.any(v) for v in jax.tree.leaves(tree))}
    assert moved == set(kinds)


@pytest.mark.parametrize(("learned_steps", "follows"), [("none", True), ("weights", False)])
def test_weight_ranges_follow_the_weights_unless_they_are_learned(learned_steps, follows):
    spec = QuantSpec(learned_steps=learned_steps)
    student = step_spec(TEACHER, dataclasses.replace(tiny_settings(), student=spec), None).student
    variables = student.initial_variables(jax.tree.map(jax.numpy.asarray, TEACHER.variables))
    _, variables = calibrate(student, variables, jax.random.normal(jax.random.key(1), (8, 8, 8, 1)))
    before = freeze(student, variables)["weights"]["classifier"].scale
    head = variables["params"]["classifier"]
    grown = {**variables["params"], "classifier": {**head, "kernel": 2 * head["kernel"]}}
    after = freeze(student, {**variables, "params": grown})["weights"]["classifier"].scale
    np.testing.assert_allclose(after, 2 * before if follows else before, rtol=1e-6)


def test_the_student_loss_leaves_the_generator_alone():
    """The student trains on images as they are: no gradient flows back through them."""
    base, other = tiny_settings(**FIRING), tiny_settings(**FIRING, student_loss="kd")
    states = [run_steps(s, CALIBRATED)[0] for s in (base, other)]
    for a, b in zip(*(jax.tree.leaves(s.generator) for s in states), strict=True):
        np.testing.assert_array_equal(a, b)
    kernels = [s.student["params"]["classifier"]["kernel"] for s in states]
    assert not np.array_equal(*kernels)


@pytest.mark.parametrize(
    "switched",
    [
        {"attention": "after_block1"},
        {"ama_weight": 0.0},
        {"student_loss": "kd"},
        {"ama_center": "classifier"},
        {"inundation": 0.1},
    ],
    ids=lambda switched: next(iter(switched)),
)
def test_each_ingredient_changes_program_and_result(switched):
    settings = tiny_settings(**FIRING), tiny_settings(**{**FIRING, **switched})
    base, other = (run_steps(each, CALIBRATED) for each in settings)
    programs = [
        jax.jit(functools.partial(steps.joint_step, spec=step_spec(TEACHER, each, None)))
        .lower(state, TEACHER.variables)
        .as_text()
        for each, (state, _) in zip(settings, (base, other), strict=True)
    ]
    assert programs[0] != programs[1]
    assert base[1][-1]["student/loss"] != other[1][-1]["student/loss"]
    kernels = [run[0].student["params"]["classifier"]["kernel"] for run in (base, other)]
    assert not np.array_equal(*kernels)


@pytest.mark.parametrize(
    "switched", [{"class_focus": 2.0}, {"superposition": 1.0}, {"ce_hardest": 0.3}]
)
def test_each_further_ingredient_changes_the_losses(switched):
    """Evaluated, not trained: their gradients are those of the losses, tested alone."""
    spec = step_spec(TEACHER, tiny_settings(**switched), None)
    plain = step_spec(TEACHER, tiny_settings(), None)
    variables = jax.tree.map(jax.numpy.asarray, TEACHER.variables)
    state, _ = run_steps(tiny_settings(), ())
    found = []
    for each in (plain, spec):
        noise, labels = steps.draw_latents(jax.random.key(1), each)
        _, aux = steps.synthesis_loss(
            state.generator, variables, state.centers, noise, labels, spec=each
        )
        trainable = each.student.trainable(state.student)
        _, terms = student_loss(
            trainable, state.student, aux["images"], labels, aux["lesson"], spec=each
        )
        found.append((float(aux["terms"]["generator/ce"]), float(terms["student/ce"])))
    changed = [bool(np.not_equal(a, b)) for a, b in zip(*found, strict=True)]
    assert changed == {
        "class_focus": [True, False], "superposition": [True, True], "ce_hardest": [False, True],
    }[next(iter(switched))]  # fmt: skip


ALIGNED = {"channel_alignment": 30.0, "cam_alignment": 5.0, "perturbation": 0.01}


@pytest.fixture(scope="module")
def compared_pair():
    """A spec that aligns and perturbs, a calibrated state of its student, images and labels."""
    spec = step_spec(TEACHER, tiny_settings(student_loss="kd", **ALIGNED), None)
    variables = jax.tree.map(jax.numpy.asarray, TEACHER.variables)
    student = spec.student.initial_variables(variables)
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    _, student = calibrate(spec.student, student, images)
    return spec, variables, student, images, jax.numpy.arange(4)


def test_the_student_is_aligned_at_block_outputs_and_at_the_last_map(compared_pair):
    spec, variables, student, images, labels = compared_pair
    graph, output = spec.graph, spec.graph.output
    blocks, last = aligned_blocks(spec), graph.by_name[graph.features].inputs[0]
    assert len(blocks) == 2  # the stem and the residual block
    assert blocks[-1] == graph.last_map == last
    lesson = lesson_of(variables, images, spec)
    total, terms = student_loss(
        spec.student.trainable(student), student, images, labels, lesson, spec=spec
    )
    theirs = float_forward(graph, variables, images, (*blocks, output))
    ours = student_forward(spec.student, student, images, (*blocks, output))
    channel = losses.channel_attention_alignment(
        [ours[name] for name in blocks], [theirs[name] for name in blocks]
    )
    classes = np.argmax(theirs[output], -1)
    kernels = (
        coarse_kernel(spec.student.spec, student, spec.student.operations[-1]),
        variables["params"][graph.classifier.name]["kernel"],
    )
    maps = [
        losses.class_activation_map(values[last], kernel, classes)
        for values, kernel in zip((ours, theirs), kernels, strict=True)
    ]
    cam = losses.class_activation_alignment(*maps)
    assert channel > 0
    assert cam > 0
    np.testing.assert_allclose(terms["student/channel"], channel, rtol=1e-4)
    np.testing.assert_allclose(terms["student/cam"], cam, rtol=1e-4)
    plain = terms["student/ce"] + terms["student/distill"]
    np.testing.assert_allclose(total, plain + 30 * channel + 5 * cam, rtol=1e-5)


def test_a_generator_makes_the_spectrum_it_likes():
    settings = tiny_settings(noise_spectrum=1.0, noise_parameters="latents")
    with pytest.raises(ValueError, match=r"method\.noise_spectrum: found 1\.0 .* expected 0"):
        step_spec(TEACHER, settings, None)


def test_channels_that_are_rescaled_are_not_aligned():
    settings = tiny_settings(channel_alignment=1.0, equalize=True)
    with pytest.raises(ValueError, match=r"method\.equalize: found True .* expected False"):
        step_spec(TEACHER, settings, None)


def test_the_kernel_behind_an_activation_map_is_the_one_the_paper_placement_uses(compared_pair):
    spec, variables, _, images, _ = compared_pair
    paper = dataclasses.replace(spec.student, spec=QuantSpec(placement="paper", weight_bits=3))
    _, student = calibrate(paper, paper.initial_variables(variables), images)
    graph = spec.graph
    values = student_forward(paper, student, images, (graph.features, graph.output))
    kernel = lineage_kernel(paper.spec, student, paper.operations[-1])
    bias = student["params"][graph.classifier.name]["bias"]
    expected = values[graph.features] @ kernel + bias
    np.testing.assert_allclose(values[graph.output], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("placement", ["integer", "paper"])
@pytest.mark.parametrize("learned_steps", ["none", "weights"])
def test_a_kernel_is_whole_steps_and_its_gradient_ends_at_their_limits(compared_pair, placement,
                                                                       learned_steps):  # fmt: skip
    """LSQ: no gradient to weights beyond the ends of a learned range."""
    spec, variables, _, images, _ = compared_pair
    own = QuantSpec(placement=placement, weight_bits=3, learned_steps=learned_steps)
    student = dataclasses.replace(spec.student, spec=own)
    _, state = calibrate(student, student.initial_variables(variables), images)
    operation = student.operations[-1]
    name = operation.layer.name
    kernel_of = coarse_kernel if placement == "integer" else lineage_kernel
    wide = 2 * state["params"][name]["kernel"]  # of ranges that were found before it grew
    if learned_steps == "none":
        wide = wide / 2

    def coarse(kernel):
        params = {**state["params"], name: {**state["params"][name], "kernel": kernel}}
        return kernel_of(own, {**state, "params": params}, operation)

    params = {**state["params"], name: {**state["params"][name], "kernel": wide}}
    step, lowest, highest = kernel_steps(own, {**state, "params": params}, operation)
    codes = np.asarray(coarse(wide) / step)
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)
    assert (np.rint(codes) >= lowest).all()
    assert (np.rint(codes) <= highest).all()
    place = np.asarray(wide / step)
    beyond = (place < lowest - 1e-3) | (place > highest + 1e-3)
    gradient = np.asarray(jax.grad(lambda kernel: coarse(kernel).sum())(wide))
    expected = np.where(beyond & (learned_steps != "none"), 0.0, 1.0)
    edge = np.minimum(np.abs(place - lowest), np.abs(place - highest)) < 1e-3
    np.testing.assert_allclose(gradient[~edge], expected[~edge], rtol=1e-4)
    assert learned_steps == "none" or beyond.any()


def test_perturbed_images_are_harder_and_their_loss_is_added(compared_pair):
    spec, variables, student, images, labels = compared_pair
    trainable = spec.student.trainable(student)
    harder = perturbed_images(trainable, student, variables, images, labels, spec=spec)
    moved = np.asarray(harder - images)
    np.testing.assert_allclose(np.abs(moved)[moved != 0], 0.01, rtol=1e-3)
    assert np.mean(moved != 0) > 0.9

    def loss(images):
        lesson = lesson_of(variables, images, spec)
        return float(student_loss(trainable, student, images, labels, lesson, spec=spec)[0])

    assert loss(harder) > loss(images) > loss(images - moved)
    lesson = lesson_of(variables, images, spec)
    total, terms = training_loss(trainable, student, variables, images, labels, lesson, spec=spec)
    np.testing.assert_allclose(terms["student/perturbed"], loss(harder), rtol=1e-5)
    np.testing.assert_allclose(total, loss(images) + loss(harder), rtol=1e-5)
    assert terms["student/loss"] == total


@pytest.mark.parametrize(
    ("field", "term"),
    [("channel_alignment", "channel"), ("cam_alignment", "cam"), ("perturbation", "perturbed")],
)
@pytest.mark.parametrize("images", ["generator", "noise"])
def test_each_alignment_is_in_the_program_of_either_step(images, field, term):
    """Traced, not compiled."""
    settings = tiny_settings(images=images, **{field: ALIGNED[field]})
    spec = step_spec(TEACHER, settings, None)
    state = jax.eval_shape(lambda v: steps.initial_state(spec, v, 0), TEACHER.variables)
    pool = (jax.ShapeDtypeStruct((16, 8, 8, 1), np.float32), jax.ShapeDtypeStruct((16,), np.int32))
    step = steps.joint_step if images == "generator" else steps.pool_step
    arguments = (TEACHER.variables,) if images == "generator" else (TEACHER.variables, *pool)
    after, terms = jax.eval_shape(functools.partial(step, spec=spec), state, *arguments)
    assert f"student/{term}" in terms
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_activation_maps_need_a_global_pool():
    net = GraphBuilder("flat", input_shape=(8, 8, 1))
    net.dense(net.flatten(net.relu(net.batch_norm(net.conv(net.image, 4, 3)))), 10)
    graph = net.build()
    teacher = dataclasses.replace(TEACHER, graph=graph, variables=random_variables(graph))
    with pytest.raises(ValueError, match=r"method\.cam_alignment: layer .*Flatten.*GlobalPool"):
        step_spec(teacher, tiny_settings(cam_alignment=1.0), None)
    step_spec(teacher, tiny_settings(), None)


def test_networks_the_losses_are_not_defined_on_are_refused():
    def teacher_of(build):
        net = GraphBuilder("odd", input_shape=(8, 8, 1))
        build(net, net.relu(net.conv(net.image, 4, 3)))
        graph = net.build()
        return dataclasses.replace(TEACHER, graph=graph, variables=random_variables(graph))

    folded = teacher_of(lambda net, x: net.dense(net.global_pool(x), 10))
    for method in ({}, {"images": "noise"}):
        with pytest.raises(ValueError, match=r"without batch norms, expected .* before its batch"):
            step_spec(folded, tiny_settings(**method), None)
    settings = tiny_settings(images="noise", calibration_images="pool")  # read from a folder
    method = dataclasses.replace(settings.method, images="folder")
    step_spec(folded, dataclasses.replace(settings, method=method), None)
    capped = teacher_of(lambda net, x: net.relu(net.dense(net.global_pool(net.batch_norm(x)), 10)))
    with pytest.raises(ValueError, match=r"teacher: .*as the last layer, expected a Dense layer"):
        step_spec(capped, tiny_settings(), None)


ADAM = {"student_optimizer": "adam", "student_schedule": "constant", "student_weight_decay": 0.0}


@pytest.mark.parametrize("quantized", [
    QuantSpec(learned_steps="both"), QuantSpec(), QuantSpec(placement="paper"),
    QuantSpec(policy="R", weight_bits=2),
])  # fmt: skip
def test_kernels_move_by_their_rate_in_quantization_steps(quantized):
    """Adam's first update is its rate, up or down, whatever the gradient."""
    settings = tiny_settings(**ADAM, student_learning_rate=1e-3, student_kernel_rate=0.02)
    settings = dataclasses.replace(settings, student=quantized)
    spec = step_spec(TEACHER, settings, None)
    (before, _), (after, _) = (run_steps(settings, CALIBRATED[:count]) for count in (1, 2))
    for operation in spec.student.operations:
        if not operation.weight_bits:
            continue
        old, new = (s.student["params"][operation.layer.name] for s in (before, after))
        step = np.asarray(kernel_steps(quantized, before.student, operation).step)
        moved = np.abs(np.asarray(new["kernel"]) - np.asarray(old["kernel"])) / step
        gets_a_gradient = moved > 0
        assert gets_a_gradient.mean() > 0.3, operation.layer.name
        assert np.median(moved[gets_a_gradient]) == pytest.approx(0.02, rel=1e-3)
        # and less where a gradient is hardly larger than Adam's epsilon
        assert moved.max() < 0.0201
    bias = np.abs(
        np.subtract(*(s.student["params"]["classifier"]["bias"] for s in (before, after)))
    )
    assert np.median(bias) == pytest.approx(1e-3, rel=1e-2)


def test_channels_that_are_rescaled_learn_the_same_codes():
    """A batch norm undoes the size of the channels before it, so it must not matter. Rates of
    their own weights do, and here move the small ones through all their codes."""
    changed = {}
    for rate in (0.0, 0.05):
        settings = tiny_settings(**ADAM, student_learning_rate=1e-2, student_kernel_rate=rate)
        spec = step_spec(TEACHER, settings, None)
        codes = []
        for scale in (1.0, 2.0**-7):
            variables = jax.tree.map(jax.numpy.asarray, rescaled_teacher(scale))
            state = START(spec, variables, 0)
            for step in CALIBRATED:
                with jax.disable_jit():
                    state, _ = step(state, variables, spec=spec)
            codes.append(np.asarray(freeze(spec.student, state.student)["weights"][FIRST].codes))
        changed[rate] = np.mean(codes[0] != codes[1])
    assert changed[0.05] < 0.01
    assert changed[0.0] > 0.2


FIRST = TEACHER.graph.weighted[0].name
"""The first convolution; `bn1` is behind it."""


def rescaled_teacher(scale):
    """The same network, the channels of its first convolution that much smaller."""
    params, statistics = dict(TEACHER.variables["params"]), dict(TEACHER.variables["batch_stats"])
    kernel = params[FIRST]["kernel"] * np.float32(scale)
    params[FIRST] = {**params[FIRST], "kernel": kernel}
    mean, var = statistics["bn1"]["mean"] * scale, statistics["bn1"]["var"]
    eps = next(layer.eps for layer in TEACHER.graph.layers if layer.name == "bn1")
    var = (var + eps) * scale**2 - eps
    statistics["bn1"] = {"mean": np.float32(mean), "var": np.float32(var)}
    return {**TEACHER.variables, "params": params, "batch_stats": statistics}


def test_inundated_steps_change_their_share_of_every_kernels_codes():
    settings = tiny_settings(**FIRING, inundation=0.1)
    spec = step_spec(TEACHER, settings, None)
    before, after = (
        freeze(spec.student, run_steps(settings, CALIBRATED[:count])[0].student)["weights"]
        for count in (2, 3)
    )
    for name in before:
        changed = np.mean(np.asarray(before[name].codes != after[name].codes))
        assert changed > 0.05, name  # the range follows the kernel, so some thresholds move too


def test_steps_average_the_trainable_weights_and_train_as_without():
    settings = tiny_settings(average_decay=0.5)
    spec = step_spec(TEACHER, settings, None)
    functions = (*CALIBRATED, steps.joint_step)
    expected, count = None, 0
    for stop in range(2, len(functions) + 1):
        state, *_ = run_steps(settings, functions[:stop])
        plain, *_ = run_steps(tiny_settings(), functions[:stop])
        jax.tree.map(np.testing.assert_array_equal, state.student, plain.student)
        new = spec.student.trainable(state.student)
        d = min(0.5, count / (count + 9))
        expected = new if not count else jax.tree.map(lambda a, w, d=d: d * a + (1 - d) * w, expected, new)  # fmt: skip
        count += 1
    assert int(state.average.updates) == count == 3
    final = steps.final_student(state, spec=spec)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        spec.student.trainable(final),
        expected,
    )
    jax.tree.map(np.testing.assert_array_equal, final["batch_stats"], state.student["batch_stats"])
    assert not np.array_equal(
        final["params"]["classifier"]["kernel"], state.student["params"]["classifier"]["kernel"]
    )


def test_without_it_nothing_is_kept_and_the_last_weights_ship():
    settings = tiny_settings()
    state, *_ = run_steps(settings, CALIBRATED)
    assert jax.tree.leaves(state.average.weights) == []
    assert steps.final_student(state, spec=step_spec(TEACHER, settings, None)) is state.student


def test_before_the_first_update_the_student_itself_ships():
    settings = tiny_settings(average_decay=0.5)
    state, *_ = run_steps(settings, CALIBRATED[:1])
    assert steps.final_student(state, spec=step_spec(TEACHER, settings, None)) is state.student


def test_one_device_equals_eight():
    """Losses of three joint steps agree to 1e-5, and each device holds an eighth of the batch.

    With Adam's usual epsilon the first update is the gradient's sign, which flips where the
    gradient is rounding noise; a large epsilon makes the step a continuous function of it.
    """
    settings = tiny_settings(attention="after_block1", adam_epsilon=1e-2, student_optimizer="sgd")
    functions = (*CALIBRATED, steps.joint_step)
    one, _ = compiled_steps(settings, functions, 1)
    eight, text = compiled_steps(settings, functions, 8)
    for first, second in zip(one, eight, strict=True):
        for name, value in first.items():
            assert second[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert "f32[2,8,8,8]" in text, "the batch of 16 is not split over 8 devices"
    assert "f32[16,8,8,8]" not in text, "a device computes feature maps of the whole batch"
    assert "all-reduce" in text


def test_the_compiled_step_refuses_other_shapes_instead_of_recompiling():
    settings = tiny_settings()
    mesh = data_mesh(1)
    spec = step_spec(TEACHER, settings, mesh)
    variables = put_replicated(TEACHER.variables, mesh)
    state = put_replicated(START(spec, variables, 0), mesh)
    program = compile_step(steps.warmup_step, state, variables, mesh=mesh, spec=spec)
    compilations = []
    with jax.log_compiles(False):
        listener = lambda event, *_, **__: compilations.append(event)  # noqa: E731
        jax.monitoring.register_event_duration_secs_listener(listener)
        for _ in range(3):
            state, _ = program(state, variables)
        jax.block_until_ready(state)
    assert not [event for event in compilations if "compile" in event]
    with pytest.raises((TypeError, ValueError)):
        program(state._replace(step=jax.numpy.zeros((2,), jax.numpy.int32)), variables)


def test_a_program_takes_its_state_and_the_precision_of_its_settings():
    mesh = data_mesh(1)
    spec = step_spec(TEACHER, tiny_settings(), mesh)
    spec = dataclasses.replace(spec, resources=Resources(precision="tf32"))
    asked = []

    def step(state, spec):
        asked.append(jax.config.jax_default_matmul_precision)
        return state + 1, {}

    state = put_replicated(np.zeros(3), mesh)
    compile_step(step, state, mesh=mesh, spec=spec)(state)
    assert asked == [spec.resources.matmul_precision] != ["highest"]
    assert state.is_deleted()  # donated: no second copy of parameters and moments


def test_several_steps_a_dispatch_equal_single_ones():
    settings = tiny_settings(adam_epsilon=1e-2)
    mesh = data_mesh(1)
    spec = step_spec(TEACHER, settings, mesh)
    variables = put_replicated(TEACHER.variables, mesh)

    def after(count, calls):
        state = put_replicated(START(spec, variables, 0), mesh)
        program = compile_step(
            steps.warmup_step, state, variables, mesh=mesh, count=count, spec=spec
        )
        losses = []
        for _ in range(calls):
            state, metrics = program(state, variables)
            losses.append(np.asarray(metrics["generator/loss"]))
        return np.concatenate(losses), int(state.step)

    losses, count = after(3, 1)
    expected, expected_count = after(1, 3)
    assert count == expected_count == 3
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_phases_cover_every_step_once():
    for method in (
        {"warmup_steps": 7, "calibration_start": 2, "calibration_steps": 3},
        {"warmup_steps": 3, "calibration_start": 0, "calibration_steps": 3},
        {"warmup_steps": 3, "images": "noise"},
    ):
        settings = tiny_settings(**method)
        plan = phases(step_spec(TEACHER, settings, None))
        covered = [step for phase in plan for step in range(phase.start, phase.stop)]
        assert covered == list(range(settings.method.warmup_steps + settings.method.steps))
        calibrating = [p for p in plan if p.step is steps.calibration_step]
        assert sum(p.stop - p.start for p in calibrating) == settings.method.calibration_steps
        student = steps.pool_step if "images" in method else steps.joint_step
        assert plan[-1].step is student


def test_steps_are_static_descriptions_that_hash():
    spec = step_spec(TEACHER, tiny_settings(), data_mesh(1))
    assert hash(spec) == hash(dataclasses.replace(spec))
