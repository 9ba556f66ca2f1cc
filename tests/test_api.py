"""The library: the same run as the command line's, in five lines."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TINY_FIELDS, tiny_data
from test_steps import tiny_teacher

import lrq_jax
from lrq_jax import api
from lrq_jax.readers import save_teacher
from lrq_jax.writers.codes import load_student

pytestmark = pytest.mark.usefixtures("quick_compilation", "one_device")

REPOSITORY = Path(__file__).resolve().parents[1]


def test_the_result_is_the_report_as_plain_values(tiny_run):
    result, data, _ = tiny_run
    report = json.loads((result.path / "report.json").read_text())
    assert result.report == report
    assert (result.network, result.weight_bits, result.act_bits) == ("tiny", 3, 5)
    assert (result.teacher, result.student) == (
        report["teacher"]["top1"],
        report["student"]["top1"],
    )
    assert result.images == data.num_examples == 37
    assert result.teacher == pytest.approx(100 * 34 / 37, abs=1e-3)
    assert "report" not in repr(result)
    assert "weight_bits=3" in repr(result)
    assert str(result).startswith("tiny W3A5, policy U")
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.images = 3
    assert api.load_run(result.path) == result


def test_the_callback_is_told_of_every_phase_to_its_end(tiny_run):
    _, _, seen = tiny_run
    assert [(s.phase, s.done, s.total) for s in seen] == [
        ("calibration", 1, 2), ("calibration", 2, 2), ("training", 1, 2), ("training", 2, 2),
    ]  # fmt: skip
    assert all(np.isfinite(list(s.losses.values())).all() and s.losses for s in seen)
    assert {s.unit for s in seen} == {"step"}


def test_quiet_means_quiet_and_a_second_call_only_reports(tiny_run, capsys):
    result, data, seen = tiny_run
    before = len(seen)
    settings = {"weight_bits": 3, "act_bits": 5, "steps": 2, "data": data,
                "workdir": result.path, "fields": TINY_FIELDS}  # fmt: skip
    again = api.quantize(tiny_teacher(), verbose=False, callback=seen.append, **settings)
    assert again == result
    assert len(seen) == before
    assert capsys.readouterr().out == ""
    api.quantize(tiny_teacher(), **settings)
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"student.weight_bits: 3 -> 2"):
        api.quantize(tiny_teacher(), **{**settings, "weight_bits": 2})


def test_a_finished_run_does_not_pass_for_a_measurement_of_other_images(tiny_run):
    result = tiny_run[0]
    settings = {"weight_bits": 3, "act_bits": 5, "steps": 2, "workdir": result.path,
                "fields": TINY_FIELDS, "verbose": False}  # fmt: skip
    with pytest.raises(FileExistsError, match=r"37 images \(noise\), expected the 20 given"):
        api.quantize(tiny_teacher(), data=tiny_data(20), **settings)
    assert api.quantize(tiny_teacher(), **settings) == result  # none given: those it has


def test_a_run_is_taken_up_by_its_own_command(tmp_path, monkeypatch):
    """What the caller says of teacher and data is what the command line would."""
    save_teacher(tiny_teacher(), tmp_path / "kept")
    monkeypatch.chdir(tmp_path)
    seen = {}

    def prepare(teacher, settings, data, workdir):
        seen.update(settings=settings, data=data)
        return types.SimpleNamespace(run=types.SimpleNamespace(report=None))

    monkeypatch.setattr(api, "prepare", prepare)
    monkeypatch.setattr(api, "_quantize", lambda job: {})
    monkeypatch.setattr(api, "_quantized", lambda path, report: None)
    for teacher in (api.load_teacher("kept"), "kept", Path("kept")):
        api.quantize(teacher)
        assert (seen["settings"].teacher_path, seen["data"]) == ("kept", None)
    api.quantize(api.load_teacher("digits"))
    assert seen["settings"].teacher_path == "digits"
    assert seen["data"].num_examples == 500  # as on the command line
    api.quantize("digits", fields={"data.name": "digits", "data.split": "train"})
    assert seen["data"].num_examples == 1297
    api.quantize("digits", fields={"data.name": ""})
    assert seen["data"] is None
    api.quantize(tiny_teacher(), data=tiny_data(3))
    assert seen["settings"].data_name == seen["settings"].data_path == ""
    assert seen["data"].num_examples == 3


def test_the_callers_precision_is_left_alone(tiny_run):
    assert jax.config.jax_default_matmul_precision is None


def test_it_evaluates_exports_and_verifies(tiny_run, tmp_path):
    pytest.importorskip("onnxruntime")
    result, data, _ = tiny_run
    accuracy = result.evaluate(data)
    assert round(accuracy.top1, 4) == result.student
    exported = result.export(tmp_path / "out")
    assert exported.files["model.onnx"] == (tmp_path / "out" / "model.onnx").stat().st_size
    assert exported.portable_without_vnni
    assert "model.onnx" in repr(exported)
    verdicts = exported.verify()
    assert len(verdicts) == 5  # logits and constants of both files, and the report
    assert all(verdict.passed for verdict in verdicts)
    assert {round(a.top1, 4) for a in exported.evaluate(data).values()} == {result.student}
    codes = [load_student(path / "student")[1] for path in (result.path, exported.path)]
    jax.tree.map(np.testing.assert_array_equal, *codes)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"teacher": "nowhere"}, FileNotFoundError, "nowhere"),
        ({"config": "nowhere.py"}, FileNotFoundError, "nowhere.py.*configs/r18.py"),
        ({"data": "cifar11"}, FileNotFoundError, "cifar11"),
        ({"preset": "lqr"}, ValueError, "'lqr', expected one of .*lrq_released"),
        ({"weight_bits": 9}, ValueError, "student.weight_bits: found 9"),
        ({"fields": {"method.batch": 4}}, ValueError, "'method.batch'.*method.batch_size"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, arguments, error, message):
    arguments = {"teacher": tiny_teacher(), "workdir": tmp_path / "run", **arguments}
    with pytest.raises(error, match=message):
        api.quantize(arguments.pop("teacher"), **arguments)
    assert not (tmp_path / "run").exists()


def test_no_run_there_says_what_makes_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run at .*python -m lrq_jax.main"):
        api.load_run(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="an unfinished run"):
        api.load_run(tmp_path)


def test_a_config_file_is_the_command_lines(tmp_path):
    config = api._config(REPOSITORY / "configs" / "r18.py")
    assert config.checkpoint_every == 1000
    config.seed = 3
    assert api._config(REPOSITORY / "configs" / "r18.py").seed == 0


def test_images_are_found_by_folder_or_name(tmp_path, monkeypatch):
    assert api.load_data("digits").num_examples == 500
    assert api.load_data("digits", split="train").num_examples == 1297
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        api.load_data("digits2")
    (tmp_path / "digits").mkdir()  # what is there comes before what is known
    with pytest.raises(ValueError, match="digits"):
        api.load_data("digits")


def test_the_package_stays_light():
    code = "import sys, lrq_jax; print('jax' in sys.modules); print(lrq_jax.api.quantize.__name__)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert result.stdout.split() == ["False", "quantize"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", lrq_jax.__version__)
    with pytest.raises(AttributeError, match="no attribute 'apy'"):
        _ = lrq_jax.apy


def snippet_of(page):
    """The page's one block of Python that uses the library."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(from lrq_jax import api\n.*?)```", text, re.DOTALL)
    return snippet


