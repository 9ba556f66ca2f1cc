"""The steps that optimise a batch of images from noise; pure, as those of `training.steps`."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lrq_jax import losses
from lrq_jax.graph import Graph
from lrq_jax.graph.layers import Layer
from lrq_jax.losses.margin import Centers
from lrq_jax.ops.straight_through import straight_through
from lrq_jax.passes import float_forward
from lrq_jax.passes.float_forward import Transform, Variables, unchanged
from lrq_jax.sharding import constrain_batch
from lrq_jax.synthesis.augmentation import AUGMENTATIONS, swing
from lrq_jax.synthesis.generator import generate, init_generator
from lrq_jax.synthesis.spectrum import coloured, low_pass
from lrq_jax.training.comparison import teacher_forward
from lrq_jax.training.optimizers import noise_optimizer
from lrq_jax.training.spec import StepSpec
from lrq_jax.training.steps import margin_loss, step_key
from lrq_jax.training.student_loss import Metrics

_SWING_STREAM = 3
"""Folded into an iteration's key; what it is split into otherwise stays as it was without."""
_TARGET_STREAM = 2**31 - 1
"""Folded into a batch's key, as the numbers of its iterations are, which it must not be one of."""

Parameters = Any
"""What is optimised: pixels `[B, H, W, C]`, or `{"latents": [B, latent_dim], "generator": ...}`."""


class NoiseState(NamedTuple):
    """One batch of images being optimised from noise."""

    step: jax.Array
    key: jax.Array
    parameters: Parameters
    labels: jax.Array
    opt: optax.OptState
    centers: Centers


def initial_noise(spec: StepSpec, key: jax.Array, centers: Centers) -> NoiseState:
    """A fresh batch N(0, 1) with random labels; `centers` are those of earlier batches."""
    image_key, label_key, run_key = jax.random.split(key, 3)
    method = spec.method
    parameters = _initial_parameters(spec, image_key)
    labels = jax.random.randint(
        label_key, (method.noise_batch_size,), 0, spec.generator.num_classes
    )
    return NoiseState(
        step=jnp.int32(0),
        key=jax.random.key_data(run_key),
        parameters=parameters,
        labels=constrain_batch(labels, spec.mesh),
        opt=noise_optimizer(method).init(parameters),
        centers=centers,
    )


def _initial_parameters(spec: StepSpec, key: jax.Array) -> Parameters:
    """N(0, 1), and a fresh generator where it is latents."""
    batch = spec.method.noise_batch_size
    if spec.method.noise_parameters == "pixels":
        shape = (batch, *spec.generator.image_shape)
        return constrain_batch(jax.random.normal(key, shape), spec.mesh)
    latent_key, generator_key = jax.random.split(key)
    latents = jax.random.normal(latent_key, (batch, spec.generator.latent_dim))
    return {
        "latents": constrain_batch(latents, spec.mesh),
        "generator": _fresh_generator(spec.generator, generator_key),
    }


# Op by op each of its draws would be compiled on its own.
_fresh_generator = jax.jit(init_generator, static_argnums=0)


def shown(parameters: Parameters, labels: jax.Array, *, spec: StepSpec) -> jax.Array:
    """The images `[B, H, W, C]` that the networks see of what is optimised.

    Pixels are the images, or coefficients of cosines with the spectrum of photographs (`coloured`);
    latents z and the generator G are optimised together, and `G(z, y)` are the images.
    Where the method asks for it they lose high frequencies, and every pixel becomes one that a
    real image could hold; gradients pass as if nothing was clipped, so that a pixel can come
    back. Source of the latents: Genie (arXiv 2212.04780); the generator is the method's own.
    """
    # The state is a copy on each device: unconstrained, each would compute the whole batch.
    if spec.method.noise_parameters == "pixels":
        images = constrain_batch(parameters, spec.mesh)
        if spec.method.noise_spectrum:
            images = coloured(images, spec.method.noise_spectrum)
    else:
        latents, labels = (constrain_batch(x, spec.mesh) for x in (parameters["latents"], labels))
        generator, latents = spec.resources.cast((parameters["generator"], latents))
        images = generate(spec.generator, generator, latents, labels).astype(jnp.float32)
    if spec.method.noise_low_pass:
        images = low_pass(images, spec.method.noise_low_pass)
    if spec.method.noise_clip:
        images = straight_through(jnp.clip(images, *spec.student.input_range), images)
    return images


