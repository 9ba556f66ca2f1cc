"""Trains the teacher that comes with the package: a ResNet-8 on scikit-learn's digits.

    python scripts/train_digits_teacher.py

About a minute on 2 CPU cores. Expected: all 1,297 training and 499 of the 500 test images
correct. Only the training split is used for training; the test split is measured once, after the
last step.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lrq_jax.data import EvalData, Preprocessing, batches, load_data
from lrq_jax.graph import INPUT, Graph
from lrq_jax.graph import layers as L
from lrq_jax.networks import build_network
from lrq_jax.passes.float_forward import Variables, apply_layer, float_logits
from lrq_jax.readers import Teacher, save_embedded

ARCH = "resnet8_cifar"
SIZE = 16  # pixels, side of an image of `load_data(name="digits")`
ASSET = Path(__file__).resolve().parents[1] / "lrq_jax" / "assets" / "digits_teacher.safetensors"
NOTES = (
    "trained by scripts/train_digits_teacher.py on the training split of scikit-learn's digits",
    "data: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine "
    "Learning Repository, CC BY 4.0, through scikit-learn",
    "batch norm statistics: means and unbiased variances over all unshifted training images",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train; the defaults made the teacher that comes with the package."""

    seed: int = 0  # of the weights, the order of the images and their shifts
    epochs: int = 60
    batch_size: int = 64  # images
    learning_rate: float = 0.1  # peak, after the warm-up
    warmup_epochs: int = 3  # linear from zero
    momentum: float = 0.9  # Nesterov
    weight_decay: float = 5e-4  # of every parameter, as PyTorch's SGD does
    max_shift: int = 1  # pixels, in each direction


# --- the network in training ---------------------------------------------------------------------


def init_params(graph: Graph, key: jax.Array) -> Variables:
    """Parameters to start from: He normal kernels, unit scales, zero biases."""
    he_normal = jax.nn.initializers.he_normal()
    params: Variables = {}
    for layer, shapes in graph.variable_shapes()["params"].items():
        key, subkey = jax.random.split(key)
        start = {"kernel": functools.partial(he_normal, subkey), "scale": jnp.ones}
        params[layer] = {name: start.get(name, jnp.zeros)(shapes[name]) for name in shapes}
    return params


def train_forward(graph: Graph, params: Variables, images: jax.Array) -> tuple[jax.Array, Variables]:  # fmt: skip
    """The network in train mode: each batch norm uses the statistics of this batch.

    Args:
      graph: the network.
      params: its parameters, by layer.
      images: `[B, H, W, C]` in the network's normalised input space.

    Returns:
      Logits `[B, num_classes]` and the `batch_stats` of this batch: mean and, as PyTorch keeps
      it, unbiased variance.
    """
    values, batch_stats = {INPUT: images}, {}
    for layer in graph.layers:
        own = dict(params.get(layer.name, {}))
        inputs = [values[name] for name in layer.inputs]
        if isinstance(layer, L.BatchNorm):
            axes = tuple(range(inputs[0].ndim - 1))
            count = inputs[0].size // inputs[0].shape[-1]
            mean, var = jnp.mean(inputs[0], axes), jnp.var(inputs[0], axes)
            own |= {"mean": mean, "var": var}  # normalised with the biased variance
            batch_stats[layer.name] = {"mean": mean, "var": var * (count / (count - 1))}
        values[layer.name] = apply_layer(layer, own, *inputs)
    return values[graph.output], batch_stats


def loss_fn(params: Variables, images: jax.Array, labels: jax.Array, *, graph: Graph) -> jax.Array:
    """Mean cross-entropy of `images` `[B, H, W, C]` and `labels` `[B]`, in train mode."""
    logits, _ = train_forward(graph, params, images)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def make_optimizer(settings: Settings, steps_per_epoch: int) -> optax.GradientTransformation:
    """SGD with Nesterov momentum; a linear warm-up, then a cosine to zero at the last step."""
    rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.learning_rate,
        warmup_steps=min(settings.warmup_epochs, settings.epochs - 1) * steps_per_epoch,
        decay_steps=settings.epochs * steps_per_epoch,
    )
    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay),
        optax.sgd(rate, momentum=settings.momentum, nesterov=True),
    )


@functools.partial(jax.jit, static_argnames=("graph", "settings", "steps_per_epoch"))
def train_step(params: Variables, state: optax.OptState, images: jax.Array, labels: jax.Array, *,
               graph: Graph, settings: Settings,
               steps_per_epoch: int) -> tuple[Variables, optax.OptState, jax.Array]:  # fmt: skip
    """One update; returns the new parameters and optimiser state, and the loss before it."""
    loss, gradients = jax.value_and_grad(loss_fn)(params, images, labels, graph=graph)
    updates, state = make_optimizer(settings, steps_per_epoch).update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


