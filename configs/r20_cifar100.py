"""ResNet-20 on CIFAR-100, W4A4, LRQ's losses on a budget of minutes.

Convert:   python scripts/convert_teacher.py --source resnet20.pt --out teachers/r20_cifar100
Command:   python -m lrq_jax.main --config=configs/r20_cifar100.py --workdir=runs/r20_c100 \\
             --config.teacher.path=teachers/r20_cifar100 --config.data.path=DIR_OF_TEST_IMAGES
Time:      19 minutes on one processor of a busy 2-processor machine (600 steps of 32 images)
Expected:  57.24 % top-1 (seed 0) against the teacher's 68.17 %
"""

from ml_collections import ConfigDict

from lrq_jax.config import base_config, short_schedule


def get_config() -> ConfigDict:
    """See the module docstring."""
    config = short_schedule(base_config(), steps=400)
    config.method.preset = "lrq"
    config.student.act_observer = config.student.weight_observer = "smallest_error"
    config.teacher.path = "teachers/r20_cifar100"
    config.data.path = ""  # a folder of labelled images; empty: nothing is evaluated
    return config
