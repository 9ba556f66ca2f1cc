"""Pure functions over (graph, variables, images)."""

from lrq_jax.passes.float_forward import float_forward, float_logits
from lrq_jax.passes.plan import QuantSpec, plan_quantization
from lrq_jax.passes.student import (
    Student,
    calibrate,
    freeze,
    frozen_logits,
    student_forward,
)

__all__ = [
    "QuantSpec",
    "Student",
    "calibrate",
    "float_forward",
    "float_logits",
    "freeze",
    "frozen_logits",
    "plan_quantization",
    "student_forward",
]
