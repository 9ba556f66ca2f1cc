"""The training steps: top-level pure functions `(state, ..., *, spec) -> (state, metrics)`.

Nothing here is jitted, sharded or donated; `training.compilation` does that in one place.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lrq_jax import losses
from lrq_jax.graph import Graph
from lrq_jax.losses.margin import Centers
from lrq_jax.method import Method
from lrq_jax.passes import Student, calibrate, float_forward, float_logits, student_forward
from lrq_jax.passes.float_forward import Variables
from lrq_jax.resources import DEFAULT_RESOURCES, Resources, accumulated_gradient
from lrq_jax.sharding import constrain_batch
from lrq_jax.synthesis.augmentation import random_resized_crop_flip
from lrq_jax.synthesis.generator import GeneratorSpec, generate, init_generator
from lrq_jax.training.averaging import Average, initial_average, update_average
from lrq_jax.training.optimizers import (
    generator_optimizer,
    noise_optimizer,
    student_optimizer,
)

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSpec:
    """Everything static about a step.

    Attributes:
      student: the student; its graph is the teacher's too.
      generator: the generator.
      method: losses, schedules, optimisers.
      mesh: device mesh with axis `data`, or None for one device.
      resources: precision and memory.
    """

    student: Student
    generator: GeneratorSpec
    method: Method
    mesh: Mesh | None = None
    resources: Resources = DEFAULT_RESOURCES

    @property
    def graph(self) -> Graph:
        """The network."""
        return self.student.graph


class TrainState(NamedTuple):
    """What training changes. `step` counts all steps from the first of the warm-up; `key` is raw
    key data, which any checkpoint format can hold."""

    step: jax.Array
    key: jax.Array
    generator: Any
    generator_opt: optax.OptState
    centers: Centers
    student: Variables
    student_opt: optax.OptState
    average: Average


class NoiseState(NamedTuple):
    """One batch of images being optimised from noise."""

    step: jax.Array
    key: jax.Array
    images: jax.Array
    labels: jax.Array
    opt: optax.OptState
    centers: Centers


def initial_state(spec: StepSpec, teacher: Variables, seed: int) -> TrainState:
    """State before the first step; the student starts at the teacher's weights."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    generator = init_generator(spec.generator, init_key)
    copy = jax.tree.map(jnp.array, teacher)  # the state is donated, the teacher is not
    student = spec.student.initial_variables(copy)
    graph = spec.graph
    return TrainState(
        step=jnp.int32(0),
        key=jax.random.key_data(run_key),
        generator=generator,
        generator_opt=generator_optimizer(spec.method).init(generator),
        centers=losses.initial_centers(graph.num_classes, graph.shapes[graph.features][0]),
        student=student,
        student_opt=student_optimizer(spec.method).init(spec.student.trainable(student)),
        average=initial_average(spec.student.trainable(student), decay=spec.method.average_decay),
    )


def final_student(state: TrainState, *, spec: StepSpec) -> Variables:
    """The student that is evaluated and shipped: of averaged weights where the method asks."""
    if not spec.method.average_decay or not int(state.average.updates):
        return state.student
    return spec.student.with_trainable(state.student, state.average.weights)


# --- what the steps share -------------------------------------------------------------------


def draw_latents(key: jax.Array, spec: StepSpec) -> tuple[jax.Array, jax.Array]:
    """Noise `[B, latent_dim]` and labels `[B]`, split over the mesh."""
    noise_key, label_key = jax.random.split(key)
    batch = spec.method.batch_size
    noise = jax.random.normal(noise_key, (batch, spec.generator.latent_dim))
    labels = jax.random.randint(label_key, (batch,), 0, spec.generator.num_classes)
    return constrain_batch(noise, spec.mesh), constrain_batch(labels, spec.mesh)


def teacher_forward(graph: Graph, teacher: Variables, images: jax.Array, resources: Resources) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Logits `[B, K]`, pooled features `[B, D]` and the BNS loss of the frozen teacher, float32
    whatever the teacher is computed in."""
    taps = tuple(layer.inputs[0] for layer in graph.batch_norms)
    outputs = (graph.output, graph.features, *taps)
    values = float_forward(graph, *resources.cast((teacher, images), smallest_rank=2), outputs)
    values = {name: value.astype(jnp.float32) for name, value in values.items()}
    running = [
        (teacher["batch_stats"][layer.name]["mean"], teacher["batch_stats"][layer.name]["var"])
        for layer in graph.batch_norms
    ]
    bns = losses.batch_norm_statistics([values[name] for name in taps], running)
    return values[graph.output], values[graph.features], bns


def margin_loss(features: jax.Array, labels: jax.Array, centers: Centers, teacher: Variables,
                spec: StepSpec) -> jax.Array:  # fmt: skip
    """AMA's `L_low + L_up` against the configured class centres."""
    method = spec.method
    if method.ama_center == "classifier":
        means = teacher["params"][spec.graph.classifier.name]["kernel"].T
        mask = jnp.ones(labels.shape)
    else:
        means = centers.means
        mask = (centers.counts[labels] > 0).astype(jnp.float32)
    cosine = losses.cosine_to_centers(features, jax.lax.stop_gradient(means), labels)
    low, up = losses.angular_margin_hinge(
        cosine, mask, margin=method.ama_margin, lower=method.ama_lower, upper=method.ama_upper
    )
    return low + up


