"""Where evaluation images come from: an image folder, scikit-learn's digits, a prepared TFDS."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrq_jax.data import folder as folder_lib
from lrq_jax.data.pixels import decode_image
from lrq_jax.paths import cache_directory

Example = tuple[np.ndarray, int]

DIGITS_TEST = 500  # images of the test split; the other 1,297 are "train"
DIGITS_SEED = 0
DIGITS_SIDE = 16  # pixels, enlarged from 8


@dataclasses.dataclass(frozen=True, eq=False)
class EvalData:
    """Labelled images, read one by one when asked for.

    Attributes:
      name: what results are filed under, e.g. `digits/test` or the name of the image folder.
      num_examples: how many images; the length of `source`.
      class_names: names by class index, or None where only numbers are known.
      largest_label: of all images, or None where finding out would mean reading them.
      source: random access; `source[i]` is (uint8 [H, W, C] with C = 1 or 3, int label). The order
        is fixed; that of a folder is by class, so its first images are no fair sample.

    Raises:
      ValueError: `num_examples` is not the length of `source`, or there are none.
    """

    name: str
    num_examples: int
    class_names: tuple[str, ...] | None
    source: Sequence[Example]
    largest_label: int | None = None

    def __post_init__(self) -> None:
        if self.num_examples != len(self.source) or self.num_examples < 1:
            raise ValueError(
                f"data {self.name!r}: found num_examples {self.num_examples} and a source of "
                f"{len(self.source)} images, expected the same number, at least 1"
            )


def load_data(
    *, name: str = "", path: str = "", split: str = "test", cache_dir: str | None = None
) -> EvalData:
    """Finds evaluation images. Give `name` or `path`, not both.

    Args:
      name: "digits" (scikit-learn's 1,797 digits, enlarged to 16 x 16 x 1), or a TFDS dataset that
        is already prepared as array_record below $TFDS_DATA_DIR (default ~/tensorflow_datasets):
        "cifar10", "cifar10:3.0.2" or "name/config". Without a version: the newest there is.
      path: an image folder with labels.csv, or with a sub-folder a class; see
        `folder.list_images`. It is made once into a TFDS dataset below `cache_dir` and made again
        when a file changes.
      split: "train" or "test" of digits; any split TFDS knows of a prepared dataset
        ("validation", "test[:10%]"). Not used with `path`: a folder is one split.
      cache_dir: default $LRQ_CACHE, or ~/.cache/lrq_jax.

    Returns:
      The images, in a fixed order.

    Raises:
      FileNotFoundError: the folder, a listed file or the prepared dataset is not there.
      ValueError: both or neither of `name` and `path`; or what is there cannot be used.
    """
    if bool(name) == bool(path):
        raise ValueError(
            f"found data.name={name!r} and data.path={path!r}, expected exactly one of them: a "
            "name ('digits' or a prepared TFDS dataset) or the path of an image folder"
        )
    if path:
        return _load_folder(path, cache_dir)
    if name == "digits":
        return _load_digits(split)
    return _load_prepared(name, split)


def _load_folder(path: str, cache_dir: str | None) -> EvalData:
    images = folder_lib.list_images(path)
    made = folder_lib.build(images, str(cache_dir or cache_directory()))
    _, source = _open(made, folder_lib.SPLIT)
    return EvalData(
        name=os.path.basename(images.root) or images.root,
        num_examples=len(images.files),
        class_names=images.class_names,
        source=source,
        largest_label=max(images.labels),
    )


def _load_digits(split: str) -> EvalData:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "data.name='digits' found no scikit-learn, which holds the images; "
            "pip install scikit-learn, or use data.path with an image folder"
        ) from error
    from PIL import Image

    if split not in ("train", "test"):
        raise ValueError(f"digits: found split {split!r}, expected 'train' or 'test'")
    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)),
        test_size=DIGITS_TEST,
        stratify=digits.target,
        random_state=DIGITS_SEED,
    )
    size = (DIGITS_SIDE, DIGITS_SIDE)
    examples = []
    for index in train if split == "train" else test:
        pixels = np.rint(digits.images[index] * (255 / 16)).astype(np.uint8)  # stored as 0 .. 16
        enlarged = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
        examples.append((np.asarray(enlarged)[:, :, None], int(digits.target[index])))
    return EvalData(
        name=f"digits/{split}",
        num_examples=len(examples),
        class_names=tuple(str(digit) for digit in digits.target_names),
        source=tuple(examples),
    )


def _load_prepared(name: str, split: str) -> EvalData:
    data_dir = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    builder, source = _open(_prepared_folder(data_dir, name), split)
    label = builder.info.features["label"]
    names = getattr(label, "names", None)  # a ClassLabel has names, a plain integer has not
    return EvalData(
        name=f"{builder.info.full_name}/{split}",
        num_examples=len(source),
        class_names=tuple(names) if names else None,
        source=source,
    )


def _prepared_folder(data_dir: Path, name: str) -> Path:
    """The folder of a prepared TFDS dataset, `<data_dir>/<name>[/<config>]/<version>`.

    TFDS' own lookup imports the dataset's code, which may import TensorFlow; the files say enough.
    """
    wanted = data_dir.joinpath(*name.replace(":", "/").split("/"))
    found = sorted(path.parent for path in wanted.glob("*/features.json"))
    if (wanted / "features.json").is_file():
        return wanted
    if found:
        return max(found, key=_version)
    deeper = sorted(
        str(path.parent.parent.relative_to(data_dir)) for path in wanted.glob("*/*/features.json")
    )
    if deeper:
        raise ValueError(
            f"data.name={name!r}: found several configurations in {wanted}, expected one to be "
            f"named; use one of {sorted(set(deeper))}"
        )
    raise FileNotFoundError(
        f"data.name={name!r}: found no prepared dataset in {wanted} (the folder is "
        "$TFDS_DATA_DIR, or ~/tensorflow_datasets), expected <version>/features.json there; "
        "prepare it once where TensorFlow is installed, with tensorflow_datasets.builder("
        f"{name!r}).download_and_prepare(file_format='array_record'), or use data.path with an "
        "image folder"
    )


def _version(path: Path) -> tuple[int, ...]:
    """(1, 10, 0) for `.../1.10.0`, so that it is newer than 1.9.0; () for anything else."""
    parts = path.name.split(".")
    return tuple(int(part) for part in parts) if all(p.isdecimal() for p in parts) else ()


def _open(folder: Path, split: str) -> tuple[Any, TfdsSource]:
    """The builder of a prepared dataset and random access to its images."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise ValueError(
            f"{folder}: found a dataset prepared as {', '.join(sorted(formats))}, expected "
            "array_record, the one that can be read without TensorFlow; convert it once where "
            f"TensorFlow is installed: tfds convert_format --dataset_version_dir={folder} "
            "--out_file_format=array_record"
        )
    features = builder.info.features
    if not _is_classification(features):
        raise ValueError(
            f"{folder}: found the features {sorted(features)}, expected an image named 'image' and "
            "an integer named 'label'; use a classification dataset, or data.path"
        )
    try:
        records = builder.as_data_source(
            split,
            decoders={"image": tfds.decode.SkipDecoding()},
            file_format="array_record",
        )
        return builder, TfdsSource(records, f"{builder.info.full_name}/{split}")
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{folder}: found no split {split!r} ({error}), expected one of "
            f"{sorted(builder.info.splits)}; set data.split"
        ) from error


