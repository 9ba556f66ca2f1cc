"""lrq_jax.data: folders, digits and prepared datasets in; batches that count each image once out."""

import collections
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lrq_jax.data import EvalData, Preprocessing, batches, folder, load_data, preprocess

REPOSITORY = Path(__file__).resolve().parents[1]
ASSETS = Path(os.environ.get("LRQ_ASSETS", REPOSITORY.parent / "shared" / "assets"))
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def _pixels(seed, height=12, width=12, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def _save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(path, **options)
    return pixels


@pytest.fixture
def classes(tmp_path):
    """A folder of 7 images in 2 named classes; returns its path."""
    for number in range(7):
        name = "cat" if number < 3 else "dog"
        _save(tmp_path / "images" / name / f"{number}.png", _pixels(number))
    return tmp_path / "images"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def _load(path, cache):
    return load_data(path=str(path), cache_dir=str(cache))


def _arrays(count, side=4, channels=3):
    """EvalData in memory; image i is filled with i."""
    source = [(np.full((side, side, channels), i % 256, np.uint8), i % 10) for i in range(count)]
    return EvalData(name="arrays", num_examples=count, class_names=None, source=source)


# ---- preprocess ------------------------------------------------------------------------------


def _by_hand(image, preprocessing):
    """A second version: Pillow and numpy, written out, torchvision's rounding."""
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    if len(preprocessing.mean) == 1:
        picture = picture.convert("L")
    if preprocessing.resize is not None:
        width, height = picture.size
        if width < height:
            target = preprocessing.resize, int(preprocessing.resize * height / width)
        else:
            target = int(preprocessing.resize * width / height), preprocessing.resize
        method = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[preprocessing.interpolation]
        picture = picture.resize(target, method)
    width, height = picture.size
    left = round((width - preprocessing.size) / 2.0)
    top = round((height - preprocessing.size) / 2.0)
    picture = picture.crop((left, top, left + preprocessing.size, top + preprocessing.size))
    if len(preprocessing.mean) == 3:
        picture = picture.convert("RGB")
    pixels = np.asarray(picture).reshape(*picture.size[::-1], len(preprocessing.mean))
    mean, std = np.asarray(preprocessing.mean), np.asarray(preprocessing.std)
    return (pixels.astype(np.float64) / 255 - mean) / std


@pytest.mark.parametrize(
    ("shape", "preprocessing"),
    [
        ((8, 8, 3), Preprocessing(**IMAGENET, size=8)),
        ((31, 20, 3), Preprocessing(**IMAGENET, size=8, resize=11)),
        ((20, 31, 3), Preprocessing(**IMAGENET, size=8, resize=11)),
        ((20, 31, 3), Preprocessing(**IMAGENET, size=8, resize=11, interpolation="bicubic")),
        ((5, 6, 3), Preprocessing(**IMAGENET, size=8, resize=9)),  # enlarged
        ((227, 227, 3), Preprocessing(**IMAGENET, size=224, resize=227)),  # only cropped
        ((20, 31, 1), Preprocessing(**IMAGENET, size=8, resize=11)),  # grey -> RGB
        ((20, 31, 3), Preprocessing(mean=(0.5,), std=(0.25,), size=8, resize=11)),  # RGB -> grey
        ((8, 8, 1), Preprocessing(mean=(0.5,), std=(0.25,), size=8)),
    ],
)
def test_preprocess_is_pillow_and_numpy_written_out(shape, preprocessing):
    image = _pixels(0, *shape)
    found = preprocess(image, preprocessing)
    expected = _by_hand(image, preprocessing)
    assert found.dtype == np.float32
    assert found.shape == expected.shape == (*2 * (preprocessing.size,), len(preprocessing.mean))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_larger_images_without_resize_are_refused():
    with pytest.raises(ValueError, match=r"found an image 9 x 8 .* expected 6 x 6 .* resize=8"):
        preprocess(_pixels(0, 9, 8), Preprocessing(**IMAGENET, size=6))
    with pytest.raises(ValueError, match=r"found an image 9 x 8 .* expected 12 x 12 .* resize=12"):
        preprocess(_pixels(0, 9, 8), Preprocessing(**IMAGENET, size=12))


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8), _pixels(0, 8, 8, 4)]
)
def test_preprocess_refuses_what_is_no_image(image):
    with pytest.raises(ValueError, match=r"expected uint8\[H, W, 1 or 3\]"):
        preprocess(image, Preprocessing(**IMAGENET, size=8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (0.5, 0.5)}, "one value a channel"),
        ({"std": (0.5,)}, "one value a channel"),
        ({"std": (0.1, 0.0, 0.1)}, "positive stds"),
        ({"mean": (0.1, float("nan"), 0.1)}, "finite means"),
        ({"size": 0}, "at least 1 pixel"),
        ({"resize": 7}, "resize >= size"),
        ({"interpolation": "nearest"}, "bilinear.*bicubic"),
    ],
)
def test_preprocessing_errors(change, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**{**IMAGENET, "size": 8, **change})