def synthesis_loss(generator: Any, teacher: Variables, centers: Centers, noise: jax.Array,
                   labels: jax.Array, *, spec: StepSpec) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """`L_G = CE + w_bns * BNS + w_ama * (L_low + L_up)`.

    Returns:
      The loss, and `{"images", "logits", "features"}` plus the terms as metrics under `"terms"`.
    """
    method = spec.method
    images = generate(spec.generator, *spec.resources.cast((generator, noise)), labels)
    images = images.astype(jnp.float32)
    logits, features, bns = teacher_forward(spec.graph, teacher, images, spec.resources)
    terms = {
        "generator/ce": losses.cross_entropy(logits, labels),
        "generator/bns": bns,
    }
    total = method.class_weight * terms["generator/ce"] + method.bns_weight * bns
    if method.ama_weight:
        terms["generator/ama"] = margin_loss(features, labels, centers, teacher, spec)
        total += method.ama_weight * terms["generator/ama"]
    terms["generator/loss"] = total
    return total, {"images": images, "logits": logits, "features": features, "terms": terms}


def student_loss(trainable: Variables, student: Variables, images: jax.Array, labels: jax.Array,
                 teacher_logits: jax.Array, *, spec: StepSpec) -> tuple[jax.Array, Metrics]:  # fmt: skip
    """`L_S = w_ce * CE + distillation` of the quantized student."""
    method, output = spec.method, spec.graph.output
    variables = spec.student.with_trainable(student, trainable)
    logits = student_forward(spec.student, variables, images, (output,))[output]
    if method.student_loss == "dkd":
        distill = losses.decoupled_distillation(
            logits,
            teacher_logits,
            labels,
            alpha=method.distill_weight,
            beta=method.dkd_beta,
            temperature=method.temperature,
        )
    else:
        distill = method.distill_weight * losses.distillation(
            logits, teacher_logits, temperature=method.temperature, reduction=method.kd_reduction
        )
    terms = {"student/ce": losses.cross_entropy(logits, labels), "student/distill": distill}
    agreement = jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(teacher_logits, -1))
    total = method.ce_weight * terms["student/ce"] + distill
    return total, {**terms, "student/loss": total, "student/agreement": agreement}


def _update_generator(state: TrainState, teacher: Variables, key: jax.Array, spec: StepSpec) -> tuple[TrainState, dict[str, Any], jax.Array]:  # fmt: skip
    noise, labels = draw_latents(key, spec)
    loss = spec.resources.rematerialized(functools.partial(synthesis_loss, spec=spec))
    gradient = jax.grad(loss, has_aux=True)
    grads, aux = gradient(state.generator, teacher, state.centers, noise, labels)
    updates, opt = generator_optimizer(spec.method).update(
        grads, state.generator_opt, state.generator
    )
    state = state._replace(
        generator=optax.apply_updates(state.generator, updates),
        generator_opt=opt,
        centers=losses.update_centers(state.centers, aux["features"], labels),
    )
    return state, jax.lax.stop_gradient(aux), labels


def _update_student(state: TrainState, images: jax.Array, labels: jax.Array,
                    teacher_logits: jax.Array, spec: StepSpec) -> tuple[TrainState, Metrics]:  # fmt: skip
    loss = spec.resources.rematerialized(
        lambda trainable, *batch: student_loss(trainable, state.student, *batch, spec=spec)
    )
    gradient = accumulated_gradient(loss, spec.resources.micro_batches, spec.mesh)
    trainable = spec.student.trainable(state.student)
    grads, terms = gradient(trainable, images, labels, teacher_logits)
    updates, opt = student_optimizer(spec.method).update(grads, state.student_opt, trainable)
    trainable = optax.apply_updates(trainable, updates)
    state = state._replace(
        student=spec.student.with_trainable(state.student, trainable),
        student_opt=opt,
        average=update_average(state.average, trainable, decay=spec.method.average_decay),
    )
    return state, terms


