"""Learned rounding: each weight's choice between floor and ceiling as a soft variable."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lrq_jax.ops.division import divide
from lrq_jax.quantizers.affine import AffineParameters, weight_code_limits

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
"""The sigmoid is stretched to these ends and cut at 0 and 1, which it thus reaches."""

FIRST_BETA, LAST_BETA = 20.0, 2.0
"""Exponents of the regulariser: at first only choices near the ends are pushed, at last all."""


def soft_round(choice: jax.Array) -> jax.Array:
    """`h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)` (AdaRound, arXiv 2004.10568, equation 23)."""
    stretched = (STRETCH_HIGH - STRETCH_LOW) * jax.nn.sigmoid(choice) + STRETCH_LOW
    return jnp.clip(stretched, 0.0, 1.0)


def initial_choice(weight: jax.Array, parameters: AffineParameters) -> jax.Array:
    """V of which `h(V)` is the weight's own fraction: soft rounding starts as no rounding."""
    value = divide(weight, parameters.scale)
    share = (value - jnp.floor(value) - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)
    return jnp.log(share) - jnp.log1p(-share)


def soft_codes(weight: jax.Array, choice: jax.Array, parameters: AffineParameters, bits: int) -> jax.Array:  # fmt: skip
    """`clip(floor(w/s) + h(V) + z)`, not whole numbers: gradients reach V alone.

    Args:
      weight, choice: `[..., C_out]`.
      parameters: scale and zero point `[C_out]`.
      bits: of the codes.
    """
    low, high = weight_code_limits(bits)
    floor = jax.lax.stop_gradient(jnp.floor(divide(weight, parameters.scale)))
    return jnp.clip(floor + soft_round(choice) + parameters.zero_point, low, high)


def hard_codes(weight: jax.Array, choice: jax.Array, parameters: AffineParameters, bits: int) -> jax.Array:  # fmt: skip
    """Codes with each choice made: up where `h(V) >= 1/2`; arguments as `soft_codes`."""
    made = jnp.where(soft_round(choice) >= 0.5, jnp.inf, -jnp.inf)
    return soft_codes(weight, made, parameters, bits)


def undecided(choice: jax.Array, beta: jax.Array) -> jax.Array:
    """`sum(1 - |2 h(V) - 1|^beta)`: 0 when every choice is made (equation 24)."""
    return jnp.sum(1 - jnp.abs(2 * soft_round(choice) - 1) ** beta)
