"""Configs: locked names, presets that fill what is left open, impossible values refused."""

import dataclasses
import importlib.util
import math
import typing
from pathlib import Path

import pytest

from lrq_jax.config import (
    RunSettings,
    base_config,
    differences,
    field_names,
    get_config,
    resolve,
    short_schedule,
)
from lrq_jax.method import Method
from lrq_jax.presets import LARGE_IMAGE, METHOD_FIELDS, PRESETS, preset

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.py"))

# For every field of Method a value that is neither any preset's nor impossible.
OTHER_VALUES = {
    "images": "noise",
    "conditioning": "batch_norm",
    "attention": "replace_block1",
    "latent_dim": 7,
    "generator_width": 24,
    "batch_size": 40,
    "warmup_steps": 5000,
    "calibration_start": 3,
    "calibration_steps": 11,
    "class_weight": 2.5,
    "bns_weight": 0.7,
    "ama_weight": 0.4,
    "ama_margin": 0.2,
    "ama_lower": 0.1,
    "ama_upper": 0.9,
    "ama_center": "classifier",
    "student_loss": "kd",
    "ce_weight": 0.3,
    "distill_weight": 3.0,
    "dkd_beta": 2.0,
    "temperature": 5.0,
    "kd_reduction": "element_mean",
    "student_optimizer": "adam",
    "step_size_learning_rate": 7e-4,
    "student_learning_rate": 0.25,
    "student_kernel_rate": 0.02,
    "student_schedule": "cosine",
    "student_milestones": (1, 2),
    "student_momentum": 0.5,
    "student_weight_decay": 0.01,
    "generator_learning_rate": 0.125,
    "generator_beta1": 0.6,
    "generator_schedule": "constant",
    "generator_milestones": (3,),
    "adam_epsilon": 1e-5,
    "average_decay": 0.99,
    "gradient_clip": 2.0,
    "noise_batches": 3,
    "noise_batch_size": 9,
    "noise_iterations": 4,
    "noise_learning_rate": 0.75,
    "noise_plateau_patience": 5,
    "noise_smallest_rate": 1e-3,
    "noise_bns_weight": 0.6,
    "equalize": True,
    "rounding": "adaround",
    "bias_correction": True,
    "reconstruction_iterations": 77,
    "reconstruction_batch_size": 5,
    "reconstruction_learning_rate": 0.3,
    "reconstruction_step_rate": 0.2,
    "reconstruction_regularizer": 0.7,
    "reconstruction_warmup": 0.9,
    "reconstruction_drop": 0.1,
    "class_focus": 1.5,
    "superposition": 0.3,
    "superposed_classes": 4,
    "ce_hardest": 0.6,
    "inundation": 0.002,
    "channel_alignment": 12.0,
    "cam_alignment": 13.0,
    "perturbation": 0.02,
    "noise_parameters": "latents",
    "noise_generator_rate": 0.03,
    "noise_generator_decay": 0.7,
    "noise_generator_decay_every": 9,
    "noise_image_weight": 0.35,
    "noise_swing": 2,
    "noise_spectrum": 1.2,
    "noise_low_pass": 9.0,
    "noise_beta1": 0.3,
    "noise_schedule": "cosine",
    "noise_statistics": "relative",
    "noise_target": "cross_entropy",
    "noise_target_weight": 0.2,
    "noise_lowest_target": 0.8,
    "noise_augmentation": "none",
    "noise_augment_probability": 0.25,
    "noise_clip": True,
    "augmentation": "shift_flip",
    "mixup": 0.7,
    "calibration_images": "pool",
}


def lrq_config():
    """The default with LRQ's preset and its published schedule."""
    config = base_config()
    config.method.preset = "lrq"
    return config


def set_field(config, name, value):
    """`config.a.b = value` for the name `a.b`."""
    *groups, field = name.split(".")
    for group in groups:
        config = config[group]
    config[field] = value


def load_config_file(path):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("stepz", "steps"),
        ("student.weight_bit", "weight_bits"),
        ("method.batchsize", "batch_size"),
        ("data.pth", "path"),
        ("metod.batch_size", "method"),
    ],
)
def test_a_typo_in_a_field_is_refused_with_the_field_that_was_meant(typo, meant):
    config = base_config()
    with pytest.raises((AttributeError, KeyError)) as refusal:
        set_field(config, typo, 4)
    assert typo.split(".")[0 if meant == "method" else -1] in str(refusal.value)
    assert f'"{meant}"' in str(refusal.value)


