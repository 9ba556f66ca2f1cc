"""A finished integer student as one serialized JAX function (StableHLO), any batch size."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from lrq_jax.passes import Student, frozen_logits
from lrq_jax.writers.codes import frozen_from_codes

PLATFORMS = ("cpu", "cuda", "tpu")


def jax_export(student: Student, codes: dict[str, Any], *, batch: int | None = None) -> bytes:
    """Serialized `jax.export` of normalised images `[B, H, W, C]` to logits `[B, K]`.

    Args:
      student: of the `integer` placement.
      codes: its arrays, of `writers.codes.student_codes`; kept in the file as integers.
      batch: B; None for any.
    """
    stored = jax.tree.map(jnp.asarray, codes)

    def logits(images: jax.Array) -> jax.Array:
        return frozen_logits(student, frozen_from_codes(stored), images)

    # Without the places in the source: they would tell where it lies on this machine, and a file
    # of the same student made elsewhere would be another.
    limit = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, limit)
    size = batch if batch is not None else export.symbolic_shape("batch")[0]
    image = jax.ShapeDtypeStruct((size, *student.graph.input_shape), jnp.float32)
    jax.config.update(limit, 0)
    try:
        return bytes(export.export(jax.jit(logits), platforms=PLATFORMS)(image).serialize())
    finally:
        jax.config.update(limit, before)
