"""The command line, as a person meets it: refusals, a tiny run from start to report, restarts."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import lrq_jax
from lrq_jax.writers.codes import load_student

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = (
    f"--config={REPOSITORY / 'configs' / 'digits_lrq.py'}",
    "--config.steps=1",
    "--config.method.warmup_steps=2",
    "--config.method.calibration_start=1",
    "--config.method.calibration_steps=1",
    "--config.method.batch_size=8",
    "--config.method.generator_width=8",
)
FORBIDDEN = ("tensorflow", "torch", "keras", "clu")
RUN_AND_LIST_IMPORTS = f"""
import atexit, runpy, sys

asked = set()

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name not in {FORBIDDEN}:
            return
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__", "").startswith("importlib"):
            if frame.f_globals["__name__"] == "importlib.util":
                return  # asks whether it is there, imports nothing
            frame = frame.f_back
        asked.add(frame.f_globals.get("__name__", "?"))
        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refusing())
atexit.register(lambda: print("ASKED", *sorted(asked)))
atexit.register(lambda: print("MODULES", *sorted({{name.split(".")[0] for name in sys.modules}})))
runpy.run_module("lrq_jax.main", run_name="__main__", alter_sys=True)
"""
"""As if none of those packages were there, whatever is installed; who asked for them is told."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs of these runs, so that each is compiled once."""
    return tmp_path_factory.mktemp("cache")


def start(cache, cwd, *arguments, program=("-m", "lrq_jax.main")):
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "LRQ_CACHE": str(cache),
        "TFDS_DATA_DIR": str(cwd / "no_datasets"),
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment.pop("XLA_FLAGS", None)  # one device, as on a person's computer
    return subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--confg=x.py"], ["confg", "config"]),
        (["--config.student.weight_bit=4"], ["student.weight_bit'", "student.weight_bits"]),
        (["--config.metod.batch_size=4"], ["metod.batch_size", "method.batch_size"]),
        (["--config.student=4"], ["'student'", "student.policy"]),
        (["--config.steps=many"], ["steps", "many"]),
        (["--config.student.act_bits=9"], ["student.act_bits: found 9", "2 to 8"]),
        (["--config.method.batch_size=0"], ["method.batch_size: found 0", "at least 1"]),
        (["--config.method.kd_reduction=sum"], ["method.kd_reduction", "'sum'", "batch_mean"]),
        (
            ["--config.student.overrides=layer9=w6"],
            ["student.overrides", "layer9=w6", "stage1_block0_conv1"],
        ),
        (["--config.teacher.path=nowhere"], ["nowhere", "convert_teacher.py"]),
        (["--config.data.name=", "--config.data.path=nowhere"], ["nowhere"]),
        (["--config.data.name=cifar11"], ["cifar11", "no prepared dataset"]),
        (
            ["--config.data.name=digits", "--config.data.path=."],
            ["data.name='digits'", "data.path='.'", "exactly one"],
        ),
        (["--config.data.split=dev"], ["'dev'", "'test'"]),
        (["--config=nowhere.py"], ["nowhere.py"]),
        (["--config=nowhere.py", "--config.steps=3"], ["nowhere.py"]),
        (["--config=broken.py"], ["broken.py", "SyntaxError"]),
        (["--config=typo.py"], ["typo.py", 'Did you mean "method"']),
        (["--config=text.py"], ["steps", "many"]),
        (["--config=other.py"], ["other.py", "'depth'"]),
        (["runs/here"], ["runs/here", "flags only"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith(("--", "runs")) else "",
)
def test_what_cannot_be_used_is_refused_by_name_before_anything_is_done(tmp_path, arguments, named):
    base = "from lrq_jax.config import base_config\ndef get_config():\n    config = base_config()\n"
    (tmp_path / "broken.py").write_text("def get_config(:")
    (tmp_path / "typo.py").write_text(f"{base}    config.metod.batch_size = 3\n    return config\n")
    (tmp_path / "text.py").write_text(f"{base}    config.steps = 'many'\n    return config\n")
    (tmp_path / "other.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'depth': 3})\n"
    )
    result = start(tmp_path / "cache", tmp_path, "--workdir=run", *arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if "WARNING" not in line]
    assert len(lines) <= 10
    assert len(result.stderr) < 3000
    assert lines[0].startswith("lrq_jax: ")
    for text in named:
        assert text in result.stderr
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob("cache/compiled/*"))


