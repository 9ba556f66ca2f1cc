"""lrq_jax.losses: each against numpy in float64 from the formulas, and where gradients could break."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lrq_jax import losses

# Compiled, as every caller runs them, and faster than one operation at a time.
cross_entropy = jax.jit(losses.cross_entropy)
squared_target_error = jax.jit(losses.squared_target_error)
distillation = jax.jit(losses.distillation, static_argnames=("temperature", "reduction"))
decoupled_distillation = jax.jit(losses.decoupled_distillation, static_argnames="temperature")
cosine_to_centers = jax.jit(losses.cosine_to_centers)
angular_margin_hinge = jax.jit(
    losses.angular_margin_hinge, static_argnames=("margin", "lower", "upper")
)
update_centers = jax.jit(losses.update_centers)
batch_norm_statistics = jax.jit(losses.batch_norm_statistics)
relative_batch_norm_statistics = jax.jit(losses.relative_batch_norm_statistics)

BATCH, CLASSES = 6, 5
AMA = {"margin": 0.5, "lower": 0.3, "upper": 0.8}  # docs/method.md: m, and R18's hinges


def _check_gradients(function, *arguments):
    check_grads(
        jax.jit(function), arguments, order=1, modes=["fwd", "rev"], atol=2e-2, rtol=2e-2, eps=1e-2
    )


def _naive_softmax(z):
    z = np.float64(z)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _kl(p, q):
    return np.sum(p * (np.log(p) - np.log(q)), -1)


@pytest.fixture
def logits(rng):
    """Student's and teacher's logits and labels of an ordinary batch."""
    student, teacher = rng.standard_normal((2, BATCH, CLASSES)).astype(np.float32) * 3
    return jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(rng.integers(0, CLASSES, BATCH))


def _dangerous_logits():
    """Pairs of logits where probabilities are exactly 0 or 1 in float32; the label is class 0."""
    rows = {
        "p_y = 1": [1e4, 0, -5, 3, 1],
        "p_y = 0": [-1e4, 0, 1, 2, 3],
        "another class at 1": [0, 1e4, 0, 0, 0],
        "all equal": [7, 7, 7, 7, 7],
        "all huge": [1e4, 1e4, 1e4, -1e4, 1e4],
    }
    return [(a, b, rows[a], rows[b]) for a in rows for b in rows]


# ---- classification ----------------------------------------------------------------------------


def test_cross_entropy(logits):
    student, _, labels = logits
    expected = -np.mean(np.log(_naive_softmax(student)[np.arange(BATCH), labels]))
    np.testing.assert_allclose(cross_entropy(student, labels), expected, rtol=1e-5)
    shifted = cross_entropy(student + 1000, labels)
    np.testing.assert_allclose(shifted, expected, rtol=1e-3)
    _check_gradients(lambda z: cross_entropy(z, labels), student)
    softmax = _naive_softmax(student)
    softmax[np.arange(BATCH), labels] -= 1
    gradient = jax.grad(cross_entropy)(student, labels)
    np.testing.assert_allclose(gradient, softmax / BATCH, rtol=1e-4, atol=1e-7)


def test_cross_entropy_of_sure_logits():
    logits = jnp.float32([[1e4, 0, 0], [0, 1e4, 0]])
    assert cross_entropy(logits, jnp.array([0, 1])) == 0
    assert cross_entropy(logits, jnp.array([1, 0])) == 1e4
    assert np.isfinite(jax.grad(cross_entropy)(logits, jnp.array([1, 0]))).all()


def test_squared_target_error(logits, rng):
    student, _, labels = logits
    targets = jnp.asarray(rng.random(BATCH), jnp.float32)
    chosen = _naive_softmax(student)[np.arange(BATCH), labels]
    found = squared_target_error(student, labels, targets)
    np.testing.assert_allclose(found, np.mean((chosen - np.float64(targets)) ** 2), rtol=1e-4)
    _check_gradients(lambda z: squared_target_error(z, labels, targets), student)
    sure = squared_target_error(jnp.float32([[1e4, 0]]), jnp.array([0]), jnp.float32([1]))
    assert sure == 0
    gradient = jax.grad(squared_target_error)(
        jnp.float32([[1e4, -1e4]]), jnp.array([1]), jnp.float32([1])
    )
    assert np.isfinite(gradient).all()


def test_targets_are_one_half_of_the_time_and_else_above_the_lowest():
    targets = np.asarray(losses.sample_targets(jax.random.key(0), 4000, lowest=0.3))
    hard = targets == 1
    assert abs(hard.mean() - 0.5) < 0.04
    soft = targets[~hard]
    assert soft.min() >= 0.3
    assert soft.max() < 1
    np.testing.assert_allclose([soft.min(), soft.mean(), soft.max()], [0.3, 0.65, 1], atol=0.02)
    assert (losses.sample_targets(jax.random.key(0), 4000, lowest=0.3) == targets).all()
    rare = losses.sample_targets(jax.random.key(1), 4000, lowest=0.5, probability=0.1)
    assert abs((rare == 1).mean() - 0.1) < 0.03
    np.testing.assert_array_equal(
        losses.sample_targets(jax.random.key(2), 5, lowest=0.0, probability=1.0), 1
    )


# ---- distillation ------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_distillation(temperature, logits):
    student, teacher, _ = logits
    terms = _kl(*(_naive_softmax(np.float64(z) / temperature) for z in (teacher, student)))
    expected = temperature**2 * terms.mean()
    found = distillation(student, teacher, temperature=temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    by_element = distillation(student, teacher, temperature=temperature, reduction="element_mean")
    np.testing.assert_allclose(by_element, expected / CLASSES, rtol=1e-3)
    assert distillation(teacher, teacher, temperature=temperature) == 0
    if temperature == 4:
        _check_gradients(lambda s, t: distillation(s, t, temperature=4.0), student, teacher)


def test_unknown_reduction_is_refused(logits):
    with pytest.raises(ValueError, match=r"reduction: found 'mean', expected one of .*batch_mean"):
        distillation(*logits[:2], temperature=1.0, reduction="mean")


def _naive_dkd(student, teacher, labels, alpha, beta, temperature):
    """docs/method.md, section 3, one image at a time."""
    total = 0.0
    for s, t, y in zip(np.float64(student), np.float64(teacher), np.asarray(labels), strict=True):
        ps, pt = _naive_softmax(s / temperature), _naive_softmax(t / temperature)
        binary = _kl(np.array([pt[y], 1 - pt[y]]), np.array([ps[y], 1 - ps[y]]))
        rest = [k for k in range(len(s)) if k != y]
        others = _kl(_naive_softmax(t[rest] / temperature), _naive_softmax(s[rest] / temperature))
        total += temperature**2 * (alpha * binary + beta * others)
    return total / len(labels)


@pytest.mark.parametrize(
    ("alpha", "beta", "temperature"),
    [(1.0, 8.0, 1.0), (1.0, 8.0, 4.0), (0.0, 1.0, 4.0), (1.0, 0.0, 4.0), (0.5, 2.0, 1.0)],
)
def test_decoupled_distillation(alpha, beta, temperature, logits):
    student, teacher, labels = logits

    def loss(student, teacher):
        return decoupled_distillation(
            student, teacher, labels, alpha=alpha, beta=beta, temperature=temperature
        )

    expected = _naive_dkd(student, teacher, labels, alpha, beta, temperature)
    np.testing.assert_allclose(loss(student, teacher), expected, rtol=1e-4)
    np.testing.assert_allclose(loss(teacher, teacher), 0, atol=1e-6)
    shifted = loss(student + 50, teacher - 20)
    np.testing.assert_allclose(shifted, expected, rtol=1e-3)
    if (alpha, beta, temperature) == (1, 8, 4):
        _check_gradients(loss, student, teacher)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_with_beta_one_minus_p_is_plain_distillation_of_every_image(temperature, logits):
    student, teacher, labels = logits
    p = _naive_softmax(np.float64(teacher) / temperature)
    for i in range(BATCH):
        one = slice(i, i + 1)
        beta = 1 - p[i, labels[i]]
        decoupled = decoupled_distillation(
            student[one], teacher[one], labels[one], alpha=1.0, beta=beta, temperature=temperature
        )
        plain = distillation(student[one], teacher[one], temperature=temperature)
        np.testing.assert_allclose(decoupled, plain, rtol=1e-4, atol=1e-6)


def test_two_classes_leave_nothing_to_the_others(logits):
    student, teacher = (z[:, :2] for z in logits[:2])
    labels = logits[2] % 2
    value = decoupled_distillation(student, teacher, labels, alpha=0.0, beta=8.0, temperature=1.0)
    assert value == 0
    both = decoupled_distillation(student, teacher, labels, alpha=1.0, beta=8.0, temperature=2.0)
    np.testing.assert_allclose(both, distillation(student, teacher, temperature=2.0), rtol=1e-4)


def test_distillation_of_extreme_logits_is_finite_with_finite_gradients():
    cases = _dangerous_logits()
    students = jnp.float32([case[2] for case in cases])
    teachers = jnp.float32([case[3] for case in cases])
    labels = jnp.zeros(1, jnp.int32)

    def plain(s, t):
        return distillation(s, t, temperature=1.0)

    def decoupled(s, t):
        return decoupled_distillation(s, t, labels, alpha=1.0, beta=8.0, temperature=1.0)

    for loss in (plain, decoupled):
        one = jax.value_and_grad(lambda s, t, loss=loss: loss(s[None], t[None]), (0, 1))
        values, gradients = jax.jit(jax.vmap(one))(students, teachers)
        for (student, teacher, *_), value, by_s, by_t in zip(
            cases, values, *gradients, strict=True
        ):
            assert np.isfinite(value), (student, teacher)
            assert value >= -1e-3, (student, teacher)
            assert np.isfinite(by_s).all(), (student, teacher)
            assert np.isfinite(by_t).all(), (student, teacher)
            assert np.abs(by_s).max() <= 2 * 9, (student, teacher)
            if student == teacher:
                assert value == 0


@pytest.mark.parametrize("offset", [0.0, -5000.0])
def test_a_sure_teacher_still_teaches_the_others(offset):
    """p_y = 1 in float32: the non-target part must still see the teacher's order of the others."""
    teacher = jnp.float32([[50, 1, 2, 3]]) + offset
    student = jnp.float32([[50, 3, 2, 1]]) + offset
    value, gradient = jax.value_and_grad(decoupled_distillation)(
        student, teacher, jnp.array([0]), alpha=1.0, beta=8.0, temperature=1.0
    )
    expected = 8 * _kl(_naive_softmax([1, 2, 3]), _naive_softmax([3, 2, 1]))
    np.testing.assert_allclose(value, expected, rtol=2e-3)
    assert gradient[0, 1] > 1
    assert gradient[0, 3] < -1


