"""What executes an exported student: one module a runtime, all with the same three methods.

`logits(images)` and `codes(images, tensors)` take normalised images `[B, H, W, C]` (or raw uint8
pixels, where `input_kind` is `uint8`) and return float32 logits `[B, K]` and, by tensor of the
network, uint8 codes `[B, ...]`, channels last.
"""

from lrq_jax.runtimes.base import Runner
from lrq_jax.runtimes.reference import Reference

__all__ = ["Reference", "Runner"]
