"""The library in five lines; the same code as the command lines.

    from lrq_jax import api
    teacher = api.load_teacher("resnet18.pth")
    result = api.quantize(teacher, preset="lrq", weight_bits=4, act_bits=4, data="IMAGES")
    print(result, result.evaluate("IMAGES"))
    result.export("exported").verify()

What `quantize` writes is a run directory as `python -m lrq_jax.main` makes it: it resumes, and is
exported, verified, reported and compared by the same commands.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from lrq_jax.config import base_config, field_names, get_config, resolve
from lrq_jax.console import Step, audience
from lrq_jax.data import EvalData
from lrq_jax.data import load_data as _load_data
from lrq_jax.evaluate import evaluate_model
from lrq_jax.evaluation import Accuracy
from lrq_jax.export import export_student
from lrq_jax.quantize import load_eval_data, prepare, summary
from lrq_jax.quantize import quantize as _quantize
from lrq_jax.readers import Teacher, load_teacher
from lrq_jax.report_file import read_report
from lrq_jax.verify import Verdict
from lrq_jax.verify import verify as _verify

if TYPE_CHECKING:
    from ml_collections import ConfigDict

__all__ = [
    "Accuracy",
    "EvalData",
    "Exported",
    "Quantized",
    "Step",
    "Teacher",
    "Verdict",
    "load_data",
    "load_run",
    "load_teacher",
    "quantize",
]

_PRECISION = "jax_default_matmul_precision"

Callback = Callable[[Step], None]


def load_data(source: str | Path, *, split: str = "test") -> EvalData:
    """Labelled images for evaluation.

    Args:
      source: a folder of images (a sub-folder per class, or a `labels.csv`), else the name of a
        dataset: `digits`, or a TFDS dataset prepared as array_record.
      split: of a dataset by name.

    Raises:
      FileNotFoundError: neither such a folder nor such a dataset.
      ValueError: what is there cannot be used.
    """
    return _load_data(**_place(source), split=split)


def _place(source: str | Path) -> dict[str, str]:
    """Whether a string names a folder or a dataset, as fields of a config's `data`."""
    if isinstance(source, Path) or Path(source).exists():
        return {"name": "", "path": str(source)}
    return {"name": source, "path": ""}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """An export: a directory of files that integer runtimes execute.

    Attributes:
      path: the directory.
      files: name -> bytes.
      portable_without_vnni: whether old x86 CPUs give the same integers.
    """

    path: Path
    files: dict[str, int]
    portable_without_vnni: bool

    def verify(self, data: EvalData | str | Path | None = None) -> tuple[Verdict, ...]:
        """A verdict on each file, its runtime and the report; see `lrq_jax.verify.verify`.

        Where a runtime's package is missing, its verdict has not passed and `untried` names the extra.

        Args:
          data: images to try; None takes synthetic ones.
        """
        return tuple(_verify(self.path, data=None if data is None else _data(data)))

    def evaluate(self, data: EvalData | str | Path) -> dict[str, Accuracy]:
        """Accuracy by runtime on labelled images; see `lrq_jax.evaluate.evaluate_model`."""
        return evaluate_model(self.path, _data(data))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized:
    """A finished run.

    Attributes:
      path: its directory.
      network: name of the network.
      weight_bits, act_bits: nominal bits of weights and activations.
      teacher, student: top-1 in percent on the same images; None where none were given.
      agreement: percent of those images that both class alike; None as above.
      images: how many there were.
      report: all of `report.json`.
    """

    path: Path
    network: str
    weight_bits: int
    act_bits: int
    teacher: float | None
    student: float | None
    agreement: float | None
    images: int
    report: dict[str, Any] = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return summary(self.report)

    def evaluate(self, data: EvalData | str | Path) -> Accuracy:
        """Accuracy of the stored integers on labelled images.

        Raises:
          FileNotFoundError: no such images.
          ValueError: images or labels that are not for this network; a `paper` student, which is
            no integer network.
        """
        return evaluate_model(self.path / "student", _data(data), runtimes=("jax",))["jax"]

    def export(self, out: str | Path, *, targets: Sequence[str] = ("onnx", "jax"),
               overwrite: bool = False, **settings: Any) -> Exported:  # fmt: skip
        """Writes the student as files of integer runtimes; arguments of `export.export_student`."""
        report = export_student(self.path, out, targets=targets, overwrite=overwrite, **settings)
        return Exported(
            path=Path(out),
            files=report["files"],
            portable_without_vnni=report["portable_without_vnni"],
        )


