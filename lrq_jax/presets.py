"""Presets: published methods, and ours, as instances of `Method` and of the student's quantizers.

A preset fixes how a method works; how many bits, which layers and which placement stay the
user's. Constants are the papers' (source per function); `[open]` marks choices of ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from lrq_jax.method import Method
from lrq_jax.passes.plan import QuantSpec

METHOD_FIELDS = ("weight_observer", "act_observer", "range_decay", "clip_mask", "learned_steps")
"""Fields of a `QuantSpec` that are part of a method; the others say what the user wants of it."""


LARGE_IMAGE = 64
"""Images with a longer side above this, in pixels, take a preset's ImageNet column."""
LOW_BITS = 3
"""So few bits, of weights or activations, want more training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a preset is asked for.

    Attributes:
      image_size: longer side of the teacher's images, pixels.
      bits: of weights or of activations, whichever are fewer; layers' own (`overrides`) do not count.
    """

    image_size: int
    bits: int = QuantSpec.weight_bits

    @property
    def large_images(self) -> bool:
        """Whether the images are of ImageNet's kind."""
        return self.image_size > LARGE_IMAGE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A method, whole.

    Attributes:
      method: images, losses, schedule.
      student: its `METHOD_FIELDS` are the preset's, the others mean nothing here.
    """

    method: Method
    student: QuantSpec = dataclasses.field(default_factory=QuantSpec)


def lrq(task: Task) -> Preset:
    """LRQ as the paper describes it: generator and student trained in turn.

    The warm-up comes on top of the table's 80,000 steps, and a student's milestones count from its
    own first step [open]: the paper does not say whether its epochs hold the warm-up. Gradients
    are clipped at a norm of 10 [open], which the lineage does not do.
    """
    if not task.large_images:
        return Preset(method=Method())
    return Preset(
        method=Method(
            conditioning="batch_norm",
            batch_size=16,
            warmup_steps=10_000,
            student_learning_rate=1e-6,
        )
    )


def lrq_released(task: Task) -> Preset:
    """LRQ as its code runs: the generator only sets ranges, the student trains on noise images.
    Gradients are clipped here [open]."""
    return _changed(
        lrq(task),
        images="noise",
        batch_size=16 if task.large_images else 256,
        warmup_steps=800,
        steps=30_200,
        student_milestones=(20_000, 40_000, 70_000)
        if task.large_images
        else (4_000, 8_000, 12_000),
        noise_beta1=0.9,
        noise_lowest_target=0.9,
        attention="after_block1" if task.large_images else "none",
        augmentation="crop_flip",
    )


def gdfq(task: Task) -> Preset:
    """GDFQ (arXiv 2003.03603), LRQ's base: no attention, no margin, plain distillation. Gradients
    are clipped here [open]."""
    return _changed(
        lrq(task),
        attention="none",
        ama_weight=0.0,
        student_loss="kd",
        temperature=20.0,
        kd_reduction="element_mean",
    )


def qimera(task: Task) -> Preset:
    """Qimera (arXiv 2111.02625): GDFQ whose generator also makes images between classes.

    Constants of its CIFAR-10 and ResNet-18 runs: 40 % of the batches superpose 2 (500) classes; on
    CIFAR-100 it superposes 10 (`method.superposed_classes`). Differences [open]: its embeddings
    come from the teacher's classifier in most runs, ours are learned, as GDFQ's; it adds noise to
    each class's embedding before mixing, here the mixed one is multiplied by it; its latents have
    other lengths.
    """
    return _changed(
        gdfq(task),
        superposition=0.4,
        superposed_classes=500 if task.large_images else 2,
    )


def intraq(task: Task) -> Preset:
    """IntraQ (arXiv 2111.09136): noise images of varied classes and regions; LRQ's code grew from it.

    Its parts: local object reinforcement (`crop_flip` in half of the iterations), the marginal
    distance constraint (AMA's hinges without a margin, LRQ's addition), the soft inception loss
    (`noise_target` of probabilities); then plain distillation. Constants of its ResNet-20 runs on
    CIFAR-10 and, as LRQ's code has them, of ResNet-18. Differences [open]: IntraQ counts its
    warm-up of 800 steps in; its warm-up generator has no hinges and makes 16 images a step;
    gradients are clipped here.
    """
    return _changed(
        lrq_released(task),
        attention="none",
        ama_margin=0.0,
        ama_lower=0.3 if task.large_images else 0.05,
        noise_lowest_target=0.9 if task.large_images else 0.95,
        noise_beta1=0.9,
        student_loss="kd",
        distill_weight=20.0,
        temperature=20.0,
    )


def hast(task: Task) -> Preset:
    """HAST (arXiv 2303.13826): noise images, hard for teacher and student, channel attention aligned.

    Constants of its CIFAR-10 and ResNet-18 runs. Differences [open]: where channels are aligned
    (every tensor that all of the network passes through, the sum of a residual block; HAST: what
    a block adds), the warm-up generator's focal loss (HAST: cross-entropy), crops of 0.5 to 1 of
    an image at 224 px (HAST: 0.4), 16 images a step there (HAST: 4 on each of its GPUs), a warm-up
    on top of the table's steps, gradients clipped.
    """
    return _changed(
        intraq(task),
        ama_weight=0.0,
        batch_size=16 if task.large_images else 64,
        student_learning_rate=1e-6 if task.large_images else 1e-5,
        class_focus=0.5 if task.large_images else 2.0,
        noise_target="cross_entropy",
        noise_target_weight=0.1 if task.large_images else 10.0,
        noise_augmentation="crop_flip" if task.large_images else "none",
        ce_weight=0.0,
        channel_alignment=4000.0 if task.large_images else 1000.0,
        perturbation=0.01,
    )


def genie(task: Task) -> Preset:
    """Genie (arXiv 2212.04780): images made through latents, the student rebuilt block by block.

    Constants of its ResNet-18 runs, at every size [open]. Differences [open]: the generator is
    LRQ's, with a class for each image (no loss asks for it) and long-range attention; AdaRound's
    weight steps stay as searched (Genie-M learns them); the exponent of its regularizer falls on a
    cosine (Genie: a line); an activation step's rate is that of its logarithm; ranges are seen on
    16 batches and searched as a share of the whole, activations' zero points with them.
    """
    method = Method(
        images="noise",
        calibration_images="pool",
        conditioning="batch_norm" if task.large_images else "embedding",
        attention="after_block1",
        latent_dim=256,
        batch_size=32 if task.large_images else 64,
        warmup_steps=16,
        calibration_steps=16,
        steps=0,
        ama_weight=0.0,
        rounding="adaround",
        reconstruction_iterations=20_000,
        reconstruction_regularizer=1.0,
        noise_parameters="latents",
        noise_batches=8,
        noise_batch_size=128,
        noise_iterations=4_000,
        noise_learning_rate=0.1,
        noise_beta1=0.9,
        noise_plateau_patience=100,
        noise_statistics="deviation",
        noise_image_weight=1.0,
        noise_swing=1,
        noise_target_weight=0.0,
        noise_augmentation="none",
        noise_augment_probability=0.0,
    )
    student = QuantSpec(weight_observer="smallest_error", act_observer="smallest_error")
    return Preset(method=method, student=student)


def fast(task: Task) -> Preset:
    """Ours, for minutes: a small pool of noise images, ranges and step sizes that are searched
    and then learned, rounding learned block by block, then distillation alone.

    The parts: images matched to the batch norms' relative statistics, over frequencies that fall as
    those of photographs do (`coloured`); ranges by the smallest `|error|^2.4` (BRECQ); AdaRound
    with QDrop, 400 of its published 20,000 iterations (200 on large images) at 10 times its rate for
    choices and 25 times that for activation steps [open]; learned step sizes and clip mask (LSQ);
    kernels' rates in units of their quantization steps, so that the size of
    channels, which batch norms undo, does not matter; the teacher's soft outputs and no labels (AIT,
    arXiv 2203.17008); a thousand images suffice, since they are only ever seen moved, mirrored and
    mixed in pairs (mixup, arXiv 1710.09412); twice the steps at 3 bits and fewer [open].
    `docs/accuracy.md` says what each part bought.
    """
    steps = 500 if task.large_images else 1_000
    method = Method(
        images="noise",
        calibration_images="pool",
        attention="none",
        conditioning="batch_norm" if task.large_images else "embedding",
        batch_size=32 if task.large_images else 64,
        warmup_steps=16,
        calibration_steps=16,
        steps=steps if task.bits > LOW_BITS else 2 * steps,
        rounding="adaround",
        reconstruction_iterations=200 if task.large_images else 400,
        reconstruction_learning_rate=0.01,
        reconstruction_step_rate=0.001,
        ama_weight=0.0,
        student_loss="kd",
        ce_weight=0.0,
        temperature=4.0,
        student_optimizer="adam",
        student_learning_rate=2e-4,
        student_kernel_rate=0.003,
        student_schedule="cosine",
        student_weight_decay=0.0,
        augmentation="crop_flip" if task.large_images else "shift_flip",
        mixup=1.0,
        noise_batches=8,
        noise_batch_size=32 if task.large_images else 128,
        noise_iterations=250 if task.large_images else 125,
        noise_learning_rate=0.1,
        noise_beta1=0.9,
        noise_schedule="cosine",
        noise_statistics="relative",
        noise_target="cross_entropy",
        noise_target_weight=0.005,
        noise_augmentation="crop_flip" if task.large_images else "shift_flip",
        noise_augment_probability=1.0,
        noise_clip=True,
        noise_spectrum=1.0,
    )
    student = QuantSpec(
        weight_observer="smallest_error",
        act_observer="smallest_error",
        clip_mask=True,
        learned_steps="both",
    )
    return Preset(method=method, student=student)


def best(task: Task) -> Preset:
    """Ours, for a GPU-hour: `fast` with more images, iterations and steps.

    2,048 images of 1,000 iterations each; AdaRound with QDrop at its published rates; distillation
    at half of `fast`'s rates, and a running average of the weights. Constants are
    ours, sized by counting operations [open]: nothing of it was measured yet.
    """
    base = fast(task)
    return _changed(
        base,
        batch_size=64 if task.large_images else 128,
        reconstruction_iterations=5_000 if task.large_images else 20_000,
        reconstruction_learning_rate=1e-3,
        reconstruction_step_rate=4e-5,
        steps=5_000 if task.large_images else 20_000,
        student_learning_rate=base.method.student_learning_rate / 2,
        student_kernel_rate=base.method.student_kernel_rate / 2,
        average_decay=0.999,
        noise_batches=64 if task.large_images else 16,
        noise_iterations=1_000,
        noise_swing=1,
    )


def squant(task: Task) -> Preset:
    """No training: weights are rounded so that errors cancel (SQuant, arXiv 2202.07471), channels
    equalized before and biases corrected after (arXiv 1906.04721), which SQuant does without; a few
    images, matched to the batch norms for seconds, set the activation ranges [open]."""
    base = fast(task)
    return Preset(
        method=dataclasses.replace(
            base.method,
            rounding="squant",
            equalize=True,
            bias_correction=True,
            steps=0,
            warmup_steps=2,
            calibration_steps=2,
            noise_batches=1,
            noise_batch_size=16 if task.large_images else 64,
            noise_iterations=20,
        ),
        student=dataclasses.replace(base.student, learned_steps="none"),
    )


def _changed(preset: Preset, **method: Any) -> Preset:
    return dataclasses.replace(preset, method=dataclasses.replace(preset.method, **method))


PRESETS: dict[str, Callable[..., Preset]] = {
    "best": best,
    "fast": fast,
    "gdfq": gdfq,
    "genie": genie,
    "hast": hast,
    "intraq": intraq,
    "lrq": lrq,
    "lrq_released": lrq_released,
    "qimera": qimera,
    "squant": squant,
}
"""Preset by name, for a task."""


def preset(name: str, *, image_size: int, bits: int = Task.bits) -> Preset:
    """The constants of a method, the published ones where there are any.

    Args:
      name: of `PRESETS`.
      image_size, bits: of the `Task`.

    Raises:
      ValueError: an unknown name, with the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"method.preset: found {name!r}, expected one of {sorted(PRESETS)}")
    return PRESETS[name](Task(image_size=image_size, bits=bits))
