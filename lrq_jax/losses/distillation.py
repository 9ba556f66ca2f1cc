"""Distillation of the teacher's outputs into the student's."""

from __future__ import annotations

import jax
import jax.numpy as jnp

REDUCTIONS = ("batch_mean", "element_mean")
_EXCLUDED = -1e9
"""Logit of an excluded class: its probability is exactly 0 and its gradient finite."""


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Terms of KL(p || q) from log probabilities, any shape."""
    return jnp.exp(log_p) * (log_p - log_q)


def distillation(student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float,
                 reduction: str = "batch_mean") -> jax.Array:  # fmt: skip
    """`T^2 * KL(softmax(teacher / T) || softmax(student / T))` (Hinton et al., arXiv 1503.02531).

    Args:
      student_logits, teacher_logits: `[B, K]`.
      temperature: T.
      reduction: `batch_mean` sums over classes, as KL is defined; `element_mean` divides by K
        too, as GDFQ's code does (PyTorch's KLDivLoss default).

    Returns:
      Scalar, in nats times T^2.

    Raises:
      ValueError: an unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: found {reduction!r}, expected one of {REDUCTIONS}")
    terms = _kl(
        jax.nn.log_softmax(teacher_logits / temperature),
        jax.nn.log_softmax(student_logits / temperature),
    )
    total = jnp.sum(terms) / terms.shape[0]
    return temperature**2 * (total if reduction == "batch_mean" else total / terms.shape[1])


def decoupled_distillation(student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array, *,
                           alpha: float, beta: float, temperature: float) -> jax.Array:  # fmt: skip
    """Decoupled knowledge distillation (Zhao et al., arXiv 2203.08679, equation 7).

    `alpha*T^2*KL(b_P || b_Q) + beta*T^2*KL(p^_P || p^_Q)`, batch mean, with p = softmax(z / T),
    b = [p_y, 1 - p_y] and p^ the softmax over the classes other than y. With
    beta = 1 - p_y of the teacher it is plain distillation. log(1 - p_y) is taken as a
    difference of log-sum-exps, so p_y = 1 stays finite.

    Args:
      student_logits, teacher_logits: `[B, K]`, K >= 2.
      labels: `[B]` int.
      alpha, beta: weights of the target and non-target parts.
      temperature: T.
    """
    target = jax.nn.one_hot(labels, student_logits.shape[-1], dtype=bool)

    def parts(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = logits / temperature
        others = jnp.where(target, _EXCLUDED, logits)
        everything = jax.nn.logsumexp(logits, axis=-1)
        log_target = jnp.sum(jnp.where(target, logits, 0.0), axis=-1) - everything
        log_rest = jax.nn.logsumexp(others, axis=-1) - everything
        return jnp.stack([log_target, log_rest], axis=-1), jax.nn.log_softmax(others)

    teacher_binary, teacher_others = parts(teacher_logits)
    student_binary, student_others = parts(student_logits)
    binary = jnp.sum(_kl(teacher_binary, student_binary), axis=-1)
    others = jnp.sum(jnp.where(target, 0.0, _kl(teacher_others, student_others)), axis=-1)
    return temperature**2 * jnp.mean(alpha * binary + beta * others)