def test_preprocessing_survives_json_and_is_hashable():
    preprocessing = Preprocessing(**IMAGENET, size=8, resize=9, interpolation="bicubic")
    back = Preprocessing(**json.loads(json.dumps(dataclasses.asdict(preprocessing))))
    assert back == preprocessing
    assert hash(back) == hash(preprocessing)


# ---- batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 4, 7, 8, 9])
@pytest.mark.parametrize("threads", [None, 1, 3])
def test_every_image_counts_once(count, threads):
    data = _arrays(count)
    plain = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3, size=4)
    found = list(batches(data, plain, batch_size=4, threads=threads))
    assert len(found) == -(-count // 4)
    for batch in found:
        assert batch.images.shape == (4, 4, 4, 3)
        assert (batch.labels.shape, batch.mask.shape) == ((4,), (4,))
        dtypes = (batch.images.dtype, batch.labels.dtype, batch.mask.dtype)
        assert dtypes == (np.float32, np.int32, np.bool_)
        assert not batch.images[~batch.mask].any()
        assert not batch.labels[~batch.mask].any()
    seen = np.concatenate([batch.images[batch.mask] for batch in found])
    labels = np.concatenate([batch.labels[batch.mask] for batch in found])
    np.testing.assert_array_equal(np.rint(seen[:, 0, 0, 0] * 255), np.arange(count))
    np.testing.assert_array_equal(labels, np.arange(count) % 10)


def test_padding_is_zero_after_normalisation():
    batch = next(batches(_arrays(1), Preprocessing(**IMAGENET, size=4), batch_size=2))
    assert batch.images[0].any()
    assert not batch.images[1].any()


def test_batches_are_preprocess_of_each_image(classes, cache):
    data = _load(classes, cache)
    preprocessing = Preprocessing(**IMAGENET, size=8, resize=10)
    found = np.concatenate([b.images[b.mask] for b in batches(data, preprocessing, batch_size=3)])
    expected = np.stack([preprocess(image, preprocessing) for image, _ in data.source])
    np.testing.assert_array_equal(found, expected)


def test_batches_refuse_at_once():
    with pytest.raises(ValueError, match="batch_size 0"):
        batches(_arrays(1), Preprocessing(**IMAGENET, size=4), batch_size=0)


def test_an_image_that_does_not_fit_is_named():
    data = _arrays(5, side=6)
    with pytest.raises(ValueError, match=r"'arrays', image 0: found an image 6 x 6"):
        list(batches(data, Preprocessing(**IMAGENET, size=4), batch_size=5))


def test_num_examples_is_the_length_of_the_source():
    with pytest.raises(ValueError, match=r"num_examples 2 .* 1 images"):
        EvalData(name="x", num_examples=2, class_names=None, source=_arrays(1).source)


# ---- image folders ---------------------------------------------------------------------------


def test_class_folders_in_sorted_order(classes, cache):
    data = _load(classes, cache)
    assert (data.name, data.num_examples, data.class_names) == ("images", 7, ("cat", "dog"))
    assert [label for _, label in data.source] == [0, 0, 0, 1, 1, 1, 1]
    for number, (image, _) in enumerate(data.source):
        np.testing.assert_array_equal(image, _pixels(number))
    np.testing.assert_array_equal(data.source[-1][0], _pixels(6))
    assert len(data.source[2:4]) == 2
    with pytest.raises(IndexError):
        data.source[7]


def test_formats_nesting_and_grey(tmp_path, cache):
    root = tmp_path / "images"
    expected = [
        _save(root / "a" / "1.PNG", _pixels(1)),
        _save(root / "a" / "2.webp", _pixels(2), lossless=True),
        _save(root / "a" / "3.bmp", _pixels(3)),
        _save(root / "a" / "deep" / "er" / "4.ppm", _pixels(4)),
        _save(root / "b" / "1.png", _pixels(5, channels=1)),
    ]
    jpeg = root / "b" / "2.JPEG"
    _save(jpeg, _pixels(6), quality=80)
    _save(root / "b" / "3.jpg", _pixels(7, channels=1))
    (root / "b" / "notes.txt").write_text("no image")
    _save(root / "b" / "._4.png", _pixels(8))  # what macOS leaves
    (root / ".git").mkdir()
    data = _load(root, cache)
    assert [label for _, label in data.source] == [0, 0, 0, 0, 1, 1, 1]
    for found, pixels in zip([image for image, _ in data.source], expected, strict=False):
        np.testing.assert_array_equal(found, pixels)
    np.testing.assert_array_equal(data.source[5][0], np.asarray(Image.open(jpeg)))
    assert data.source[5][0].shape == (12, 12, 3)
    assert data.source[6][0].shape == (12, 12, 1)


def test_png_and_jpeg_bytes_are_kept_and_others_become_png(tmp_path):
    for name in ("1.png", "2.jpg"):
        _save(tmp_path / name, _pixels(1))
        assert folder.read_encoded(str(tmp_path / name)) == (tmp_path / name).read_bytes()
    _save(tmp_path / "3.webp", _pixels(1), lossless=True)
    shutil.copy(tmp_path / "3.webp", tmp_path / "4.png")  # the content decides, not the name
    for name in ("3.webp", "4.png"):
        encoded = folder.read_encoded(str(tmp_path / name))
        assert encoded.startswith(b"\x89PNG")
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encoded))), _pixels(1))


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("LA", 1), ("P", 3), ("RGBA", 3), ("CMYK", 3)]
)
def test_other_modes_become_grey_or_rgb(tmp_path, mode, channels):
    image = Image.fromarray(_pixels(0)).convert(mode)
    options = {"transparency": bytes([0, 128])} if mode == "P" else {}
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    image.save(path, **options)
    pixels, _ = folder.decode_image(path.read_bytes())
    assert (pixels.dtype, pixels.shape) == (np.uint8, (12, 12, channels))


