"""What a finished student does, beside its teacher, on synthetic images; needs no data."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrq_jax.data import EvalData, Preprocessing, batches
from lrq_jax.passes import Student, student_forward
from lrq_jax.passes.float_forward import Variables, float_forward
from lrq_jax.passes.integer_forward import integer_forward
from lrq_jax.report.layers import layer_rows

NEAREST = 10
"""Synthetic images that are shown beside their nearest real one."""

_REAL_IMAGES = 500
_BINS = 64


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What `measure` found.

    Attributes:
      facts: JSON-ready, for report.json.
      arrays: what only pictures need: `images` float32 `[N, H, W, C]` (normalised), `labels`
        `[N]`, `teacher_map` and `student_map` `[N, 2]`; with data `nearest` `[10, H, W, C]`.
    """

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]


def measure(student: Student, tree: dict[str, Any], codes: dict[str, Any], *,
            teacher_variables: Variables, images: np.ndarray, labels: np.ndarray,
            data: EvalData | None, preprocessing: Preprocessing) -> Measured:  # fmt: skip
    """Layer by layer: signal to quantization noise, batch-norm match, classes in the plane.

    The noise of a tensor is its difference from the teacher's on the same images,
    `10 log10(sum t^2 / sum (t - s)^2)` dB; it holds the rounding of all layers before it and what
    training changed.

    Args:
      student: static description.
      tree: what its forward runs on: the frozen integers, or the variables of a `paper` student.
      codes: as stored.
      teacher_variables: of the float network.
      images: synthetic `[N, H, W, C]`, normalised; `labels` `[N]` are the classes asked for.
      data: real images of the user, to show the nearest of some synthetic ones; or None.
      preprocessing: of the teacher, for `data`.
    """
    graph = student.graph
    found = jax.device_get(_compare(student, teacher_variables, tree, jnp.asarray(images)))
    rows = layer_rows(student, codes)
    for row in rows:
        row["sqnr_db"] = _decibel(*found["power"][row["output"]])
    statistics = teacher_variables["batch_stats"]
    norms = [
        {"layer": layer.name, **_match(found["moments"][layer.name], statistics[layer.name], layer.eps)}
        for layer in graph.batch_norms
    ]  # fmt: skip
    teacher_class, student_class = (found[name].argmax(-1) for name in ("teacher", "student"))
    facts = {
        "layers": rows,
        "size": {name: sum(row[name] for row in rows) for name in ("bytes", "float_bytes")},
        "batch_norms": norms,
        "synthetic": {
            "images": len(images),
            "teacher_as_asked": _percent(teacher_class == labels),
            "agreement": _percent(teacher_class == student_class),
        },
        "histogram": _histogram(rows, codes, teacher_variables),
    }
    arrays = {"images": np.asarray(images), "labels": np.asarray(labels)}
    features = found["features"]
    arrays["teacher_map"], arrays["student_map"] = _plane(*features)
    if data is not None:
        arrays["nearest"] = _nearest(
            student, teacher_variables, features[0][:NEAREST], data, preprocessing, len(images)
        )
    return Measured(facts=facts, arrays=arrays)


@functools.partial(jax.jit, static_argnums=0)
def _compare(student: Student, variables: Variables, tree: Any, images: jax.Array) -> dict[str, Any]:  # fmt: skip
    """Both networks once; powers of signal and noise, moments before batch norms, features."""
    graph = student.graph
    names = tuple(dict.fromkeys((*(op.output for op in student.operations), graph.features)))
    before = tuple(layer.inputs[0] for layer in graph.batch_norms)
    floats = float_forward(graph, variables, images, (*names, *before))
    if student.is_integer:
        made = {op.output for op in student.operations}
        ours = integer_forward(
            student.operations, tree, images, tuple(name for name in names if name in made),
            input_bits=student.spec.boundary_bits,
        )  # fmt: skip
    else:
        ours = student_forward(student, tree, images, names)
    power = {
        name: (jnp.sum(jnp.square(floats[name])), jnp.sum(jnp.square(floats[name] - ours[name])))
        for name in ours
    }
    moments = {}
    for layer in graph.batch_norms:
        x = floats[layer.inputs[0]]
        axes = tuple(range(x.ndim - 1))
        moments[layer.name] = x.mean(axes), x.var(axes)
    flat = lambda x: x.reshape(len(images), -1)  # noqa: E731
    features = flat(floats[graph.features]), flat(ours.get(graph.features, floats[graph.features]))
    return {
        "power": power,
        "moments": moments,
        "features": features,
        "teacher": floats[graph.output],
        "student": ours[graph.output],
    }