@pytest.mark.parametrize("name", ["steps", "student.weight_bits", "method.batch_size"])
def test_a_value_of_another_type_is_refused(name):
    with pytest.raises(TypeError, match=name.rpartition(".")[2]):
        set_field(base_config(), name, "many")


def test_configs_do_not_share_state():
    base_config().method.batch_size = 3
    assert base_config().method.batch_size is None
    get_config().steps = 3
    assert get_config().steps is None
    assert base_config().steps is None


def test_field_names_spell_fields_as_the_command_line_does():
    names = field_names(base_config().to_dict())
    assert {"seed", "steps", "teacher.path", "student.overrides", "method.preset"} <= set(names)
    assert not {"student", "method", "data", "method.steps"} & set(names)
    assert len(names) == len(set(names))


# --- presets and overrides -----------------------------------------------------------------------


def test_every_field_of_the_method_has_another_value_below():
    assert set(OTHER_VALUES) == {field.name for field in dataclasses.fields(Method)} - {"steps"}


@pytest.mark.parametrize("name", sorted(OTHER_VALUES))
def test_every_field_of_the_method_can_be_set_and_is_the_presets_when_it_is_not(name):
    for preset_name in PRESETS:
        own = preset(preset_name, image_size=16).method
        refused = {
            "bias_correction": own.rounding == "adaround",
            "rounding": own.bias_correction,
            "student_kernel_rate": own.student_optimizer != "adam",
        }
        if refused.get(name):  # the two together: see test_method
            continue
        config = base_config()
        config.method.preset = preset_name
        before = resolve(config, image_size=16).method
        assert before == preset(preset_name, image_size=16).method
        config.method.warmup_steps = 5000  # so that the calibration fits wherever it is moved
        before = dataclasses.replace(before, warmup_steps=5000)
        config.method[name] = OTHER_VALUES[name]
        after = resolve(config, image_size=16).method
        assert getattr(after, name) == OTHER_VALUES[name]
        assert dataclasses.replace(after, **{name: getattr(before, name)}) == before
        config.method[name] = None
        config.method.warmup_steps = 5000 if name != "warmup_steps" else None
        assert getattr(resolve(config, image_size=16).method, name) == getattr(
            before if name != "warmup_steps" else preset(preset_name, image_size=16).method, name
        )
    assert any(  # and the value is not, by accident, what every preset has anyway
        getattr(preset(preset_name, image_size=16).method, name) != OTHER_VALUES[name]
        for preset_name in PRESETS
    )


def test_steps_are_the_configs_or_else_the_presets():
    config = lrq_config()
    assert resolve(config, image_size=32).method.steps == 80_000
    config.method.preset = "lrq_released"
    assert resolve(config, image_size=32).method.steps == 30_200
    config.method.preset = "fast"
    for name in ("weight_bits", "act_bits"):  # so few of either
        assert resolve(config, image_size=32).method.steps == 1_000
        config.student[name] = 3
        assert resolve(config, image_size=32).method.steps == 2_000
        config.student[name] = None  # the default, of 4
    for steps in (0, 1, 123):
        config.steps = steps
        assert resolve(config, image_size=32).method.steps == steps


def test_falsy_overrides_are_overrides():
    config = base_config()
    config.method.ama_weight = 0.0
    config.method.student_milestones = ()
    config.method.calibration_start = 0
    method = resolve(config, image_size=16).method
    assert (method.ama_weight, method.student_milestones) == (0.0, ())
    config.method.preset = "lrq_released"
    config.method.preset = "fast"
    config.method.noise_clip = False
    assert resolve(config, image_size=16).method.noise_clip is False


STUDENT_VALUES = {
    "weight_observer": "percentile",
    "act_observer": "percentile",
    "range_decay": 0.25,
    "clip_mask": True,
    "learned_steps": "activations",
}


