"""Networks the benchmarks export: real teachers from files, published topologies at random."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrq_jax.data import Preprocessing
from lrq_jax.data.pixels import crop, decode_image, normalise
from lrq_jax.graph import INPUT, Graph
from lrq_jax.graph import layers as L
from lrq_jax.networks import build_network
from lrq_jax.networks.registry import find_network
from lrq_jax.passes import QuantSpec, Student, float_forward
from lrq_jax.passes.float_forward import apply_layer
from lrq_jax.passes.plan import tracked_tensors
from lrq_jax.quantize import normalised_range
from lrq_jax.readers import convert_teacher
from lrq_jax.runtimes.trials import synthetic_pixels

SHEET, SIDE = 50, 32  # CIFAR's mosaics: 50 x 50 tiles of 32 pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A network with images.

    Attributes:
      name: what results are filed under.
      graph, variables, preprocessing: as a teacher's.
      pixels: uint8 `[N, H, W, C]`, to be tried.
      labels: of the first of `pixels`; empty where they have none.
      images: what `pixels` are, in words.
      range_pixels: others, which the ranges of activations come from.
      source: in words, with the file's hash.
    """

    name: str
    graph: Graph
    variables: Any
    preprocessing: Preprocessing
    pixels: np.ndarray
    labels: np.ndarray
    images: str
    range_pixels: np.ndarray
    source: str

    def normalised(self, pixels: np.ndarray) -> np.ndarray:
        """As the network wants them."""
        return normalise(pixels, self.preprocessing)

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Smallest and largest value of every tensor of the float network, in images of their
        own. They serve all bits: exactness is what is measured, accuracy only on the side."""
        # A tensor an integer network makes is one of the float network, under the same name.
        names = tuple(tracked_tensors(self.graph, QuantSpec()))

        def ends(variables: Any, images: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
            found = float_forward(self.graph, variables, images, names)
            return {name: (x.min(), x.max()) for name, x in found.items()}

        found = jax.jit(ends)(self.variables, self.normalised(self.range_pixels))
        return {name: (float(low), float(high)) for name, (low, high) in found.items()}

    def student(self, ranges: dict[str, tuple[float, float]], **spec: Any) -> tuple[Student, Any]:
        """A student at these ranges, and its variables.

        Args:
          ranges: of `ranges()`.
          **spec: fields of `QuantSpec`.
        """
        student = Student(
            graph=self.graph,
            spec=QuantSpec(**spec),
            input_range=normalised_range(self.preprocessing),
        )
        variables = student.initial_variables(self.variables)
        for name, (low, high) in ranges.items():
            limits = {"low": jnp.float32(low), "high": jnp.float32(high)}
            variables["quant"]["activations"][name] = limits
        return student, variables


# --- real ones -----------------------------------------------------------------------------------


def cifar(assets: Path, dataset: str) -> tuple[np.ndarray, np.ndarray]:
    """Test images uint8 `[N, 32, 32, 3]` and labels, shuffled: they lie sorted by class."""
    labels = np.load(assets / dataset / "test_labels.npz")["y"]
    tiles = []
    for sheet in sorted((assets / dataset).glob("test_*.webp")):
        mosaic, _ = decode_image(sheet.read_bytes())
        tiles.append(mosaic.reshape(SHEET, SIDE, SHEET, SIDE, 3).swapaxes(1, 2))
    images = np.concatenate([tile.reshape(-1, SIDE, SIDE, 3) for tile in tiles])[: len(labels)]
    order = np.random.default_rng(0).permutation(len(labels))
    return images[order], labels[order]


def imagenet(assets: Path, preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """The 650 + 500 validation images at hand as the network wants them, and their labels."""
    pixels, labels = [], []
    for folder in ("val650", "imagenette500"):
        lines = (assets / "imagenet" / folder / "labels.csv").read_text().splitlines()[1:]
        for file, label, _ in (line.split(",") for line in lines):
            image, _ = decode_image((assets / "imagenet" / folder / file).read_bytes())
            pixels.append(crop(image, preprocessing))
            labels.append(int(label))
    return np.stack(pixels), np.asarray(labels)


def real(name: str, file: str, dataset: str, count: int) -> Callable[[Path], Subject]:
    """A maker of a published network with its real images, `count` of them."""

    def make(assets: Path) -> Subject:
        teacher = convert_teacher(assets / file)
        if dataset == "imagenet":
            pixels, labels = imagenet(assets, teacher.preprocessing)
            # All there are: ranges come from synthetic ones, and so does what is missing.
            made = synthetic_pixels(teacher.graph.input_shape, count - len(pixels) + 64)
            images = f"{len(pixels)} of imagenet, {count - len(pixels)} synthetic"
            range_pixels, rest = np.concatenate([made[:64], pixels[::18]]), made[64:]
            pixels = np.concatenate([pixels, rest])
        else:
            pixels, labels = cifar(assets, dataset)
            range_pixels, images = pixels[count : count + 512], f"{count} of {dataset}/test"
            pixels, labels = pixels[:count], labels[:count]
        return Subject(
            name=name,
            graph=teacher.graph,
            variables=jax.tree.map(jnp.asarray, teacher.variables),
            preprocessing=teacher.preprocessing,
            pixels=pixels,
            labels=labels,
            images=images,
            range_pixels=range_pixels,
            source=f"{Path(file).name}, sha256 {teacher.source_sha256}",
        )

    return make


# --- topologies ----------------------------------------------------------------------------------


def topology(arch: str, size: int, count: int = 256) -> Callable[[Path], Subject]:
    """A maker of a published network with random weights and synthetic images of `size` pixels."""

    def make(assets: Path) -> Subject:
        graph = build_network(arch, input_shape=(size, size, 3))
        recipe = find_network(arch).recipe
        preprocessing = Preprocessing(mean=recipe.mean, std=recipe.std, size=size)
        pixels = synthetic_pixels(graph.input_shape, count)
        other = np.random.default_rng(9).permutation(count)[:32]
        range_pixels = 255 - pixels[other]  # negatives of some
        images = jnp.asarray(normalise(range_pixels, preprocessing))
        return Subject(
            name=f"{arch} {size}px",
            graph=graph,
            variables=random_variables(graph, images),
            preprocessing=preprocessing,
            pixels=pixels,
            labels=np.zeros(0, int),
            images=f"{count} synthetic",
            range_pixels=range_pixels,
            source="random weights and batch norm statistics",
        )

    return make


def random_variables(graph: Graph, images: jax.Array) -> Any:
    """Random variables with which every tensor stays alive at any depth.

    Statistics of batch norms are those of the images, moved at random; a quarter of their scales
    are negative, and one channel of each is 0.
    """
    rng = np.random.default_rng(0)
    variables: Any = {"params": {}, "batch_stats": {}}
    shapes = graph.variable_shapes()
    values = {INPUT: images}
    for layer in graph.layers:
        inputs = [values[name] for name in layer.inputs]
        made = {}
        for name, shape in shapes["params"].get(layer.name, {}).items():
            if name == "kernel":
                spread = np.sqrt(2 / np.prod(shape[:-1]))
                made[name] = spread * rng.standard_normal(shape, np.float32)
            elif name == "scale":
                made[name] = rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1, 1, 1], shape)
                made[name][rng.integers(shape[0])] = 0
            else:
                made[name] = 0.2 * rng.standard_normal(shape)
        made = {name: jnp.asarray(value, jnp.float32) for name, value in made.items()}
        if made:
            variables["params"][layer.name] = made
        if isinstance(layer, L.BatchNorm):
            axes = tuple(range(inputs[0].ndim - 1))
            mean, var = inputs[0].mean(axes), inputs[0].var(axes) + 1e-3
            moved = 0.2 * rng.standard_normal(mean.shape, np.float32) * jnp.sqrt(var)
            stretch = jnp.asarray(rng.uniform(0.7, 1.4, mean.shape), jnp.float32)
            statistics = {"mean": mean + moved, "var": var * stretch}
            variables["batch_stats"][layer.name] = statistics
            made = {**made, **statistics}
        values[layer.name] = apply_layer(layer, made, *inputs)
    return variables


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    name: real(name, *rest)
    for name, *rest in (
        ("ResNet-20", "cifar10/resnet20_akamaster.pt", "cifar10", 2000),
        ("ResNet-20 B", "cifar10/resnet20_forge.pt", "cifar10", 2000),
        ("MobileNetV2 x0.5", "cifar10/mobilenetv2_x0.5_forge.pt", "cifar10", 2000),
        ("EfficientNet-Lite0", "imagenet/efficientnet-lite0-57934424.pth", "imagenet", 2000),
    )
} | {
    f"{arch} {size}px": topology(arch, size)
    for arch, size in (
        ("resnet18", 64), ("resnet50", 64), ("mobilenet_v2", 64), ("vgg16_bn", 64),
        ("resnet18", 224), ("resnet50", 224), ("mobilenet_v2", 224),
    )
}  # fmt: skip
"""Name -> maker, from the folder of test assets."""
