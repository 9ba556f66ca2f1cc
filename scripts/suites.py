"""The suites of `run_experiments.py`: which config, and which flags make each cell of it.

Every cell is a config that resolves, and no two of a suite are the same run
(`tests/test_run_experiments.py`).
"""

from __future__ import annotations

R20 = {
    **{f"lrq seed {seed}": [f"--config.seed={seed}"] for seed in (0, 1, 2)},
    "lrq paper placement": ["--config.student.placement=paper"],
    "gdfq": ["--config.method.preset=gdfq"],
    "lrq_released": ["--config.method.preset=lrq_released"],
    "lrq ranges only": ["--config.steps=0"],
    "lrq ranges only, paper placement": ["--config.steps=0", "--config.student.placement=paper"],
}
ABLATIONS = {
    "full": [],
    "no attention": ["--config.method.attention=none"],
    "no margin": ["--config.method.ama_weight=0.0"],
    "plain distillation": ["--config.method.student_loss=kd"],
}


def _rounded(rounding: str, *, equalize: bool = False, bias_correction: bool = False) -> list[str]:
    return [
        f"--config.method.rounding={rounding}",
        f"--config.method.equalize={equalize}",
        f"--config.method.bias_correction={bias_correction}",
    ]


INGREDIENTS = {
    "squant": _rounded("squant"),
    "nearest": _rounded("nearest"),
    "nearest, bias correction": _rounded("nearest", bias_correction=True),
    "nearest, equalized": _rounded("nearest", equalize=True),
    "squant, equalized": _rounded("squant", equalize=True),
    "squant, bias correction": _rounded("squant", bias_correction=True),
    "squant, equalized, bias correction": _rounded("squant", equalize=True, bias_correction=True),
    "adaround": [
        *_rounded("adaround"),
        "--config.method.reconstruction_iterations=300",
        "--config.method.reconstruction_learning_rate=0.01",
        "--config.method.reconstruction_step_rate=0.001",
        "--config.method.noise_batch_size=128",
        "--config.method.noise_batches=4",
        "--config.method.noise_iterations=250",
    ],
}


def _bits(weights: int, activations: int) -> list[str]:
    return [f"--config.student.weight_bits={weights}", f"--config.student.act_bits={activations}"]


