"""What a step with less memory keeps for its backward pass: results of convolutions and products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies

_PRODUCT = "product"


def kept(product: jax.Array) -> jax.Array:
    """The same array, named for `only_kept`. A name and not the operation itself: gradients of our
    own (`jax.custom_vjp`) hide the operations inside them from jax."""
    return checkpoint_name(product, _PRODUCT)


def only_kept() -> Callable[..., Any]:
    """The policy of `jax.checkpoint` that keeps what `kept` has named and computes the rest again."""
    return checkpoint_policies.save_only_these_names(_PRODUCT)