def _step_key(state: TrainState | NoiseState) -> jax.Array:
    return jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)


# --- the steps ------------------------------------------------------------------------------


def warmup_step(state: TrainState, teacher: Variables, *, spec: StepSpec) -> tuple[TrainState, Metrics]:  # fmt: skip
    """Updates the generator alone."""
    state, aux, _ = _update_generator(state, teacher, _step_key(state), spec)
    return state._replace(step=state.step + 1), aux["terms"]


def calibration_step(state: TrainState, teacher: Variables, *, spec: StepSpec) -> tuple[TrainState, Metrics]:  # fmt: skip
    """Updates the generator, and the student's activation ranges on its images."""
    state, aux, _ = _update_generator(state, teacher, _step_key(state), spec)
    _, student = calibrate(spec.student, state.student, aux["images"])
    return state._replace(step=state.step + 1, student=student), aux["terms"]


def joint_step(state: TrainState, teacher: Variables, *, spec: StepSpec) -> tuple[TrainState, Metrics]:  # fmt: skip
    """Updates the generator, then the student on the same images; one teacher forward for both."""
    state, aux, labels = _update_generator(state, teacher, _step_key(state), spec)
    state, terms = _update_student(state, aux["images"], labels, aux["logits"], spec)
    return state._replace(step=state.step + 1), {**aux["terms"], **terms}


def pool_step(state: TrainState, teacher: Variables, images: jax.Array, labels: jax.Array, *,
              spec: StepSpec) -> tuple[TrainState, Metrics]:  # fmt: skip
    """Updates the student on a batch drawn from a pool of images.

    Args:
      images: `[N, H, W, C]`, the pool.
      labels: `[N]`.
    """
    pick_key, augment_key = jax.random.split(_step_key(state))
    picked = jax.random.randint(pick_key, (spec.method.batch_size,), 0, images.shape[0])
    picked = constrain_batch(picked, spec.mesh)
    batch, batch_labels = images[picked], labels[picked]
    if spec.method.augment:
        batch = random_resized_crop_flip(augment_key, batch)
    cast = spec.resources.cast((teacher, batch), smallest_rank=2)
    teacher_logits = float_logits(spec.graph, *cast)
    teacher_logits = teacher_logits.astype(jnp.float32)
    state, terms = _update_student(state, batch, batch_labels, teacher_logits, spec)
    return state._replace(step=state.step + 1), terms


# --- images optimised from noise ------------------------------------------------------------


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


def noise_loss(images: jax.Array, labels: jax.Array, key: jax.Array, teacher: Variables,
               centers: Centers, *, spec: StepSpec) -> tuple[jax.Array, Metrics]:  # fmt: skip
    """`L_syn = w_bns * (L_mean + L_var) + L_target + w_ama * (L_low + L_up)`."""
    method = spec.method
    augment_key, coin_key, target_key = jax.random.split(key, 3)
    images = jax.lax.cond(
        jax.random.bernoulli(coin_key, method.noise_augment_probability),
        lambda x: random_resized_crop_flip(augment_key, x),
        lambda x: x,
        images,
    )
    logits, features, bns = teacher_forward(spec.graph, teacher, images, spec.resources)
    targets = losses.sample_targets(target_key, labels.shape[0], lowest=method.noise_lowest_target)
    terms = {
        "noise/bns": bns,
        "noise/target": losses.squared_target_error(logits, labels, targets),
    }
    total = method.noise_bns_weight * bns + terms["noise/target"]
    if method.ama_weight:
        terms["noise/ama"] = margin_loss(features, labels, centers, teacher, spec)
        total += method.ama_weight * terms["noise/ama"]
    return total, {**terms, "noise/loss": total}


def noise_step(state: NoiseState, teacher: Variables, *, spec: StepSpec) -> tuple[NoiseState, Metrics]:  # fmt: skip
    """One iteration on a batch of noise images."""
    gradient = jax.value_and_grad(noise_loss, has_aux=True)
    (loss, terms), grads = gradient(
        state.images, state.labels, _step_key(state), teacher, state.centers, spec=spec
    )
    updates, opt = noise_optimizer(spec.method).update(grads, state.opt, state.images, value=loss)
    images = optax.apply_updates(state.images, updates)
    return state._replace(step=state.step + 1, images=images, opt=opt), terms


def finished_noise(state: NoiseState, teacher: Variables, *, spec: StepSpec) -> Centers:
    """Class centres with a finished batch's features added."""
    features = float_forward(spec.graph, teacher, state.images, (spec.graph.features,))
    return losses.update_centers(state.centers, features[spec.graph.features], state.labels)
