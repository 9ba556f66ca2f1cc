"""Alignment losses, focal and easy cross-entropy, low-pass filter and gradient inundation, each
against numpy from its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lrq_jax import losses
from lrq_jax.training.inundation import inundated

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_channel_attention_alignment(rng):
    pairs = [rng.standard_normal((2, *s)).astype(np.float32) for s in [(3, 4, 5, 6), (3, 2, 2, 4)]]
    expected = 0.0
    for student, teacher in np.float64(pairs[0]), np.float64(pairs[1]):
        rows = []
        for features in (student, teacher):
            energy = np.array(
                [[np.mean(x[..., c] ** 2) for c in range(x.shape[-1])] for x in features]
            )
            rows.append(energy / np.linalg.norm(energy, axis=1, keepdims=True))
        expected += np.mean((rows[0] - rows[1]) ** 2)
    students, teachers = ([pair[i] for pair in pairs] for i in (0, 1))
    found = jax.jit(losses.channel_attention_alignment)(students, teachers)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert float(losses.channel_attention_alignment(teachers, teachers)) == 0
    check_grads(
        jax.jit(lambda *x: losses.channel_attention_alignment(x, teachers)),
        tuple(map(jnp.asarray, students)), order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=1e-2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="found no blocks, expected at least one"):
        losses.channel_attention_alignment([], [])


def test_dead_features_have_attention_0_and_finite_gradients():
    dead = jnp.zeros((2, 3, 3, 4))
    np.testing.assert_array_equal(losses.channel_attention(dead), 0)
    loss = lambda x: losses.channel_attention_alignment([x], [jnp.ones_like(x)])  # noqa: E731
    assert np.isfinite(jax.grad(loss)(dead)).all()


def test_class_activation_maps_are_grad_cams(rng):
    features = jnp.asarray(rng.standard_normal((4, 3, 5, 6)), jnp.float32)
    classifier = jnp.asarray(rng.standard_normal((6, 7)), jnp.float32)
    labels = jnp.asarray([0, 3, 6, 3])

    def logit(features):
        return jnp.sum((features.mean((1, 2)) @ classifier)[jnp.arange(4), labels])

    weights = np.float64(jax.grad(logit)(features)).mean((1, 2))  # Grad-CAM's alpha, [B, C]
    heat = np.maximum(np.einsum("bhwc,bc->bhw", np.float64(features), weights), 0)
    expected = heat / heat.max((1, 2), keepdims=True)
    found = losses.class_activation_map(features, classifier, labels)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    other = jnp.asarray(rng.random((4, 3, 5)), jnp.float32)
    np.testing.assert_allclose(
        losses.class_activation_alignment(found, other),
        np.mean((expected - np.float64(other)) ** 2),
        rtol=1e-4,
    )
    against = -jnp.abs(features) * jnp.sign(classifier.T[labels])[:, None, None]
    np.testing.assert_array_equal(losses.class_activation_map(against, classifier, labels), 0)
    gradient = jax.grad(lambda x: jnp.sum(losses.class_activation_map(x, classifier, labels)))
    assert np.isfinite(gradient(against)).all()


@pytest.mark.parametrize("focus", [0.0, 0.5, 2.0])
def test_focal_cross_entropy(rng, focus):
    logits = rng.standard_normal((6, 5)).astype(np.float32) * 3
    labels = rng.integers(0, 5, 6)
    p = np.exp(np.float64(logits))
    right = (p / p.sum(1, keepdims=True))[np.arange(6), labels]
    expected = np.mean((1 - right) ** focus * -np.log(right))
    found = losses.focal_cross_entropy(jnp.asarray(logits), labels, focus=focus)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    sure = jnp.asarray([[1e4, 0.0], [-1e4, 0.0]])
    gradient = jax.grad(lambda z: losses.focal_cross_entropy(z, jnp.zeros(2, int), focus=focus))
    assert np.isfinite(gradient(sure)).all()


def test_easy_cross_entropy_leaves_out_what_the_teacher_finds_hard(rng):
    logits, teacher = rng.standard_normal((2, 40, 5)).astype(np.float32) * 2
    labels = rng.integers(0, 5, 40)
    p, q = (np.exp(np.float64(z)) for z in (logits, teacher))
    right = (p / p.sum(1, keepdims=True))[np.arange(40), labels]
    easy = (q / q.sum(1, keepdims=True))[np.arange(40), labels] >= 0.4
    assert 5 < easy.sum() < 35
    found = losses.easy_cross_entropy(logits, teacher, labels, hardest=0.6)
    np.testing.assert_allclose(found, np.sum(-np.log(right)[easy]) / 40, rtol=1e-4)
    whole = losses.easy_cross_entropy(logits, teacher, labels, hardest=1.0)
    np.testing.assert_allclose(whole, losses.cross_entropy(logits, labels), rtol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 1.0])
def test_inundation_changes_the_share_of_codes_and_no_more_than_it_must(rng, share):
    weight = rng.standard_normal((20, 25)).astype(np.float32)
    step = np.float32(rng.uniform(0.1, 0.3, 25))
    update = np.float32(1e-5 * rng.standard_normal((20, 25)))
    lowest, highest = rng.integers(-9, -4, 25), rng.integers(4, 9, 25)  # some weights are beyond
    found = np.asarray(
        jax.jit(inundated, static_argnums=5)(update, weight, step, lowest, highest, share)
    )
    factor = found[0, 0] / update[0, 0]
    np.testing.assert_allclose(found, factor * update, rtol=1e-5)

    def changed(factor):
        before, after = (
            np.clip(np.rint(np.float64(w) / step), lowest, highest)
            for w in (weight, weight + factor * update)
        )
        return np.count_nonzero(before != after)

    assert np.any(weight / step > highest + 0.5)
    wanted = int(np.ceil(share * weight.size))
    if share in (0, 1):  # all cannot change: those beyond a limit that go farther
        np.testing.assert_array_equal(found, update)
    else:
        assert changed(np.float64(factor)) >= wanted
        assert changed(np.float64(factor) * 0.999) <= wanted


def test_inundation_never_shrinks_an_update_nor_blows_up_none():
    weight, codes = jnp.asarray([0.04, 0.3, -0.26]), (jnp.float32(0.1), -8, 7)
    large = jnp.asarray([0.5, 0.5, 0.5])
    np.testing.assert_array_equal(inundated(large, weight, *codes, 0.5), large)
    none = jnp.zeros(3)
    np.testing.assert_array_equal(inundated(none, weight, *codes, 0.5), none)
    single = jnp.asarray([1e-4, 0.0, 0.0])  # two of three cannot change
    np.testing.assert_array_equal(inundated(single, weight, *codes, 0.6), single)