# ---- margin ------------------------------------------------------------------------------------


def _naive_hinges(cosine, mask, margin, lower, upper):
    """docs/method.md, section 3: phi = cos(theta + m), through the angle itself."""
    phi = np.cos(np.arccos(np.float64(cosine)) + margin)
    chosen = np.asarray(mask) > 0
    low = np.maximum(lower - (1 - phi), 0)[chosen]
    up = np.maximum((1 - phi) - upper, 0)[chosen]
    return (low.mean(), up.mean()) if chosen.any() else (0, 0)


def test_hinges_are_the_formula(rng):
    cosine = jnp.asarray(rng.uniform(-0.999, 0.999, 300), jnp.float32)
    mask = jnp.asarray(rng.random(300) < 0.7, jnp.float32)
    for settings in (AMA, {"margin": 0.0, "lower": 0.05, "upper": 0.8},
                     {"margin": 0.2, "lower": 1.9, "upper": 0.1}):  # fmt: skip
        found = angular_margin_hinge(cosine, mask, **settings)
        np.testing.assert_allclose(found, _naive_hinges(cosine, mask, **settings), rtol=1e-4)
        if settings["margin"]:
            assert min(found) > 0
    nobody = angular_margin_hinge(cosine, jnp.zeros(300), **AMA)
    np.testing.assert_array_equal(nobody, [0, 0])
    _check_gradients(lambda c: angular_margin_hinge(c, mask, **AMA), cosine * 0.9)


