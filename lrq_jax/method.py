"""A method is data: which images, which losses, which schedule. `presets` holds instances of it.

Every method runs through the same steps and the same loop; a preset differs from another only
in the values below. Sources are given per field; `[open]` marks a choice of ours where nothing
is published.
"""

from __future__ import annotations

import dataclasses
import math

from lrq_jax.losses.distillation import REDUCTIONS
from lrq_jax.losses.statistics import STATISTICS
from lrq_jax.quantizers.rounding import ROUNDINGS
from lrq_jax.synthesis.augmentation import AUGMENTATIONS
from lrq_jax.synthesis.generator import ATTENTION_PLACES, CONDITIONINGS

IMAGE_SOURCES = ("generator", "noise", "folder")
ROUNDING_NAMES = (*ROUNDINGS, "adaround")
CALIBRATION_SOURCES = ("generator", "pool")
NOISE_TARGETS = ("probability", "cross_entropy")
NOISE_SCHEDULES = ("plateau", "cosine")
NOISE_PARAMETERS = ("pixels", "latents")
STUDENT_LOSSES = ("dkd", "kd")
OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("step", "cosine", "constant")
CENTERS = ("running_mean", "classifier")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """All constants of a zero-shot method. Defaults: LRQ (arXiv 2211.06816), CIFAR column.

    Raises:
      ValueError: an impossible value, by name.
    """

    # --- images ---
    # the student trains on: generator (live) | noise (optimised pool) | folder (real images of
    # data.train_path: no zero-shot method, but the ceiling of one)
    images: str = "generator"
    conditioning: str = "embedding"  # generator's class input: embedding (32 px) | batch_norm (224)
    attention: str = "after_block1"  # long-range attention: none | before_/after_/replace_block1
    latent_dim: int = 100  # length of the noise vector
    generator_width: int = 128  # channels of the generator's first block
    batch_size: int = 200  # images a step, all devices together
    # --- the student before its first step ---
    equalize: bool = False  # cross-layer equalization (arXiv 1906.04721), same float network
    rounding: str = "nearest"  # nearest | squant (2202.07471) | adaround (2004.10568, on the pool)
    bias_correction: bool = False  # of nearest and squant, from batch norms (1906.04721)
    reconstruction_iterations: int = 20_000  # adaround: of every block (BRECQ, 2102.05426)
    reconstruction_batch_size: int = 32  # images an iteration
    reconstruction_learning_rate: float = 1e-3  # Adam, of the choices between floor and ceiling
    reconstruction_step_rate: float = 4e-5  # Adam on a cosine, of log activation steps (QDrop)
    reconstruction_regularizer: float = 0.01  # weight of choices not made (AdaRound's lambda)
    reconstruction_warmup: float = 0.2  # share of the iterations before that weight counts
    reconstruction_drop: float = 0.5  # activations left unquantized (QDrop, 2203.05740)
    # --- schedule, in steps ---
    steps: int = 80_000  # student steps after the warm-up; 0: only what comes before them
    warmup_steps: int = 800  # steps before, of the generator alone
    calibration_start: int = 0  # activation ranges are updated from this step of the warm-up ...
    calibration_steps: int = 800  # ... for this many steps, then frozen
    calibration_images: str = "generator"  # generator | pool (of images)
    # --- generator (synthesis) loss ---
    class_weight: float = 1.0  # cross-entropy of the teacher on its own synthetic images
    class_focus: float = 0.0  # times (1 - p_y)^this: HAST's focus on hard images (2303.13826)
    superposition: float = 0.0  # probability of a batch of superposed classes (Qimera, 2111.02625)
    superposed_classes: int = 2  # classes that a superposed image mixes
    bns_weight: float = 0.1  # of the batch norms' statistics, with a generator
    ama_weight: float = 1.0  # adversarial margin add: weight of both hinges [open]
    ama_margin: float = 0.5  # added to the angle between feature and centre, radians
    ama_lower: float = 0.3  # lower hinge on 1 - phi; R18's: IntraQ's CIFAR .05 would never fire
    ama_upper: float = 0.8  # upper hinge on 1 - phi
    ama_center: str = "running_mean"  # running_mean of synthetic features | classifier row [open]
    # --- student loss ---
    student_loss: str = "dkd"  # distillation: dkd (decoupled, 2203.08679) | kd
    ce_weight: float = 1.0  # cross-entropy of the student on the generator's labels ...
    ce_hardest: float = 1.0  # ... but of images whose 1 - p_y exceeds this (SynQ, ICLR 2025)
    distill_weight: float = 1.0  # weight of kd; of dkd's target part (alpha)
    dkd_beta: float = 8.0  # weight of dkd's non-target part
    temperature: float = 1.0  # T of either distillation
    kd_reduction: str = "batch_mean"  # batch_mean | element_mean (GDFQ's code)
    channel_alignment: float = 0.0  # weight of channel attention aligned at blocks (HAST)
    cam_alignment: float = 0.0  # weight of class activation maps aligned (SynQ)
    perturbation: float = 0.0  # student sees images again, moved so far uphill in its loss (HAST)
    inundation: float = 0.0  # share of a kernel's codes every step changes (AIT, 2203.17008)
    average_decay: float = 0.0  # of the student's weights; their average ships; 0: the last ones do
    # --- optimisers ---
    student_optimizer: str = "sgd"  # sgd (nesterov) | adam
    student_learning_rate: float = 1e-4  # of weights, biases and norms
    # of all quantized kernels instead, in units of their own quantization steps, on the same
    # schedule (ours; Adam alone); 0: the same
    student_kernel_rate: float = 0.0
    student_schedule: str = "step"  # step (x 0.1 at milestones) | cosine (to 0) | constant
    student_milestones: tuple[int, ...] = (20_000, 40_000, 60_000)  # steps after which it falls
    student_momentum: float = 0.9  # of sgd
    student_weight_decay: float = 1e-4  # added to the gradient, of either optimiser
    step_size_learning_rate: float = 1e-3  # Adam, of the logarithm of learned step sizes
    generator_learning_rate: float = 1e-3  # of Adam
    generator_beta1: float = 0.5  # of its Adam, whose beta2 is 0.999
    generator_schedule: str = "step"  # as student_schedule
    generator_milestones: tuple[int, ...] = (20_000, 40_000, 60_000)  # as student_milestones
    adam_epsilon: float = 1e-8  # of every Adam
    gradient_clip: float = 10.0  # largest global norm of either gradient; the lineage has none
    augmentation: str = "none"  # of the pool's images in training: none | crop_flip | shift_flip
    mixup: float = 0.0  # probability that such an image is mixed with another (1710.09412)
    # --- noise images (images = noise) ---
    noise_parameters: str = "pixels"  # what is optimised: pixels | latents (Genie, 2212.04780)
    noise_generator_rate: float = 0.01  # Adam, of the generator that latents come with (Genie)
    noise_generator_decay: float = 0.95  # of that rate, step by step beside a plateau (Genie)
    noise_generator_decay_every: int = 100  # iterations from one such decay to the next
    noise_batches: int = 20  # batches in the pool (released: 4 groups x 5)
    noise_batch_size: int = 256  # images of each
    noise_iterations: int = 1000  # optimisation steps a batch
    noise_learning_rate: float = 0.5  # Adam, of pixels or latents
    noise_beta1: float = 0.5  # of the images' Adam, whose beta2 is 0.999
    noise_schedule: str = "plateau"  # of that rate: plateau | cosine (to 0)
    noise_plateau_patience: int = 50  # iterations without improvement before x 0.1 ...
    noise_smallest_rate: float = 1e-4  # ... down to this learning rate
    noise_statistics: str = "variance"  # of batch norms: variance | relative (ours) | deviation
    noise_bns_weight: float = 1.0  # of the batch norms' statistics
    noise_image_weight: float = 0.0  # of each image's own mean and deviation, 0 and 1 (Genie)
    noise_swing: int = 0  # pixels by which strided convolutions of the teacher move (Genie: 1)
    noise_target: str = "probability"  # class loss: probability (squared error) | cross_entropy
    noise_target_weight: float = 1.0  # of the class loss
    noise_lowest_target: float = 0.5  # class probability targets: 1 or U(this, 1) [open]
    noise_augmentation: str = "crop_flip"  # while they are made: none | crop_flip | shift_flip
    noise_augment_probability: float = 0.5  # an iteration augments the batch with this probability
    # pixels over cosines whose size falls as 1 / frequency^this; 0: pixels as they are
    noise_spectrum: float = 0.0
    noise_low_pass: float = 0.0  # cutoff of a low-pass filter, cycles an image (SynQ); 0: none
    noise_clip: bool = False  # pixels stay in the range of real ones

    def __post_init__(self) -> None:
        for name, allowed in (
            ("images", IMAGE_SOURCES),
            ("conditioning", CONDITIONINGS),
            ("attention", ATTENTION_PLACES),
            ("student_loss", STUDENT_LOSSES),
            ("kd_reduction", REDUCTIONS),
            ("student_optimizer", OPTIMIZERS),
            ("student_schedule", SCHEDULES),
            ("generator_schedule", SCHEDULES),
            ("ama_center", CENTERS),
            ("calibration_images", CALIBRATION_SOURCES),
            ("rounding", ROUNDING_NAMES),
            ("augmentation", tuple(AUGMENTATIONS)),
            ("noise_parameters", NOISE_PARAMETERS),
            ("noise_schedule", NOISE_SCHEDULES),
            ("noise_statistics", tuple(STATISTICS)),
            ("noise_target", NOISE_TARGETS),
            ("noise_augmentation", tuple(AUGMENTATIONS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"method.{name}: found {getattr(self, name)!r}, expected one of {allowed}"
                )
        for name in ("batch_size", "calibration_steps", "latent_dim", "generator_width",
                     "superposed_classes", "noise_batches", "noise_batch_size", "noise_iterations",
                     "noise_plateau_patience", "noise_generator_decay_every",
                     "reconstruction_iterations",
                     "reconstruction_batch_size"):  # fmt: skip
            self._check(name, minimum=1)
        for name in ("steps", "warmup_steps", "calibration_start", "class_weight", "bns_weight",
                     "ama_weight", "ce_weight", "distill_weight", "dkd_beta",
                     "student_weight_decay", "noise_bns_weight", "noise_target_weight",
                     "class_focus", "noise_low_pass", "channel_alignment", "cam_alignment",
                     "perturbation", "noise_image_weight", "noise_swing", "noise_spectrum",
                     "reconstruction_regularizer", "student_kernel_rate"):  # fmt: skip
            self._check(name, minimum=0)
        for name in ("temperature", "gradient_clip", "student_learning_rate",
                     "step_size_learning_rate", "generator_learning_rate", "noise_learning_rate",
                     "noise_generator_rate", "noise_smallest_rate", "adam_epsilon", "reconstruction_learning_rate",
                     "reconstruction_step_rate"):  # fmt: skip
            self._check(name, minimum=1e-12)
        # at 1 an average never moves
        for name in ("student_momentum", "generator_beta1", "noise_beta1", "average_decay"):
            self._check(name, minimum=0, maximum=0.9999)
        for name in ("superposition", "ce_hardest", "inundation", "mixup", "noise_lowest_target",
                     "noise_augment_probability", "reconstruction_warmup",
                     "reconstruction_drop"):  # fmt: skip
            self._check(name, minimum=0, maximum=1)
        self._check("noise_generator_decay", minimum=1e-12, maximum=1)
        self._check("ama_margin", minimum=0, maximum=math.pi)
        for name in ("ama_lower", "ama_upper"):  # of 1 - cosine
            self._check(name, minimum=0, maximum=2)
        for name in ("student_milestones", "generator_milestones"):
            if not all(isinstance(step, int) and step >= 0 for step in getattr(self, name)):
                raise ValueError(
                    f"method.{name}: found {getattr(self, name)!r}, expected steps: whole numbers "
                    "of at least 0"
                )
        if self.student_kernel_rate and self.student_optimizer != "adam":
            raise ValueError(
                f"method.student_kernel_rate: found {self.student_kernel_rate} with "
                f"student_optimizer={self.student_optimizer!r}, expected 'adam', or 0: an update "
                "of others grows with the gradient, so that a rate in steps means nothing"
            )
        if self.bias_correction and self.rounding == "adaround":
            raise ValueError(
                "method.bias_correction: found True with rounding='adaround', expected False: "
                "reconstruction matches the float network, mean included"
            )
        if self.calibration_start + self.calibration_steps > self.warmup_steps:
            raise ValueError(
                f"method: found calibration until step {self.calibration_start} + "
                f"{self.calibration_steps} of a warm-up of {self.warmup_steps} steps, expected it "
                "to end within the warm-up; lower calibration_steps or raise warmup_steps"
            )

    @property
    def without_effect(self) -> dict[str, str]:
        """Fields that are set to something but that no step looks at, and why."""
        live = "" if self.images != "generator" else "images='generator' are seen as they are made"
        idle = {
            "augmentation": live,
            "mixup": live,
            "superposition": "" if self.trains_generator else "no generator is trained",
            "ce_hardest": "" if self.ce_weight else "ce_weight is 0",
            "class_focus": "" if self._asks_for_classes else "no images are made by cross-entropy",
        }
        return {
            name: why
            for name, why in idle.items()
            if why and getattr(self, name) != getattr(Method, name)
        }

    @property
    def _asks_for_classes(self) -> bool:
        return self.trains_generator or (self.makes_pool and self.noise_target == "cross_entropy")

    @property
    def trains_generator(self) -> bool:
        """Whether any step needs the generator."""
        return "generator" in (self.images, self.calibration_images)

    @property
    def makes_pool(self) -> bool:
        """Whether any step needs a pool of images optimised from noise."""
        used = self.calibration_images == "pool" or self.rounding == "adaround"
        return self.images == "noise" or (self.images == "generator" and used)

    def _check(self, name: str, *, minimum: float, maximum: float = math.inf) -> None:
        value = getattr(self, name)
        if not minimum <= value <= maximum or value == math.inf:  # also refuses NaN
            wanted = "finite" if maximum == math.inf else f"at most {maximum:.6g}"
            field = name if name == "steps" else f"method.{name}"  # as the config has them
            raise ValueError(f"{field}: found {value}, expected at least {minimum}, {wanted}")
