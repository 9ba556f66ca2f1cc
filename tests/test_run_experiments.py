"""Experiments: which noise images a cell takes over from another, which commit its log names."""

import functools
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lrq_jax.config import resolve

SCRIPTS = Path(__file__).parents[1] / "scripts"
with pytest.MonkeyPatch.context() as patch:  # as when it is started
    patch.syspath_prepend(SCRIPTS)
    SCRIPT = runpy.run_path(str(SCRIPTS / "run_experiments.py"))
pool_of = SCRIPT["_pool_of"]

CELLS = {
    "W4A4 seed 0": ["--config.seed=0"],
    "W4A4 seed 1": ["--config.seed=1"],
    "W3A3": ["--config.student.weight_bits=3", "--config.student.act_bits=3"],
    "averaged": ["--config.method.average_decay=0.99", "--config.steps=9"],
    "more images": ["--config.method.noise_batches=9"],
}


def finish(run, *, pool=True):
    (run / "pool").mkdir(parents=True) if pool else run.mkdir(parents=True)
    (run / "report.json").write_text("{}")


def test_images_are_shared_by_cells_that_differ_in_the_student_and_its_training_alone(tmp_path):
    def found(cell):
        return pool_of(cell, CELLS, tmp_path / cell.replace(" ", "_"))

    assert found("W3A3") is None
    finish(tmp_path / "more_images")
    finish(tmp_path / "W4A4_seed_1")
    assert found("W3A3") is None  # another recipe, another seed
    finish(tmp_path / "W4A4_seed_0")
    assert found("W3A3") == found("averaged") == tmp_path / "W4A4_seed_0"
    assert found("more images") == tmp_path / "more_images"


def test_a_run_without_a_pool_of_its_own_offers_none(tmp_path):
    finish(tmp_path / "W4A4_seed_0", pool=False)
    assert pool_of("W3A3", CELLS, tmp_path / "W3A3") is None


def test_one_cell_can_be_asked_for_by_its_name():
    chosen, cells = SCRIPT["_chosen"], ("squant", "squant, equalized", "nearest")
    assert chosen(cells, "squant") == ["squant"]
    assert chosen(cells, "squ") == ["squant", "squant, equalized"]
    assert chosen(cells, None) == list(cells)


def test_a_second_start_takes_what_it_took_before(tmp_path):
    finish(tmp_path / "W4A4_seed_0")
    (tmp_path / "W3A3").mkdir()
    for before in ("", "elsewhere"):
        (tmp_path / "W3A3" / "config.json").write_text(json.dumps({"pool_path": before}))
        assert pool_of("W3A3", CELLS, tmp_path / "W3A3") == (before or None)


def test_logs_that_runs_write_do_not_make_the_commit_dirty(tmp_path):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    commit_of = SCRIPT["_commit"]
    git("init")
    (tmp_path / "results").mkdir()
    for name in ("code.py", "results/log.jsonl"):
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-m", "all")
    clean = commit_of(tmp_path)
    assert len(clean) == 12
    (tmp_path / "results" / "log.jsonl").write_text("2")
    assert commit_of(tmp_path) == clean
    (tmp_path / "code.py").write_text("2")
    assert commit_of(tmp_path) == f"{clean}-dirty"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "nowhere"], ["--data: found no directory nowhere"]),
        (["--teacher", "nowhere", "--only", "squant"], ["exit code 2", "its log is", "found no teacher"]),
    ],
)  # fmt: skip
def test_a_cell_that_cannot_run_ends_in_a_message(tmp_path, flags, words):
    script = SCRIPTS / "run_experiments.py"
    command = [sys.executable, script, "--suite", "ingredients", "--out", "out", "--runs", "runs"]
    result = subprocess.run(
        command + flags, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    for text in words:
        assert text in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "ingredients.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--teacher", "nowhere"], "found no teacher"),
        (["--teacher", "digits", "--average-bits", "40"], "--average-bits: found 40, expected"),
    ],
)
def test_bits_that_cannot_be_given_are_refused(monkeypatch, capsys, flags, words):
    script = runpy.run_path(str(SCRIPTS / "allocate_bits.py"))
    monkeypatch.setattr(sys, "argv", ["allocate_bits.py", *flags])
    assert script["main"]() == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("suite", sorted(SCRIPT["SUITES"]))
def test_cells_of_a_suite_are_possible_and_no_two_the_same(suite):
    path, cells = SCRIPT["SUITES"][suite]
    found = {}
    for cell, flags in cells.items():
        config = runpy.run_path(str(Path(__file__).parents[1] / path))["get_config"]()
        if SCRIPT["REAL"][0] in flags:
            config.data.train_path = "real"
        for flag in flags:
            name, _, text = flag.removeprefix("--config.").partition("=")
            *parents, field = name.split(".")
            part = functools.reduce(getattr, parents, config)
            kept = part.get_type(field)
            part[field] = text == "True" if kept is bool else kept(text)
        settings = resolve(config, image_size=32)
        assert not settings.method.without_effect, cell
        if not cell.endswith(",000 steps"):  # the preset has one of both, by its bits
            assert settings not in found.values(), cell
        found[cell] = settings
