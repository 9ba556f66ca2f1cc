"""The embedded default: handwritten digits, a small residual teacher, W4A4.

Command:   python -m lrq_jax.main --config=configs/digits.py --workdir=runs/digits
Time:      minutes on 2 processors (200 + 300 steps of 32 images)
Expected:  99.2 % top-1 (seeds 0, 1, 2) against the teacher's 99.8 %
"""

from lrq_jax.config import get_config

__all__ = ["get_config"]