def test_the_readme_needs_five_lines():
    assert len([line for line in snippet_of("README.md").splitlines() if line.strip()]) == 5


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_documented_lines_of_the_library_run_as_they_stand(page, tiny_run, tmp_path, monkeypatch):
    """The teacher and the images are tiny ones, the schedule as well; the lines are the page's."""
    pytest.importorskip("onnxruntime")
    snippet = snippet_of(page)
    result, data, _ = tiny_run
    monkeypatch.chdir(tmp_path)
    real = api.quantize
    calls = []

    def short(teacher, **settings):
        calls.append(settings)
        shutil.copytree(result.path, tmp_path / "runs" / "r18")
        return real(teacher, fields=TINY_FIELDS, verbose=False, **{
            **settings, "steps": 2, "weight_bits": 3, "act_bits": 5, "data": data,
            "callback": None,
        })  # fmt: skip

    monkeypatch.setattr(api, "quantize", short)
    monkeypatch.setattr(api, "load_teacher", lambda path: tiny_teacher())
    monkeypatch.setattr(api, "load_data", lambda path: data)
    names = {}
    exec(compile(snippet, page, "exec"), names)
    assert calls[0]["weight_bits"] == 4
    assert (tmp_path / "exported" / "model.onnx").is_file()


def test_the_documented_callback_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    real = api.quantize
    fields = {**TINY_FIELDS, "steps": 1, "method.batch_size": 8}
    monkeypatch.setattr(api, "quantize", lambda *a, **options: real(*a, fields=fields, **options))
    exec(compile(snippet_of("docs/howto.md"), "docs/howto.md", "exec"), {})
    assert "training 1 1 {" in capsys.readouterr().out
    assert (tmp_path / "runs" / "digits" / "report.json").is_file()
