"""Optimisers and learning-rate schedules, by the names a Method gives them."""

from __future__ import annotations

import optax

from lrq_jax.method import Method


def learning_rate(name: str, peak: float, milestones: tuple[int, ...], steps: int) -> optax.Schedule:  # fmt: skip
    """Schedule over optimiser updates: `step` (x 0.1 at milestones), `cosine` to 0, `constant`."""
    if name == "step":
        return optax.piecewise_constant_schedule(peak, dict.fromkeys(milestones, 0.1))
    if name == "cosine":
        return optax.cosine_decay_schedule(peak, max(steps, 1))
    return optax.constant_schedule(peak)


def student_optimizer(method: Method) -> optax.GradientTransformation:
    """Of `{"params": ..., "stretch": ...}`: SGD with Nesterov momentum (the lineage's) or Adam,
    weight decay and clipping in front, for the weights; Adam for learned step sizes."""
    rate, step_rate = (
        learning_rate(method.student_schedule, peak, method.student_milestones, method.steps)
        for peak in (method.student_learning_rate, method.step_size_learning_rate)
    )
    if method.student_optimizer == "sgd":
        update = optax.sgd(rate, momentum=method.student_momentum, nesterov=True)
    else:
        update = optax.adam(rate, eps=method.adam_epsilon)
    params = optax.chain(
        optax.clip_by_global_norm(method.gradient_clip),
        optax.add_decayed_weights(method.student_weight_decay),
        update,
    )
    stretch = optax.adam(step_rate, eps=method.adam_epsilon)
    return optax.partition(
        {"params": params, "stretch": stretch}, {"params": "params", "stretch": "stretch"}
    )


def generator_optimizer(method: Method) -> optax.GradientTransformation:
    """Adam, its schedule counted over warm-up and joint steps together."""
    rate = learning_rate(
        method.generator_schedule,
        method.generator_learning_rate,
        method.generator_milestones,
        method.warmup_steps + method.steps,
    )
    return optax.chain(
        optax.clip_by_global_norm(method.gradient_clip),
        optax.adam(rate, b1=method.generator_beta1, b2=0.999, eps=method.adam_epsilon),
    )


def noise_optimizer(method: Method) -> optax.GradientTransformationExtraArgs:
    """Adam for images optimised from noise: on a cosine, or reduced (x 0.1) on a plateau.

    Of pixels; or of `{"latents": ..., "generator": ...}`, the generator at a rate of its own, on
    the same cosine, or decaying in steps beside the latents' plateau.
    """

    def adam(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        return optax.adam(rate, b1=method.noise_beta1, b2=0.999, eps=method.adam_epsilon)

    peak, of_generator = method.noise_learning_rate, method.noise_generator_rate
    images: optax.GradientTransformation
    if method.noise_schedule == "cosine":
        rates = (
            learning_rate("cosine", rate, (), method.noise_iterations)
            for rate in (peak, of_generator)
        )
        images, generator = map(adam, rates)
    else:
        plateau = optax.contrib.reduce_on_plateau(
            factor=0.1,
            patience=method.noise_plateau_patience,
            min_scale=method.noise_smallest_rate / peak,
        )
        images = optax.chain(adam(peak), plateau)
        generator = adam(
            optax.exponential_decay(
                of_generator,
                method.noise_generator_decay_every,
                method.noise_generator_decay,
                staircase=True,
            )
        )
    if method.noise_parameters == "latents":
        images = optax.partition(
            {"latents": images, "generator": generator},
            {"latents": "latents", "generator": "generator"},
        )
    return optax.with_extra_args_support(images)
