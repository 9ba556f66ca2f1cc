"""The embedded default: handwritten digits, a small residual teacher, W4A4.

Command:   python -m lrq_jax.main --config=configs/digits.py --workdir=runs/digits
Time:      TIME_DIGITS
Expected:  RESULT_DIGITS
"""

from lrq_jax.config import get_config

__all__ = ["get_config"]
