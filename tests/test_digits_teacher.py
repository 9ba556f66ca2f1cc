"""The teacher that comes with the package, and the script that trains it."""

import importlib.util
import itertools
import math
import sys
from importlib import resources
from pathlib import Path

import jax
import numpy as np
import pytest

from lrq_jax.data import EvalData, batches, load_data
from lrq_jax.networks import build_network
from lrq_jax.networks.cifar_resnet import cifar_resnet
from lrq_jax.passes.float_forward import float_forward, float_logits
from lrq_jax.readers import load_teacher

pytestmark = pytest.mark.usefixtures("quick_compilation")

REPOSITORY = Path(__file__).resolve().parents[1]
MAX_BYTES = 1_000_000


@pytest.fixture(scope="module")
def script():
    """scripts/train_digits_teacher.py as a module."""
    path = REPOSITORY / "scripts" / "train_digits_teacher.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[path.stem]


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("digits")


def _load(split):
    pytest.importorskip("sklearn")
    return load_data(name="digits", split=split)


# --- the file ------------------------------------------------------------------------------------


def test_file_is_small_and_says_what_it_is(teacher, script):
    asset = resources.files("lrq_jax") / "assets" / "digits_teacher.safetensors"
    assert len(asset.read_bytes()) < MAX_BYTES
    assert Path(str(asset)).resolve() == script.ASSET
    assert teacher.arch == "resnet8_cifar"
    assert teacher.graph == build_network(teacher.arch, num_classes=10, input_shape=(16, 16, 1))
    assert teacher.class_names == tuple("0123456789")
    notes = " ".join(teacher.notes)
    assert "CC BY 4.0" in notes
    assert repr(script.Settings()) in notes  # the defaults are what made it, seed included


def test_accuracy_on_the_test_split_each_image_once(teacher):
    data = _load("test")
    traces = []

    @jax.jit
    def logits(images):
        traces.append(images.shape)
        return float_logits(teacher.graph, teacher.variables, images)

    labels, correct = [], 0
    for batch in batches(data, teacher.preprocessing, batch_size=128):
        found = np.argmax(logits(batch.images), axis=-1)
        correct += np.sum(found[batch.mask] == batch.labels[batch.mask])
        labels += batch.labels[batch.mask].tolist()
    assert labels == [label for _, label in data.source]
    assert len(labels) == 500
    assert traces == [(128, 16, 16, 1)]
    assert correct / len(labels) >= 0.97


def test_preprocessing_is_measured_on_the_training_split(teacher, script):
    pixels = np.concatenate([image.ravel() for image, _ in _load("train").source]) / 255
    how = teacher.preprocessing
    assert how.mean == (round(float(pixels.mean()), 4),)
    assert how.std == (round(float(pixels.std()), 4),)
    assert how == script.measure_preprocessing(_load("train"))


def test_statistics_are_those_of_the_training_images(teacher):
    """What the notes say, measured in eval mode: a norm whose inputs are off is found here."""
    data = _load("train")
    (batch,) = batches(data, teacher.preprocessing, batch_size=data.num_examples)
    inputs = {norm.name: norm.inputs[0] for norm in teacher.graph.batch_norms}
    values = float_forward(teacher.graph, teacher.variables, batch.images, set(inputs.values()))
    assert set(teacher.variables["batch_stats"]) == set(inputs)
    for name, tensor in inputs.items():
        stats = teacher.variables["batch_stats"][name]
        assert np.isfinite(stats["mean"]).all()
        assert np.isfinite(stats["var"]).all()
        assert (stats["var"] > 0).all()
        seen = np.asarray(values[tensor], np.float64)
        var = seen.var((0, 1, 2), ddof=1)
        np.testing.assert_allclose(stats["var"], var, rtol=2e-3)
        mean, sigma = seen.mean((0, 1, 2)), var.max() ** 0.5
        np.testing.assert_allclose(stats["mean"], mean, atol=1e-3 * sigma)


# --- the script ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """A small network with random parameters, scales and biases too, and images."""
    graph = cifar_resnet(depth=8, shortcut="B", width=4, input_shape=(8, 8, 1))
    rng = np.random.default_rng(0)
    params = {
        layer: {name: 0.5 * rng.standard_normal(shape, np.float32) for name, shape in own.items()}
        for layer, own in graph.variable_shapes()["params"].items()
    }
    return graph, params, rng.standard_normal((3, 8, 8, 1), np.float32)