def _is_classification(features: Any) -> bool:
    """Whether a record is an encoded `image` and one integer `label`."""
    import tensorflow_datasets as tfds

    if not {"image", "label"} <= set(features):
        return False
    image, label = features["image"], features["label"]
    return (
        isinstance(image, tfds.features.Image)
        and isinstance(label, tfds.features.Tensor)  # Scalar and ClassLabel are such
        and label.shape == ()
        and np.issubdtype(label.np_dtype, np.integer)
    )


class TfdsSource(Sequence[Example]):
    """Decodes the records of a TFDS data source with Pillow. Safe to read from several threads.

    TFDS' own decoding gives mixed shapes for grey and RGB images, and uses OpenCV if it is there.
    """

    def __init__(self, records: Any, name: str) -> None:
        """Keeps `records` (dicts of encoded image, label and perhaps file); `name` is for errors."""
        self._records = records
        self._name = name

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        """(uint8 [H, W, C], label) of one index.

        Raises:
          IndexError: outside -len .. len - 1.
          ValueError: an image that cannot be decoded or a label outside 0 .. 2**31 - 1.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        record = self._records[number]
        where = f"{self._name}, image {number}"
        if "file" in record:
            where += f" ({record['file'].decode(errors='replace')})"
        try:
            image, _ = decode_image(record["image"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        label = int(record["label"])
        if not 0 <= label <= folder_lib.MAX_LABEL:
            raise ValueError(
                f"{where}: found label {label}, expected 0 .. {folder_lib.MAX_LABEL}; a split "
                "without labels cannot be evaluated, use another data.split"
            )
        return image, label