@pytest.mark.parametrize("preset_name", sorted(PRESETS))
def test_the_quantizers_of_a_method_are_the_presets_unless_set(preset_name):
    config = base_config()
    config.method.preset = preset_name
    config.student.weight_bits, config.student.policy = 3, "R"
    expected = dataclasses.replace(
        preset(preset_name, image_size=16).student, weight_bits=3, policy="R"
    )
    assert resolve(config, image_size=16).student == expected
    assert set(STUDENT_VALUES) == set(METHOD_FIELDS)
    for name, value in STUDENT_VALUES.items():
        config.student[name] = value
        expected = dataclasses.replace(expected, **{name: value})
        assert resolve(config, image_size=16).student == expected
    config.student.clip_mask = False  # falsy, and yet set
    assert resolve(config, image_size=16).student.clip_mask is False


def test_the_image_size_picks_the_presets_column():
    config = lrq_config()
    assert LARGE_IMAGE == 64
    for size, batch in ((16, 200), (32, 200), (64, 200), (65, 16), (224, 16)):
        assert resolve(config, image_size=size).method.batch_size == batch
    config.method.batch_size = 24
    large = resolve(config, image_size=224).method
    assert (large.batch_size, large.conditioning) == (24, "batch_norm")


def test_settings_carry_every_other_field_and_hash():
    config = lrq_config()
    config.teacher.path, config.data.path, config.data.split = "t", "p", "s"
    config.data.name = ""
    config.student.weight_bits, config.student.overrides = 3, ("conv1=w6a8",)
    config.seed, config.eval_batch_size = 5, 7
    config.precision, config.micro_batches, config.rematerialize = "tf32", 2, "elementwise"
    config.steps_per_dispatch, config.log_every = 2, 3
    config.checkpoint_every, config.images_every = 4, 6
    settings = resolve(config, image_size=16)
    expected = {
        "teacher_path": "t",
        "data_name": "",
        "data_path": "p",
        "data_split": "s",
        "pool_path": "",
        "train_path": "",
        "train_images": 1024,
        "preset": "lrq",
        "seed": 5,
        "resources": {"precision": "tf32", "micro_batches": 2, "rematerialize": "elementwise"},
        "eval_batch_size": 7,
        "steps_per_dispatch": 2,
        "log_every": 3,
        "checkpoint_every": 4,
        "images_every": 6,
    }
    found = settings.to_dict()
    assert {name: found[name] for name in expected} == expected
    assert set(found) == set(expected) | {"student", "method"}
    assert found["student"]["weight_bits"] == 3
    assert found["student"]["overrides"] == ("conv1=w6a8",)
    assert found["method"] == dataclasses.asdict(Method())
    assert hash(settings) == hash(resolve(config, image_size=16))
    assert {field.name for field in dataclasses.fields(RunSettings)} == set(found)