def test_images_without_a_center_neither_count_nor_get_a_gradient():
    cosine, mask = jnp.float32([0.99, 0.0, 0.99, -0.5]), jnp.float32([1, 0, 0, 1])
    (low, up), pullback = jax.vjp(lambda c: angular_margin_hinge(c, mask, **AMA), cosine)
    alone = angular_margin_hinge(cosine[mask > 0], jnp.ones(2), **AMA)
    np.testing.assert_allclose((low, up), alone, rtol=1e-6)
    (gradient,) = pullback((jnp.float32(1), jnp.float32(1)))
    assert (gradient[1], gradient[2]) == (0, 0)
    assert (gradient[0], gradient[3]) != (0, 0)


def test_intraqs_lower_hinge_cannot_fire_with_the_margin():
    """docs/method.md: at lower = .05 and m = .5 even a feature on its centre is far enough."""
    cosine = jnp.linspace(-1, 1, 201)
    low, _ = angular_margin_hinge(cosine, jnp.ones(201), margin=0.5, lower=0.05, upper=0.8)
    assert low == 0
    low, _ = angular_margin_hinge(cosine, jnp.ones(201), margin=0.0, lower=0.05, upper=0.8)
    assert low > 0


def _angle(features, center):
    product = features @ center / np.linalg.norm(features) / np.linalg.norm(center)
    return math.acos(min(max(product, -1), 1))


