"""The training steps: top-level pure functions `(state, ..., *, spec) -> (state, metrics)`.

Nothing here is jitted, sharded or donated; `training.compilation` does that in one place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from lrq_jax import losses
from lrq_jax.losses.margin import Centers
from lrq_jax.method import Method
from lrq_jax.passes import calibrate
from lrq_jax.passes.bias_correction import bias_corrected
from lrq_jax.passes.equalization import equalized
from lrq_jax.passes.float_forward import Variables
from lrq_jax.passes.kernels import KernelSteps, kernel_steps
from lrq_jax.passes.rounding import rounded_weights, with_held_ranges
from lrq_jax.quantizers.rounding import ROUNDINGS
from lrq_jax.resources import accumulated_gradient
from lrq_jax.sharding import constrain_batch
from lrq_jax.synthesis.augmentation import AUGMENTATIONS, mixup
from lrq_jax.synthesis.generator import generate, init_generator
from lrq_jax.synthesis.superposition import superposed_labels
from lrq_jax.training.averaging import Average, initial_average, update_average
from lrq_jax.training.comparison import (
    Compared,
    compared_tensors,
    lesson_of,
    taught,
    teacher_forward,
)
from lrq_jax.training.inundation import inundated
from lrq_jax.training.optimizers import (
    generator_optimizer,
    student_optimizer,
)
from lrq_jax.training.spec import StepSpec
from lrq_jax.training.student_loss import Metrics, hard_labels, training_loss


class Keyed(Protocol):
    """A state that counts its steps and holds raw key data."""

    @property
    def step(self) -> jax.Array:
        """Steps done, a scalar."""
        ...

    @property
    def key(self) -> jax.Array:
        """Raw data of a random key."""
        ...


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


def initial_state(spec: StepSpec, teacher: Variables, seed: int) -> TrainState:
    """State before the first step; the student starts at the teacher's weights, prepared as the
    method says; a method that needs no generator has none (`{}`)."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    trained = spec.method.trains_generator
    generator = init_generator(spec.generator, init_key) if trained else {}
    copy = jax.tree.map(jnp.array, teacher)  # the state is donated, the teacher is not
    student = _prepared_student(spec, copy)
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


def _prepared_student(spec: StepSpec, teacher: Variables) -> Variables:
    """The student of a teacher's weights: equalized, rounded, biases corrected, where asked."""
    method = spec.method
    floats = equalized(spec.graph, teacher) if method.equalize else teacher
    student = spec.student.initial_variables(floats)
    if method.rounding in ROUNDINGS:
        student = rounded_weights(spec.student, student, method.rounding)
    else:  # reconstruction rounds later, and a state keeps its structure from the first step on
        student = with_held_ranges(spec.student, student)
    if method.bias_correction:
        student = bias_corrected(spec.student, student, floats)
    return student


def final_student(state: TrainState, *, spec: StepSpec) -> Variables:
    """The student that is evaluated and shipped: of averaged weights where the method asks."""
    if not spec.method.average_decay or not int(state.average.updates):
        return state.student
    return spec.student.with_trainable(state.student, state.average.weights)


# --- what the steps share -------------------------------------------------------------------


