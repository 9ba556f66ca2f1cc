"""How plain operators of XNNPACK give the codes of a residual addition.

Our addition is two fused multiply-adds. XNNPACK's int8 addition multiplies in fixed point, and
float operators round in other places; but there are at most 2^16 pairs of input codes, so that
either can be tried on all of them: what is chosen is proved to give our codes, not measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lrq_jax.passes.integer_forward import QuantizedTensor, sum_of_codes
from lrq_jax.quantizers.affine import AffineParameters, top_code

REACH = 12
"""Units in the last place that each factor may be away from its ratio of scales."""
OFFSETS = tuple(sorted((n * 2.0**-18 for n in range(-6, 7)), key=abs))
"""Tried beside the zero point: their step is of the size of the sums' rounding errors."""
NEAR_TIE = 2e-3
"""Sums farther than this from a rounding boundary round alike under all constants in reach."""
FIXED_POINT_BITS = 20
"""Of XNNPACK's int8 addition: the larger multiplier is in [2^20, 2^21]."""


class Sum(NamedTuple):
    """An addition `c = a + b`.

    Attributes:
      a, b: bits and parameters of the summands; their codes are not read.
      c, bits: parameters and bits of the sum.
    """

    a: QuantizedTensor
    b: QuantizedTensor
    c: AffineParameters
    bits: int

    def every_pair(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All pairs of codes beside their zero points, float32, and our codes of their sums."""
        grid = np.meshgrid(
            *(np.arange(top_code(x.bits) + 1, dtype=np.float32) for x in (self.a, self.b)),
            indexing="ij",
        )
        codes = [values.reshape(-1) for values in grid]
        a, b = (
            x._replace(codes=jnp.asarray(values))
            for x, values in zip((self.a, self.b), codes, strict=True)
        )
        ours = np.asarray(sum_of_codes(a, b, self.c, self.bits))
        zeros = [np.float32(x.parameters.zero_point) for x in (a, b)]
        return codes[0] - zeros[0], codes[1] - zeros[1], ours

    def ratios(self) -> tuple[np.float32, np.float32]:
        """Scales of `a` and `b` over the sum's."""
        a, b, c = (np.float32(x.scale) for x in (self.a, self.b, self.c))
        return a / c, b / c

    def clipped(self, codes: np.ndarray) -> np.ndarray:
        """To the bits of the sum."""
        return np.clip(codes, 0, top_code(self.bits))


class SumConstants(NamedTuple):
    """Constants of `rint(first*a + second*b) + z_c`; or, with an offset, of `rint(first*a +
    (second*b + offset))`, every operation rounded to float32."""

    first: np.float32
    second: np.float32
    offset: np.float32 | None


def fixed_point_sum(a: np.ndarray, b: np.ndarray, ratios: tuple[np.float32, np.float32]) -> np.ndarray:  # fmt: skip
    """XNNPACK's int8 addition of integers, beside the output's zero point, before it clips."""
    shift = FIXED_POINT_BITS - (math.frexp(float(max(ratios)))[1] - 1)
    first, second = (int(np.rint(float(ratio) * 2.0**shift)) for ratio in ratios)
    accumulator = a.astype(np.int64) * first + b.astype(np.int64) * second
    return (accumulator + (1 << (shift - 1))) >> shift


def int8_sum_is_ours(addition: Sum) -> bool:
    """Whether XNNPACK's int8 addition gives our code for every pair of codes."""
    ratios = addition.ratios()
    if not 2**-10 <= min(ratios) <= max(ratios) < 2**8:  # what XNNPACK takes
        return False
    a, b, ours = addition.every_pair()
    found = fixed_point_sum(a, b, ratios) + int(addition.c.zero_point)
    return np.array_equal(addition.clipped(found), ours)


def sum_constants(addition: Sum, units: tuple[np.float32, np.float32]) -> SumConstants | None:
    """Constants with which float operators give our code for every pair of codes.

    Args:
      addition: which.
      units: what the runtime has multiplied each summand's codes beside its zero point by.

    Returns:
      The nearest to the ratios of scales, without an offset if possible; None if there are none.
    """
    a, b, ours = addition.every_pair()
    zero_point = np.float32(addition.c.zero_point)
    ratios = addition.ratios()
    real = a * float(ratios[0]) + b * float(ratios[1])
    near = abs(real - np.floor(real) - 0.5) < NEAR_TIE
    a, b = a * units[0], b * units[1]

    def gives_ours(constants: SumConstants, which: np.ndarray | slice) -> bool:
        first, second = constants.first * a[which], constants.second * b[which]
        if constants.offset is None:
            found = np.rint(first + second) + zero_point
        else:
            found = np.rint(first + (second + constants.offset))
        return np.array_equal(addition.clipped(found), ours[which])

    first, second = (ratio / unit for ratio, unit in zip(ratios, units, strict=True))
    for constants in _candidates(first, second, zero_point):
        if gives_ours(constants, near) and gives_ours(constants, slice(None)):
            return constants
    return None


def _candidates(first: np.float32, second: np.float32, zero_point: np.float32) -> Iterator[SumConstants]:  # fmt: skip
    pairs = itertools.product(range(-REACH, REACH + 1), repeat=2)
    steps = sorted(pairs, key=lambda pair: (sum(map(abs, pair)), pair))
    for n, m in steps:
        yield SumConstants(_stepped(first, n), _stepped(second, m), None)
    for more in OFFSETS:
        for n, m in steps:
            yield SumConstants(
                _stepped(first, n), _stepped(second, m), np.float32(float(zero_point) + more)
            )


def _stepped(value: np.float32, steps: int) -> np.float32:
    """The float32 that many units in the last place farther from 0."""
    return (np.float32(value).view(np.int32) + np.int32(steps)).view(np.float32)
