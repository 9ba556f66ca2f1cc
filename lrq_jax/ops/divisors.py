"""Arrays cut into equal parts."""


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor up to a limit, at least 1."""
    return next(n for n in range(max(min(number, limit), 1), 0, -1) if number % n == 0)
