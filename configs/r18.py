"""ResNet-18 on ImageNet, W4A4, the published schedule of `lrq` at 224 px.

Convert:   python scripts/convert_teacher.py --source resnet18.pth --arch resnet18 \\
             --out teachers/r18
Command:   python -m lrq_jax.main --config=configs/r18.py --workdir=runs/r18 \\
             --config.teacher.path=teachers/r18 --config.data.path=DIR_OF_VALIDATION_IMAGES
Time:      90,000 steps of 16 images: meant for a GPU or TPU; not yet measured. For a look on
           a CPU add --config.steps=0 --config.method.warmup_steps=20
           --config.method.calibration_steps=10
Expected:  not yet measured
"""

from ml_collections import ConfigDict

from lrq_jax.config import base_config


def get_config() -> ConfigDict:
    """See the module docstring."""
    config = base_config()
    config.method.preset = "lrq"
    config.teacher.path = "teachers/r18"
    config.data.path = ""  # a folder of labelled images; empty: nothing is evaluated
    config.checkpoint_every = 1000
    config.images_every = 1000
    return config