def test_integer_folder_names_are_labels(tmp_path, cache):
    for name in ("010", "2", "0"):
        _save(tmp_path / "images" / name / "x.png", _pixels(int(name)))
    data = _load(tmp_path / "images", cache)
    assert data.class_names is None
    assert [label for _, label in data.source] == [0, 2, 10]
    for image, label in data.source:
        np.testing.assert_array_equal(image, _pixels(label))


def test_labels_csv_keeps_its_order(tmp_path, cache):
    for name in ("b.png", "a.png", "sub/c.png"):
        _save(tmp_path / "images" / name, _pixels(ord(name[-5])))
    rows = "\ufefffile,label,wnid\nb.png,999,n1\nsub/c.png,0,n2\na.png,5,n3\n"
    (tmp_path / "images" / "labels.csv").write_text(rows, encoding="utf-8")
    data = _load(tmp_path / "images", cache)
    assert (data.num_examples, data.class_names) == (3, None)
    assert [label for _, label in data.source] == [999, 0, 5]
    for (image, _), letter in zip(data.source, "bca", strict=True):
        np.testing.assert_array_equal(image, _pixels(ord(letter)))
    (tmp_path / "images" / "labels.csv").write_text("file,label\nb.png,998\n")
    _load(tmp_path / "images", cache)
    (tmp_path / "images" / "labels.csv").write_text("file,label\nb.png,997\n")
    assert [label for _, label in _load(tmp_path / "images", cache).source] == [997]


def test_second_load_reuses_the_cache(classes, cache, monkeypatch):
    first = _load(classes, cache)
    monkeypatch.setattr(folder, "_write", None)  # building again would fail
    second = _load(classes, cache)
    for (image, label), (again, same) in zip(first.source, second.source, strict=True):
        np.testing.assert_array_equal(image, again)
        assert label == same
    assert len(list(cache.iterdir())) == 1


