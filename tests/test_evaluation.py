"""Accuracy: every image once, and against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrq_jax.data import EvalData, Preprocessing
from lrq_jax.evaluation import evaluate
from lrq_jax.sharding import data_mesh

PLAIN = Preprocessing(mean=(0.0,), std=(1 / 255,), size=4)  # the networks see pixels as stored


def make_data(labels, pixels=None):
    """Images 4 x 4 whose first pixel is their index, unless `pixels` are given."""
    if pixels is None:
        pixels = np.zeros((len(labels), 4, 4, 1), np.uint8)
        pixels[:, 0, 0, 0] = np.arange(len(labels))
    source = [(image, int(label)) for image, label in zip(pixels, labels, strict=True)]
    return EvalData(name="made", num_examples=len(source), class_names=None, source=source)


def lookup(table):
    """A network that answers image i with row i of a table; padding (zeros) with row 0."""
    table = jnp.asarray(table, jnp.float32)
    return lambda images: table[jnp.rint(images[:, 0, 0, 0]).astype(jnp.int32)]


def run(tables, labels, *, batch_size=8, devices=1):
    return evaluate(
        {name: lookup(table) for name, table in tables.items()},
        make_data(labels),
        PLAIN,
        num_classes=np.shape(next(iter(tables.values())))[1],
        batch_size=batch_size,
        mesh=data_mesh(devices),
    )


def naive(table, labels, reference):
    """Percent right at rank 1, within rank 5, and of the reference's class, one image at a time."""
    top1 = top5 = agree = 0
    for logits, label, other in zip(table, labels, reference, strict=True):
        order = sorted(range(len(logits)), key=lambda k: -logits[k])
        top1 += order[0] == label
        top5 += label in order[:5]
        agree += order[0] == np.argmax(other)
    return tuple(100 * count / len(labels) for count in (top1, top5, agree))


@pytest.mark.parametrize("batch_size", [1, 7, 8, 23, 64])
def test_equals_numpy_whatever_the_batch_size(rng, batch_size):
    labels = rng.integers(0, 10, 23)
    tables = {name: rng.normal(size=(23, 10)).astype(np.float32) for name in ("teacher", "student")}
    for name, right in (("teacher", slice(0, 12)), ("student", slice(6, 14))):
        tables[name][np.arange(23)[right], labels[right]] += 3
    found = run(tables, labels, batch_size=batch_size)
    for name, table in tables.items():
        expected = naive(table, labels, tables["teacher"])
        value = found[name]
        assert (value.top1, value.top5, value.agreement) == pytest.approx(expected)
        assert value.images == 23
    assert found["teacher"].agreement == 100.0
    assert 0 < found["student"].top1 < found["student"].top5 < 100


def test_padding_counts_neither_as_right_nor_as_an_image():
    """Padded rows are zero images of label 0, which this network gets 'right'."""
    table = np.zeros((5, 6), np.float32)
    table[0, 0] = 1.0  # what the padding gets
    table[1:, 3] = 1.0
    found = run({"a": table}, [5, 5, 5, 5, 5], batch_size=8)["a"]
    assert (found.top1, found.images) == (0.0, 5)
    assert found.agreement == 100.0
    found = run({"a": table}, [0, 3, 3, 3, 3], batch_size=64)["a"]
    assert (found.top1, found.images) == (100.0, 5)


@pytest.mark.parametrize("label", [0, 3, 9])
def test_a_tie_is_not_right(label):
    table = np.zeros((1, 10), np.float32)
    found = run({"constant": table}, [label])["constant"]
    assert (found.top1, found.top5) == (0.0, 0.0)
    table[0, :2] = table[0, label] = 1.0
    if label in (0, 3):
        found = run({"shared": table}, [label])["shared"]
        assert (found.top1, found.top5) == (0.0, 100.0)


@pytest.mark.parametrize("classes", [3, 10])
def test_a_nan_is_never_right_and_agrees_with_nothing(classes):
    labels = [0, 1, 2, 2]
    sound = np.eye(classes, dtype=np.float32)[labels]
    broken = sound.copy()
    broken[0] = np.nan  # argmax is 0, the label
    broken[1, 1] = np.nan  # argmax is the NaN's place, the label
    broken[2, 0] = np.nan  # not the label's own logit
    found = run({"sound": sound, "broken": broken}, labels)
    assert (found["sound"].top1, found["sound"].top5) == (100.0, 100.0)
    assert (found["broken"].top1, found["broken"].top5) == (25.0, 25.0)
    assert found["broken"].agreement == 25.0
    found = run({"broken": broken, "sound": sound}, labels)
    assert found["sound"].agreement == 25.0


def test_infinite_logits_rank_as_numbers():
    table = np.array([[-np.inf, 0, 1], [np.inf, 0, 1]], np.float32)
    assert run({"a": table}, [2, 0])["a"].top1 == 100.0


def test_a_label_the_network_has_no_class_for_is_refused():
    table = np.zeros((3, 4), np.float32)
    for label in (4, -1):
        with pytest.raises(ValueError, match=rf"'made': found label {label}, expected 0 to 3"):
            run({"a": table}, [0, label, 1])


def test_the_batch_is_rounded_up_to_the_devices_and_split(rng):
    labels = rng.integers(0, 10, 21)
    table = rng.normal(size=(21, 10)).astype(np.float32)
    shapes = []

    def spy(images):
        shapes.append(images.shape)
        return lookup(table)(images)

    devices = len(jax.devices())
    assert devices == 8
    found = evaluate(
        {"a": spy}, make_data(labels), PLAIN, num_classes=10, batch_size=9, mesh=data_mesh(8)
    )["a"]
    assert shapes == [(16, 4, 4, 1)]  # traced once, for two batches
    assert found == run({"a": table}, labels, batch_size=9)["a"]


def test_images_reach_the_network_normalised():
    how = Preprocessing(mean=(0.5,), std=(0.25,), size=4)
    pixels = np.full((1, 4, 4, 1), 204, np.uint8)  # 0.8

    def right_if_normalised(images):
        # 1.2 = (0.8 - 0.5) / 0.25
        close = jnp.all(jnp.abs(images - 1.2) < 1e-6, axis=(1, 2, 3))
        return jnp.stack([1.0 - close, close], -1)

    found = evaluate(
        {"a": right_if_normalised},
        make_data([1], pixels),
        how,
        num_classes=2,
        batch_size=1,
        mesh=data_mesh(1),
    )["a"]
    assert found.top1 == 100.0
