"""No training at all (preset `squant`), for any teacher.

Command:   python -m lrq_jax.main --config=configs/squant.py --workdir=runs/squant \\
             --config.teacher.path=teachers/r20_cifar10 --config.data.path=DIR_OF_TEST_IMAGES
Time:      a minute for ResNet-20 at 32 px on one processor (Intel Xeon): 8 to 14 seconds, compilation 2 to 6,
           the rest evaluation on 9,977 images and export
Expected:  90.22 % top-1 on CIFAR-10 (ResNet-20, W4A4, seed 0) against the teacher's 91.73 %
"""

from ml_collections import ConfigDict

from lrq_jax.config import base_config


def get_config() -> ConfigDict:
    """See the module docstring."""
    config = base_config()
    config.method.preset = "squant"
    config.teacher.path = ""  # a converted teacher; `digits` for the embedded one
    config.data.path = ""  # a folder of labelled images; empty: nothing is evaluated
    return config
