"""The command that repeats a run, from its settings alone."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from lrq_jax.config import RunSettings, get_config, resolve

PLACES = {"teacher_path": "teacher.path", "data_name": "data.name", "data_path": "data.path",
           "data_split": "data.split",
          "train_path": "data.train_path", "train_images": "data.train_images", "pool_path": "data.pool_path", "preset": "method.preset"}  # fmt: skip
"""Field of RunSettings -> its name in a config, where they differ."""


_GROUPS = ("student", "method", "resources")
"""Fields of RunSettings that hold fields of their own."""


def command(settings: RunSettings, *, image_size: int) -> str:
    """A line for a shell: the preset, and every field that differs from what runs with it alone.

    Args:
      settings: of the run.
      image_size: side of the teacher's images, pixels; picks the preset's column.
    """
    config = get_config()
    config.method.preset = settings.preset
    plain = resolve(config, image_size=image_size).student
    for name in ("weight_bits", "act_bits"):  # a preset is one of these bits
        config.student[name] = getattr(settings.student, name)
    base = resolve(config, image_size=image_size)
    base = dataclasses.replace(base, student=plain)
    flags = [_flag(PLACES["preset"], settings.preset)]
    for name, value in vars(settings).items():
        if name not in (*_GROUPS, "preset") and value != getattr(base, name):
            flags.append(_flag(PLACES.get(name, name), value))
    for group in _GROUPS:
        ours, default = vars(getattr(settings, group)), vars(getattr(base, group))
        for name, value in ours.items():
            if value != default[name]:
                flags.append(_flag(_field(group, name), value))
    return shlex.join(["python", "-m", "lrq_jax.main", *flags])


def _field(group: str, name: str) -> str:
    """A method's steps and the resources stand at the top of a config."""
    at_top = group == "resources" or (group, name) == ("method", "steps")
    return name if at_top else f"{group}.{name}"


def _flag(name: str, value: Any) -> str:
    return f"--config.{name}={value}"
