"""The main job: a teacher in, a quantized student and an honest report out."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.tree_util import Partial

from lrq_jax import __version__
from lrq_jax.config import RunSettings
from lrq_jax.console import coloured, say
from lrq_jax.data import EvalData, Preprocessing, load_data
from lrq_jax.evaluation import Accuracy, check_data, evaluate
from lrq_jax.hints import preprocessing_warning
from lrq_jax.method import Method
from lrq_jax.passes import Student, float_logits, frozen_logits, student_forward
from lrq_jax.passes.equalization import equalized
from lrq_jax.processes import is_first, wait_for_all
from lrq_jax.readers.teacher import Teacher, teacher_hash
from lrq_jax.report import Measured, measure, write_page
from lrq_jax.reproduce import command
from lrq_jax.run_directory import PAGE, RunDirectory
from lrq_jax.sharding import data_mesh, local_mesh
from lrq_jax.synthesis.generator import GeneratorSpec
from lrq_jax.training.compilation import put_replicated
from lrq_jax.training.loop import TrainingLoop
from lrq_jax.training.noise_pool import check_pool
from lrq_jax.training.real_pool import training_data
from lrq_jax.training.steps import StepSpec, final_student
from lrq_jax.writers.codes import frozen_from_codes, load_student, save_student

_PREVIEWED = 120
"""Synthetic images that a finished student is measured on, or all there are."""

_PAIRS = 20
"""Most frequent disagreements that a report lists."""

_FIRST_LOOK = 256
"""Images on which a teacher's recorded accuracy is checked before the run."""

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


def normalised_range(preprocessing: Preprocessing) -> tuple[float, float]:
    """Smallest and largest value a normalised image can hold, from pixels in [0, 1]."""
    pairs = list(zip(preprocessing.mean, preprocessing.std, strict=True))
    return min(-mean / std for mean, std in pairs), max((1 - mean) / std for mean, std in pairs)


def step_spec(teacher: Teacher, settings: RunSettings, mesh: jax.sharding.Mesh | None) -> StepSpec:  # fmt: skip
    """The static description of a run's training steps.

    Raises:
      ValueError: settings the network does not admit, or a network that cannot be trained.
    """
    method = settings.method
    _check_network(teacher, method)
    student = Student(
        graph=teacher.graph,
        spec=settings.student,
        input_range=normalised_range(teacher.preprocessing),
    )
    try:
        _ = student.operations  # refuses impossible overrides now, not at the first step
    except ValueError as error:
        raise ValueError(f"student.{error}") from error
    for name, neutral in (("rounding", "nearest"), ("bias_correction", False)):
        if getattr(method, name) != neutral and not student.is_integer:
            raise ValueError(
                f"method.{name}: found {getattr(method, name)!r} with student.placement="
                f"{settings.student.placement!r}, expected {neutral!r} or the integer placement"
            )
    if method.cam_alignment:
        try:
            _ = teacher.graph.last_map
        except ValueError as error:
            raise ValueError(f"method.cam_alignment: {error}") from error
    if method.channel_alignment and method.equalize:
        raise ValueError(
            "method.equalize: found True with channel_alignment, expected False: equalization "
            "rescales the channels whose shares are aligned with the teacher's"
        )
    if method.noise_spectrum and method.noise_parameters != "pixels":
        raise ValueError(
            f"method.noise_spectrum: found {method.noise_spectrum} with noise_parameters="
            f"{method.noise_parameters!r}, expected 0: a generator makes the spectrum it likes"
        )
    devices = 1 if mesh is None else mesh.devices.size
    parts = {"batch_size": devices * settings.resources.micro_batches}
    if method.makes_pool:
        parts["noise_batch_size"] = devices
    for name, count in parts.items():
        if getattr(method, name) % count:
            raise ValueError(
                f"method.{name}: found {getattr(method, name)}, expected a multiple of {count}: "
                f"{devices} devices"
                + (f" x {count // devices} micro_batches" if count > devices else "")
            )
    height, width, channels = teacher.graph.input_shape
    generator = GeneratorSpec(
        image_shape=(height, width, channels),
        num_classes=teacher.graph.num_classes,
        conditioning=method.conditioning,
        attention=method.attention,
        latent_dim=method.latent_dim,
        width=method.generator_width,
    )
    return StepSpec(
        student=student,
        generator=generator,
        method=method,
        mesh=mesh,
        resources=settings.resources,
    )