def test_the_lower_hinge_pushes_features_away_and_the_upper_pulls_them_in():
    center = np.float32([1, 0, 0])
    for degrees, moves in ((3, "away"), (10, "away"), (30, "nowhere"), (60, "in"), (110, "in")):
        angle = math.radians(degrees)
        features = jnp.float32([[math.cos(angle), math.sin(angle), 0]]) * 3
        low = math.radians(degrees) + 0.5 < math.acos(1 - 0.3)
        up = math.radians(degrees) + 0.5 > math.acos(1 - 0.8)
        assert (low, up) == (moves == "away", moves == "in"), "the example itself"

        def loss(features):
            cosine = cosine_to_centers(features, jnp.asarray(center)[None], jnp.array([0]))
            return sum(angular_margin_hinge(cosine, jnp.ones(1), **AMA))

        gradient = jax.jit(jax.grad(loss))(features)
        after = _angle(np.asarray(features - 0.01 * gradient)[0], center)
        step = after - _angle(np.asarray(features)[0], center)
        if moves == "nowhere":
            assert loss(features) == 0
            np.testing.assert_array_equal(gradient, 0)
        else:
            assert step > 1e-5 if moves == "away" else step < -1e-5, (degrees, step)


def test_cosine(rng):
    features = rng.standard_normal((BATCH, 7)).astype(np.float32) * 5
    centers = rng.standard_normal((CLASSES, 7)).astype(np.float32) / 100
    labels = rng.integers(0, CLASSES, BATCH)
    f, c = np.float64(features), np.float64(centers)[labels]
    expected = (f * c).sum(1) / np.linalg.norm(f, axis=1) / np.linalg.norm(c, axis=1)
    found = cosine_to_centers(jnp.asarray(features), jnp.asarray(centers), jnp.asarray(labels))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    _check_gradients(lambda f: cosine_to_centers(f, centers, labels), jnp.asarray(features) / 5)


