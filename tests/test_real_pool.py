"""Training on real images: the ceiling of a method, and never called zero-shot."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image
from test_steps import TEACHER, tiny_settings

from lrq_jax.data import preprocess
from lrq_jax.quantize import prepare, quantize, summary
from lrq_jax.sharding import data_mesh
from lrq_jax.training.real_pool import read_pool

pytestmark = pytest.mark.usefixtures("quick_compilation", "one_device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve images of three classes; class c has images of brightness 60 c + i."""
    root = tmp_path_factory.mktemp("real")
    for label in range(3):
        (root / f"{label:03d}").mkdir()
        for i in range(4):
            Image.fromarray(np.full((8, 8), 60 * label + i, np.uint8)).save(
                root / f"{label:03d}" / f"{i}.png"
            )
    return str(root)


def test_a_pool_is_a_random_draw_of_preprocessed_images(folder):
    pools = [
        read_pool(folder, TEACHER.preprocessing, count=7, seed=seed, mesh=data_mesh(1))
        for seed in (0, 0, 1)
    ]
    images, labels = jax.device_get(pools[0])
    assert images.shape == (7, 8, 8, 1)
    every = {
        60 * c + i: (preprocess(np.full((8, 8, 1), 60 * c + i, np.uint8), TEACHER.preprocessing), c)
        for c in range(3)
        for i in range(4)
    }
    found = set()
    for image, label in zip(images, labels, strict=True):
        match = [k for k, (x, c) in every.items() if np.array_equal(x, image) and c == label]
        assert len(match) == 1
        found.update(match)
    assert len(found) == 7
    np.testing.assert_array_equal(images, pools[1].images)
    assert not np.array_equal(images, pools[2].images)


def test_more_images_than_there_are_is_refused(folder):
    with pytest.raises(ValueError, match=r"found 13, expected at most the 12 images"):
        read_pool(folder, TEACHER.preprocessing, count=13, seed=0, mesh=data_mesh(1))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"train_path": "nowhere"}, OSError, "nowhere"),
        ({"train_images": 13}, ValueError, "data.train_images: found 13, expected at most the 12"),
    ],
)
def test_real_images_are_looked_at_before_anything_is_written(folder, tmp_path, changed, error, message):  # fmt: skip
    settings = tiny_settings(calibration_images="pool")
    method = dataclasses.replace(settings.method, images="folder")
    settings = dataclasses.replace(
        settings, method=method, **{"train_path": folder, "train_images": 12, **changed}
    )
    with pytest.raises(error, match=message):
        prepare(TEACHER, settings, None, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_on_real_images_says_that_it_is_not_zero_shot(folder, tmp_path):
    settings = tiny_settings(calibration_images="pool", steps=2)
    method = dataclasses.replace(settings.method, images="folder")
    settings = dataclasses.replace(settings, method=method, train_path=folder, train_images=12)
    report = quantize(prepare(TEACHER, settings, None, tmp_path / "run"))
    assert report["zero_shot"] is False
    assert "NOT zero-shot: trained on 12 real images" in summary(report)
    assert not (tmp_path / "run" / "pool").exists()
    (tmp_path / "run" / "report.html").unlink()  # as if killed before it was written
    quantize(prepare(TEACHER, settings, None, tmp_path / "run"))
    assert (tmp_path / "run" / "report.html").exists()
    assert "zero-shot" not in summary({**report, "zero_shot": True})