DIGITS = {
    **{f"W4A4 seed {seed}": [f"--config.seed={seed}"] for seed in (0, 1, 2)},
    "W4A4 ranges only": ["--config.steps=0", "--config.method.rounding=nearest"],
    "W3A3 seed 0": _bits(3, 3),
}
REAL = ["--config.method.images=folder"]
POLICY_R = ["--config.student.policy=R"]
FAST = {
    **{f"U W4A4 seed {seed}": [f"--config.seed={seed}"] for seed in (0, 1, 2)},
    **{f"U W3A3 seed {seed}": [*_bits(3, 3), f"--config.seed={seed}"] for seed in (0, 1)},
    "U W5A5 seed 0": _bits(5, 5),
    "U W4A4 real images": REAL,
    "U W3A3 real images": [*REAL, *_bits(3, 3)],
    "U W5A5 real images": [*REAL, *_bits(5, 5)],
    "R W4A4 seed 0": POLICY_R,
    "R W3A3 seed 0": [*POLICY_R, *_bits(3, 3)],
    "R W3A3 real images": [*REAL, *POLICY_R, *_bits(3, 3)],
    "R W2A4 seed 0": [*POLICY_R, *_bits(2, 4)],
}
FAST_PARTS = {
    "fast": [],
    "no mixup": ["--config.method.mixup=0.0"],
    "white noise": ["--config.method.noise_spectrum=0.0"],
    "channel alignment": ["--config.method.channel_alignment=1000.0"],
    "activation map alignment": ["--config.method.cam_alignment=1.0"],
    "perturbation": ["--config.method.perturbation=0.01"],
    "latents": [
        "--config.method.noise_parameters=latents",
        "--config.method.noise_spectrum=0.0",
        "--config.method.attention=after_block1",
        "--config.method.latent_dim=256",
    ],
    "latents, no attention": [
        "--config.method.noise_parameters=latents",
        "--config.method.noise_spectrum=0.0",
        "--config.method.latent_dim=256",
    ],
    "swing": ["--config.method.noise_swing=1"],
    "image statistics": ["--config.method.noise_image_weight=0.1"],
    "low pass": ["--config.method.noise_low_pass=8.0"],
    "averaged weights": ["--config.method.average_decay=0.99"],
    "inundation": ["--config.method.inundation=0.001"],
    "equalized": ["--config.method.equalize=True"],
    "rounded to the nearest": ["--config.method.rounding=nearest"],
    "one rate for all": ["--config.method.student_kernel_rate=0.0"],
    "rounded to the nearest, one rate for all": [
        "--config.method.rounding=nearest",
        "--config.method.student_kernel_rate=0.0",
    ],
    "1,000 steps": ["--config.steps=1000"],
    "2,000 steps": ["--config.steps=2000"],
    "2,000 steps of 32": [
        "--config.steps=2000",
        "--config.method.batch_size=32",
        "--config.method.warmup_steps=32",
        "--config.method.calibration_steps=32",
    ],
    "half the rates": [
        "--config.method.student_learning_rate=0.0001",
        "--config.method.student_kernel_rate=0.0015",
    ],
    "temperature 10": ["--config.method.temperature=10"],
    "2,048 images of 64 iterations": [
        "--config.method.noise_batches=16",
        "--config.method.noise_iterations=64",
    ],
    "learned rounding alone": ["--config.steps=0"],
    "higher rates": [
        "--config.method.student_learning_rate=0.0005",
        "--config.method.student_kernel_rate=0.006",
    ],
}
SHORT = [
    *_bits(3, 3),
    "--config.steps=300",
    "--config.method.reconstruction_iterations=100",
    "--config.method.noise_batches=2",
]
"""`fast` at 32 px with a quarter of its images and of its rounding's iterations and a seventh of its
steps: minutes a cell, for parts to be switched on and off. At 3 bits, where they differ most."""
ABLATED = {
    name: FAST_PARTS[name]
    for name in (
        "fast",
        "no mixup",
        "rounded to the nearest",
        "one rate for all",
        "channel alignment",
        "activation map alignment",
        "perturbation",
        "averaged weights",
        "inundation",
        "equalized",
        "white noise",
        "low pass",
        "swing",
        "image statistics",
        "latents",
    )
} | {
    "step sizes as searched": ["--config.student.learned_steps=none"],
    "weight steps as searched": ["--config.student.learned_steps=activations"],
    "activation steps as searched": ["--config.student.learned_steps=weights"],
    "rounding without QDrop": ["--config.method.reconstruction_drop=0.0"],
    "ranges from extremes": [
        "--config.student.weight_observer=min_max",
        "--config.student.act_observer=min_max",
    ],
    "gradients unclipped": ["--config.method.gradient_clip=1e9"],
    "labels": ["--config.method.ce_weight=1.0"],
    "labels of easy images": ["--config.method.ce_weight=1.0", "--config.method.ce_hardest=0.3"],
    "decoupled distillation": ["--config.method.student_loss=dkd"],
    "plain variances": ["--config.method.noise_statistics=variance"],
    "deviations": ["--config.method.noise_statistics=deviation"],
    "no classes": ["--config.method.noise_target_weight=0.0"],
    "focal classes": ["--config.method.class_focus=2.0"],
    "class probabilities": [
        "--config.method.noise_target=probability",
        "--config.method.noise_lowest_target=0.95",
    ],
    "feature distances": [
        "--config.method.ama_weight=1.0",
        "--config.method.ama_margin=0.0",
        "--config.method.ama_lower=0.05",
        "--config.method.ama_center=classifier",  # running means have seen no image of batch 1
    ],
    "images not moved while made": [
        "--config.method.noise_augmentation=none",
        "--config.method.noise_augment_probability=0.0",
    ],
}
_POOL = ["--config.method.noise_iterations=250", "--config.method.noise_plateau_patience=12"]
_OWN_TEMPERATURE = ["--config.method.temperature=20"]
TEN_MINUTES = {
    "lrq": ["--config.steps=1250"],
    "gdfq": ["--config.steps=1800", *_OWN_TEMPERATURE],
    "intraq": ["--config.steps=1800", *_OWN_TEMPERATURE, *_POOL],
    "hast": ["--config.steps=700", *_OWN_TEMPERATURE, *_POOL],
    "genie": [
        "--config.steps=0",
        "--config.method.noise_batches=2",
        "--config.method.noise_iterations=100",
        "--config.method.noise_plateau_patience=3",
        "--config.method.noise_generator_decay_every=3",
        "--config.method.reconstruction_iterations=900",
        "--config.method.reconstruction_learning_rate=0.01",
        "--config.method.reconstruction_step_rate=0.001",
    ],
}
"""Preset -> a schedule of 10 minutes, evaluation apart, on one processor (AMD Zen 5) for ResNet-20 at
32 px, beside one of the same size on another. A pool of 512 images, half of `fast`'s, is made in 3.6 of
them; Genie's 256, through a generator, in 3.7. How often rates fall is cut as their iterations are."""
FAST_IN_TEN_MINUTES = [
    "--config.steps=600",
    "--config.method.noise_batches=4",
]
"""`fast` with half of its images and 600 steps at any bits: 13 to 17 minutes on one processor of an Intel
Xeon beside other work, less than ten on that Zen 5 by what images take on both; not run there."""
_SLOWER = ["--config.method.student_learning_rate=2e-4"]
"""Better than the config's own 5e-4 for all but Genie, which trains no weights."""