def _decibel(signal: float, noise: float) -> float | None:
    """None where there is no noise at all, or no signal."""
    return round(10 * float(np.log10(signal / noise)), 2) if noise > 0 and signal > 0 else None


def _match(moments: tuple[np.ndarray, np.ndarray], running: dict[str, np.ndarray], eps: float) -> dict[str, float]:  # fmt: skip
    """How near a batch's statistics are to the running ones, means over channels.

    `mean_error` in running standard deviations (0 is exact); `std_ratio` of the two standard
    deviations (1 is exact).
    """
    deviation = np.sqrt(np.asarray(running["var"]) + eps)
    error = np.abs(moments[0] - running["mean"]) / deviation
    ratio = np.sqrt(moments[1] + eps) / deviation
    return {
        "mean_error": round(float(error.mean()), 4),
        "std_ratio": round(float(ratio.mean()), 4),
    }


def _percent(right: np.ndarray) -> float:
    return round(100 * float(right.mean()), 4)


def _histogram(rows: list[dict[str, Any]], codes: dict[str, Any], teacher: Variables) -> dict[str, Any]:  # fmt: skip
    """Weights of the teacher and codes of the student, of the layer with the most noise."""
    measured = [row for row in rows if row["sqnr_db"] is not None] or rows
    worst = min(measured, key=lambda row: row["sqnr_db"] or 0)
    kernel = np.asarray(teacher["params"][worst["layer"]]["kernel"]).ravel()
    counts, edges = np.histogram(kernel, bins=_BINS)
    stored = np.asarray(codes["weights"][worst["layer"]]["codes"]).ravel()
    return {
        "layer": worst["layer"],
        "weight_edges": [float(f"{edge:.6g}") for edge in edges],
        "weights": counts.tolist(),
        "codes": np.bincount(stored, minlength=2 ** worst["weight_bits"]).tolist(),
    }


def _plane(teacher: np.ndarray, student: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sets of features in the plane of the teacher's two largest principal components."""
    centre = teacher.mean(0)
    _, _, axes = np.linalg.svd(teacher - centre, full_matrices=False)
    plane = np.zeros((teacher.shape[1], 2), teacher.dtype)
    plane[:, : min(2, len(axes))] = axes[:2].T
    return (teacher - centre) @ plane, (student - centre) @ plane


@functools.partial(jax.jit, static_argnums=0)
def _features(student: Student, variables: Variables, images: jax.Array) -> jax.Array:
    graph = student.graph
    found = float_forward(graph, variables, images, (graph.features,))[graph.features]
    return found.reshape(len(images), -1)


def _nearest(student: Student, variables: Variables, wanted: np.ndarray, data: EvalData,
             preprocessing: Preprocessing, batch_size: int) -> np.ndarray:  # fmt: skip
    """The real images nearest to `wanted` in the teacher's features, of 500 at equal distances."""
    chosen = np.linspace(0, data.num_examples - 1, min(_REAL_IMAGES, data.num_examples)).astype(int)
    source = [data.source[int(index)] for index in chosen]
    some = EvalData(name=data.name, num_examples=len(source), class_names=None, source=source)
    best, images = np.full(len(wanted), np.inf), [np.zeros(())] * len(wanted)
    for batch in batches(some, preprocessing, batch_size=batch_size):
        features = np.asarray(_features(student, variables, jnp.asarray(batch.images)))
        distance = np.linalg.norm(features[None, batch.mask] - wanted[:, None], axis=-1)
        for row, column in enumerate(distance.argmin(1)):
            if distance[row, column] < best[row]:
                best[row], images[row] = distance[row, column], batch.images[column]
    return np.stack(images)