def draw_latents(key: jax.Array, spec: StepSpec) -> tuple[jax.Array, jax.Array]:
    """Noise `[B, latent_dim]` and labels `[B]`, or class weights `[B, K]` where the method has
    superposed classes; split over the mesh."""
    noise_key, label_key = jax.random.split(key)
    batch = spec.method.batch_size
    noise = jax.random.normal(noise_key, (batch, spec.generator.latent_dim))
    labels = jax.random.randint(label_key, (batch,), 0, spec.generator.num_classes)
    if spec.method.superposition:
        labels = superposed_labels(
            jax.random.fold_in(label_key, 1),
            labels,
            num_classes=spec.generator.num_classes,
            count=min(spec.method.superposed_classes, spec.generator.num_classes),
            probability=spec.method.superposition,
        )
    return constrain_batch(noise, spec.mesh), constrain_batch(labels, spec.mesh)


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
                   labels: jax.Array, *, spec: StepSpec) -> tuple[jax.Array, dict[str, Any]]:  # fmt: skip
    """`L_G = CE + w_bns * BNS + w_ama * (L_low + L_up)`.

    Returns:
      The loss, and `{"images", "lesson", "features"}` plus the terms as metrics under `"terms"`.
    """
    method = spec.method
    cast_generator, cast_noise = spec.resources.cast((generator, noise))
    images = generate(spec.generator, cast_generator, cast_noise, labels).astype(jnp.float32)
    values, bns = teacher_forward(
        spec.graph, teacher, images, compared_tensors(spec), resources=spec.resources
    )
    logits, features = values[spec.graph.output], values[spec.graph.features]
    terms = {
        "generator/ce": losses.focal_cross_entropy(logits, labels, focus=method.class_focus),
        "generator/bns": bns,
    }
    total = method.class_weight * terms["generator/ce"] + method.bns_weight * bns
    if method.ama_weight:
        terms["generator/ama"] = margin_loss(features, hard_labels(labels), centers, teacher, spec)
        total += method.ama_weight * terms["generator/ama"]
    terms["generator/loss"] = total
    lesson = taught(values, teacher, spec)
    return total, {"images": images, "lesson": lesson, "features": features, "terms": terms}


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
        centers=losses.update_centers(state.centers, aux["features"], hard_labels(labels)),
    )
    return state, jax.lax.stop_gradient(aux), labels


def _update_student(state: TrainState, teacher: Variables, images: jax.Array, labels: jax.Array,
                    lesson: Compared, spec: StepSpec) -> tuple[TrainState, Metrics]:  # fmt: skip
    loss = spec.resources.rematerialized(
        lambda trainable, *batch: training_loss(
            trainable, state.student, teacher, *batch, spec=spec
        )
    )
    gradient = accumulated_gradient(loss, spec.resources.micro_batches, spec.mesh)
    trainable = spec.student.trainable(state.student)
    grads, terms = gradient(trainable, images, labels, lesson)
    updates, opt = student_optimizer(spec.method).update(grads, state.student_opt, trainable)
    if spec.method.student_kernel_rate:
        updates = _with_kernels(_at_kernel_rate, updates, state.student, spec)
    if spec.method.inundation:
        updates = _with_kernels(_inundated, updates, state.student, spec)
    trainable = optax.apply_updates(trainable, updates)
    state = state._replace(
        student=spec.student.with_trainable(state.student, trainable),
        student_opt=opt,
        average=update_average(state.average, trainable, decay=spec.method.average_decay),
    )
    return state, terms


def _with_kernels(change: Callable[..., jax.Array], updates: Variables, student: Variables,
                  spec: StepSpec) -> Variables:  # fmt: skip
    """Updates in which every kernel's is `change(update, kernel, its steps, method)`."""
    params = dict(updates["params"])
    for operation in spec.student.operations:
        if operation.weight_bits:
            name = operation.layer.name
            steps = kernel_steps(spec.student.spec, student, operation)
            kernel = student["params"][name]["kernel"]
            update = change(params[name]["kernel"], kernel, steps, spec.method)
            params[name] = {**params[name], "kernel": update}
    return {**updates, "params": params}


def _at_kernel_rate(update: jax.Array, kernel: jax.Array, steps: KernelSteps, method: Method) -> jax.Array:  # fmt: skip
    """Adam's update of a kernel, its rate counted in the kernel's own quantization steps."""
    return update * (method.student_kernel_rate / method.student_learning_rate * steps.step)


def _inundated(update: jax.Array, kernel: jax.Array, steps: KernelSteps, method: Method) -> jax.Array:  # fmt: skip
    """An update large enough to change its share of the kernel's codes."""
    return inundated(update, kernel, *steps, method.inundation)