def swung(graph: Graph, key: jax.Array, *, reach: int) -> Transform:
    """Moves what each strided convolution reads (`synthesis.augmentation.swing`), each by a draw
    of its own; what others read stays."""
    place = {layer.name: number for number, layer in enumerate(graph.layers)}

    def move(layer: Layer, x: jax.Array) -> jax.Array:
        if max(getattr(layer, "strides", (1, 1))) == 1:
            return x
        return swing(jax.random.fold_in(key, place[layer.name]), x, reach=reach)

    return move


def class_targets(state: NoiseState, *, spec: StepSpec) -> jax.Array:
    """Class probabilities `[B]` that a batch's images are to get: drawn once for all its iterations."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), _TARGET_STREAM)
    lowest = spec.method.noise_lowest_target
    return losses.sample_targets(key, state.labels.shape[0], lowest=lowest)


def noise_loss(parameters: Parameters, labels: jax.Array, targets: jax.Array, key: jax.Array,
               teacher: Variables, centers: Centers, *, spec: StepSpec) -> tuple[jax.Array, Metrics]:  # fmt: skip
    """`L_syn = w_bns * L_BNS + w_target * L_target + w_image * L_image + w_ama * (L_low + L_up)`.

    The sources of the terms are those of their functions in `losses`; IntraQ (arXiv 2111.09136)
    is L_target of probabilities, images augmented by `crop_flip` in half of the iterations (its
    local object reinforcement) and the hinges without a margin (its marginal distance constraint).
    """
    method = spec.method
    images = shown(parameters, labels, spec=spec)
    augment_key, coin_key, _ = jax.random.split(key, 3)
    if method.noise_augment_probability and method.noise_augmentation != "none":
        images = jax.lax.cond(
            jax.random.bernoulli(coin_key, method.noise_augment_probability),
            lambda x: AUGMENTATIONS[method.noise_augmentation](augment_key, x),
            lambda x: x,
            images,
        )
    moved: Transform = unchanged
    if method.noise_swing:
        swing_key = jax.random.fold_in(key, _SWING_STREAM)
        moved = swung(spec.graph, swing_key, reach=method.noise_swing)
    values, bns = teacher_forward(
        spec.graph,
        teacher,
        images,
        resources=spec.resources,
        statistics=method.noise_statistics,
        input_transform=moved,
    )
    logits, features = values[spec.graph.output], values[spec.graph.features]
    if method.noise_target == "probability":
        target = losses.squared_target_error(logits, labels, targets)
    else:
        target = losses.focal_cross_entropy(logits, labels, focus=method.class_focus)
    terms = {"noise/bns": bns, "noise/target": target}
    total = method.noise_bns_weight * bns + method.noise_target_weight * target
    if method.noise_image_weight:
        terms["noise/image"] = losses.image_statistics(images)
        total += method.noise_image_weight * terms["noise/image"]
    if method.ama_weight:
        terms["noise/ama"] = margin_loss(features, labels, centers, teacher, spec)
        total += method.ama_weight * terms["noise/ama"]
    return total, {**terms, "noise/loss": total}


def noise_step(state: NoiseState, teacher: Variables, *, spec: StepSpec) -> tuple[NoiseState, Metrics]:  # fmt: skip
    """One iteration on a batch of noise images."""
    loss_of = spec.resources.rematerialized(functools.partial(noise_loss, spec=spec))
    gradient = jax.value_and_grad(loss_of, has_aux=True)
    targets = class_targets(state, spec=spec)
    (loss, terms), grads = gradient(
        state.parameters, state.labels, targets, step_key(state), teacher, state.centers
    )
    optimizer = noise_optimizer(spec.method)
    updates, opt = optimizer.update(grads, state.opt, state.parameters, value=loss)
    parameters = optax.apply_updates(state.parameters, updates)
    return state._replace(step=state.step + 1, parameters=parameters, opt=opt), terms


def finished_noise(state: NoiseState, teacher: Variables, *, spec: StepSpec) -> tuple[jax.Array, Centers]:  # fmt: skip
    """The finished images, and class centres with their features added."""
    images = shown(state.parameters, state.labels, spec=spec)
    features = float_forward(spec.graph, teacher, images, (spec.graph.features,))
    centers = losses.update_centers(state.centers, features[spec.graph.features], state.labels)
    return images, centers