# --- impossible values ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("student.weight_bits", 9),
        ("student.weight_bits", 1),
        ("student.act_bits", 0),
        ("student.edge_bits", 16),
        ("student.boundary_bits", -8),
        ("student.policy", "X"),
        ("student.policy", "u"),
        ("student.placement", "float"),
        ("student.weight_observer", "max"),
        ("student.act_observer", ""),
        ("student.range_decay", 1.0),
        ("student.range_decay", -0.1),
        ("student.range_decay", math.nan),
        ("student.overrides", ("conv1=w9",)),
        ("student.overrides", ("conv1",)),
        ("method.preset", "lrqq"),
        ("method.images", "photos"),
        ("method.attention", "after_block2"),
        ("method.conditioning", "none"),
        ("method.student_loss", "mse"),
        ("method.kd_reduction", "sum"),
        ("method.student_optimizer", "lion"),
        ("method.student_schedule", "linear"),
        ("method.generator_schedule", "linear"),
        ("method.ama_center", "median"),
        ("method.batch_size", 0),
        ("method.batch_size", -8),
        ("method.latent_dim", 0),
        ("method.generator_width", 0),
        ("method.warmup_steps", -1),
        ("method.calibration_steps", 0),
        ("method.calibration_start", -1),
        ("method.class_weight", -1.0),
        ("method.bns_weight", math.nan),
        ("method.ama_weight", math.inf),
        ("method.ama_margin", math.nan),
        ("method.ama_margin", 4.0),
        ("method.ama_lower", math.nan),
        ("method.ama_upper", -0.5),
        ("method.ce_weight", -0.5),
        ("method.distill_weight", math.inf),
        ("method.dkd_beta", math.nan),
        ("method.temperature", 0.0),
        ("method.temperature", math.inf),
        ("method.student_learning_rate", math.nan),
        ("method.student_learning_rate", math.inf),
        ("method.student_learning_rate", -1e-3),
        ("method.student_momentum", 1.5),
        ("method.student_momentum", math.nan),
        ("method.student_weight_decay", -1e-4),
        ("method.student_weight_decay", math.nan),
        ("method.student_milestones", (-5,)),
        ("method.student_milestones", ("x",)),
        ("method.generator_milestones", (1.5,)),
        ("method.generator_learning_rate", 0.0),
        ("method.generator_beta1", 1.0),
        ("method.generator_beta1", math.nan),
        ("method.adam_epsilon", 0.0),
        ("method.average_decay", 1.0),
        ("method.average_decay", -0.1),
        ("method.gradient_clip", 0.0),
        ("method.noise_batches", 0),
        ("method.noise_batch_size", 0),
        ("method.noise_iterations", 0),
        ("method.noise_learning_rate", -0.5),
        ("method.noise_plateau_patience", 0),
        ("method.noise_smallest_rate", 0.0),
        ("method.noise_bns_weight", math.nan),
        ("data.train_path", "somewhere"),
        ("data.pool_path", "somewhere"),
        ("data.train_images", 0),
        ("method.rounding", "up"),
        ("method.reconstruction_iterations", 0),
        ("method.reconstruction_batch_size", 0),
        ("method.reconstruction_learning_rate", 0.0),
        ("method.reconstruction_step_rate", math.nan),
        ("method.reconstruction_regularizer", -1.0),
        ("method.reconstruction_warmup", 1.5),
        ("method.reconstruction_drop", -0.5),
        ("method.class_focus", -1.0),
        ("method.channel_alignment", -1.0),
        ("method.cam_alignment", math.inf),
        ("method.noise_generator_decay", 0.0),
        ("method.perturbation", math.nan),
        ("method.noise_parameters", "voxels"),
        ("method.noise_generator_rate", 0.0),
        ("method.noise_generator_decay", 1.5),
        ("method.noise_generator_decay_every", 0),
        ("method.noise_image_weight", -0.5),
        ("method.noise_swing", -1),
        ("method.superposition", 1.5),
        ("method.superposed_classes", 0),
        ("method.ce_hardest", -0.1),
        ("method.inundation", 2.0),
        ("method.noise_spectrum", -0.5),
        ("method.noise_low_pass", math.inf),
        ("method.noise_beta1", 1.0),
        ("method.noise_schedule", "step"),
        ("method.noise_statistics", "std"),
        ("method.noise_target", "margin"),
        ("method.noise_target_weight", -0.1),
        ("method.noise_augmentation", "crop"),
        ("method.augmentation", "mixup"),
        ("method.calibration_images", "real"),
        ("method.noise_lowest_target", 1.5),
        ("method.noise_augment_probability", -0.1),
        ("method.noise_augment_probability", 2.0),
        ("precision", "exact"),
        ("micro_batches", 0),
        ("rematerialize", "all"),
        ("seed", -1),
        ("seed", 2**32),
        ("eval_batch_size", 0),
        ("steps_per_dispatch", -1),
        ("log_every", 0),
        ("checkpoint_every", -5),
        ("images_every", 0),
        ("steps", -1),
    ],
)
def test_an_impossible_value_is_refused_by_name(name, value):
    config = lrq_config()
    set_field(config, name, value)
    with pytest.raises(ValueError, match=r"found .*expected") as refusal:
        resolve(config, image_size=16)
    message = str(refusal.value)
    assert message.startswith(f"{name}: found"), message
    shown = value[0] if isinstance(value, tuple) else value
    assert str(shown) in message
    assert message.count("\n") == 0


