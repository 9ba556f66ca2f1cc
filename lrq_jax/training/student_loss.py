"""The student's loss: on images as they are, and on harder ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lrq_jax import losses
from lrq_jax.passes import student_forward
from lrq_jax.passes.float_forward import Variables
from lrq_jax.passes.kernels import coarse_kernel, lineage_kernel
from lrq_jax.training.comparison import Compared, compared, compared_tensors, lesson_of
from lrq_jax.training.spec import StepSpec

Metrics = dict[str, jax.Array]


def hard_labels(labels: jax.Array) -> jax.Array:
    """Labels `[B]`: as they are, or the heaviest class of class weights `[B, K]`."""
    return jnp.argmax(labels, axis=-1) if labels.ndim == 2 else labels


def student_loss(trainable: Variables, student: Variables, images: jax.Array, labels: jax.Array,
                 lesson: Compared, *, spec: StepSpec) -> tuple[jax.Array, Metrics]:  # fmt: skip
    """`L_S = w_ce * CE + distillation + w_channel * L_channel + w_cam * L_cam` of the quantized
    student, whose activation maps are those of the class that the teacher sees."""
    method = spec.method
    variables = spec.student.with_trainable(student, trainable)
    values = student_forward(spec.student, variables, images, compared_tensors(spec))
    classifier = spec.student.operations[-1]
    kernel_of = coarse_kernel if spec.student.is_integer else lineage_kernel
    seen = compared(
        values,
        lambda: kernel_of(spec.student.spec, variables, classifier),
        jnp.argmax(lesson.logits, -1),
        spec,
    )
    logits, teacher_logits = seen.logits, lesson.logits
    if method.student_loss == "dkd":
        distill = losses.decoupled_distillation(
            logits,
            teacher_logits,
            hard_labels(labels),
            alpha=method.distill_weight,
            beta=method.dkd_beta,
            temperature=method.temperature,
        )
    else:
        distill = method.distill_weight * losses.distillation(
            logits, teacher_logits, temperature=method.temperature, reduction=method.kd_reduction
        )
    terms = {
        "student/ce": losses.easy_cross_entropy(
            logits, teacher_logits, labels, hardest=method.ce_hardest
        ),
        "student/distill": distill,
    }
    agreement = jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(teacher_logits, -1))
    total = method.ce_weight * terms["student/ce"] + distill
    if method.channel_alignment:
        channel = losses.channel_attention_alignment(seen.blocks, lesson.blocks)
        total += method.channel_alignment * channel
        terms["student/channel"] = channel
    if seen.activation_map is not None and lesson.activation_map is not None:
        cam = losses.class_activation_alignment(seen.activation_map, lesson.activation_map)
        total += method.cam_alignment * cam
        terms["student/cam"] = cam
    return total, {**terms, "student/loss": total, "student/agreement": agreement}


def perturbed_images(trainable: Variables, student: Variables, teacher: Variables,
                     images: jax.Array, labels: jax.Array, *, spec: StepSpec) -> jax.Array:  # fmt: skip
    """`x' = x + eps * sign(dL_S/dx)`, images that are harder for the student.

    The gradient passes through the teacher's part of the loss too. Source: HAST's sample
    difficulty promotion (arXiv 2303.13826), eps 0.01 in units of normalised pixels.
    """

    def loss(images: jax.Array) -> jax.Array:
        lesson = lesson_of(teacher, images, spec)
        return student_loss(trainable, student, images, labels, lesson, spec=spec)[0]

    trainable = jax.lax.stop_gradient(trainable)
    direction = jnp.sign(jax.grad(loss)(images))
    return images + spec.method.perturbation * jax.lax.stop_gradient(direction)


def training_loss(trainable: Variables, student: Variables, teacher: Variables, images: jax.Array,
                  labels: jax.Array, lesson: Compared, *, spec: StepSpec) -> tuple[jax.Array, Metrics]:  # fmt: skip
    """`L_S(x)`, or where the method perturbs images `L_S(x) + L_S(x')` (HAST)."""
    total, terms = student_loss(trainable, student, images, labels, lesson, spec=spec)
    if not spec.method.perturbation:
        return total, terms
    harder = perturbed_images(trainable, student, teacher, images, labels, spec=spec)
    lesson = lesson_of(teacher, harder, spec)
    more, _ = student_loss(trainable, student, harder, labels, lesson, spec=spec)
    return total + more, {**terms, "student/perturbed": more, "student/loss": total + more}
