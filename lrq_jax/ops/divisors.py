"""Arrays cut into equal parts."""

import math

import jax


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor up to a limit, at least 1."""
    return next(n for n in range(max(min(number, limit), 1), 0, -1) if number % n == 0)


def shares_of(batch: int) -> int:
    """Into how many equal shares a batch falls that lie whole on one device each, if it is split
    over all devices or over a divisor of their number.

    What is summed part by part takes a part of every share, or else devices would send each other
    their images.
    """
    return math.gcd(batch, jax.device_count())