@pytest.mark.parametrize(
    ("side", "label", "message"),
    [(20, 0, "20 x 20 pixels, expected 16 x 16"), (16, 10, "found label 10, expected less than")],
)
def test_images_for_another_teacher_are_refused_before_anything_is_done(
    tmp_path, side, label, message
):
    (tmp_path / "images").mkdir()
    Image.new("L", (side, side)).save(tmp_path / "images" / "a.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "images" / "0.png")  # the first one is right
    (tmp_path / "images" / "labels.csv").write_text(f"file,label\n0.png,0\na.png,{label}\n")
    result = start(
        tmp_path / "cache",
        tmp_path,
        "--workdir=run",
        "--config.data.name=",
        "--config.data.path=images",
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


# --- a whole run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("runs")
    result = start(cache, cwd, "--workdir=run", *TINY, program=("-c", RUN_AND_LIST_IMPORTS))
    assert result.returncode == 0, result.stderr
    return cwd, result.stdout


def test_a_run_writes_every_file(finished):
    cwd, _ = finished
    run = cwd / "run"
    assert {entry.name for entry in run.iterdir()} == {
        "checkpoints",
        "config.json",
        "images",
        "metrics.jsonl",
        "report.html",
        "report.json",
        "report.npz",
        "student",
        "tensorboard",
        "timings.json",
    }
    assert list(run.glob("tensorboard/events*"))
    assert list(run.glob("images/*.png"))
    assert [entry.name for entry in (run / "checkpoints").iterdir()] == ["3"]
    config = json.loads((run / "config.json").read_text())
    assert config["method"]["batch_size"] == 8
    assert config["method"]["steps"] == 1
    assert config["method"]["bns_weight"] > 0  # full: what the preset gave is there as well
    assert None not in [*config.values(), *config["method"].values(), *config["student"].values()]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["phase"]) for line in lines] == [
        (1, "warm-up"),
        (2, "calibration"),
        (3, "training"),
    ]
    assert all(math.isfinite(value) for line in lines for value in line.values()
               if isinstance(value, float))  # fmt: skip
    student, codes, preprocessing = load_student(run / "student")
    assert student.is_integer
    assert set(codes["weights"]) == {layer.name for layer in student.graph.weighted}
    assert preprocessing.size == 16


def test_the_report_says_what_was_done(finished):
    cwd, _ = finished
    report = json.loads((cwd / "run" / "report.json").read_text())
    expected = {
        "images": 500,
        "data": "digits/test",
        "preset": "lrq",
        "policy": "U",
        "placement": "integer",
        "weight_bits": 4,
        "act_bits": 4,
        "seed": 0,
        "steps": 1,
        "platform": "cpu",
    }
    assert {name: report[name] for name in expected} == expected
    assert 95 < report["teacher"]["top1"] <= report["teacher"]["top5"] <= 100
    assert 0 <= report["student"]["top1"] <= report["student"]["top5"] <= 100
    drop = report["teacher"]["top1"] - report["student"]["top1"]
    assert report["drop"] == pytest.approx(drop, abs=1e-3)
    assert 0 <= report["agreement"] <= 100
    assert {"warm-up", "calibration", "training", "compilation", "evaluation and export"} == set(
        report["wall_seconds"]
    )
    assert min(report["wall_seconds"].values()) >= 0
    assert report["device"].startswith("1 x ")
    assert report["versions"]["lrq_jax"] == lrq_jax.__version__
    assert {"jax", "python", "numpy"} <= set(report["versions"])
    assert re.fullmatch("[0-9a-f]{64}", report["teacher_sha256"])
    config = json.loads((cwd / "run" / "config.json").read_text())
    assert report["teacher_sha256"] == config["teacher_sha256"]
    assert report["settings"] == {k: v for k, v in config.items() if k != "teacher_sha256"}
    assert (cwd / "run" / report["student_path"] / "student.json").is_file()


