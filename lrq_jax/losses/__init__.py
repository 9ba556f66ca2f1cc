"""The losses, each one function with its equation and source."""

from lrq_jax.losses.classification import cross_entropy, sample_targets, squared_target_error
from lrq_jax.losses.distillation import decoupled_distillation, distillation
from lrq_jax.losses.margin import (
    angular_margin_hinge,
    cosine_to_centers,
    initial_centers,
    update_centers,
)
from lrq_jax.losses.statistics import (
    STATISTICS,
    batch_norm_statistics,
    relative_batch_norm_statistics,
)

__all__ = [
    "STATISTICS",
    "angular_margin_hinge",
    "batch_norm_statistics",
    "cosine_to_centers",
    "cross_entropy",
    "decoupled_distillation",
    "distillation",
    "initial_centers",
    "relative_batch_norm_statistics",
    "sample_targets",
    "squared_target_error",
    "update_centers",
]
