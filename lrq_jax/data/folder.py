"""An image folder, made once into a TFDS dataset that random access can read without TensorFlow."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lrq_jax.data.pixels import decode_image, encode_png

SPLIT = "test"  # the only split of a dataset made from a folder
MAX_LABEL = 2**31 - 1  # batches carry int32 labels
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm")
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}
_LAYOUT = "1"  # of what is cached; a change makes every folder be built again
_TEMPORARY = "building-"  # prefix of unfinished builds
_STALE_SECONDS = 24 * 3600.0  # an unfinished build this old was killed: nobody else removes it
_CHUNK = 256  # images decoded ahead of the writer; bounds memory to about 30 MB of JPEG
_SMALL_BYTES = 16384  # a file; below, threads lose more to the GIL than decoding takes

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageList:
    """The images of a folder, in the order in which they are read.

    Attributes:
      root: the folder, absolute.
      files: paths below `root`, "/" as separator; sorted by class and name, or as in labels.csv.
      labels: one a file, 0 .. 2**31 - 1.
      class_names: names by class index, or None where the folder gives only numbers.
    """

    root: str
    files: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...] | None

    def digest(self) -> str:
        """Hash of path, file names, labels, sizes and modification times: the key of the cache."""
        found = hashlib.sha256()
        found.update(f"{_LAYOUT}\0".encode() + os.fsencode(self.root) + b"\0")
        for file, label in zip(self.files, self.labels, strict=True):
            stat = os.stat(os.path.join(self.root, file))
            found.update(os.fsencode(file))
            found.update(f"\0{label}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        return found.hexdigest()


def list_images(path: str) -> ImageList:
    """Lists a folder that holds `labels.csv` (columns file,label), or one sub-folder a class.

    Class sub-folders: if every name is an integer, that integer is the label; otherwise the label
    is the place of the name among the sorted names. Images may lie deeper; names that begin with
    a dot are skipped, as is every file whose name ends in none of `SUFFIXES`.

    Args:
      path: the folder.

    Raises:
      FileNotFoundError: no such folder, or a file of labels.csv is not there.
      ValueError: no images, a class without images, splits instead of classes, a label that is no
        integer in 0 .. 2**31 - 1, a file listed twice, columns missing.
    """
    root = os.path.abspath(os.path.expanduser(path))
    if not os.path.isdir(root):
        raise FileNotFoundError(
            f"{root}: found no such folder, expected one with labels.csv or class sub-folders; "
            "correct data.path"
        )
    if os.path.isfile(os.path.join(root, "labels.csv")):
        files, labels = _read_labels(root)
        return ImageList(root=root, files=files, labels=labels, class_names=None)
    return _list_classes(root)


def build(images: ImageList, cache_dir: str) -> Path:
    """Makes the TFDS dataset (array_record) of a folder, or finds the one made before.

    PNG and JPEG files are kept byte for byte, others are stored as PNG of the same pixels. Every
    image is decoded once here, so that a broken one stops the build and not an evaluation.

    Args:
      images: what to store.
      cache_dir: where datasets are kept; made if absent.

    Returns:
      The folder of the dataset, for `tfds.builder_from_directory`. It appears whole, by a rename:
      a build that dies leaves at most a `building-*` folder, which a build a day later removes.

    Raises:
      ValueError: an image that cannot be decoded.
    """
    cache = Path(cache_dir)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", os.path.basename(images.root)) or "root"
    folder = cache / f"{name}-{images.digest()[:16]}"
    if folder.is_dir():
        _log.info("reusing %s for %s", folder, images.root)
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    _remove_stale(cache)
    started = time.monotonic()
    temporary = tempfile.mkdtemp(prefix=_TEMPORARY, dir=cache)
    try:
        made = _write(images, temporary)
        try:
            os.rename(made, folder)
        except OSError:
            if not folder.is_dir():  # else another process finished the same build before us
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    seconds = time.monotonic() - started
    _log.info("built %s: %d images of %s, %.1f s", folder, len(images.files), images.root, seconds)
    return folder


def read_encoded(path: str) -> bytes:
    """The bytes to store for an image file: its own if PNG or JPEG, else a PNG of its pixels.

    Args:
      path: the file. Its content decides, not its name: ImageNet has a PNG called .JPEG.

    Raises:
      ValueError: not a whole image of at most 8 bits a channel.
    """
    with open(path, "rb") as file:
        encoded = file.read()
    try:
        pixels, found = decode_image(encoded)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return encoded if found in ("PNG", "JPEG") else encode_png(pixels)


def _read_labels(root: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Files and labels of `<root>/labels.csv`, in its order."""
    table = os.path.join(root, "labels.csv")
    found: dict[str, int] = {}
    with open(table, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        header = reader.fieldnames or []
        if not {"file", "label"} <= set(header):
            raise ValueError(
                f"{table}: found columns {list(header)}, expected a header line with at least "
                "file,label; add it"
            )
        for row in reader:
            where = f"{table}, line {reader.line_num}"
            if not row["file"] or row["label"] is None:
                raise ValueError(f"{where}: found {row}, expected a file and a label in each row")
            file = os.path.normpath(row["file"]).replace(os.sep, "/")
            if file in found:
                raise ValueError(
                    f"{where}: found {file!r} a second time, expected each file once, so that each "
                    "image counts once; remove the duplicate row"
                )
            if not os.path.isfile(os.path.join(root, file)):
                raise FileNotFoundError(
                    f"{where}: found no file {os.path.join(root, file)}, expected every file of "
                    "labels.csv to be there; add it or remove the row"
                )
            found[file] = _check_label(row["label"], where)
    if not found:
        raise ValueError(f"{table}: found no rows, expected one an image; add them")
    return tuple(found), tuple(found.values())


def _list_classes(root: str) -> ImageList:
    """The images below class sub-folders."""
    with os.scandir(root) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise ValueError(
            f"{root}: found neither labels.csv nor sub-folders, expected one sub-folder a class or "
            "a labels.csv with the columns file,label; add one of the two"
        )
    if {name.lower() for name in names} <= _SPLIT_NAMES:
        raise ValueError(
            f"{root}: found the sub-folders {names}, which are splits, expected classes; give one "
            f"of them, for instance {os.path.join(root, names[-1])}"
        )
    numbered = all(re.fullmatch(r"-?[0-9]+", name) for name in names)
    files: list[str] = []
    labels: list[int] = []
    taken: dict[int, str] = {}
    order = sorted(names, key=int) if numbered else names
    for index, name in enumerate(order):
        label = _check_label(name, f"{root}, sub-folder names") if numbered else index
        if label in taken:
            raise ValueError(
                f"{root}: found the sub-folders {taken[label]!r} and {name!r}, both of class "
                f"{label}, expected one folder a class; merge them"
            )
        taken[label] = name
        below = _images_below(root, name)
        if not below:
            raise ValueError(
                f"{os.path.join(root, name)}: found no images, expected at least one "
                f"{'/'.join(SUFFIXES)} in each class folder; add images or remove the folder"
            )
        files += below
        labels += [label] * len(below)
    return ImageList(
        root=root,
        files=tuple(files),
        labels=tuple(labels),
        class_names=None if numbered else tuple(names),
    )


def _images_below(root: str, name: str) -> list[str]:
    """Image files below `<root>/<name>`, relative to `root`, sorted."""
    found, other = [], 0
    for folder, folders, files in os.walk(os.path.join(root, name), followlinks=True):
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        for file in files:
            if file.startswith("."):
                continue
            if file.lower().endswith(SUFFIXES):
                found.append(os.path.relpath(os.path.join(folder, file), root).replace(os.sep, "/"))
            else:
                other += 1
    if other:
        _log.warning("%s: %d files are no %s: skipped", name, other, "/".join(SUFFIXES))
    return sorted(found)


def _check_label(text: str, where: str) -> int:
    """The label written as `text`."""
    label = int(text) if re.fullmatch(r"\s*-?[0-9]+\s*", text) else None
    if label is None or not 0 <= label <= MAX_LABEL:
        raise ValueError(
            f"{where}: found label {text!r}, expected an integer in 0 .. {MAX_LABEL}; correct it"
        )
    return label


def _remove_stale(cache: Path) -> None:
    """Removes what killed builds left behind."""
    for left in cache.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):  # another process may remove it at the same time
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left)