def test_margin_at_dangerous_points():
    """|cos| = 1, a zero feature, a class without a centre, a nearly zero feature, a huge one."""
    centers = jnp.float32([[3, 0, 0], [0, 0, 0]])
    features = jnp.float32(
        [[5, 0, 0], [-5, 0, 0], [0, 0, 0], [1, 2, 3], [0, 0, 0], [1e-20, 0, 0], [1e15, 1e15, 0]]
    )
    labels = jnp.array([0, 0, 0, 1, 1, 0, 0])
    mask = jnp.float32([1, 1, 1, 0, 0, 1, 1])

    def loss(features, centers):
        cosine = cosine_to_centers(features, centers, labels)
        return sum(angular_margin_hinge(cosine, mask, **AMA))

    cosine = cosine_to_centers(features, centers, labels)
    np.testing.assert_allclose(cosine, [1, -1, 0, 0, 0, 0, math.sqrt(0.5)], atol=1e-6)
    by_features, by_centers = jax.jit(jax.grad(loss, (0, 1)))(features, centers)
    assert np.isfinite(by_features).all()
    assert np.isfinite(by_centers).all()
    np.testing.assert_array_equal(by_features[3:5], 0)
    assert np.isfinite(loss(features, centers))
    ends = jnp.float32([1, -1, 1.0000001, -1.0000001])  # rounding passes 1
    hinges, pullback = jax.vjp(lambda c: angular_margin_hinge(c, jnp.ones(4), **AMA), ends)
    assert np.isfinite(hinges).all()
    assert np.isfinite(pullback(hinges)[0]).all()


def test_centers_are_the_running_mean_of_each_class(rng):
    centers = losses.initial_centers(CLASSES, 3)
    np.testing.assert_array_equal(centers.means, np.zeros((CLASSES, 3)))
    seen = {k: [] for k in range(CLASSES)}
    for _ in range(4):
        features = rng.standard_normal((BATCH, 3)).astype(np.float32)
        labels = rng.integers(0, CLASSES - 1, BATCH)  # the last class never comes
        for label, feature in zip(labels, np.float64(features), strict=True):
            seen[label].append(feature)
        centers = update_centers(centers, jnp.asarray(features), jnp.asarray(labels))
    for k, rows in seen.items():
        assert centers.counts[k] == len(rows)
        np.testing.assert_allclose(
            centers.means[k], np.mean(rows, 0) if rows else np.zeros(3), rtol=1e-4, atol=1e-6
        )
    assert not seen[CLASSES - 1]
    gradient = jax.grad(lambda f: jnp.sum(update_centers(centers, f, labels).means))(features)
    np.testing.assert_array_equal(gradient, 0)


# ---- statistics --------------------------------------------------------------------------------


def test_batch_norm_statistics(rng):
    shapes = [(4, 5, 6, 3), (4, 7), (4, 1, 2, 2)]
    inputs = [rng.standard_normal(shape).astype(np.float32) * 2 + 1 for shape in shapes]
    running = [
        (rng.standard_normal(s[-1]).astype(np.float32), rng.random(s[-1]).astype(np.float32) * 4)
        for s in shapes
    ]
    expected = 0.0
    for x, (mean, variance) in zip(inputs, running, strict=True):
        rows = np.float64(x).reshape(-1, x.shape[-1])
        expected += np.mean((rows.mean(0) - mean) ** 2) + np.mean((rows.var(0) - variance) ** 2)
    found = batch_norm_statistics(inputs, running)
    np.testing.assert_allclose(found, expected / 3, rtol=1e-5)
    _check_gradients(lambda *x: batch_norm_statistics(x, running), *map(jnp.asarray, inputs))
    matched = [
        (x.reshape(-1, x.shape[-1]).mean(0), x.reshape(-1, x.shape[-1]).var(0)) for x in inputs
    ]
    np.testing.assert_allclose(batch_norm_statistics(inputs, matched), 0, atol=1e-10)