# --- data ----------------------------------------------------------------------------------------


def measure_preprocessing(data: EvalData) -> Preprocessing:
    """Mean and standard deviation of the pixels of `data`, in [0, 1] units, to 4 digits."""
    pixels = np.stack([image for image, _ in data.source]) / 255
    return Preprocessing(
        mean=tuple(np.round(pixels.mean((0, 1, 2)), 4)),
        std=tuple(np.round(pixels.std((0, 1, 2)), 4)),
        size=SIZE,
    )


def shift_images(images: np.ndarray, background: np.ndarray, max_shift: int,
                 rng: np.random.Generator) -> np.ndarray:  # fmt: skip
    """Each image of `[B, H, W, C]` moved by up to `max_shift` pixels; `background` `[C]` fills."""
    count, height, width, channels = images.shape
    padded_shape = (count, height + 2 * max_shift, width + 2 * max_shift, channels)
    padded = np.broadcast_to(background, padded_shape).copy()
    padded[:, max_shift : max_shift + height, max_shift : max_shift + width] = images
    top, left = rng.integers(0, 2 * max_shift + 1, (2, count, 1, 1))
    rows = top + np.arange(height)[:, None]
    columns = left + np.arange(width)
    return padded[np.arange(count)[:, None, None], rows, columns]


# --- training ------------------------------------------------------------------------------------


def train(data: EvalData, settings: Settings) -> Teacher:
    """The teacher after the last step of training on `data`.

    Raises:
      FloatingPointError: a loss that is not finite.
    """
    preprocessing = measure_preprocessing(data)
    everything = next(batches(data, preprocessing, batch_size=data.num_examples))
    graph = build_network(
        ARCH,
        num_classes=len(data.class_names),
        input_shape=(SIZE, SIZE, preprocessing.channels),
    )
    background = -np.float32(preprocessing.mean) / np.float32(preprocessing.std)
    rng = np.random.default_rng(settings.seed)
    params = init_params(graph, jax.random.key(settings.seed))
    steps_per_epoch = data.num_examples // settings.batch_size
    state = make_optimizer(settings, steps_per_epoch).init(params)
    for epoch in range(settings.epochs):
        # The images left over after the last full batch are others in every epoch.
        order = rng.permutation(data.num_examples)[: steps_per_epoch * settings.batch_size]
        for rows in order.reshape(steps_per_epoch, settings.batch_size):
            images = shift_images(everything.images[rows], background, settings.max_shift, rng)
            params, state, loss = train_step(
                params,
                state,
                images,
                everything.labels[rows],
                graph=graph,
                settings=settings,
                steps_per_epoch=steps_per_epoch,
            )
        if not jnp.isfinite(loss):
            raise FloatingPointError(f"found loss {loss} in epoch {epoch + 1}, expected a number")
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1:3d}  loss of its last batch {loss:.4f}", flush=True)
    _, batch_stats = jax.jit(train_forward, static_argnums=0)(graph, params, everything.images)
    return Teacher(
        graph=graph,
        variables=jax.device_get({"params": params, "batch_stats": batch_stats}),
        preprocessing=preprocessing,
        arch=ARCH,
        class_names=data.class_names,
        source="scripts/train_digits_teacher.py",
        notes=(*NOTES, f"{settings}"),
    )


def num_correct(teacher: Teacher, data: EvalData, *, batch_size: int = 128) -> tuple[int, int]:
    """Images of `data` that the teacher classifies correctly, and images counted."""
    logits = jax.jit(float_logits, static_argnums=0)
    correct = counted = 0
    for batch in batches(data, teacher.preprocessing, batch_size=batch_size):
        found = np.argmax(logits(teacher.graph, teacher.variables, batch.images), axis=-1)
        correct += int(np.sum((found == batch.labels) & batch.mask))
        counted += int(np.sum(batch.mask))
    return correct, counted


def main(arguments: list[str] | None = None) -> int:
    """Trains, writes the teacher and prints its accuracy; returns 0."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default=str(ASSET), help="file to write; default: %(default)s")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=defaults.epochs, help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"found --epochs {options.epochs}, expected at least 1")
    settings = Settings(seed=options.seed, epochs=options.epochs)
    teacher = train(load_data(name="digits", split="train"), settings)
    save_embedded(teacher, options.out)
    for split in ("train", "test"):
        correct, counted = num_correct(teacher, load_data(name="digits", split=split))
        print(f"{split:<6}{correct} of {counted} correct, {correct / counted:.2%}")
    print(f"written to {options.out}, {Path(options.out).stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
