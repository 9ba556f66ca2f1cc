"""The files of a run: config, metrics, images, report. Written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrq_jax.config import differences
from lrq_jax.data import Preprocessing
from lrq_jax.paths import make_parents
from lrq_jax.report_file import CONFIG, REPORT, read_object, read_report, temporary_path, write_json

METRICS, TIMINGS = "metrics.jsonl", "timings.json"
ARRAYS, PAGE, STUDENT = "report.npz", "report.html", "student"


class RunDirectory:
    """One run's directory.

    Args:
      path: of the directory.
      config: JSON-ready; what tells runs apart.
      writes: False in all but the first of several processes: they read, and write nothing.

    Raises:
      FileExistsError: the directory holds a run with another config; the fields are named.
      NotADirectoryError: the path is a file, or below one.
      ValueError: a report or timings that cannot be read; the file is named.
    """

    def __init__(self, path: str | Path, config: dict[str, Any], *, writes: bool = True) -> None:
        self.path, self._writes = Path(path), writes
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"workdir: found a file at {path}, expected a directory")
        make_parents(self.path, "workdir")
        self.path.mkdir(exist_ok=True)
        config = json.loads(json.dumps(config))  # tuples become lists, as they will be read
        if (self.path / CONFIG).exists():
            changed = differences(self._earlier_config(), config)
            if changed:
                raise FileExistsError(
                    f"workdir {path}: found a run with another config:\n  "
                    + "\n  ".join(changed)
                    + "\nexpected the same one to resume it; choose another --workdir, or repeat "
                    "the run's own settings"
                )
        else:
            # A start killed while it wrote the config leaves its temporary file: no one else's.
            names = {entry.name for entry in self.path.iterdir()} - {
                temporary_path(self.path / CONFIG).name
            }
            if others := sorted(names):
                raise FileExistsError(
                    f"workdir {path}: found files but no {CONFIG}: {others[:5]}; expected an empty "
                    "directory or an earlier run's; choose another --workdir"
                )
            if writes:
                write_json(self.path / CONFIG, config)
        _ = self.report, self.timings()  # refused now if they cannot be read
        self._events: Any = None

    def _earlier_config(self) -> dict[str, Any]:
        try:
            earlier = json.loads((self.path / CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            earlier = error
        if not isinstance(earlier, dict):
            raise FileExistsError(
                f"workdir {self.path}: found a {CONFIG} that is not a run's ({earlier!r}), expected "
                "an empty directory or an earlier run's; choose another --workdir"
            )
        return earlier

    @property
    def checkpoints(self) -> Path:
        """Where training checkpoints go."""
        return self.path / "checkpoints"

    @property
    def pool(self) -> Path:
        """Where finished batches of noise images go."""
        return self.path / "pool"

    @property
    def student(self) -> Path:
        """Where the finished student's codes and scales go."""
        return self.path / STUDENT

    @property
    def report(self) -> dict[str, Any] | None:
        """The finished run's report, None before.

        Raises:
          ValueError: there is one, and it cannot be read or is not a run's.
        """
        return read_report(self.path) if (self.path / REPORT).exists() else None

    def write_report(self, report: dict[str, Any]) -> None:
        """Marks the run as finished."""
        write_json(self.path / REPORT, report)

    def write_arrays(self, arrays: dict[str, Any]) -> None:
        """Keeps what the report's pictures are made of."""
        temporary = temporary_path(self.path / ARRAYS)
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(temporary, self.path / ARRAYS)

    def timings(self) -> dict[str, float]:
        """Wall seconds per phase so far, over all starts of the run."""
        return read_object(self.path / TIMINGS) if (self.path / TIMINGS).exists() else {}

    def write_timings(self, timings: dict[str, float]) -> None:
        """Replaces the wall seconds per phase."""
        if self._writes:
            write_json(self.path / TIMINGS, timings)

    # --- metrics ---

    def open_metrics(self, step: int) -> None:
        """Prepares the metrics for a run that continues after `step`: later lines, of steps that
        were lost and will be repeated, are dropped."""
        if not self._writes:
            return
        path = self.path / METRICS
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            temporary = temporary_path(path)
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(temporary, path)
        self._events = _summary_writer()(str(self.path / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, phase: str, metrics: dict[str, float]) -> None:
        """Appends a line to metrics.jsonl and the scalars to the TensorBoard events."""
        if not self._writes:
            return
        line = json.dumps({"step": step, "phase": phase, **metrics})
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes the events."""
        if self._events is not None:
            self._events.close()

    # --- images ---

    def write_images(self, name: str, images: np.ndarray, labels: Sequence[int] | np.ndarray,
                     preprocessing: Preprocessing, class_names: Sequence[str] | None) -> None:  # fmt: skip
        """Writes a labelled grid of images as `images/NAME.png`.

        Args:
          name: file name without ending.
          images: `[N, H, W, C]` in the network's normalised input space.
          labels: N class indices.
          preprocessing: the normalisation to undo.
          class_names: names to write below; None writes the numbers.
        """
        if not self._writes:
            return
        directory = self.path / "images"
        directory.mkdir(exist_ok=True)
        names = [str(label) if class_names is None else class_names[label] for label in labels]
        grid = _image_grid(_to_pixels(images, preprocessing), names)
        temporary = directory / f".{name}.new"
        grid.save(temporary, format="PNG")
        os.replace(temporary, directory / f"{name}.png")


def _summary_writer() -> Any:
    """tensorboardX's SummaryWriter, imported as if there were no torch: for tensors that it is never
    given here it imports torch where that is installed, which takes seconds."""
    hidden: dict[str, Any] = {} if "torch" in sys.modules else {"torch": None}
    sys.modules.update(hidden)
    try:
        from tensorboardX import SummaryWriter
    finally:
        for name in hidden:
            del sys.modules[name]
    return SummaryWriter


def _step_of(line: str) -> float:
    """Step of a metrics line; a line cut short by a kill counts as later than any."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _to_pixels(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Normalised images as uint8 `[N, H, W, 3]`."""
    mean, std = np.asarray(preprocessing.mean), np.asarray(preprocessing.std)
    pixels = np.clip(np.rint((np.asarray(images) * std + mean) * 255), 0, 255).astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:3], 3)) if pixels.shape[3] == 1 else pixels


def _image_grid(pixels: np.ndarray, names: list[str], *, columns: int = 10) -> Any:
    """PIL image: tiles enlarged to at least 64 pixels, each with its name below."""
    from PIL import Image, ImageDraw

    factor = max(1, -(-64 // pixels.shape[1]))
    height, width, text = pixels.shape[1] * factor, pixels.shape[2] * factor, 14
    columns = min(columns, len(pixels))
    rows = -(-len(pixels) // columns)
    canvas = Image.new("RGB", (columns * (width + 4), rows * (height + text + 4)), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (tile, name) in enumerate(zip(pixels, names, strict=True)):
        left, top = index % columns * (width + 4) + 2, index // columns * (height + text + 4) + 2
        image = Image.fromarray(np.ascontiguousarray(tile))
        canvas.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.text((left, top + height + 1), name[: width // 6], fill="black")
    return canvas