def test_the_cache_is_keyed_by_files_and_labels(classes, cache, monkeypatch):
    _load(classes, cache)
    os.utime(classes / "cat" / "0.png", ns=(1, 1))
    _load(classes, cache)
    (classes / "cat").rename(classes / "zebra")  # same sizes and times, other labels
    assert [label for _, label in _load(classes, cache).source] == [0, 0, 0, 0, 1, 1, 1]
    assert len(list(cache.iterdir())) == 3
    monkeypatch.setenv("LRQ_CACHE", str(cache / "other"))
    load_data(path=str(classes))
    assert len(list((cache / "other").iterdir())) == 1


def test_a_failed_build_leaves_nothing(classes, cache, monkeypatch):
    def interrupted(path):
        if path.endswith("5.png"):
            raise KeyboardInterrupt
        return real(path)

    real = folder.read_encoded
    monkeypatch.setattr(folder, "read_encoded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _load(classes, cache)
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(folder, "read_encoded", real)
    assert len(list(_load(classes, cache).source)) == 7


def _python(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_killed_build_is_never_taken_for_a_whole_one(classes, cache):
    done = _python(f"""
        import os
        from lrq_jax.data import folder, load_data
        real = folder.read_encoded
        folder.read_encoded = lambda path: os._exit(9) if path.endswith("5.png") else real(path)
        load_data(path={str(classes)!r}, cache_dir={str(cache)!r})
    """)
    assert done.returncode == 9, done.stderr
    (left,) = cache.iterdir()
    assert left.name.startswith("building-")
    os.utime(left, (time.time() - 2 * 24 * 3600,) * 2)
    assert len(list(_load(classes, cache).source)) == 7
    assert not left.exists()  # a day later it is removed


def test_another_process_may_finish_the_same_build_first(classes, cache, monkeypatch):
    def slower(images, data_dir):
        made = real(images, data_dir)
        shutil.copytree(made, cache / f"images-{images.digest()[:16]}")
        return made

    real = folder._write
    monkeypatch.setattr(folder, "_write", slower)
    assert len(list(_load(classes, cache).source)) == 7
    assert len(list(cache.iterdir())) == 1


# ---- digits ----------------------------------------------------------------------------------


def test_digits_split_is_fixed_stratified_and_disjoint():
    pytest.importorskip("sklearn")
    train, test = (load_data(name="digits", split=split) for split in ("train", "test"))
    assert (train.num_examples, test.num_examples) == (1297, 500)
    assert (test.name, test.class_names) == ("digits/test", tuple("0123456789"))
    share = collections.Counter(label for _, label in test.source)
    whole = share + collections.Counter(label for _, label in train.source)
    assert sum(whole.values()) == 1797
    for digit in range(10):
        assert abs(share[digit] - whole[digit] * 500 / 1797) < 1
    images = [image.tobytes() for data in (train, test) for image, _ in data.source]
    assert len(set(images)) == 1797  # so that no image is in both
    assert [label for _, label in test.source[:10]] == [4, 8, 8, 3, 9, 0, 6, 3, 9, 8]
    assert sum(int(image.sum()) for image, _ in test.source) == 9_968_028


def test_digits_pixels():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    expected = set()
    for pixels, label in zip(digits.images.tolist(), digits.target.tolist(), strict=True):
        scaled = np.array([[int(v * 255 / 16 + 0.5) for v in row] for row in pixels], np.uint8)
        enlarged = Image.fromarray(scaled).resize((16, 16), Image.BILINEAR)
        expected.add((np.asarray(enlarged).tobytes(), label))
    for image, label in load_data(name="digits").source:
        assert (image.dtype, image.shape) == (np.uint8, (16, 16, 1))
        assert (image.tobytes(), label) in expected


# ---- prepared TFDS datasets ------------------------------------------------------------------


@pytest.fixture
def prepared(classes, cache, tmp_path, monkeypatch):
    """$TFDS_DATA_DIR with the dataset `pets` in versions 1.9.0 and 1.10.0; returns the latter."""
    _load(classes, cache)
    (made,) = cache.iterdir()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    for version in ("1.9.0", "1.10.0"):
        shutil.copytree(made, tmp_path / "tfds" / "pets" / version)
        _edit_info(tmp_path / "tfds" / "pets" / version, version=version)
    return tmp_path / "tfds" / "pets" / "1.10.0"


def _edit_info(directory, **changes):
    path = directory / "dataset_info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("name", "version"), [("pets", "1.10.0"), ("pets:1.9.0", "1.9.0"), ("pets/1.9.0", "1.9.0")]
)
def test_prepared_dataset_by_name(prepared, name, version):
    data = load_data(name=name)
    assert data.name.endswith(f"/{version}/test")
    assert [label for _, label in data.source] == [0, 0, 0, 1, 1, 1, 1]
    np.testing.assert_array_equal(data.source[4][0], _pixels(4))
    assert load_data(name=name, split="test[:2]").num_examples == 2


def test_class_names_of_a_prepared_dataset(prepared):
    features = json.loads((prepared / "features.json").read_text())
    features["featuresDict"]["features"]["label"] = {
        "pythonClassName": "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
        "classLabel": {"numClasses": "2"},
    }
    (prepared / "features.json").write_text(json.dumps(features))
    (prepared / "label.labels.txt").write_text("cat\ndog\n")
    assert load_data(name="pets").class_names == ("cat", "dog")


def test_only_array_record_can_be_read(prepared):
    _edit_info(prepared, fileFormat="tfrecord")
    with pytest.raises(ValueError, match=r"prepared as tfrecord, .* tfds convert_format"):
        load_data(name="pets")
    _edit_info(prepared, alternativeFileFormats=["array_record"])  # what convert_format leaves
    assert len(list(load_data(name="pets").source)) == 7


def test_prepared_dataset_errors(prepared):
    with pytest.raises(ValueError, match=r"found no split 'train' .* expected one of \['test'\]"):
        load_data(name="pets", split="train")
    with pytest.raises(FileNotFoundError, match=r"tfds/cats .*array_record.* or use data.path"):
        load_data(name="cats")
    shutil.copytree(prepared, prepared.parents[1] / "zoo" / "small" / "1.0.0")
    with pytest.raises(ValueError, match=r"several configurations .*\['zoo/small'\]"):
        load_data(name="zoo")
    assert load_data(name="zoo/small").num_examples == 7
    features = json.loads((prepared / "features.json").read_text())
    inner = features["featuresDict"]["features"]
    for image, label, names in (
        (inner["image"], inner["file"], "file', 'image', 'label"),  # a label that is text
        (inner["label"], inner["label"], "file', 'image', 'label"),  # an image that is a number
        (None, inner["label"], "file', 'label"),
    ):
        changed = {"image": image, "label": label, "file": inner["file"]}
        features["featuresDict"]["features"] = {k: v for k, v in changed.items() if v}
        (prepared / "features.json").write_text(json.dumps(features))
        with pytest.raises(ValueError, match=rf"features \['{names}'\]"):
            load_data(name="pets")


def test_a_split_without_labels_is_refused(classes, cache, monkeypatch):
    real = folder._encoded
    monkeypatch.setattr(folder, "_encoded", lambda i: ((f, -1, e) for f, _, e in real(i)))
    data = _load(classes, cache)
    with pytest.raises(ValueError, match=r"image 0 \(cat/0.png\): found label -1"):
        data.source[0]


# ---- errors of load_data ---------------------------------------------------------------------


def _csv(text):
    def make(root):
        _save(root / "a.png", _pixels(0))
        (root / "labels.csv").write_text(text)

    return make


def _files(*names, content=None):
    def make(root):
        root.mkdir()
        for name in names:
            if content is None:
                _save(root / name, _pixels(0))
            else:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(content)

    return make


def _empty_class(root):
    _save(root / "cat" / "0.png", _pixels(0))
    (root / "dog").mkdir()


def _truncated(root):
    _save(root / "cat" / "0.png", _pixels(0, 64, 64))
    whole = (root / "cat" / "0.png").read_bytes()
    (root / "cat" / "0.png").write_bytes(whole[: len(whole) // 2])


def _sixteen_bit(root):
    (root / "cat").mkdir(parents=True)
    Image.fromarray(np.full((8, 8), 4096, np.uint16)).save(root / "cat" / "0.png")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda root: None, FileNotFoundError, "no such folder.*data.path"),
        (_files(), ValueError, "neither labels.csv nor sub-folders"),
        (_files("a.png"), ValueError, "neither labels.csv nor sub-folders"),
        (_files("test/cat/a.png", "train/cat/a.png"), ValueError, "which are splits"),
        (_empty_class, ValueError, "dog: found no images"),
        (_files("3/a.png", "03/b.png"), ValueError, "'03' and '3', both of class 3"),
        (_files("0/a.png", "-1/b.png"), ValueError, "found label '-1'"),
        (_files("0/a.png", f"{2**31}/b.png"), ValueError, "found label '2147483648'"),
        (_files("cat/a.png", content=b"text"), ValueError, r"a\.png: found 4 bytes .* cannot"),
        (_files("cat/a.png", content=b""), ValueError, r"a\.png: found 0 bytes .* cannot"),
        (_truncated, ValueError, r"0\.png: .* cannot decode"),
        (_sixteen_bit, ValueError, r"0\.png: found an image of mode 'I;16'"),
        (_csv("name,label\na.png,1\n"), ValueError, r"columns \['name', 'label'\]"),
        (_csv(""), ValueError, r"columns \[\]"),
        (_csv("file,label\n"), ValueError, "found no rows"),
        (_csv("file,label\na.png,cat\n"), ValueError, "line 2: found label 'cat'"),
        (_csv("file,label\na.png,1.0\n"), ValueError, "line 2: found label '1.0'"),
        (_csv("file,label\na.png,-1\n"), ValueError, "line 2: found label '-1'"),
        (_csv("file,label\na.png\n"), ValueError, "line 2: .* a file and a label"),
        (_csv("file,label\na.png,1\n./a.png,1\n"), ValueError, "line 3: .* second time"),
        (_csv("file,label\nb.png,1\n"), FileNotFoundError, r"line 2: found no file .*b\.png"),
    ],
)
def test_folder_errors_name_what_was_found(tmp_path, cache, make, error, message):
    make(tmp_path / "images")
    with pytest.raises(error, match=message):
        _load(tmp_path / "images", cache)
    assert not cache.exists() or list(cache.iterdir()) == []