def step_key(state: Keyed) -> jax.Array:
    """The PRNG key of the step a state stands before."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)


# --- the steps ------------------------------------------------------------------------------


def warmup_step(state: TrainState, teacher: Variables, *, spec: StepSpec) -> tuple[TrainState, Metrics]:  # fmt: skip
    """Updates the generator alone."""
    state, aux, _ = _update_generator(state, teacher, step_key(state), spec)
    return state._replace(step=state.step + 1), aux["terms"]


def calibration_step(state: TrainState, teacher: Variables, *, spec: StepSpec) -> tuple[TrainState, Metrics]:  # fmt: skip
    """Updates the generator, and the student's activation ranges on its images."""
    state, aux, _ = _update_generator(state, teacher, step_key(state), spec)
    _, student = calibrate(spec.student, state.student, aux["images"])
    return state._replace(step=state.step + 1, student=student), aux["terms"]


def joint_step(state: TrainState, teacher: Variables, *, spec: StepSpec) -> tuple[TrainState, Metrics]:  # fmt: skip
    """Updates the generator, then the student on the same images; one teacher forward for both."""
    state, aux, labels = _update_generator(state, teacher, step_key(state), spec)
    state, terms = _update_student(state, teacher, aux["images"], labels, aux["lesson"], spec)
    return state._replace(step=state.step + 1), {**aux["terms"], **terms}


def _draw(key: jax.Array, images: jax.Array, labels: jax.Array, spec: StepSpec) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """A step's batch of the pool, augmented, and its labels."""
    pick_key, augment_key = jax.random.split(key)
    picked = jax.random.randint(pick_key, (spec.method.batch_size,), 0, images.shape[0])
    picked = constrain_batch(picked, spec.mesh)
    return AUGMENTATIONS[spec.method.augmentation](augment_key, images[picked]), labels[picked]


def training_batch(key: jax.Array, images: jax.Array, labels: jax.Array, spec: StepSpec) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """A step's batch of the pool, augmented and mixed, as the method says.

    Args:
      key: PRNG key.
      images: `[N, H, W, C]`, the pool.
      labels: `[N]`.

    Returns:
      Images `[B, H, W, C]`; labels `[B]`, or class weights `[B, K]` where images are mixed.
    """
    batch, labels_of_batch = _draw(key, images, labels, spec)
    probability = spec.method.mixup
    if not probability:
        return batch, labels_of_batch
    other_key, mix_key = jax.random.split(jax.random.fold_in(key, 1))
    others, labels_of_others = _draw(other_key, images, labels, spec)
    batch, share = mixup(mix_key, batch, others, probability=probability)
    first, second = (
        jax.nn.one_hot(some, spec.graph.num_classes) for some in (labels_of_batch, labels_of_others)
    )
    return batch, share[:, None] * first + (1 - share[:, None]) * second


def pool_step(state: TrainState, teacher: Variables, images: jax.Array, labels: jax.Array, *,
              spec: StepSpec) -> tuple[TrainState, Metrics]:  # fmt: skip
    """Updates the student on a batch drawn from a pool of images.

    Args:
      images: `[N, H, W, C]`, the pool.
      labels: `[N]`.
    """
    batch, labels = training_batch(step_key(state), images, labels, spec)
    lesson = lesson_of(teacher, batch, spec)
    state, terms = _update_student(state, teacher, batch, labels, lesson, spec)
    return state._replace(step=state.step + 1), terms


def pool_calibration_step(state: TrainState, teacher: Variables, images: jax.Array,
                          labels: jax.Array, *, spec: StepSpec) -> tuple[TrainState, Metrics]:  # fmt: skip
    """Updates the student's activation ranges on a batch of the pool, and nothing else."""
    batch, labels = _draw(step_key(state), images, labels, spec)
    logits, student = calibrate(spec.student, state.student, batch)
    terms = {"student/ce": losses.cross_entropy(logits, labels)}
    return state._replace(step=state.step + 1, student=student), terms