def test_the_run_says_what_it_does_and_found(finished):
    _, output = finished
    for text in ("warm-up: compiling", "training: compiling", "compiled in", "evaluating 500"):
        assert text in output
    assert re.search(r"training: 1/1 steps, .*student/loss=", output)
    assert re.search(r"teacher \d+\.\d\d %, student \d+\.\d\d % top-1 on the same 500", output)
    assert "report: run/report.json" in output
    assert "\r" not in output


def test_a_whole_run_imports_neither_tensorflow_nor_torch(finished):
    _, output = finished
    told = {line.split()[0]: set(line.split()[1:]) for line in output.splitlines() if line}
    assert {"jax", "orbax", "lrq_jax"} <= told["MODULES"]
    assert not told["MODULES"] & {*FORBIDDEN, "tensorflow_datasets"}
    ours = ("lrq_jax", "__main__", "tensorboardX")
    assert not {name for name in told["ASKED"] if name.split(".")[0] in ours}


def test_a_second_start_only_reports(finished, tmp_path):
    cwd, _ = finished
    files = {path: path.stat().st_mtime_ns for path in (cwd / "run").rglob("*") if path.is_file()}
    result = start(tmp_path / "cache", cwd, "--workdir=run", *TINY)  # nothing compiled is there
    assert result.returncode == 0, result.stderr
    assert "finished already" in result.stdout
    assert "compiling" not in result.stdout
    assert re.search(r"teacher \d+\.\d\d %, student \d+\.\d\d %", result.stdout)
    assert {p: p.stat().st_mtime_ns for p in (cwd / "run").rglob("*") if p.is_file()} == files
    assert not list((tmp_path / "cache").glob("compiled/*"))


def test_another_config_is_refused_by_field(finished, cache):
    cwd, _ = finished
    before = (cwd / "run" / "config.json").read_bytes()
    result = start(
        cache, cwd, "--workdir=run", *TINY, "--config.seed=1", "--config.student.weight_bits=3"
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "seed: 0 -> 1" in result.stderr
    assert "student.weight_bits: 4 -> 3" in result.stderr
    assert "batch_size" not in result.stderr
    assert (cwd / "run" / "config.json").read_bytes() == before


def test_huge_pages_change_no_number(cache, tmp_path, monkeypatch):
    """Where the system gives none on request, both runs are alike anyway."""
    made = {}
    for wanted in ("0", "1"):
        monkeypatch.setenv("GLIBC_TUNABLES", f"glibc.malloc.hugetlb={wanted}")
        cwd = tmp_path / wanted
        cwd.mkdir()
        result = start(cache, cwd, "--workdir=run", *TINY, "--config.log_every=1")
        assert result.returncode == 0, result.stderr
        lines = (cwd / "run" / "metrics.jsonl").read_text().splitlines()
        losses = [
            {name: value for name, value in json.loads(line).items() if "/" in name}
            for line in lines
        ]
        _, frozen, _ = load_student(cwd / "run" / "student")
        made[wanted] = losses, frozen
    (losses, frozen), (same_losses, same_frozen) = made.values()
    assert len(losses) == 3
    assert any("generator/bns" in line for line in losses)
    assert losses == same_losses
    jax.tree.map(np.testing.assert_array_equal, frozen, same_frozen)


def test_no_training_and_no_data_still_reports_and_says_so(cache, tmp_path):
    result = start(
        cache, tmp_path, "--workdir=run", *TINY, "--config.steps=0", "--config.data.name="
    )
    assert result.returncode == 0, result.stderr
    assert "accuracy not measured: no evaluation data was given" in result.stdout
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"] == 0
    assert report["images"] == 0
    assert report["drop"] is None
    assert report["teacher"] == report["student"] == {"top1": None, "top5": None}
    assert "training" not in report["wall_seconds"]
    student, _, _ = load_student(tmp_path / "run" / "student")
    assert student.spec.weight_bits == 4
