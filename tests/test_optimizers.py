"""Optimisers against second versions, written out in numpy."""

import jax
import numpy as np
import optax
import pytest

from lrq_jax.method import Method
from lrq_jax.training.optimizers import generator_optimizer, student_optimizer


def updates_of(optimizer, weights, gradients):
    """Weights after each of these gradients."""
    weights, gradients = jax.tree.map(np.float32, (weights, gradients))
    state, path = optimizer.init(weights), []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
        path.append(weights)
    return path


def clipped(gradients, largest):
    """Of one global norm of at most `largest` (Pascanu et al., arXiv 1211.5063)."""
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in gradients.values()))
    return {name: g * min(1.0, largest / norm) for name, g in gradients.items()}


def draws(rng, sizes):
    """Gradients of two arrays, of these sizes in turn."""
    return [{"a": rng.normal(size=(3, 2)) * size, "b": rng.normal(size=4) * size} for size in sizes]


@pytest.mark.parametrize("clip", [0.5, 10.0, 1e6])
def test_sgd_clips_then_decays_then_steps_with_nesterov_momentum(rng, clip):
    method = Method(
        student_optimizer="sgd", student_learning_rate=0.1, student_schedule="constant",
        student_momentum=0.9, student_weight_decay=0.01, gradient_clip=clip,
    )  # fmt: skip
    weights, *gradients = draws(rng, [1, 0.1, 30, 3])
    found = updates_of(
        student_optimizer(method),
        {"params": weights, "stretch": {}},
        [{"params": gradient, "stretch": {}} for gradient in gradients],
    )
    momentum = dict.fromkeys(weights, 0.0)
    for gradient, after in zip(gradients, found, strict=True):
        gradient = clipped(gradient, clip)
        for name in weights:
            total = gradient[name] + 0.01 * weights[name]
            momentum[name] = 0.9 * momentum[name] + total
            weights[name] = weights[name] - 0.1 * (total + 0.9 * momentum[name])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after["params"], weights
        )


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_the_generators_adam_sees_clipped_gradients(rng, clip):
    method = Method(
        generator_learning_rate=0.1, generator_schedule="constant", generator_beta1=0.5,
        adam_epsilon=1e-3, gradient_clip=clip,
    )  # fmt: skip
    weights, *gradients = draws(rng, [1, 0.1, 30, 3])
    found = updates_of(generator_optimizer(method), weights, gradients)
    first, second = (dict.fromkeys(weights, 0.0) for _ in range(2))
    for count, (gradient, after) in enumerate(zip(gradients, found, strict=True), start=1):
        for name, g in clipped(gradient, clip).items():
            first[name] = 0.5 * first[name] + 0.5 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            mean, square = first[name] / (1 - 0.5**count), second[name] / (1 - 0.999**count)
            weights[name] = weights[name] - 0.1 * mean / (np.sqrt(square) + 1e-3)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), after, weights)
