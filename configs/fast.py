"""Our method of minutes (preset `fast`), for any teacher.

Command:   python -m lrq_jax.main --config=configs/fast.py --workdir=runs/fast \\
             --config.teacher.path=teachers/r20_cifar10 --config.data.path=DIR_OF_TEST_IMAGES
Time:      16 to 24 minutes on one processor (AMD Zen 4) for ResNet-20 at 32 px, the other at work too;
           24 to 34 at 3 bits and fewer, 16 with both processors and nothing else at work
Expected:  91.16 % top-1 on CIFAR-10 (W4A4, policy U, seed 0) against 91.73 %
"""

from ml_collections import ConfigDict

from lrq_jax.config import base_config


def get_config() -> ConfigDict:
    """See the module docstring."""
    config = base_config()
    config.method.preset = "fast"
    config.teacher.path = ""  # a converted teacher; `digits` for the embedded one
    config.data.path = ""  # a folder of labelled images; empty: nothing is evaluated
    return config
