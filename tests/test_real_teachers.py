"""Real teachers on real test images; skipped where the test assets are absent."""

import csv
import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from lrq_jax.data import EvalData, Preprocessing
from lrq_jax.data.pixels import decode_image, preprocess
from lrq_jax.evaluation import evaluate
from lrq_jax.passes import float_logits
from lrq_jax.readers import convert_teacher
from lrq_jax.sharding import data_mesh

REPOSITORY = Path(__file__).parents[1]
ASSETS = Path(os.environ.get("LRQ_ASSETS", REPOSITORY.parent / "shared" / "assets"))
TILE, SIDE = 32, 50  # the mosaics of the assets: 50 x 50 tiles of 32 pixels

pytestmark = pytest.mark.skipif(
    not (ASSETS / "cifar10").is_dir(), reason=f"no test assets at {ASSETS}: set LRQ_ASSETS"
)


slow = pytest.mark.skipif(
    "LRQ_SLOW_TESTS" not in os.environ, reason="takes minutes: set LRQ_SLOW_TESTS=1 to run it"
)


def test_images(dataset: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 `[N, 32, 32, 3]` and labels of a CIFAR test split."""
    from PIL import Image

    labels = np.load(ASSETS / dataset / "test_labels.npz")["y"]
    tiles = []
    for sheet in sorted((ASSETS / dataset).glob("test_*.webp")):
        mosaic = np.asarray(Image.open(sheet).convert("RGB"))
        tiles.append(mosaic.reshape(SIDE, TILE, SIDE, TILE, 3).swapaxes(1, 2))
    images = np.concatenate([tile.reshape(-1, TILE, TILE, 3) for tile in tiles])[: len(labels)]
    return images, labels


test_images.__test__ = False


@pytest.mark.parametrize(
    ("file", "dataset", "images", "top1"),
    [
        ("cifar10/resnet20_akamaster.pt", "cifar10", 9977, 91.73),
        pytest.param("cifar10/resnet32_akamaster.pt", "cifar10", 9977, 92.62, marks=slow),
        ("cifar10/resnet20_forge.pt", "cifar10", 9977, 92.13),
        ("cifar100/resnet20_forge.pt", "cifar100", 10000, 68.17),
        pytest.param("cifar10/mobilenetv2_x0.5_forge.pt", "cifar10", 9977, 91.74, marks=slow),
    ],
)
def test_converted_teachers_have_their_published_accuracy(file, dataset, images, top1):
    teacher = convert_teacher(ASSETS / file)
    pixels, labels = test_images(dataset)
    data = EvalData(
        name=dataset,
        num_examples=len(labels),
        class_names=None,
        source=list(zip(pixels, labels.tolist(), strict=True)),
    )
    result = evaluate(
        {"teacher": lambda x: float_logits(teacher.graph, teacher.variables, x)},
        data,
        teacher.preprocessing,
        num_classes=teacher.graph.num_classes,
        batch_size=500,
        mesh=data_mesh(1),
    )["teacher"]
    assert result.images == images
    # One image of 10,000 may fall on the other side of a near tie in another float arithmetic.
    assert result.top1 == pytest.approx(top1, abs=0.015)


@pytest.mark.parametrize(
    ("file", "arch", "top1", "top5"),
    [
        ("imagenet/mobilenetv1_x0.25_retinaface.pt", "mobilenet_v1", 45.0, None),
        ("imagenet/efficientnet-lite0-57934424.pth", "efficientnet_lite0", 69.6, 91.0),
    ],
)
def test_imagenet_teachers_have_their_accuracy_on_imagenette500(file, arch, top1, top5):
    teacher = convert_teacher(ASSETS / file)
    assert teacher.arch == arch
    folder = ASSETS / "imagenet" / "imagenette500"
    rows = list(csv.DictReader((folder / "labels.csv").read_text(encoding="utf-8").splitlines()))
    data = EvalData(
        name="imagenette500",
        num_examples=len(rows),
        class_names=None,
        source=[(decode_image((folder / row["file"]).read_bytes())[0], int(row["label"])) for row in rows],
    )  # fmt: skip
    # The folder holds the crops already, 224 x 224.
    result = evaluate(
        {"teacher": lambda x: float_logits(teacher.graph, teacher.variables, x)},
        data,
        dataclasses.replace(teacher.preprocessing, resize=None),
        num_classes=1000,
        batch_size=50,
        mesh=data_mesh(1),
    )["teacher"]
    assert result.images == 500
    assert result.top1 == pytest.approx(top1, abs=0.05)
    assert top5 is None or result.top5 == pytest.approx(top5, abs=0.05)


def written_out(image, size, resize, interpolation, mean, std):
    """The published preprocessing in PIL and numpy: shorter side, centre crop, normalisation."""
    from PIL import Image

    width, height = image.size
    if width <= height:
        target = (resize, int(resize * height / width))
    else:
        target = (int(resize * width / height), resize)
    image = image.resize(target, getattr(Image.Resampling, interpolation))
    left, top = round((target[0] - size) / 2), round((target[1] - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return (np.asarray(image, np.float64) / 255 - mean) / std


@pytest.mark.parametrize(
    ("file", "size", "resize", "interpolation", "mean", "std"),
    [
        ("imagenet/efficientnet-lite0-57934424.pth", 224, 256, "BICUBIC", 127 / 255, 128 / 255),
        ("imagenet/mobilenetv1_x0.25_retinaface.pt", 224, 256, "BILINEAR",
         np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])),
    ],
)  # fmt: skip
@pytest.mark.parametrize("folder", ["imagenette500", "val650"])
def test_preprocessing_is_the_published_one(folder, file, size, resize, interpolation, mean, std):
    from PIL import Image

    how = convert_teacher(ASSETS / file).preprocessing
    for path in sorted((ASSETS / "imagenet" / folder).glob("*.JPEG"))[:4]:
        with Image.open(path) as opened:
            square = opened.convert("RGB")
        for image in (square, square.crop((0, 3, 200, 130)), square.crop((11, 0, 120, 210))):
            ours = preprocess(np.asarray(image), how)
            theirs = written_out(image, size, resize, interpolation, mean, std)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_logits_equal_pytorch_on_1000_test_images():
    torch = pytest.importorskip("torch", reason="compares with torch, which is not installed")
    from torch.nn import functional

    file = ASSETS / "cifar10/resnet20_akamaster.pt"
    teacher = convert_teacher(file)
    pixels, _ = test_images("cifar10")
    pixels = pixels[np.random.default_rng(0).permutation(len(pixels))[:1000]]
    images = normalised(pixels, teacher.preprocessing)
    ours = jax.jit(lambda x: float_logits(teacher.graph, teacher.variables, x))(images)

    state = torch.load(file, map_location="cpu", weights_only=True)
    state = {name.removeprefix("module."): value for name, value in state.items()}

    def batch_norm(x, name):
        keys = ("running_mean", "running_var", "weight", "bias")
        return functional.batch_norm(x, *(state[f"{name}.{key}"] for key in keys), eps=1e-5)

    with torch.inference_mode():
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        x = functional.relu(
            batch_norm(functional.conv2d(x, state["conv1.weight"], padding=1), "bn1")
        )
        for stage in (1, 2, 3):
            for block in range(3):
                name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                y = functional.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
                y = functional.relu(batch_norm(y, f"{name}.bn1"))
                y = functional.conv2d(y, state[f"{name}.conv2.weight"], padding=1)
                y = batch_norm(y, f"{name}.bn2")
                if stride == 2:
                    quarter = y.shape[1] // 4
                    x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
                x = functional.relu(y + x)
        theirs = functional.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])
    np.testing.assert_allclose(np.asarray(ours), theirs.numpy(), rtol=0, atol=1e-4)


def normalised(pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    mean, std = (np.asarray(x, np.float32) for x in (preprocessing.mean, preprocessing.std))
    return ((pixels.astype(np.float32) / 255 - mean) / std).astype(np.float32)