def quantize(teacher: Teacher | str | Path, *, config: ConfigDict | str | Path | None = None,
             preset: str | None = None, weight_bits: int | None = None,
             act_bits: int | None = None, steps: int | None = None,
             data: EvalData | str | Path | None = None, workdir: str | Path = "runs/latest",
             fields: Mapping[str, Any] | None = None, callback: Callback | None = None,
             verbose: bool = True) -> Quantized:  # fmt: skip
    """Quantizes a teacher without its data; a second call on the same `workdir` resumes.

    Args:
      teacher: of `load_teacher`, or what that takes.
      config: a config or a file with `get_config()`; None: `lrq_jax.config.get_config()`, our
        method of minutes (preset `fast`).
      preset: a name in `lrq_jax.presets.PRESETS`; this and the next three: None keeps the config's.
      weight_bits, act_bits: 2 to 8.
      steps: training steps; 0: ranges (and rounding, if the preset learns it) and a report.
      data: labelled images, to report accuracy only; a folder, a dataset's name or `load_data`'s;
        None: the config's, by default those of the embedded teacher, and none for others.
      workdir: the run directory.
      fields: any other field of the config, `{"method.batch_size": 64}`.
      callback: is told of progress; see `console.Step`.
      verbose: print what the command line prints.

    Raises:
      FileNotFoundError: no teacher, config or images there.
      FileExistsError: `workdir` holds a run with other settings, which are named, or a finished
        one measured on other images.
      ValueError: a field there is not, or a value it cannot have.
      TrainingDiverged: a loss stopped being finite.
    """
    chosen_config = _config(config)
    chosen = {
        "method.preset": preset,
        "student.weight_bits": weight_bits,
        "student.act_bits": act_bits,
        "steps": steps,
    }
    _set_fields(
        chosen_config, {k: v for k, v in chosen.items() if v is not None} | dict(fields or {})
    )
    if data is not None:
        place = {"name": "", "path": ""} if isinstance(data, EvalData) else _place(data)
        _set_fields(chosen_config, {f"data.{name}": value for name, value in place.items()})
    if not isinstance(teacher, Teacher):
        teacher = load_teacher(teacher)
    chosen_config.teacher.path = teacher.path or teacher.source or teacher.arch
    settings = resolve(chosen_config, image_size=max(teacher.graph.input_shape[:2]))
    precision = getattr(jax.config, _PRECISION)
    try:
        with audience(callback, verbose=verbose):
            found = data if isinstance(data, EvalData) else load_eval_data(settings)
            job = prepare(teacher, settings, found, workdir)
            if isinstance(data, EvalData):
                _check_measured(job.run.report, data, workdir)
            report = _quantize(job)
    finally:  # a library leaves the caller's own settings alone
        jax.config.update(_PRECISION, precision)
    return _quantized(Path(workdir), report)


def _check_measured(report: dict[str, Any] | None, data: EvalData, workdir: str | Path) -> None:
    """Refuses to pass off a finished run's figures as those of other images, as far as their name
    and number tell; which they are is no part of a run's settings."""
    if report is None:
        return
    measured, given = (report["data"], report["images"]), (data.name, data.num_examples)
    if measured != given:
        name, images = measured if measured[0] else ("none", 0)
        raise FileExistsError(
            f"workdir {workdir}: found a finished run that was measured on {images} images "
            f"({name}), expected the {given[1]} given ({given[0]}); "
            "load_run(workdir).evaluate(data) measures it on them, another workdir runs it again"
        )


def load_run(path: str | Path) -> Quantized:
    """A finished run from its directory.

    Raises:
      FileNotFoundError: no finished run there.
    """
    return _quantized(Path(path), read_report(path))


def _quantized(path: Path, report: dict[str, Any]) -> Quantized:
    return Quantized(
        path=path,
        network=report["network"],
        weight_bits=report["weight_bits"],
        act_bits=report["act_bits"],
        teacher=report["teacher"]["top1"],
        student=report["student"]["top1"],
        agreement=report["agreement"],
        images=report["images"],
        report=report,
    )


def _data(data: EvalData | str | Path) -> EvalData:
    return data if isinstance(data, EvalData) else load_data(data)


def _config(config: ConfigDict | str | Path | None) -> ConfigDict:
    """A config of one's own to change, from what the caller has."""
    if config is None:
        return get_config()
    if isinstance(config, str | Path):
        path = Path(config)
        if not path.is_file():
            raise FileNotFoundError(
                f"config: found no file {str(path)!r}, expected a Python file with get_config(), "
                "such as configs/r18.py"
            )
        specification = importlib.util.spec_from_file_location("lrq_jax_user_config", path)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return module.get_config()
    return config.copy_and_resolve_references()


def _set_fields(config: ConfigDict, fields: Mapping[str, Any]) -> None:
    known = field_names(base_config().to_dict())
    for name, value in fields.items():
        if name not in known:
            raise ValueError(f"fields: found {name!r}, expected one of {known}")
        holder, _, last = name.rpartition(".")
        setattr(config[holder] if holder else config, last, value)
