"""Our method of an hour on a GPU (preset `best`), for any teacher.

Command:   python -m lrq_jax.main --config=configs/best.py --workdir=runs/best \\
             --config.teacher.path=teachers/r20_cifar10 --config.data.path=DIR_OF_TEST_IMAGES
Time:      sized for under an hour on one GPU for ResNet-20 at 32 px; not yet measured
Expected:  not yet measured
"""

from ml_collections import ConfigDict

from lrq_jax.config import base_config


def get_config() -> ConfigDict:
    """See the module docstring."""
    config = base_config()
    config.method.preset = "best"
    config.teacher.path = ""  # a converted teacher; `digits` for the embedded one
    config.data.path = ""  # a folder of labelled images; empty: nothing is evaluated
    config.checkpoint_every = 1000
    return config
