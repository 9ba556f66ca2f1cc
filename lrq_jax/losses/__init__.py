"""The losses, each one function with its equation and source."""

from lrq_jax.losses.alignment import (
    channel_attention,
    channel_attention_alignment,
    class_activation_alignment,
    class_activation_map,
)
from lrq_jax.losses.classification import (
    cross_entropy,
    easy_cross_entropy,
    focal_cross_entropy,
    sample_targets,
    squared_target_error,
)
from lrq_jax.losses.distillation import decoupled_distillation, distillation
from lrq_jax.losses.margin import (
    angular_margin_hinge,
    cosine_to_centers,
    initial_centers,
    update_centers,
)
from lrq_jax.losses.statistics import (
    STATISTICS,
    batch_norm_deviations,
    batch_norm_statistics,
    image_statistics,
    relative_batch_norm_statistics,
)

__all__ = [
    "STATISTICS",
    "angular_margin_hinge",
    "batch_norm_deviations",
    "batch_norm_statistics",
    "channel_attention",
    "channel_attention_alignment",
    "class_activation_alignment",
    "class_activation_map",
    "cosine_to_centers",
    "cross_entropy",
    "decoupled_distillation",
    "distillation",
    "easy_cross_entropy",
    "focal_cross_entropy",
    "image_statistics",
    "initial_centers",
    "relative_batch_norm_statistics",
    "sample_targets",
    "squared_target_error",
    "update_centers",
]