SUITES = {
    "best": ("configs/best.py", FAST),
    "fast": ("configs/fast.py", FAST),
    "fast_parts": ("configs/fast.py", FAST_PARTS),
    "fast_ablation": (
        "configs/fast.py",
        {name: [*SHORT, *flags] for name, flags in ABLATED.items()},
    ),
    "ten_minutes": (
        "configs/r20_cifar10.py",
        {
            f"{name} W{bits}A{bits} seed {seed}{words}": [
                f"--config.method.preset={name}",
                *flags,
                *rate,
                *_bits(bits, bits),
                f"--config.seed={seed}",
            ]
            for seed in (0, 1)
            for bits in (4, 3)
            for name, flags in TEN_MINUTES.items()
            for words, rate in (("", []), (", rate 2e-4", _SLOWER))
            if not rate or name != "genie"  # which trains no weights
        },
    ),
    "ten_minutes_fast": (
        "configs/fast.py",
        {
            f"fast W{bits}A{bits} seed {seed}": [
                *FAST_IN_TEN_MINUTES,
                *_bits(bits, bits),
                f"--config.seed={seed}",
            ]
            for seed in (0, 1)
            for bits in (4, 3)
        },
    ),
    "ingredients": ("configs/squant.py", INGREDIENTS),
    "ingredients_depthwise": ("configs/squant.py", INGREDIENTS),
    "r20_cifar10": ("configs/r20_cifar10.py", R20),
    "r20_cifar10_ablation": (
        "configs/r20_cifar10.py",
        {
            f"{name} seed {seed}": ["--config.steps=120", *flags, f"--config.seed={seed}"]
            for seed in (0, 1)
            for name, flags in ABLATIONS.items()
        },
    ),
    "r20_cifar100": (
        "configs/r20_cifar100.py",
        {"lrq seed 0": [], "lrq ranges only": ["--config.steps=0"]},
    ),
    "digits": ("configs/digits.py", DIGITS),
    "digits_lrq": ("configs/digits_lrq.py", DIGITS),
}
"""Suite -> config and {cell: flags}."""