def _check_network(teacher: Teacher, method: Method) -> None:
    """Finds out now, not in the first step, whether a method's losses are defined on a network."""
    graph = teacher.graph
    try:
        _ = graph.features
    except ValueError as error:
        raise ValueError(
            f"teacher: {error}; the losses compare pooled features and logits, so put the layers "
            "behind the last dense one into it, or leave them out"
        ) from error
    if not graph.batch_norms and (method.trains_generator or method.makes_pool):
        raise ValueError(
            "teacher: found a network without batch norms, expected at least one: images are "
            "matched to their running statistics; convert the network as it was before its batch "
            "norms were folded, or train on real images (method.images=folder, "
            "method.calibration_images=pool)"
        )


def load_eval_data(settings: RunSettings) -> EvalData | None:
    """The evaluation images of a run, None if its settings name none."""
    if not (settings.data_name or settings.data_path):
        return None
    return load_data(name=settings.data_name, path=settings.data_path, split=settings.data_split)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run that was found possible: everything checked that can be before any work."""

    teacher: Teacher
    settings: RunSettings
    data: EvalData | None
    spec: StepSpec
    run: RunDirectory
    config: dict[str, Any]


def prepare(teacher: Teacher, settings: RunSettings, data: EvalData | None, workdir: str | Path) -> Job:  # fmt: skip
    """Checks the input of a run and opens its directory.

    Args:
      teacher: the trained float network.
      settings: of `lrq_jax.config.resolve`.
      data: labelled images for evaluation only, or None.
      workdir: the run directory.

    Raises:
      ValueError: settings the network does not admit, or data that is not for this teacher.
      FileExistsError: `workdir` holds a run with other settings.
      NotADirectoryError: `workdir` is a file.
    """
    spec = step_spec(teacher, settings, data_mesh())
    if data is not None:
        check_data(data, teacher.preprocessing, teacher.graph.num_classes)
    config = {**settings.to_dict(), "teacher_sha256": teacher_hash(teacher)}
    if settings.method.images == "folder":
        images = training_data(settings.train_path, count=settings.train_images)
        check_data(images, teacher.preprocessing, teacher.graph.num_classes)
    if settings.pool_path:
        check_pool(settings.pool_path, config)
    run = RunDirectory(workdir, config, writes=is_first())
    wait_for_all("run directory")  # all look at it before the first one writes anything else
    return Job(
        teacher=teacher,
        settings=settings,
        data=data,
        spec=spec,
        run=run,
        config=config,
    )


def quantize(job: Job) -> dict[str, Any]:
    """Quantizes a teacher without data and reports.

    A second call on the same directory resumes; after a finished one it only returns the report.
    Of several processes all train, and the first one writes, evaluates and reports.

    Returns:
      The report, as written to `report.json` in the run directory; of processes but the first {}.

    Raises:
      TrainingDiverged: a loss stopped being finite.
    """
    spec, settings, run = job.spec, job.settings, job.run
    if run.report is not None:
        say(f"{run.path}: finished already; its report:")
        if is_first() and not (run.path / PAGE).exists():  # killed before it was written
            write_page(run.path, job.teacher.preprocessing)
        return run.report
    jax.config.update("jax_default_matmul_precision", "highest")
    warnings = _check_teacher(job)

    loop = TrainingLoop(spec, job.teacher, settings, run)
    with jax.default_matmul_precision(settings.resources.matmul_precision):
        state = loop.run()
        student = jax.device_get(final_student(state, spec=spec))
    if not is_first():
        return {}

    clock = time.monotonic()
    codes = save_student(
        run.student,
        spec.student,
        student,
        preprocessing=job.teacher.preprocessing,
        provenance={
            "teacher_sha256": job.config["teacher_sha256"],
            "preset": settings.preset,
            "seed": settings.seed,
            "versions": versions(),
        },
    )
    accuracy = _evaluate(job, student)
    measured = _measure(job, *loop.preview(state, _PREVIEWED), student, codes)
    run.write_arrays(measured.arrays)
    timings = {**loop.timings, "evaluation and export": time.monotonic() - clock}
    warnings = warnings or _warn(job, accuracy["teacher"] if accuracy else None)
    run.write_report({**_report(job, accuracy, timings), "warnings": warnings, **measured.facts})
    write_page(run.path, job.teacher.preprocessing)
    return run.report or {}  # as a second call reads it: tuples are lists in JSON


def _measure(job: Job, images: np.ndarray, labels: np.ndarray, variables: Any,
             codes: dict[str, Any]) -> Measured:  # fmt: skip
    """What the report shows of layers and synthetic images."""
    student, teacher = job.spec.student, job.teacher.variables
    if job.spec.method.equalize:  # the same network, its channels scaled as the student's
        teacher = jax.device_get(equalized(student.graph, teacher))
    return measure(
        student,
        frozen_from_codes(codes) if student.is_integer else variables,
        codes,
        teacher_variables=teacher,
        images=images,
        labels=labels,
        data=job.data,
        preprocessing=job.teacher.preprocessing,
    )


def _check_teacher(job: Job) -> list[str]:
    """Warns before a long run, not after it, of a teacher that is fed wrongly: where an accuracy
    is recorded for its file, on some of the images."""
    data = job.data
    if data is None or job.teacher.top1 is None or job.settings.method.steps == 0:
        return []
    chosen = np.linspace(0, data.num_examples - 1, min(_FIRST_LOOK, data.num_examples)).astype(int)
    source = [data.source[int(index)] for index in chosen]
    some = EvalData(name=data.name, num_examples=len(source), class_names=None, source=source)
    found = evaluate(
        {"teacher": _teacher_forward(job)},
        some,
        job.teacher.preprocessing,
        num_classes=job.teacher.graph.num_classes,
        batch_size=min(job.settings.eval_batch_size, len(source)),
        mesh=local_mesh(),
    )
    return _warn(job, found["teacher"])


def _warn(job: Job, teacher: Accuracy | None) -> list[str]:
    """Says where the teacher's accuracy shows that it is fed wrongly; the report's warnings."""
    if teacher is None:
        return []
    warning = preprocessing_warning(
        teacher.top1,
        images=teacher.images,
        num_classes=job.teacher.graph.num_classes,
        recorded=job.teacher.top1,
    )
    if warning is None:
        return []
    say(coloured(f"careful: {warning}", "yellow"))
    return [warning]


def _teacher_forward(job: Job) -> Partial:
    graph = job.teacher.graph
    floats = put_replicated(job.teacher.variables, local_mesh())
    return Partial(lambda variables, images: float_logits(graph, variables, images), floats)


def _evaluate(job: Job, variables: Any) -> dict[str, Accuracy]:
    """Accuracy of the teacher and of the student as read back from its exported codes."""
    spec, teacher, settings, data = job.spec, job.teacher, job.settings, job.data
    if data is None:
        return {}
    graph, mesh = teacher.graph, local_mesh()
    teacher_forward = _teacher_forward(job)
    if spec.student.is_integer:
        student, codes, _ = load_student(job.run.student)
        frozen = put_replicated(frozen_from_codes(codes), mesh)
        forward = Partial(lambda frozen, images: frozen_logits(student, frozen, images), frozen)
    else:
        forward = Partial(
            lambda variables, images: student_forward(
                spec.student, variables, images, (graph.output,)
            )[graph.output],
            put_replicated(variables, mesh),
        )
    say(f"evaluating {data.num_examples} images of {data.name} ...")
    return evaluate(
        {"teacher": teacher_forward, "student": forward},
        data,
        teacher.preprocessing,
        num_classes=graph.num_classes,
        batch_size=settings.eval_batch_size,
        mesh=mesh,
    )


def versions() -> dict[str, str]:
    """Versions of this package and of what it computes with."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"lrq_jax": __version__, "python": platform.python_version(), **found}


