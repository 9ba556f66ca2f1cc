"""What is known of published files: their names, their preprocessing, their hashes."""

from lrq_jax.readers.published.classic import CLASSIC
from lrq_jax.readers.published.mobile import MOBILE

NAMINGS = (*CLASSIC, *MOBILE)
"""Every naming known, tried in this order."""

__all__ = ["NAMINGS"]