def test_a_calibration_outside_the_warmup_is_refused_with_the_way_out():
    config = lrq_config()
    config.method.warmup_steps = 10
    with pytest.raises(ValueError, match=r"0 \+ 800 .*warm-up of 10 .*calibration_steps"):
        resolve(config, image_size=16)
    config.method.calibration_steps = 4
    config.method.calibration_start = 6
    resolve(config, image_size=16)
    config.method.calibration_start = 7
    with pytest.raises(ValueError, match="within the warm-up"):
        resolve(config, image_size=16)


# --- the files of configs/ -----------------------------------------------------------------------


def test_the_issues_configs_are_there():
    names = {path.name for path in CONFIGS}
    assert {
        "best.py",
        "digits.py",
        "fast.py",
        "r20_cifar10.py",
        "r20_cifar100.py",
        "r18.py",
    } <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_file_resolves_and_says_how_to_run_it(path):
    module = load_config_file(path)
    config = module.get_config()
    assert config.is_locked
    assert field_names(config.to_dict()) == field_names(base_config().to_dict())
    for size in (16, 32, 224):
        for name in PRESETS:
            config.method.preset = name
            resolve(config, image_size=size)
    assert f"python -m lrq_jax.main --config=configs/{path.name}" in module.__doc__
    for word in ("Command:", "Time:", "Expected:"):
        assert word in module.__doc__
    assert not (config.data.name and config.data.path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_flags_in_a_config_files_docstring_are_fields(path):
    known = field_names(base_config().to_dict())
    words = load_config_file(path).__doc__.split()
    flags = [word.split("=")[0] for word in words if word.startswith("--config.")]
    assert {flag.removeprefix("--config.") for flag in flags} <= set(known)


def test_the_digits_config_is_what_runs_without_one():
    (path,) = [path for path in CONFIGS if path.name == "digits.py"]
    assert load_config_file(path).get_config().to_dict() == get_config().to_dict()
    settings = resolve(get_config(), image_size=16)
    assert (settings.teacher_path, settings.data_name) == ("digits", "digits")
    assert (settings.student.weight_bits, settings.student.act_bits) == (4, 4)
    assert settings.preset == "fast"


def test_the_short_schedule_ends_its_calibration_with_the_warmup():
    for warmup in (40, 150):
        config = short_schedule(base_config(), steps=9, warmup_steps=warmup)
        method = resolve(config, image_size=32).method
        assert method.calibration_start + method.calibration_steps == method.warmup_steps == warmup
        assert method.steps == 9


# --- differences ---------------------------------------------------------------------------------


def test_differences_name_nested_fields_old_and_new():
    old = {"a": 1, "b": {"c": 2, "d": {"e": [1, 2], "same": 0}}, "gone": None}
    new = {"a": 1, "b": {"c": 3, "d": {"e": [1], "same": 0}}, "more": "x"}
    assert differences(old, new) == [
        "b.c: 2 -> 3",
        "b.d.e: [1, 2] -> [1]",
        "gone: None -> '(absent)'",
        "more: '(absent)' -> 'x'",
    ]
    assert differences(old, old) == []
    assert differences({"a": {"b": 1}}, {"a": 2}) == ["a: {'b': 1} -> 2"]


def test_every_setting_is_told_apart():
    """Any one changed field shows, alone, in the differences of two runs' settings."""
    kinds = typing.get_type_hints(Method)
    for name, value in OTHER_VALUES.items():
        config = lrq_config()
        config.method.warmup_steps = 6000
        if name == "student_kernel_rate":
            config.method.student_optimizer = "adam"
        old = resolve(config, image_size=16).to_dict()
        config.method[name] = value
        lines = differences(old, resolve(config, image_size=16).to_dict())
        assert [line.split(":")[0] for line in lines] == [f"method.{name}"], kinds[name]


@pytest.mark.parametrize(
    ("teacher", "name", "path", "expected"),
    [
        ("digits", None, "", "digits"),
        ("digits", "", "", ""),
        ("digits", None, "images", ""),
        ("resnet20.pth", None, "", ""),
        ("resnet20.pth", "digits", "", "digits"),
    ],
)
def test_the_embedded_digits_are_for_the_embedded_teacher_unless_asked_for(
    teacher, name, path, expected
):
    config = get_config()
    config.teacher.path, config.data.path = teacher, path
    if name is not None:
        config.data.name = name
    assert resolve(config, image_size=32).data_name == expected