def _report(job: Job, accuracy: dict[str, Accuracy], timings: dict[str, float]) -> dict[str, Any]:
    spec, teacher, settings, data = job.spec, job.teacher, job.settings, job.data
    devices = spec.mesh.devices
    percent = {
        name: {"top1": round(value.top1, 4), "top5": round(value.top5, 4)}
        for name, value in accuracy.items()
    }
    measured = bool(accuracy)
    quant = settings.student
    return {
        "teacher": percent.get("teacher", {"top1": None, "top5": None}),
        "student": percent.get("student", {"top1": None, "top5": None}),
        "drop": round(accuracy["teacher"].top1 - accuracy["student"].top1, 4) if measured else None,
        "agreement": round(accuracy["student"].agreement, 4) if measured else None,
        "images": accuracy["student"].images if measured else 0,
        "data": data.name if data else None,
        "network": teacher.graph.name,
        "preset": settings.preset,
        "zero_shot": settings.method.images != "folder",
        "policy": quant.policy,
        "placement": quant.placement,
        "weight_bits": quant.weight_bits,
        "act_bits": quant.act_bits,
        "seed": settings.seed,
        "steps": settings.method.steps,
        "wall_seconds": {name: round(seconds, 1) for name, seconds in timings.items()},
        "device": f"{devices.size} x {devices.flat[0].device_kind}",
        "platform": jax.default_backend(),
        "versions": versions(),
        "teacher_sha256": job.config["teacher_sha256"],
        "teacher_source": {"file": teacher.source, "sha256": teacher.source_sha256},
        "settings": settings.to_dict(),
        "student_path": str(job.run.student.name),
        "command": command(settings, image_size=max(teacher.graph.input_shape[:2])),
        "disagreements": _disagreements(job, accuracy),
    }


