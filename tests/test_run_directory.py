"""The run directory: what it refuses, what survives a kill, and what is in its pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from lrq_jax.data import Preprocessing
from lrq_jax.report_file import missing_fields, read_report, write_json
from lrq_jax.run_directory import RunDirectory

CONFIG = {"seed": 0, "method": {"batch_size": 8, "milestones": (1, 2)}, "student": {"bits": 4}}
GREY = Preprocessing(mean=(0.5,), std=(0.25,), size=8)
COLOUR = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=8)


def names(path):
    return sorted(entry.name for entry in path.iterdir())


# --- new, resumed, refused -----------------------------------------------------------------------


def test_a_new_run_writes_its_config(tmp_path):
    run = RunDirectory(tmp_path / "a" / "b", CONFIG)
    assert names(run.path) == ["config.json"]
    assert json.loads((run.path / "config.json").read_text()) == json.loads(json.dumps(CONFIG))
    assert run.report is None
    assert run.timings() == {}


def test_an_empty_directory_is_used(tmp_path):
    RunDirectory(tmp_path, CONFIG)
    assert names(tmp_path) == ["config.json"]


def test_the_same_config_resumes_and_keeps_everything(tmp_path):
    run = RunDirectory(tmp_path, CONFIG)
    run.write_timings({"training": 1.5})
    report = dict.fromkeys(missing_fields({}), 0.5)
    run.write_report(report)
    before = (tmp_path / "config.json").stat().st_mtime_ns
    again = RunDirectory(tmp_path, {**CONFIG})  # with tuples, as they were given the first time
    assert again.report == report
    assert again.timings() == {"training": 1.5}
    assert (tmp_path / "config.json").stat().st_mtime_ns == before


def test_another_config_is_refused_by_field_and_changes_nothing(tmp_path):
    RunDirectory(tmp_path, CONFIG)
    text = (tmp_path / "config.json").read_text()
    other = {"seed": 1, "method": {"batch_size": 16, "milestones": (1, 2)}, "student": {"bits": 4}}
    with pytest.raises(FileExistsError) as refusal:
        RunDirectory(tmp_path, other)
    message = str(refusal.value)
    assert "seed: 0 -> 1" in message
    assert "method.batch_size: 8 -> 16" in message
    assert "milestones" not in message
    assert "bits" not in message
    assert str(tmp_path) in message
    assert "--workdir" in message
    assert (tmp_path / "config.json").read_text() == text
    assert names(tmp_path) == ["config.json"]


def test_a_directory_of_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(FileExistsError, match=r"thesis\.tex.*expected an empty directory"):
        RunDirectory(tmp_path, CONFIG)
    assert names(tmp_path) == ["thesis.tex"]


def test_a_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "run"
    path.write_text("x")
    with pytest.raises(NotADirectoryError, match=r"found a file .*expected a directory"):
        RunDirectory(path, CONFIG)
    assert path.read_text() == "x"


@pytest.mark.parametrize("text", ["", "{", "[1]", "3"], ids=["empty", "cut", "list", "number"])
def test_a_config_that_is_no_runs_is_refused_by_name(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FileExistsError, match=r"config\.json that is not a run's") as refusal:
        RunDirectory(tmp_path, CONFIG)
    assert str(tmp_path) in str(refusal.value)
    assert (tmp_path / "config.json").read_text() == text


def test_a_start_killed_while_it_wrote_its_config_can_be_repeated(tmp_path):
    (tmp_path / ".config.json.new").write_text('{"seed"')
    RunDirectory(tmp_path, CONFIG)
    assert names(tmp_path) == ["config.json"]


# --- JSON ----------------------------------------------------------------------------------------


def test_json_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": 2, "b": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(tmp_path) == ["report.json"]

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 1}
    monkeypatch.undo()
    write_json(path, {"a": 4})
    assert json.loads(path.read_text()) == {"a": 4}
    assert names(tmp_path) == ["report.json"]


@pytest.mark.parametrize(("text", "found"), [
    ('{"drop": ', "found no readable JSON"),
    ("\xff", "found no readable JSON"),
    ("[" * 100_000, "found no readable JSON"),
    ("[1]", "found a JSON list"),
    ("null", "found a JSON NoneType"),
    ('{"format": "lrq_jax export", "run": 3}', "found int as 'run'"),
    ("{}", "found no network, weight_bits"),
])  # fmt: skip
def test_a_damaged_report_is_named(text, found, tmp_path):
    (tmp_path / "report.json").write_bytes(text.encode("latin-1"))
    (tmp_path / "config.json").write_text("{}")
    for read in (read_report, lambda path: RunDirectory(path, {})):
        with pytest.raises(ValueError, match=found) as refusal:
            read(tmp_path)
        assert str(tmp_path / "report.json") in str(refusal.value)


# --- metrics -------------------------------------------------------------------------------------


def read_metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_lines_and_events(tmp_path):
    run = RunDirectory(tmp_path, CONFIG)
    run.open_metrics(0)
    run.log(1, "warm-up", {"generator/loss": 0.1 + 0.2})
    run.log(2, "training", {"student/loss": 3.0})
    run.close()
    assert read_metrics(tmp_path) == [
        {"step": 1, "phase": "warm-up", "generator/loss": 0.1 + 0.2},
        {"step": 2, "phase": "training", "student/loss": 3.0},
    ]
    events = list((tmp_path / "tensorboard").iterdir())
    assert len(events) == 1
    assert b"student/loss" in events[0].read_bytes()


@pytest.mark.parametrize(
    "tail",
    ["", '{"step": 3, "phase": "tr', '{"step": 1', "3", "null", "[]", '{"phase": 1}', "\x00\x00"],
)
def test_resuming_drops_lines_of_lost_steps_and_a_line_cut_short(tmp_path, tail):
    run = RunDirectory(tmp_path, CONFIG)
    run.open_metrics(0)
    for step in (1, 2, 3, 4):
        run.log(step, "training", {"student/loss": float(step)})
    run.close()
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(tail)  # no end of line: the process was killed here
    again = RunDirectory(tmp_path, CONFIG)
    again.open_metrics(2)
    again.log(3, "training", {"student/loss": 33.0})
    again.close()
    assert [(line["step"], line["student/loss"]) for line in read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 33.0),
    ]
    assert names(tmp_path) == ["config.json", "metrics.jsonl", "tensorboard"]


def test_a_line_cut_at_its_end_of_line_is_kept_and_not_run_into_the_next(tmp_path):
    run = RunDirectory(tmp_path, CONFIG)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "phase": "x"}')
    run.open_metrics(1)
    run.log(2, "x", {})
    run.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


# --- images --------------------------------------------------------------------------------------


def normalised(pixels, preprocessing):
    mean, std = (np.asarray(v, np.float32) for v in (preprocessing.mean, preprocessing.std))
    return (pixels.astype(np.float32) / 255 - mean) / std


def tile_of(picture, index, *, columns, side):
    """The part of a grid that shows image `index`: tiles have margins of 2 and a line of text."""
    top, left = index // columns * (side + 18) + 2, index % columns * (side + 4) + 2
    return picture[top : top + side, left : left + side]


@pytest.mark.parametrize("preprocessing", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("count", [1, 9, 10, 23])
def test_the_grid_shows_every_pixel_as_it_was(tmp_path, rng, preprocessing, count):
    pixels = rng.integers(0, 256, (count, 8, 8, preprocessing.channels), np.uint8)
    run = RunDirectory(tmp_path, CONFIG)
    run.write_images("step_1", normalised(pixels, preprocessing), range(count), preprocessing, None)
    assert names(tmp_path / "images") == ["step_1.png"]
    with Image.open(tmp_path / "images" / "step_1.png") as file:
        picture = np.asarray(file.convert("RGB"))
    columns, rows, side = min(count, 10), -(-count // 10), 64  # 8 pixels, 8 times
    assert picture.shape == (rows * (side + 18), columns * (side + 4), 3)
    for index in range(count):
        shown = tile_of(picture, index, columns=columns, side=side)
        expected = np.broadcast_to(pixels[index], (8, 8, 3)).repeat(8, 0).repeat(8, 1)
        np.testing.assert_array_equal(shown, expected)
        below = picture[index // 10 * (side + 18) + 2 + side :][:16]
        left = index % 10 * (side + 4)
        assert below[:, left : left + side].min() < 128, "no label below the image"


def test_labels_are_the_classes_own_names(tmp_path):
    run = RunDirectory(tmp_path, CONFIG)
    images = np.zeros((2, 8, 8, 1), np.float32)
    run.write_images("named", images, [1, 0], GREY, ("cat", "dog"))
    run.write_images("swapped", images, [0, 1], GREY, ("dog", "cat"))
    run.write_images("other", images, [0, 1], GREY, ("cat", "dog"))
    run.write_images("numbers", images, np.array([1, 0]), GREY, None)
    read = {name: (tmp_path / "images" / f"{name}.png").read_bytes() for name in
            ("named", "swapped", "other", "numbers")}  # fmt: skip
    assert read["named"] == read["swapped"]
    assert len({read["named"], read["other"], read["numbers"]}) == 3


def test_values_outside_what_a_pixel_holds_saturate(tmp_path):
    images = np.stack([np.full((8, 8, 1), -99, np.float32), np.full((8, 8, 1), 99, np.float32)])
    RunDirectory(tmp_path, CONFIG).write_images("x", images, [0, 1], GREY, None)
    with Image.open(tmp_path / "images" / "x.png") as file:
        picture = np.asarray(file)
    assert (tile_of(picture, 0, columns=2, side=64) == 0).all()
    assert (tile_of(picture, 1, columns=2, side=64) == 255).all()


def test_large_images_are_not_enlarged(tmp_path, rng):
    how = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3, size=96)
    pixels = rng.integers(0, 256, (2, 96, 96, 3), np.uint8)
    RunDirectory(tmp_path, CONFIG).write_images("x", pixels / 255, [0, 1], how, None)
    with Image.open(tmp_path / "images" / "x.png") as file:
        picture = np.asarray(file)
    assert picture.shape == (96 + 18, 2 * (96 + 4), 3)
    np.testing.assert_array_equal(tile_of(picture, 1, columns=2, side=96), pixels[1])