def test_either_name_or_path(tmp_path):
    for arguments in ({}, {"name": "digits", "path": str(tmp_path)}):
        with pytest.raises(ValueError, match="exactly one of them"):
            load_data(**arguments)
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match="'train' or 'test'"):
        load_data(name="digits", split="validation")


# ---- what is imported, what is printed ----------------------------------------------------------


@pytest.mark.usefixtures("prepared")
def test_no_tensorflow_no_torch_nothing_printed_nothing_left(classes, cache, tmp_path):
    (tmp_path / "tmp").mkdir()
    script = f"""
        import sys
        from lrq_jax.data import Preprocessing, batches, load_data
        early = {{"tensorflow_datasets", "sklearn", "PIL", "array_record"}} & set(sys.modules)
        assert not early, early
        preprocessing = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, size=12)
        for where in ({{"path": {str(classes)!r}}}, {{"name": "pets"}}):
            data = load_data(**where, cache_dir={str(cache / "new")!r})
            assert sum(b.mask.sum() for b in batches(data, preprocessing, batch_size=4)) == 7
        loaded = {{"tensorflow", "torch", "cv2"}} & set(sys.modules)
        assert not loaded, loaded
    """
    done = _python(script, TMPDIR=str(tmp_path / "tmp"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list((tmp_path / "tmp").iterdir()) == []


# ---- real images -----------------------------------------------------------------------------


def test_real_imagenet_folder(cache):
    path = ASSETS / "imagenet" / "imagenette500"
    if not path.is_dir():
        pytest.skip(f"no real images at {path}; set LRQ_ASSETS")
    data = _load(path, cache)
    preprocessing = Preprocessing(**IMAGENET, size=224)
    counts = collections.Counter()
    for batch in batches(data, preprocessing, batch_size=64):
        counts.update(batch.labels[batch.mask].tolist())
    assert sorted(counts.values()) == [50] * 10