def _disagreements(job: Job, accuracy: dict[str, Accuracy]) -> dict[str, Any]:
    """Images that teacher and student class differently, and the commonest pairs of classes."""
    if not accuracy:
        return {"images": None, "pairs": []}
    names = job.teacher.class_names
    name = lambda index: str(index) if names is None or index < 0 else names[index]  # noqa: E731
    found = accuracy["student"].disagreements
    return {
        "images": sum(count for *_, count in found),
        "pairs": [
            {"teacher": name(teacher), "student": name(student), "images": count}
            for teacher, student, count in found[:_PAIRS]
        ],
    }


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines, for a person."""
    quantized = (
        f"{report['network']} W{report['weight_bits']}A{report['act_bits']}, policy "
        f"{report['policy']}, {report['placement']} placement, preset {report['preset']}, "
        f"{report['steps']} steps, seed {report['seed']}"
    )
    if not report.get("zero_shot", True):
        quantized += f"\nNOT zero-shot: trained on {report['settings']['train_images']} real images"
    total = sum(report["wall_seconds"].values())
    if report["images"]:
        figures = (
            f"teacher {report['teacher']['top1']:.2f} %, student {report['student']['top1']:.2f} % "
            f"top-1 on the same {report['images']} images of {report['data']}: drop "
            f"{report['drop']:.2f} points; same class on {report['agreement']:.2f} %"
        )
    else:
        figures = "accuracy not measured: no evaluation data was given (data.name, data.path)"
    return f"{quantized}\n{figures}\n{total:.0f} s on {report['device']}"