def test_relative_batch_norm_statistics(rng):
    inputs = [rng.standard_normal(s).astype(np.float32) * 2 + 1 for s in [(4, 5, 6, 3), (4, 7)]]
    running = [
        (rng.standard_normal(x.shape[-1]).astype(np.float32), rng.random(x.shape[-1]) * 4)
        for x in inputs
    ]
    expected = 0.0
    for x, (mean, variance) in zip(inputs, running, strict=True):
        rows = np.float64(x).reshape(-1, x.shape[-1])
        deviation = np.sqrt(variance + 1e-3)
        expected += np.mean(((rows.mean(0) - mean) / deviation) ** 2)
        expected += np.mean((np.sqrt(rows.var(0) + 1e-3) / deviation - 1) ** 2)
    found = relative_batch_norm_statistics(inputs, running)
    np.testing.assert_allclose(found, expected / 2, rtol=1e-5)
    _check_gradients(
        lambda *x: relative_batch_norm_statistics(x, running), *map(jnp.asarray, inputs)
    )
    # A layer whose activations are a hundred times as large counts as much as before.
    larger = [100 * inputs[0], inputs[1]]
    scaled = [(100 * running[0][0], 1e4 * (running[0][1] + 1e-3) - 1e-3), running[1]]
    again = relative_batch_norm_statistics(larger, scaled)
    np.testing.assert_allclose(again, expected / 2, rtol=1e-3)
    # a constant channel, in the batch or in the running statistics
    constant = [(jnp.zeros(2), jnp.zeros(2))]
    gradient = jax.grad(lambda x: relative_batch_norm_statistics([x], constant))(jnp.ones((3, 2)))
    assert np.isfinite(gradient).all()


def test_batch_norm_deviations(rng):
    inputs = [rng.standard_normal(s).astype(np.float32) * 2 + 1 for s in [(4, 5, 6, 3), (4, 7)]]
    running = [
        (rng.standard_normal(x.shape[-1]).astype(np.float32), rng.random(x.shape[-1]) * 4)
        for x in inputs
    ]
    expected = 0.0
    for x, (mean, variance) in zip(inputs, running, strict=True):
        rows = np.float64(x).reshape(-1, x.shape[-1])
        expected += np.mean((rows.mean(0) - mean) ** 2)
        expected += np.mean((rows.std(0) - np.sqrt(variance)) ** 2)
    found = losses.batch_norm_deviations(inputs, running)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    constant = [(jnp.zeros(2), jnp.zeros(2))]
    gradient = jax.grad(lambda x: losses.batch_norm_deviations([x], constant))(jnp.ones((3, 2)))
    assert np.isfinite(gradient).all()


def test_image_statistics_are_of_each_image_and_channel(rng):
    images = rng.standard_normal((3, 4, 5, 2)).astype(np.float32) * 2 + 1
    expected = 0.0
    for image in np.float64(images):
        for channel in np.moveaxis(image, -1, 0):
            expected += (channel.mean() ** 2 + (channel.std() - 1) ** 2) / 3
    np.testing.assert_allclose(losses.image_statistics(images), expected, rtol=1e-4)
    normal = (images - images.mean((1, 2), keepdims=True)) / images.std((1, 2), keepdims=True)
    np.testing.assert_allclose(losses.image_statistics(normal), 0, atol=1e-6)
    assert np.isfinite(jax.grad(losses.image_statistics)(jnp.ones((1, 2, 2, 1)))).all()


def test_statistics_of_a_constant_and_of_a_far_batch_are_finite():
    running = [(jnp.zeros(2), jnp.ones(2))]
    for value in (0.0, 3.0, 1e4):
        x = jnp.full((3, 2, 2, 2), value)
        loss, gradient = jax.value_and_grad(lambda x: batch_norm_statistics([x], running))(x)
        np.testing.assert_allclose(loss, value**2 + 1, rtol=1e-6)
        assert np.isfinite(gradient).all()
    # Far from 0 a variance as E[x^2] - E[x]^2 would be lost in float32.
    near = 4096 + np.float32([[-1], [1]]).repeat(2, 1)
    loss = batch_norm_statistics([jnp.asarray(near)], [(jnp.full(2, 4096.0), jnp.ones(2))])
    np.testing.assert_allclose(loss, 0, atol=1e-6)


def test_statistics_refuse_what_does_not_fit():
    with pytest.raises(
        ValueError, match="found a teacher without batch norms, expected at least one"
    ):
        losses.batch_norm_statistics([], [])
    with pytest.raises(ValueError, match="zip"):
        batch_norm_statistics([jnp.ones((2, 3))], [])
