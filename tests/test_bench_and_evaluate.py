"""The float twin is the float network, bench reports what it timed, evaluate needs no run."""

import json

import numpy as np
import pytest
from small_networks import GRAPHS, calibrated, random_images
from test_export import PREPROCESSING, finished_run

from lrq_jax import bench, evaluate, export
from lrq_jax.data import EvalData, load_data
from lrq_jax.data.pixels import encode_png, normalise
from lrq_jax.passes import float_logits
from lrq_jax.runtimes.litert import LiteRTRunner
from lrq_jax.runtimes.onnx_runtime import OnnxRunner
from lrq_jax.writers.codes import student_codes
from lrq_jax.writers.onnx_float import onnx_float_twin
from lrq_jax.writers.tflite_float import tflite_float_twin

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export")
    export.export_student(finished_run(directory / "run"), directory / "out")
    return directory / "out"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 40 random images of five classes."""
    directory = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(40):
        (directory / str(i % 5)).mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        (directory / str(i % 5) / f"{i:02}.png").write_bytes(encode_png(pixels))
    return directory


@pytest.mark.parametrize("build", GRAPHS, ids=lambda build: build.__name__)
def test_the_float_twin_is_the_float_network(build):
    """At 8 bits its weights are the teacher's to half a percent, and so are its logits."""
    student, variables, _ = calibrated(build, 8)
    model = onnx_float_twin(student, student_codes(student, variables)).SerializeToString()
    images = np.asarray(random_images(5))
    expected = np.asarray(float_logits(student.graph, variables, images))
    runner = OnnxRunner(model)
    spread = expected.std()
    np.testing.assert_allclose(runner.logits(images), expected, atol=0.2 * spread)
    assert not any(kind.startswith(("Quant", "QLinear", "Dequant")) for kind in runner.census())


@pytest.mark.parametrize("build", GRAPHS, ids=lambda build: build.__name__)
def test_the_float_twin_of_litert_is_that_of_onnx(build, tmp_path):
    pytest.importorskip("ai_edge_litert")
    student, variables, _ = calibrated(build, 8)
    codes = student_codes(student, variables)
    (tmp_path / "twin.tflite").write_bytes(tflite_float_twin(student, codes))
    images = np.asarray(random_images(5))
    expected = OnnxRunner(onnx_float_twin(student, codes).SerializeToString()).logits(images)
    found = LiteRTRunner(tmp_path / "twin.tflite", batch=len(images)).logits(images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_bench_times_litert_too(exported, tmp_path, monkeypatch):
    pytest.importorskip("ai_edge_litert")
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    export.export_student(exported, tmp_path / "out", targets=("litert",), input_kind="uint8")
    result = bench.bench(tmp_path / "out", batches=(2,))
    (row,) = result["timings"]
    assert (row["runtime"], row["batch"]) == ("litert", 2)
    assert result["census"] == {}
    sizes = result["bytes"]["model.tflite"]
    assert sizes["integer"] == (tmp_path / "out" / "model.tflite").stat().st_size
    assert sizes["float32"] > 0
    assert "as integers" not in bench.table(result)
    with pytest.raises(FileNotFoundError, match=r"runtime onnxruntime: found no model\.onnx"):
        bench.bench(tmp_path / "out", runtimes=("onnxruntime",))


def test_bench_times_both_and_counts_what_runs(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    out = tmp_path / "bench.json"
    assert bench.main([str(exported), "--batch", "1,3", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [row["batch"] for row in result["timings"]] == [1, 3]
    for row in result["timings"]:
        assert row["pairs"] >= bench.PAIRS[0]
        for low, median, high in (row["float32"], row["integer"]):
            assert 0 < low <= median <= high
    assert result["float_layers"] == 0
    assert result["integer_layers"] == 7
    assert result["bytes"]["model.onnx"]["integer"] == (exported / "model.onnx").stat().st_size
    said = capsys.readouterr().out
    assert "run as integers: 7, as floats: 0" in said


def test_bench_alternates():
    order = []
    bench.compare(lambda: order.append("f"), lambda: order.append("i"))
    assert "".join(order) == "fi" * (len(order) // 2)
    assert len(order) >= 2 * bench.PAIRS[0]


def test_every_runtime_measures_the_same(exported, images, capsys):
    assert evaluate.main(["--model", str(exported), "--data", str(images)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.partition(":")[0] for line in lines]
    assert names == ["jax", "onnxruntime", "jaxexport"]
    figures = {line.partition(": ")[2].partition(",")[0] for line in lines}
    assert len(figures) == 1
    assert all(line.endswith("same class as jax on 100.00 %") for line in lines[1:])


def test_accuracy_is_that_of_the_logits(exported, images):
    data = load_data(path=str(images))
    found = evaluate.evaluate_model(exported / "model.onnx", data)["onnxruntime"]
    pixels, labels = (np.stack(part) for part in zip(*data.source, strict=True))
    logits = OnnxRunner(exported / "model.onnx").logits(normalise(pixels, PREPROCESSING))
    assert found.top1 == pytest.approx(100 * np.mean(logits.argmax(-1) == labels))
    assert found.images == 40
    student = evaluate.evaluate_model(exported / "student", data)["jax"]
    assert student.top1 == found.top1


def test_raw_pixels_give_the_same(exported, images, tmp_path):
    export.export_student(exported, tmp_path / "raw", input_kind="uint8", targets=("onnx",))
    data = load_data(path=str(images))
    found = evaluate.evaluate_model(tmp_path / "raw", data)
    assert found["onnxruntime"].agreement == 100
    assert found["onnxruntime"].top1 == found["jax"].top1


def test_refusals(exported, images, tmp_path, capsys):
    (tmp_path / "text.onnx").write_text("not a model")
    for command, arguments, message in (
        (evaluate, ["--model", str(exported)], "found no images, expected --data"),
        (evaluate, ["--model", str(tmp_path), "--data", str(images)], "found no student.json"),
        (evaluate, ["--model", str(tmp_path / "text.onnx"), "--data", str(images)], "no readable"),
        (evaluate, ["--model", str(exported), "--data", str(images), "--runtime", "tflite"],
         "found ['tflite'], expected some of"),
        (bench, [str(tmp_path)], "found no student.json"),
        (bench, [str(exported), "--batch", "one"], "--batch: found 'one'"),
        (bench, [str(exported), "--runtime", "tflite"], "found ['tflite'], expected some of"),
    ):  # fmt: skip
        assert command.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_labels_beyond_the_classes_are_refused(exported):
    pixels = np.zeros((8, 8, 3), np.uint8)
    data = EvalData(name="other", num_examples=1, class_names=None, source=[(pixels, 7)])
    with pytest.raises(ValueError, match="found label 7, expected less than the 5 classes"):
        evaluate.evaluate_model(exported, data, runtimes=("jax",))
