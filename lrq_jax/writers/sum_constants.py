"""Constants with which plain float32 operators give the codes of a residual addition.

Our addition is two fused multiply-adds, which a runtime without them rounds in other places. But
it has at most 2^16 pairs of input codes, so constants a few units in the last place away, under
which every pair gives our code, can be searched, and the result is proved, not measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lrq_jax.passes.integer_forward import QuantizedTensor, sum_of_codes
from lrq_jax.quantizers.affine import AffineParameters, top_code

REACH = 12
"""Units in the last place that each factor may be away from its ratio of scales."""
OFFSET_REACH = 4
"""The same for the offset."""
NEAR_TIE = 2e-3
"""Sums farther than this from a rounding boundary round alike under all constants in reach."""


class SumConstants(NamedTuple):
    """Constants of `rint(first*(a - z_a) + second*(b - z_b)) + z_c`; or, with an offset, of
    `rint(first*a + (second*(b - z_b) + offset))`. Every operation is rounded to float32."""

    first: np.float32
    second: np.float32
    offset: np.float32 | None


def sum_constants(a: QuantizedTensor, b: QuantizedTensor, c: AffineParameters, bits: int) -> SumConstants | None:  # fmt: skip
    """Constants that give, clipped, our code for every code of `a` and of `b`.

    Args:
      a, b: bits and parameters of the summands; their codes are not read.
      c, bits: of the sum.

    Returns:
      The nearest to the ratios of scales, without an offset if possible; None if there are none.
    """
    grid = np.meshgrid(*(np.arange(top_code(x.bits) + 1) for x in (a, b)), indexing="ij")
    codes = [values.reshape(-1).astype(np.float32) for values in grid]
    a, b = (x._replace(codes=jnp.asarray(values)) for x, values in zip((a, b), codes, strict=True))
    ours = np.asarray(sum_of_codes(a, b, c, bits))
    ratios = [np.float32(x.scale) / np.float32(c.scale) for x in (a, b)]
    zeros = [np.float32(x.parameters.zero_point) for x in (a, b)]
    real = float(c.zero_point) + sum(
        (values - zero) * float(ratio)
        for values, zero, ratio in zip(codes, zeros, ratios, strict=True)
    )
    near = np.abs(real - np.floor(real) - 0.5) < NEAR_TIE
    offset = np.float32(float(c.zero_point) - float(zeros[0]) * float(ratios[0]))

    def gives_ours(constants: SumConstants, which: np.ndarray | slice) -> bool:
        first, second = codes[0][which], codes[1][which] - zeros[1]
        if constants.offset is None:
            total = constants.first * (first - zeros[0]) + constants.second * second
            found = np.rint(total) + np.float32(c.zero_point)
        else:
            found = np.rint(
                constants.first * first + (constants.second * second + constants.offset)
            )
        return np.array_equal(np.clip(found, 0, top_code(bits)), ours[which])

    for constants in _candidates(*ratios, offset):
        if gives_ours(constants, near) and gives_ours(constants, slice(None)):
            return constants
    return None


def _candidates(first: np.float32, second: np.float32, offset: np.float32) -> Iterator[SumConstants]:  # fmt: skip
    steps = itertools.product(range(-REACH, REACH + 1), repeat=2)
    steps = sorted(steps, key=lambda pair: (sum(map(abs, pair)), pair))
    for n, m in steps:
        yield SumConstants(_stepped(first, n), _stepped(second, m), None)
    for k in sorted(range(-OFFSET_REACH, OFFSET_REACH + 1), key=abs):
        for n, m in steps:
            yield SumConstants(_stepped(first, n), _stepped(second, m), _stepped(offset, k))


def _stepped(value: np.float32, steps: int) -> np.float32:
    """The float32 that many units in the last place farther from 0."""
    return (value.view(np.int32) + np.int32(steps)).view(np.float32)