def _write(images: ImageList, data_dir: str) -> str:
    """Writes the TFDS dataset below `data_dir`; returns its folder."""
    import numpy as np
    import tensorflow_datasets as tfds

    class Info(tfds.core.DatasetInfo):
        """DatasetInfo that does not look for our folder in TFDS' bucket."""

        def initialize_from_bucket(self) -> None:
            pass  # it also leaves an empty folder in $TMPDIR at every build

    class LrqImageFolder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """Images of a folder with their labels, in the folder's order."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(),
                    "label": tfds.features.Scalar(dtype=np.int64),
                    "file": tfds.features.Text(),
                }
            )
            return Info(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
            del dl_manager  # nothing is downloaded
            return {SPLIT: self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict]]:
            for number, (file, label, encoded) in enumerate(_encoded(images)):
                # bytes: a name that is not UTF-8 has no text
                yield number, {"image": encoded, "label": label, "file": os.fsencode(file)}

        # TFDS prints these two to stdout, which belongs to the program that uses the library.
        def _log_download_bytes(self) -> None:
            pass

        def _log_download_done(self) -> None:
            pass

    builder = LrqImageFolder(data_dir=data_dir)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    with _no_progress_bar(tfds):
        builder.download_and_prepare(file_format="array_record", download_config=config)
    return str(builder.data_dir)


def _encoded(images: ImageList) -> Iterator[tuple[str, int, bytes]]:
    """File, label and stored bytes of each image."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for first in range(0, len(images.files), _CHUNK):
            files = images.files[first : first + _CHUNK]
            labels = images.labels[first : first + _CHUNK]
            paths = [os.path.join(images.root, file) for file in files]
            small = sum(map(os.path.getsize, paths)) < _SMALL_BYTES * len(paths)
            encoded = map(read_encoded, paths) if small else pool.map(read_encoded, paths)
            yield from zip(files, labels, encoded, strict=True)


@contextlib.contextmanager
def _no_progress_bar(tfds: Any) -> Iterator[None]:
    """TFDS without progress bars; its switch is global and has no public getter."""
    before = getattr(tfds.core.utils.tqdm_utils, "_active", True)
    tfds.display_progress_bar(False)
    try:
        yield
    finally:
        tfds.display_progress_bar(before)