def test_train_forward_equals_eval_with_the_statistics_it_returns(script, tiny):
    graph, params, images = tiny
    logits, batch_stats = script.train_forward(graph, params, images)
    inputs = {norm.name: norm.inputs[0] for norm in graph.batch_norms}
    counts = {name: len(images) * math.prod(graph.shapes[x][:2]) for name, x in inputs.items()}
    # Train mode normalises with the biased variance and keeps the unbiased one.
    biased = {
        name: {"mean": stats["mean"], "var": stats["var"] * (1 - 1 / counts[name])}
        for name, stats in batch_stats.items()
    }
    variables = {"params": params, "batch_stats": biased}
    values = float_forward(graph, variables, images, {graph.output, *inputs.values()})
    np.testing.assert_allclose(logits, values[graph.output], rtol=1e-4, atol=1e-5)
    for name, tensor in inputs.items():
        seen = np.asarray(values[tensor], np.float64)
        np.testing.assert_allclose(batch_stats[name]["mean"], seen.mean((0, 1, 2)), atol=1e-5)
        np.testing.assert_allclose(batch_stats[name]["var"], seen.var((0, 1, 2), ddof=1), rtol=1e-4)


def test_start_values_are_he_normal_and_differ_by_layer(script, teacher):
    graph = teacher.graph
    params = jax.device_get(script.init_params(graph, jax.random.key(1)))
    assert jax.tree.map(np.shape, params) == graph.variable_shapes()["params"]
    starts = []
    for layer, own in params.items():
        assert np.all(own.get("scale", 1.0) == 1)
        assert not np.any(own.get("bias", 0.0))
        if "kernel" in own:
            kernel = own["kernel"]
            wanted = (2 / math.prod(kernel.shape[:-1])) ** 0.5
            assert kernel.std() == pytest.approx(wanted, rel=0.15), layer
            starts.append(np.ravel(kernel / wanted)[:100])
    assert not any(np.allclose(a, b) for a, b in itertools.combinations(starts, 2))


def test_shifted_images_move_whole_and_reach_every_offset(script):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((200, 5, 4, 2), np.float32)
    background = np.array([-7, 8], np.float32)
    shifted = script.shift_images(images, background, 1, rng)
    padded = np.broadcast_to(background, (200, 7, 6, 2)).copy()
    padded[:, 1:-1, 1:-1] = images
    offsets = set()
    for whole, found in zip(padded, shifted, strict=True):
        matches = [
            (top, left)
            for top in range(3)
            for left in range(3)
            if np.array_equal(whole[top : top + 5, left : left + 4], found)
        ]
        assert len(matches) == 1
        offsets.update(matches)
    assert len(offsets) == 9


def test_command_trains_writes_and_repeats(script, tmp_path, monkeypatch, capsys):
    """One epoch on few images: only "train" is trained on, and a seed gives the same bytes."""
    whole = {split: _load(split) for split in ("train", "test")}

    def few(*, name, split):
        assert name == "digits"
        source = whole[split].source[:100]
        return EvalData(f"digits/{split}", 100, whole[split].class_names, source)

    trained_on = []
    train = script.train

    def watched(data, settings):
        trained_on.append(data.name)
        return train(data, settings)

    monkeypatch.setattr(script, "load_data", few)
    monkeypatch.setattr(script, "train", watched)
    files = [tmp_path / f"{name}.safetensors" for name in ("first", "again", "other")]
    for file, seed in zip(files, ("3", "3", "4"), strict=True):
        assert script.main(["--out", str(file), "--epochs", "1", "--seed", seed]) == 0
    assert trained_on == ["digits/train"] * 3
    assert files[0].read_bytes() == files[1].read_bytes()
    first, _, other = (load_teacher(file) for file in files)
    kernels = [made.variables["params"]["conv1"]["kernel"] for made in (first, other)]
    assert not np.allclose(*kernels)
    assert first.source == "train_digits_teacher.py"
    assert "of 100 correct" in capsys.readouterr().out


def test_command_refuses_no_epochs(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--epochs", "0"])
    assert "found --epochs 0, expected at least 1" in capsys.readouterr().err
