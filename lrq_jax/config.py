"""Configs: what a user may set, checked by name, and the frozen settings a run uses.

`base_config()` is a locked ConfigDict; files under `configs/` start from it and the command
line overrides it. Fields of `config.method` left unset take the preset's value.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any

from lrq_jax.method import Method
from lrq_jax.passes.plan import QuantSpec
from lrq_jax.presets import METHOD_FIELDS, preset
from lrq_jax.quantizers.ranges import OBSERVERS
from lrq_jax.readers.store import DIGITS
from lrq_jax.resources import DEFAULT_RESOURCES, Resources

if typing.TYPE_CHECKING:
    from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything a run depends on besides the files it reads; static and hashable.

    Attributes:
      teacher_path: teacher directory, checkpoint file, `.safetensors` teacher, or `digits`.
      data_name: evaluation images: `digits`, or a TFDS dataset that is prepared; left out, the
        embedded teacher's digits, and for another teacher nothing.
      data_path: or a folder of labelled images; with neither nothing is evaluated.
      data_split: of a TFDS dataset.
      pool_path: run directory of the same teacher whose noise images are taken; empty: new ones.
      train_path: folder of real images for `method.images='folder'`.
      train_images: how many of them are taken.
      student: how the student is quantized.
      preset: name of the method's preset.
      method: the preset with the config's overrides.
      seed: of every random number of the run.
      resources: precision and memory of the steps; evaluation is always in float32.
      eval_batch_size: images a call of the evaluation.
      steps_per_dispatch: the most steps, or iterations of images and blocks, that a program call runs; 0: chosen per backend.
      log_every: steps between two lines of metrics.
      checkpoint_every: steps between two checkpoints.
      images_every: steps between two grids of images.
    """

    teacher_path: str
    data_name: str
    data_path: str
    data_split: str
    pool_path: str
    train_path: str
    train_images: int
    student: QuantSpec
    preset: str
    method: Method
    seed: int
    resources: Resources
    eval_batch_size: int
    steps_per_dispatch: int
    log_every: int
    checkpoint_every: int
    images_every: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, nested: what config.json holds."""
        return dataclasses.asdict(self)


def base_config() -> ConfigDict:
    """The embedded default: digits, W4A4, preset `fast`."""
    from ml_collections import ConfigDict, config_dict

    def unset(owner: type, names: Iterable[str]) -> dict[str, Any]:
        types = typing.get_type_hints(owner)
        kinds = {name: typing.get_origin(types[name]) or types[name] for name in names}
        return {name: config_dict.placeholder(kind) for name, kind in kinds.items()}

    ours = [field.name for field in dataclasses.fields(Method) if field.name != "steps"]
    config = ConfigDict(
        {
            "teacher": {"path": DIGITS},
            "data": {
                "name": config_dict.placeholder(str),
                "path": "",
                "split": "test",
                "pool_path": "",
                "train_path": "",
                "train_images": 1024,
            },
            "student": {**dataclasses.asdict(QuantSpec()), **unset(QuantSpec, METHOD_FIELDS)},
            "method": {"preset": "fast", **unset(Method, ours)},
            "steps": config_dict.placeholder(int),
            "seed": 0,
            **dataclasses.asdict(DEFAULT_RESOURCES),
            "distributed": False,
            "eval_batch_size": 500,
            "steps_per_dispatch": 0,
            "log_every": 20,
            "checkpoint_every": 200,
            "images_every": 200,
        }
    )
    return config.lock()


def short_schedule(config: ConfigDict, *, steps: int, warmup_steps: int = 200) -> ConfigDict:
    """A budget of minutes: the published schedules take days on a CPU.

    Adam on a cosine instead of 80,000 steps of SGD at 1e-4; small batches; ranges calibrated at
    the end of a short warm-up; ten times the weight on batch-norm statistics, without which the
    images are far from real ones when the student starts; distillation at temperature 4; no
    gradient where codes saturate (LSQ's mask); noise images scaled down alike. Applies to every
    preset; set `method.bns_weight` and `method.temperature` back for those of the preset itself.
    """
    config.steps = steps
    config.student.clip_mask = True
    method = config.method
    method.batch_size = 32
    method.warmup_steps = warmup_steps
    method.calibration_steps = 30
    method.calibration_start = warmup_steps - method.calibration_steps
    method.bns_weight = 1.0
    method.student_optimizer = "adam"
    method.student_learning_rate = 5e-4
    method.student_schedule = "cosine"
    method.student_weight_decay = 0.0
    method.generator_schedule = "cosine"
    method.temperature = 4.0
    method.noise_batches = 4
    method.noise_batch_size = 128
    method.noise_iterations = 80
    return config


def get_config() -> ConfigDict:
    """The embedded default: `configs/digits.py`, and what runs without `--config`."""
    return base_config()


def resolve(config: ConfigDict, *, image_size: int) -> RunSettings:
    """Checks a config and fills what it leaves to the preset.

    Args:
      config: of `base_config`, with overrides.
      image_size: side of the teacher's images, pixels; picks the preset's column.

    Raises:
      ValueError: an impossible value: the field, what was found, what was expected.
    """
    chosen = {
        field.name: config.method[field.name]
        for field in dataclasses.fields(Method)
        if field.name != "steps" and config.method[field.name] is not None
    }
    wanted = {name: value for name, value in config.student.items() if value is not None}
    usual = dataclasses.asdict(QuantSpec())
    bits = min({**usual, **wanted}[name] for name in ("weight_bits", "act_bits"))
    base = preset(config.method.preset, image_size=image_size, bits=bits)
    if config.steps is not None:
        chosen["steps"] = config.steps
    method = dataclasses.replace(base.method, **chosen)
    try:
        student = dataclasses.replace(
            base.student, **{**wanted, "overrides": tuple(config.student.overrides)}
        )
    except ValueError as error:
        raise ValueError(f"student.{error}") from error
    if not 0 <= student.range_decay < 1:
        raise ValueError(f"student.range_decay: found {student.range_decay}, expected 0 <= it < 1")
    for name in ("weight_observer", "act_observer"):
        if getattr(student, name) not in OBSERVERS:
            raise ValueError(
                f"student.{name}: found {getattr(student, name)!r}, expected {sorted(OBSERVERS)}"
            )
    if bool(config.data.train_path) != (method.images == "folder"):
        raise ValueError(
            f"data.train_path: found {config.data.train_path!r} with method.images="
            f"{method.images!r}, expected a folder of real images with method.images='folder', "
            "and with it alone"
        )
    if config.data.pool_path and not method.makes_pool:
        raise ValueError(
            f"data.pool_path: found {config.data.pool_path!r} with method.images="
            f"{method.images!r}, expected a method that makes noise images; leave it empty"
        )
    resources = Resources(
        **{field.name: config[field.name] for field in dataclasses.fields(Resources)}
    )
    if not 0 <= config.seed < 2**32:  # jax's keys drop further bits, silently
        raise ValueError(f"seed: found {config.seed}, expected 0 to {2**32 - 1}")
    if config.data.train_images < 1:
        raise ValueError(
            f"data.train_images: found {config.data.train_images}, expected at least 1"
        )
    for name in ("eval_batch_size", "log_every", "checkpoint_every", "images_every"):
        if config[name] < 1:
            raise ValueError(f"{name}: found {config[name]}, expected at least 1")
    if config.steps_per_dispatch < 0:
        raise ValueError(
            f"steps_per_dispatch: found {config.steps_per_dispatch}, expected 0 (automatic) or more"
        )
    data_name = config.data.name
    if data_name is None:
        embedded = config.teacher.path == DIGITS and not config.data.path
        data_name = DIGITS if embedded else ""
    return RunSettings(
        teacher_path=config.teacher.path,
        data_name=data_name,
        data_path=config.data.path,
        data_split=config.data.split,
        pool_path=config.data.pool_path,
        train_path=config.data.train_path,
        train_images=config.data.train_images,
        student=student,
        preset=config.method.preset,
        method=method,
        seed=config.seed,
        resources=resources,
        eval_batch_size=config.eval_batch_size,
        steps_per_dispatch=config.steps_per_dispatch,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        images_every=config.images_every,
    )


def field_names(config: dict[str, Any]) -> list[str]:
    """Names of the fields of a nested dictionary, as the command line spells them: `data.path`."""
    names = []
    for key, value in config.items():
        nested = field_names(value) if isinstance(value, dict) else []
        names += [f"{key}.{name}" for name in nested] or [key]
    return names


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Fields that two nested dictionaries disagree on, as `field: old -> new`."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines
