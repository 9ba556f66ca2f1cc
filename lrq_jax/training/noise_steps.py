"""The steps that optimise a batch of images from noise; pure, as those of `training.steps`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lrq_jax import losses
from lrq_jax.losses.margin import Centers
from lrq_jax.ops.straight_through import straight_through
from lrq_jax.passes import float_forward
from lrq_jax.passes.float_forward import Variables
from lrq_jax.sharding import constrain_batch
from lrq_jax.synthesis.augmentation import AUGMENTATIONS
from lrq_jax.synthesis.low_pass import low_pass
from lrq_jax.training.optimizers import noise_optimizer
from lrq_jax.training.steps import Metrics, StepSpec, margin_loss, step_key, teacher_forward


class NoiseState(NamedTuple):
    """One batch of images being optimised from noise."""

    step: jax.Array
    key: jax.Array
    images: jax.Array
    labels: jax.Array
    opt: optax.OptState
    centers: Centers


def initial_noise(spec: StepSpec, key: jax.Array, centers: Centers) -> NoiseState:
    """A fresh batch N(0, 1) with random labels; `centers` are those of earlier batches."""
    image_key, label_key, run_key = jax.random.split(key, 3)
    method = spec.method
    shape = (method.noise_batch_size, *spec.generator.image_shape)
    images = constrain_batch(jax.random.normal(image_key, shape), spec.mesh)
    labels = jax.random.randint(
        label_key, (method.noise_batch_size,), 0, spec.generator.num_classes
    )
    return NoiseState(
        step=jnp.int32(0),
        key=jax.random.key_data(run_key),
        images=images,
        labels=constrain_batch(labels, spec.mesh),
        opt=noise_optimizer(method).init(images),
        centers=centers,
    )


def shown(images: jax.Array, *, spec: StepSpec) -> jax.Array:
    """What the networks see of the optimised images: where the method asks for it without high
    frequencies, and with every pixel one that a real image could hold. Gradients pass as if
    nothing was clipped, so that a pixel can come back."""
    if spec.method.noise_low_pass:
        images = low_pass(images, spec.method.noise_low_pass)
    if spec.method.noise_clip:
        images = straight_through(jnp.clip(images, *spec.student.input_range), images)
    return images


def noise_loss(images: jax.Array, labels: jax.Array, key: jax.Array, teacher: Variables,
               centers: Centers, *, spec: StepSpec) -> tuple[jax.Array, Metrics]:  # fmt: skip
    """`L_syn = w_bns * L_BNS + w_target * L_target + w_ama * (L_low + L_up)`."""
    method = spec.method
    images = shown(images, spec=spec)
    augment_key, coin_key, target_key = jax.random.split(key, 3)
    images = jax.lax.cond(
        jax.random.bernoulli(coin_key, method.noise_augment_probability),
        lambda x: AUGMENTATIONS[method.noise_augmentation](augment_key, x),
        lambda x: x,
        images,
    )
    logits, features, bns = teacher_forward(
        spec.graph,
        teacher,
        images,
        resources=spec.resources,
        statistics=method.noise_statistics,
    )
    if method.noise_target == "probability":
        lowest = method.noise_lowest_target
        targets = losses.sample_targets(target_key, labels.shape[0], lowest=lowest)
        target = losses.squared_target_error(logits, labels, targets)
    else:
        target = losses.focal_cross_entropy(logits, labels, focus=method.class_focus)
    terms = {"noise/bns": bns, "noise/target": target}
    total = method.noise_bns_weight * bns + method.noise_target_weight * target
    if method.ama_weight:
        terms["noise/ama"] = margin_loss(features, labels, centers, teacher, spec)
        total += method.ama_weight * terms["noise/ama"]
    return total, {**terms, "noise/loss": total}


def noise_step(state: NoiseState, teacher: Variables, *, spec: StepSpec) -> tuple[NoiseState, Metrics]:  # fmt: skip
    """One iteration on a batch of noise images."""
    gradient = jax.value_and_grad(noise_loss, has_aux=True)
    (loss, terms), grads = gradient(
        state.images, state.labels, step_key(state), teacher, state.centers, spec=spec
    )
    updates, opt = noise_optimizer(spec.method).update(grads, state.opt, state.images, value=loss)
    images = optax.apply_updates(state.images, updates)
    return state._replace(step=state.step + 1, images=images, opt=opt), terms


def finished_noise(state: NoiseState, teacher: Variables, *, spec: StepSpec) -> tuple[jax.Array, Centers]:  # fmt: skip
    """The finished images, and class centres with their features added."""
    images = shown(state.images, spec=spec)
    features = float_forward(spec.graph, teacher, images, (spec.graph.features,))
    centers = losses.update_centers(state.centers, features[spec.graph.features], state.labels)
    return images, centers
