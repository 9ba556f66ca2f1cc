"""The report's pictures, as bytes: SVG by matplotlib, grids of images by Pillow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_WIDEST_GRID = 1100
"""Pixels; wider grids are scaled down, so that a page of 224 px images stays small."""


def _figure(columns: int = 1, height: float = 2.6) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no window, nothing global

    matplotlib.rcParams["svg.hashsalt"] = "lrq_jax"  # the same run gives the same bytes
    figure = Figure(figsize=(7.2, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _whole_numbers(axes: Any) -> None:
    """Ticks of layers and steps: there is no layer 1.5."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _svg(figure: Any) -> bytes:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def loss_curves(lines: Sequence[dict[str, Any]]) -> bytes | None:
    """Generator's and student's losses by step, SVG; None where nothing was logged.

    Args:
      lines: of metrics.jsonl: `step`, `phase` and values by name.
    """
    names = sorted({name for line in lines for name in line} - {"step", "phase"})
    groups = [g for g in ("generator", "student") if any(n.startswith(f"{g}/") for n in names)]
    if not groups:
        return None
    figure, row = _figure(len(groups))
    for axes, group in zip(row, groups, strict=True):
        lowest = np.inf
        for name in (name for name in names if name.startswith(f"{group}/")):
            points = [(line["step"], line[name]) for line in lines if name in line]
            marker = "o" if len(points) == 1 else None  # a line of one point shows nothing
            label = name.partition("/")[2]
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, marker=marker)
            lowest = min(lowest, *(value for _, value in points))
        if lowest > 0:
            axes.set_yscale("log")
        axes.set_title(group, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        _whole_numbers(axes)
        axes.legend(fontsize=7, frameon=False)
    return _svg(figure)


def layer_chart(rows: Sequence[dict[str, Any]]) -> bytes:
    """Signal to quantization noise by layer, SVG."""
    figure, (axes,) = _figure()
    measured = [(i, row["sqnr_db"]) for i, row in enumerate(rows) if row["sqnr_db"] is not None]
    if measured:
        axes.bar(*zip(*measured, strict=True), color="#4878a8")
    axes.set_xlabel("layer, in order", fontsize=8)
    _whole_numbers(axes)
    axes.set_ylabel("dB", fontsize=8)
    return _svg(figure)


def histogram(facts: dict[str, Any]) -> bytes:
    """Weights of a layer's teacher, and the codes it ships as, SVG."""
    figure, (left, right) = _figure(2)
    left.stairs(facts["weights"], facts["weight_edges"], fill=True, color="#4878a8")
    left.set_title("float weights of the teacher", fontsize=9)
    right.bar(range(len(facts["codes"])), facts["codes"], color="#c8783c")
    right.set_title("codes of the student", fontsize=9)
    _whole_numbers(right)
    return _svg(figure)


def statistics_chart(rows: Sequence[dict[str, Any]]) -> bytes:
    """How near synthetic images come to the statistics of each batch norm, SVG."""
    figure, (left, right) = _figure(2)
    places = range(len(rows))
    left.bar(places, [row["mean_error"] for row in rows], color="#4878a8")
    left.set_title("error of the mean, in standard deviations", fontsize=9)
    right.bar(places, [row["std_ratio"] for row in rows], color="#c8783c")
    right.axhline(1, color="black", linewidth=0.8)
    right.set_title("standard deviation, ratio to the running one", fontsize=9)
    for axes in (left, right):
        axes.set_xlabel("batch norm, in order", fontsize=8)
        _whole_numbers(axes)
    return _svg(figure)


def class_map(teacher: np.ndarray, student: np.ndarray, labels: np.ndarray) -> bytes:
    """Features `[N, 2]` of both networks in the teacher's plane, coloured by class, SVG."""
    figure, (left, right) = _figure(2, height=3.4)
    for axes, points, title in ((left, teacher, "teacher"), (right, student, "student")):
        axes.scatter(*points.T, c=labels % 20, cmap="tab20", s=12, linewidths=0)
        axes.set_title(title, fontsize=9)
        axes.set_xlim(*_span(teacher[:, 0], student[:, 0]))
        axes.set_ylim(*_span(teacher[:, 1], student[:, 1]))
    return _svg(figure)


def _span(*values: np.ndarray) -> tuple[float, float]:
    """The same limits for both networks, with a margin."""
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    margin = 0.05 * float(high - low) or 1.0
    return float(low) - margin, float(high) + margin


def grid_jpeg(path: Path) -> bytes:
    """A grid of a run's `images/`, small enough to be embedded."""
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if image.width > _WIDEST_GRID:
        height = round(image.height * _WIDEST_GRID / image.width)
        image = image.resize((_WIDEST_GRID, height))
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=85)
    return out.getvalue()


def image_png(pixels: np.ndarray, *, side: int = 64) -> bytes:
    """One image, uint8 `[H, W, 1 or 3]`, as a PNG of `side` pixels."""
    from PIL import Image

    image = Image.fromarray(
        np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    )
    kind = Image.Resampling.NEAREST if image.width <= side else Image.Resampling.BILINEAR
    out = io.BytesIO()
    image.resize((side, side), kind).save(out, format="PNG")
    return out.getvalue()
