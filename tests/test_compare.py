"""Runs side by side: every cell is a report's, and what may not be compared is said."""

import json
import shutil

import pytest
from test_report import Page

from lrq_jax import compare


@pytest.fixture
def runs(tiny_run, tmp_path):
    """The tiny run, and one that differs in a bit, a seed and a hidden setting."""
    first, second = tmp_path / "a", tmp_path / "b"
    for path in (first, second):
        path.mkdir()
        shutil.copy(tiny_run[0].path / "report.json", path)
    report = json.loads((second / "report.json").read_text())
    report |= {"weight_bits": 5, "seed": 1, "drop": 1.25}
    report["settings"]["method"]["bns_weight"] = 0.75
    (second / "report.json").write_text(json.dumps(report))
    return first, second


def test_the_table_and_the_page_hold_what_the_reports_say(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert compare.main([*map(str, runs), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    head, first, second = printed.splitlines()[:3]
    assert head.split()[:3] == ["run", "network", "W"]
    assert first.split()[1:4] == ["tiny", "3", "5"]
    assert second.split()[1:4] == ["tiny", "5", "5"]
    assert "1.25" in second
    assert f"{runs[1]}: method.bns_weight: 0.1 -> 0.75" in printed
    assert "careful" not in printed
    page = Page(out.read_text(encoding="utf-8"))
    reports = [json.loads((run / "report.json").read_text()) for run in runs]
    assert len(page.values) == 2 * len(compare.COLUMNS)
    for path, value, _ in page.values:
        run, _, field = path.partition("/")
        assert json.loads(value) == compare._value(reports[int(run)], field)
    assert "bns_weight: 0.1 -> 0.75" in " ".join(page.loose)
    assert page.resources == ["data:,"]


def test_other_teachers_and_other_images_are_said(runs, tmp_path, capsys):
    report = json.loads((runs[1] / "report.json").read_text())
    (runs[1] / "report.json").write_text(json.dumps({**report, "teacher_sha256": "0", "images": 5}))
    assert compare.main([*map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert "careful: teacher: found 2 different ones" in printed
    assert "careful: images: found 2 different ones" in printed


def test_an_older_report_has_gaps_not_an_error(runs, tmp_path, capsys):
    report = json.loads((runs[1] / "report.json").read_text())
    del report["size"]
    (runs[1] / "report.json").write_text(json.dumps(report))
    assert compare.main([*map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.splitlines()[2].endswith(" -")


@pytest.mark.parametrize("count", [0, 1, 2])
def test_what_is_no_run_is_named(runs, tmp_path, capsys, monkeypatch, count):
    monkeypatch.chdir(tmp_path)
    given = [["nothing"], [str(runs[0])], [str(runs[0]), "nothing"]][count]
    assert compare.main(given) == 2
    error = capsys.readouterr().err
    assert "nothing" in error if count == 2 else "at least two" in error
    assert "python -m lrq_jax.main" in error
    assert not (tmp_path / "compare.html").exists()
