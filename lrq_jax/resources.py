"""What a step costs, apart from what it computes: memory and precision, as static settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lrq_jax.ops.kept import only_kept
from lrq_jax.sharding import constrain_batch

PRECISIONS = {
    "float32": ("highest", "float32"),
    "tf32": ("tensorfloat32", "float32"),
    "bfloat16": ("tensorfloat32", "bfloat16"),
}
"""Name in a config -> (jax's precision of float32 matrix products, type of images, teacher and
generator). Products of codes are exact in all of them: a centred code has at most 8 binary digits,
as bfloat16's, and sums are float32."""

REMATERIALIZE = ("none", "elementwise")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """How a step is computed; results are the same up to rounding (`precision` apart).

    Attributes:
      precision: `float32`; `tf32`; or `bfloat16` images, teacher and generator. See `PRECISIONS`.
      micro_batches: parts the student's batch is cut into, one after another, their gradients
        added up. The generator's batch and that of noise images stay whole: norms and the
        statistics they are trained on are those of the batch; a block's, in reconstruction, is small.
      rematerialize: `elementwise` keeps only the outputs of convolutions and matrix products for
        the backward pass and computes what lies between them again; `none` keeps everything.

    Raises:
      ValueError: a setting that cannot be, named.
    """

    precision: str = "float32"
    micro_batches: int = 1
    rematerialize: str = "none"

    def __post_init__(self) -> None:
        for name, allowed in (("precision", tuple(PRECISIONS)), ("rematerialize", REMATERIALIZE)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: found {getattr(self, name)!r}, expected one of {allowed}"
                )
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches: found {self.micro_batches}, expected at least 1")

    @property
    def matmul_precision(self) -> str:
        """jax's name for the precision of float32 matrix products."""
        return PRECISIONS[self.precision][0]

    def cast(self, tree: Any, *, smallest_rank: int = 0) -> Any:
        """Arrays in the type images, teacher and generator are computed in.

        Args:
          tree: of arrays.
          smallest_rank: those of fewer axes stay: the vectors of a teacher's batch norms, whose
            offsets are small differences.
        """
        dtype = jnp.dtype(PRECISIONS[self.precision][1])

        def cast(x: jax.Array) -> jax.Array:
            return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        return jax.tree.map(lambda x: cast(x) if x.ndim >= smallest_rank else x, tree)

    def rematerialized(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """The loss with less kept for its gradient."""
        if self.rematerialize == "none":
            return loss
        return jax.checkpoint(loss, policy=only_kept())


DEFAULT_RESOURCES = Resources()


def accumulated_gradient(loss: Callable[..., Any], count: int, mesh: Mesh | None) -> Callable[..., Any]:  # fmt: skip
    """`jax.grad(loss, has_aux=True)`, over `count` equal parts of a batch, one after another.

    Args:
      loss: `(trainable, *batch) -> (mean over the batch, tree of means over the batch)`.
      count: parts; must divide the batch (on each device).
      mesh: devices the batch is split over. On a CPU the loop is written out: convolutions inside
        XLA's loops lose their fast path there.

    Returns:
      `(trainable, *batch) -> (gradient, tree of means)`; every array of batch is `[B, ...]`.
    """
    gradient = jax.grad(loss, has_aux=True)
    if count == 1:
        return gradient

    def parts(x: jax.Array) -> jax.Array:
        # Every count-th image: a device's share of the batch stays on it.
        return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)

    def accumulated(trainable: Any, *batch: Any) -> tuple[Any, Any]:
        def body(total: Any, part: Any) -> tuple[Any, None]:
            part = jax.tree.map(lambda x: constrain_batch(x, mesh), part)
            return jax.tree.map(jnp.add, total, gradient(trainable, *part)), None

        first = jax.eval_shape(gradient, trainable, *jax.tree.map(lambda x: x[::count], batch))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        total, _ = jax.lax.scan(body, zero, jax.tree.map(parts, batch), unroll=platform == "cpu")
        return jax.tree.map(lambda x: x / count, total)

    return accumulated
