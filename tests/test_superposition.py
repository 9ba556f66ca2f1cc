"""Qimera's superposed classes: the weights, the generator's use of them, their loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrq_jax import losses
from lrq_jax.synthesis.generator import GeneratorSpec, generate, init_generator
from lrq_jax.synthesis.superposition import superposed_labels

pytestmark = pytest.mark.usefixtures("quick_compilation")

LABELS = jnp.arange(64) % 10


def draw(seed, **settings):
    settings = {"num_classes": 10, "count": 3, "probability": 1.0, **settings}
    return np.asarray(superposed_labels(jax.random.key(seed), LABELS, **settings))


def test_a_superposed_batch_mixes_so_many_classes_by_softmax_weights():
    weights = draw(0)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    assert np.all(np.count_nonzero(weights, axis=1) == 3)
    assert (weights > 0).any(0).all()  # every class is drawn
    # log-ratios of softmax(N(0, 1)) weights are N(0, 2)
    many = np.concatenate([np.sort(draw(seed, count=2), axis=1)[:, -2:] for seed in range(40)])
    ratio = np.log(many[:, 1] / many[:, 0])  # |N(0, 2)|: mean 2 / sqrt(pi)
    np.testing.assert_allclose(ratio.mean(), 2 / np.sqrt(np.pi), rtol=0.05)


def test_the_coin_is_thrown_once_a_batch():
    one_hot = np.eye(10)[LABELS]
    np.testing.assert_array_equal(draw(0, probability=0.0), one_hot)
    plain = [np.array_equal(draw(seed, probability=0.4), one_hot) for seed in range(100)]
    mixed = [np.all(draw(seed, probability=0.4).max(1) < 1) for seed in range(100)]
    assert np.logical_xor(plain, mixed).all()
    assert 25 <= sum(mixed) <= 55


@pytest.mark.parametrize("count", [0, 11])
def test_classes_to_mix_must_exist(count):
    with pytest.raises(ValueError, match=f"found {count}, expected 1 to 10"):
        draw(0, count=count)


@pytest.mark.parametrize("conditioning", ["embedding", "batch_norm"])
def test_the_generator_takes_class_weights(conditioning):
    spec = GeneratorSpec(
        image_shape=(8, 8, 1), num_classes=10, conditioning=conditioning, attention="none",
        latent_dim=6, width=8,
    )  # fmt: skip
    drawn = np.random.default_rng(0)
    params = jax.tree.map(  # classes differ, as they do after some training
        lambda x: x + np.float32(0.3 * drawn.standard_normal(x.shape)),
        init_generator(spec, jax.random.key(0)),
    )
    noise = jax.random.normal(jax.random.key(1), (64, 6))
    run = jax.jit(functools.partial(generate, spec, params))
    by_label = run(noise, LABELS)
    np.testing.assert_allclose(run(noise, jax.nn.one_hot(LABELS, 10)), by_label, atol=1e-3)
    mixed = run(noise, jnp.asarray(draw(0)))
    assert np.abs(mixed - by_label).max() > 0.1


def test_losses_take_class_weights_for_labels(rng):
    logits = rng.standard_normal((64, 10)).astype(np.float32) * 3
    weights = draw(1)
    p = np.exp(np.float64(logits))
    expected = -np.mean(np.sum(weights * np.log(p / p.sum(1, keepdims=True)), 1))
    np.testing.assert_allclose(losses.cross_entropy(logits, weights), expected, rtol=1e-5)
    one_hot = jax.nn.one_hot(LABELS, 10)
    for loss in (
        losses.cross_entropy,
        functools.partial(losses.focal_cross_entropy, focus=2.0),
        lambda z, y: losses.easy_cross_entropy(z, 2 * logits, y, hardest=0.5),
    ):
        np.testing.assert_allclose(loss(logits, one_hot), loss(logits, LABELS), rtol=1e-4)
