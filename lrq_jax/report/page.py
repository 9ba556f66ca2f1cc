"""report.html: one self-contained file of a run, from the files of its directory.

Every number the page shows is a field of report.json and says which: `<data data-path=...>`.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from lrq_jax.data import Preprocessing
from lrq_jax.report import plots
from lrq_jax.report_file import REPORT, read_object, read_report
from lrq_jax.run_directory import ARRAYS, METRICS, PAGE

_GRIDS = 4
"""Grids of synthetic images shown: the first, the last and some between."""


def write_page(run: str | Path, preprocessing: Preprocessing | None = None) -> Path:
    """Writes `report.html` into a finished run's directory; returns its path.

    Args:
      run: the directory.
      preprocessing: to undo where single images are shown; None leaves those out.

    Raises:
      FileNotFoundError: no finished run there.
      ValueError: an export, or a report that cannot be read.
    """
    run = Path(run)
    report = read_report(run)
    if "run" in read_object(run / REPORT):
        raise ValueError(
            f"{run}: found an export, expected the directory of the run it was made from; an "
            "export's own page is its README.md"
        )
    text = render("run.html", report=report, pictures=_pictures(run, report, preprocessing))
    path = run / PAGE
    temporary = path.with_name(f".{PAGE}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def render(template: str, **values: Any) -> str:
    """A page from a template beside this module; autoescaped."""
    import jinja2
    import markupsafe

    def cell(value: Any, path: str, digits: int | None = None) -> str:
        """A value marked with its place in a report; `-` where there is none."""
        html = markupsafe.Markup('<data data-path="{}" value="{}">{}</data>')
        return html.format(path, json.dumps(value), _shown(value, digits))

    def field(source: dict[str, Any], path: str, digits: int | None = None) -> str:
        return cell(lookup(source, path), path, digits)

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lrq_jax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(field=field, cell=cell)
    return environment.get_template(template).render(**values)


def _shown(value: Any, digits: int | None) -> str:
    if value is None:
        return "-"
    if digits is not None:
        return f"{value:,.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def lookup(source: Any, path: str) -> Any:
    """What stands at `a/b/3/c` in nested dicts and lists.

    Raises:
      KeyError: nothing there.
    """
    for part in path.split("/"):
        source = source[int(part)] if isinstance(source, list) else source[part]
    return source


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _pictures(run: Path, report: dict[str, Any], preprocessing: Preprocessing | None) -> dict[str, Any]:  # fmt: skip
    """Data URIs by what they show; what a run has no files for is left out."""
    found: dict[str, Any] = {"grids": [], "nearest": []}
    grids = sorted((run / "images").glob("*.png"))
    places = np.unique(np.linspace(0, len(grids) - 1, min(_GRIDS, len(grids))).astype(int))
    for path in (grids[place] for place in places):
        found["grids"].append({"name": path.stem, "uri": _uri(plots.grid_jpeg(path), "jpeg")})
    if (run / METRICS).is_file():
        lines = (run / METRICS).read_text(encoding="utf-8").splitlines()
        curves = plots.loss_curves([json.loads(line) for line in lines])
        if curves:
            found["losses"] = _uri(curves, "svg+xml")
    if "layers" in report:
        found["layers"] = _uri(plots.layer_chart(report["layers"]), "svg+xml")
        found["histogram"] = _uri(plots.histogram(report["histogram"]), "svg+xml")
        if report["batch_norms"]:
            chart = plots.statistics_chart(report["batch_norms"])
            found["batch_norms"] = _uri(chart, "svg+xml")
    if (run / ARRAYS).is_file():
        with np.load(run / ARRAYS) as arrays:
            points = [arrays[name] for name in ("teacher_map", "student_map", "labels")]
            found["map"] = _uri(plots.class_map(*points), "svg+xml")
            if "nearest" in arrays and preprocessing is not None:
                found["nearest"] = _pairs(arrays["images"], arrays["nearest"], preprocessing)
    return found


def _pairs(images: np.ndarray, nearest: np.ndarray, preprocessing: Preprocessing) -> list[dict[str, str]]:  # fmt: skip
    mean, std = np.asarray(preprocessing.mean), np.asarray(preprocessing.std)

    def uri(image: np.ndarray) -> str:
        pixels = np.clip(np.rint((image * std + mean) * 255), 0, 255).astype(np.uint8)
        return _uri(plots.image_png(pixels), "png")

    return [
        {"synthetic": uri(image), "real": uri(real)}
        for image, real in zip(images, nearest, strict=False)  # only the first have a nearest one
    ]
