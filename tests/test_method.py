"""Presets hold the published constants, written out here a second time."""

import dataclasses

import pytest

from lrq_jax.losses.distillation import REDUCTIONS
from lrq_jax.method import Method
from lrq_jax.presets import PRESETS, Task, gdfq, lrq, lrq_released, preset
from lrq_jax.synthesis.generator import ATTENTION_PLACES, CONDITIONINGS

# method.md, section 4: an epoch is 200 steps. (CIFAR column, ImageNet column)
SCHEDULES = {
    "lrq": {
        "steps": (400 * 200, 400 * 200),
        "batch_size": (200, 16),
        "warmup_steps": (4 * 200, 50 * 200),
        "calibration_start": (0, 0),
        "calibration_steps": (4 * 200, 4 * 200),
        "student_optimizer": ("sgd", "sgd"),
        "student_momentum": (0.9, 0.9),
        "student_weight_decay": (1e-4, 1e-4),
        "student_learning_rate": (1e-4, 1e-6),
        "student_schedule": ("step", "step"),
        "student_milestones": ((100 * 200, 200 * 200, 300 * 200),) * 2,
        "generator_learning_rate": (1e-3, 1e-3),
        "generator_beta1": (0.5, 0.5),
        "generator_schedule": ("step", "step"),
        "generator_milestones": ((100 * 200, 200 * 200, 300 * 200),) * 2,
        "images": ("generator", "generator"),
        "attention": ("after_block1", "after_block1"),
        "conditioning": ("embedding", "batch_norm"),
        "augmentation": ("none", "none"),
    },
    "lrq_released": {
        "steps": (151 * 200, 151 * 200),
        "batch_size": (256, 16),
        "warmup_steps": (4 * 200, 4 * 200),
        "calibration_start": (0, 0),
        "calibration_steps": (4 * 200, 4 * 200),
        "student_optimizer": ("sgd", "sgd"),
        "student_momentum": (0.9, 0.9),
        "student_weight_decay": (1e-4, 1e-4),
        "student_learning_rate": (1e-4, 1e-6),
        "student_schedule": ("step", "step"),
        "student_milestones": (
            (20 * 200, 40 * 200, 60 * 200),
            (100 * 200, 200 * 200, 350 * 200),
        ),
        "generator_learning_rate": (1e-3, 1e-3),
        "generator_beta1": (0.5, 0.5),
        "images": ("noise", "noise"),
        "attention": ("none", "after_block1"),  # section 2: the last 32 px script has none
        "conditioning": ("embedding", "batch_norm"),
        "noise_batches": (4 * 5, 4 * 5),
        "noise_batch_size": (256, 256),
        "noise_iterations": (1000, 1000),
        "noise_learning_rate": (0.5, 0.5),
        "noise_plateau_patience": (50, 50),
        "noise_smallest_rate": (1e-4, 1e-4),
        "noise_augment_probability": (0.5, 0.5),
        "augmentation": ("crop_flip", "crop_flip"),
    },
}
# method.md, sections 3 and 4; beyond.md, section 2; the methods' code. (32 px, 224 px)
PUBLISHED = {
    "intraq": {
        "images": ("noise", "noise"),
        "attention": ("none", "none"),
        "batch_size": (256, 16),
        "student_learning_rate": (1e-4, 1e-6),
        "augmentation": ("crop_flip", "crop_flip"),
        "student_loss": ("kd", "kd"),
        "kd_reduction": ("batch_mean", "batch_mean"),
        "distill_weight": (20.0, 20.0),
        "temperature": (20.0, 20.0),
        "ce_weight": (1.0, 1.0),
        "noise_batches": (4 * 5, 4 * 5),
        "noise_batch_size": (256, 256),
        "noise_iterations": (1000, 1000),
        "noise_learning_rate": (0.5, 0.5),
        "noise_beta1": (0.9, 0.9),
        "noise_augmentation": ("crop_flip", "crop_flip"),
        "noise_augment_probability": (0.5, 0.5),
        "noise_statistics": ("variance", "variance"),
        "noise_target": ("probability", "probability"),
        "noise_lowest_target": (0.95, 0.9),
        "ama_weight": (1.0, 1.0),
        "ama_margin": (0.0, 0.0),
        "ama_lower": (0.05, 0.3),
        "ama_upper": (0.8, 0.8),
        "ama_center": ("running_mean", "running_mean"),
    },
    "hast": {
        "images": ("noise", "noise"),
        "attention": ("none", "none"),
        "batch_size": (64, 16),
        "student_learning_rate": (1e-5, 1e-6),
        "student_loss": ("kd", "kd"),
        "kd_reduction": ("batch_mean", "batch_mean"),
        "distill_weight": (20.0, 20.0),
        "temperature": (20.0, 20.0),
        "ce_weight": (0.0, 0.0),
        "channel_alignment": (1000.0, 4000.0),
        "perturbation": (0.01, 0.01),
        "class_focus": (2.0, 0.5),
        "noise_target": ("cross_entropy", "cross_entropy"),
        "noise_target_weight": (10.0, 0.1),
        "noise_augmentation": ("none", "crop_flip"),
        "ama_weight": (0.0, 0.0),
    },
    "genie": {
        "images": ("noise", "noise"),
        "noise_parameters": ("latents", "latents"),
        "attention": ("after_block1", "after_block1"),
        "conditioning": ("embedding", "batch_norm"),
        "latent_dim": (256, 256),
        "noise_batches": (1024 // 128, 1024 // 128),
        "noise_batch_size": (128, 128),
        "noise_iterations": (4000, 4000),
        "noise_learning_rate": (0.1, 0.1),
        "noise_beta1": (0.9, 0.9),
        "noise_generator_rate": (0.01, 0.01),
        "noise_generator_decay": (0.95, 0.95),
        "noise_generator_decay_every": (100, 100),
        "noise_schedule": ("plateau", "plateau"),
        "noise_plateau_patience": (100, 100),
        "noise_smallest_rate": (1e-4, 1e-4),
        "noise_statistics": ("deviation", "deviation"),
        "noise_bns_weight": (1.0, 1.0),
        "noise_image_weight": (1.0, 1.0),
        "noise_target_weight": (0.0, 0.0),
        "noise_swing": (1, 1),
        "ama_weight": (0.0, 0.0),
        "steps": (0, 0),
        "rounding": ("adaround", "adaround"),
        "reconstruction_iterations": (20_000, 20_000),
        "reconstruction_batch_size": (32, 32),
        "reconstruction_learning_rate": (1e-3, 1e-3),
        "reconstruction_step_rate": (4e-5, 4e-5),
        "reconstruction_regularizer": (1.0, 1.0),
        "reconstruction_warmup": (0.2, 0.2),
        "reconstruction_drop": (0.5, 0.5),
    },
}
# method.md, section 3.
LOSSES = {
    "class_weight": 1.0,
    "bns_weight": 0.1,
    "noise_bns_weight": 1.0,
    "ama_margin": 0.5,
    "ama_lower": 0.3,
    "ama_upper": 0.8,
    "ama_center": "running_mean",
    "student_loss": "dkd",
    "ce_weight": 1.0,
    "distill_weight": 1.0,
    "dkd_beta": 8.0,
    "temperature": 1.0,
}


TASKS = (Task(image_size=32), Task(image_size=224))


@pytest.mark.parametrize("name", sorted(SCHEDULES | PUBLISHED))
@pytest.mark.parametrize("large", [False, True], ids=["32 px", "224 px"])
def test_presets_hold_the_published_schedule(name, large):
    method = PRESETS[name](TASKS[large]).method
    columns = (SCHEDULES | PUBLISHED)[name]
    expected = {field: values[large] for field, values in columns.items()}
    assert {field: getattr(method, field) for field in expected} == expected


@pytest.mark.parametrize("name", ["lrq", "lrq_released"])
@pytest.mark.parametrize("large", [False, True], ids=["32 px", "224 px"])
def test_presets_hold_the_published_losses(name, large):
    method = PRESETS[name](TASKS[large]).method
    assert {field: getattr(method, field) for field in LOSSES} == LOSSES
    assert method.ama_weight > 0


@pytest.mark.parametrize("large", [False, True], ids=["32 px", "224 px"])
def test_gdfq_is_lrq_without_its_three_ingredients(large):
    """GDFQ's code: plain distillation at T = 20, KLDivLoss averaged over elements."""
    base = dataclasses.asdict(lrq(TASKS[large]).method)
    found = dataclasses.asdict(gdfq(TASKS[large]).method)
    assert {name: value for name, value in found.items() if value != base[name]} == {
        "attention": "none",
        "ama_weight": 0.0,
        "student_loss": "kd",
        "temperature": 20.0,
        "kd_reduction": "element_mean",
    }


@pytest.mark.parametrize("large", [False, True], ids=["32 px", "224 px"])
def test_best_is_fast_with_more_of_everything(large):
    base, found = (PRESETS[name](TASKS[large]) for name in ("fast", "best"))
    assert base.student == found.student
    for field in ("noise_batches", "noise_iterations", "steps", "batch_size",
                  "reconstruction_iterations"):  # fmt: skip
        assert getattr(found.method, field) > getattr(base.method, field), field
    assert found.method.rounding == base.method.rounding == "adaround"
    assert found.method.student_kernel_rate == base.method.student_kernel_rate / 2
    assert found.method.noise_parameters == base.method.noise_parameters == "pixels"


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("size", [32, 224])
def test_few_bits_train_fast_twice_as_long_and_change_nothing_else(name, size):
    usual = preset(name, image_size=size)
    for bits in (2, 3, 5, 8):
        found = preset(name, image_size=size, bits=bits)
        factor = 2 if name == "fast" and bits <= 3 else 1
        changed = dataclasses.replace(usual.method, steps=factor * usual.method.steps)
        assert found == dataclasses.replace(usual, method=changed)


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("size", [16, 32, 64, 65, 224])
def test_calibration_lies_inside_the_warmup(name, size):
    method = preset(name, image_size=size).method
    assert method.calibration_start >= 0
    assert method.calibration_start + method.calibration_steps <= method.warmup_steps
    assert method == PRESETS[name](TASKS[size > 64]).method
    assert method.attention in ATTENTION_PLACES
    assert method.conditioning in CONDITIONINGS
    assert method.kd_reduction in REDUCTIONS


def test_calibration_past_the_warmup_is_refused():
    with pytest.raises(ValueError, match=r"1 \+ 800 of a warm-up of 800"):
        Method(calibration_start=1)
    with pytest.raises(ValueError, match="warm-up of 0"):
        Method(warmup_steps=0)


def test_an_unknown_rounding_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"rounding: found 'up', expected one of .*squant"):
        Method(rounding="up")


def test_bias_correction_of_what_is_not_yet_rounded_is_refused():
    with pytest.raises(ValueError, match=r"bias_correction: found True with rounding='adaround'"):
        Method(bias_correction=True, rounding="adaround")


def test_a_rate_in_quantization_steps_is_refused_where_the_update_has_no_size_of_its_own():
    with pytest.raises(ValueError, match=r"student_kernel_rate: found 0.01 with .*='sgd'"):
        Method(student_kernel_rate=0.01)
    Method(student_kernel_rate=0.01, student_optimizer="adam")


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"'LRQ', expected one of .*'intraq', 'lrq', 'lrq_released'"
    ):
        preset("LRQ", image_size=32)


def test_methods_are_static_values():
    assert hash(lrq(TASKS[0]).method) == hash(Method())
    assert lrq_released(TASKS[1]) != lrq_released(TASKS[0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        Method().steps = 3
    with pytest.raises(TypeError):
        Method("generator")


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"superposition": 0.4}, ()),
        ({"superposition": 0.4, "images": "noise", "calibration_images": "pool"}, ("superposition",)),
        ({"mixup": 0.5, "augmentation": "crop_flip"}, ("augmentation", "mixup")),
        ({"mixup": 0.5, "images": "noise"}, ()),
        ({"ce_hardest": 0.5}, ()),
        ({"ce_hardest": 0.5, "ce_weight": 0.0}, ("ce_hardest",)),
        ({"class_focus": 2.0, "images": "folder", "calibration_images": "pool"}, ("class_focus",)),
        (
            {"class_focus": 2.0, "images": "noise", "calibration_images": "pool",
             "noise_target": "cross_entropy"},
            (),
        ),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_known(fields, names):
    assert tuple(Method(**fields).without_effect) == names


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_nothing_in_a_preset_is_without_effect(name, large):
    assert not preset(name, image_size=224 if large else 32).method.without_effect
