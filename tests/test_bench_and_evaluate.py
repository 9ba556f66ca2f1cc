"""The float twin is the float network, bench reports what it timed, evaluate needs no run."""

import json
import shutil
import sys
import types

import matplotlib.image
import numpy as np
import pytest
from small_networks import GRAPHS, calibrated, random_images
from test_export import PREPROCESSING, finished_run

from lrq_jax import bench, evaluate, export
from lrq_jax.data import EvalData, load_data
from lrq_jax.data.pixels import encode_png, normalise
from lrq_jax.exported import record
from lrq_jax.passes import float_logits
from lrq_jax.runtimes.litert import LiteRTRunner
from lrq_jax.runtimes.onnx_runtime import OnnxRunner
from lrq_jax.runtimes.openvino import OpenVinoRunner
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
    assert result["census"] is None
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


@pytest.fixture
def paced(monkeypatch):
    """A runtime by a clock of its own, beside the real ones: three seconds an image for the float
    twin, one for the exported file; it keeps what it was told."""

    class Paced:
        name = version = "paced"
        fixed_batch = None
        now, threads, twins, calls = 0.0, [], [], []

        def __init__(self, path, threads):
            self.is_twin = path.read_bytes() == b"twin"
            self.input_kind = "float" if self.is_twin else "uint8"
            Paced.threads.append(threads)

        def logits(self, images):
            Paced.calls.append((self.is_twin, len(images), images.dtype.name))
            Paced.now += len(images) * (3 if self.is_twin else 1)

    def write_twin(student, codes, **fixed):
        Paced.twins.append(fixed)
        return b"twin"

    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=lambda: Paced.now))
    monkeypatch.setitem(bench.RUNTIMES, "paced", ("model.onnx", Paced, write_twin, "paced-package"))
    return Paced


def test_bench_times_the_twin_beside_the_file(exported, paced):
    result = bench.bench(exported, batches=(1, 5), threads=3, runtimes=("paced",))
    for row, batch in zip(result["timings"], (1, 5), strict=True):
        assert row["float32"] == (3000.0 * batch,) * 3
        assert row["integer"] == (1000.0 * batch,) * 3
        assert row["speedup"] == 3
        assert (row["runtime"], row["batch"], row["threads"]) == ("paced", batch, 3)
    shown = {(True, b, "float32") for b in (1, 5)} | {(False, b, "uint8") for b in (1, 5)}
    assert set(paced.calls) == shown
    assert set(paced.threads) == {3}
    assert result["versions"] == {"paced-package": "paced"}
    cells = bench.table(result).splitlines()[3].split()
    assert cells[:4] == ["paced", "5", "3", "15000.000"]
    assert cells[-4:] == ["(5000.000", "-", "5000.000)", "3.00x"]
    assert cells[-5] == "5000.000"


def test_a_fixed_batch_is_the_only_one_timed(exported, paced, monkeypatch):
    monkeypatch.setattr(paced, "fixed_batch", 3)
    (row,) = bench.bench(exported, runtimes=("paced",))["timings"]
    assert row["batch"] == 3
    assert {count for _, count, _ in paced.calls} == {3}
    assert paced.twins == [{"batch": 3}]
    assert bench.bench(exported, batches=(3,), runtimes=("paced",))["timings"] == [row]
    paced.calls.clear()
    with pytest.raises(ValueError, match=r"found \[1, 3\], expected \[3\], as model\.onnx was"):
        bench.bench(exported, batches=(1, 3), runtimes=("paced",))
    assert not paced.calls


def test_exports_of_a_fixed_batch_are_timed_at_it(exported, tmp_path, monkeypatch, capsys):
    pytest.importorskip("ai_edge_litert")
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    out = tmp_path / "out"
    export.export_student(exported, out, targets=("onnx", "litert"), batch=3)
    rows = bench.bench(out)["timings"]
    assert [(row["runtime"], row["batch"]) for row in rows] == [("onnxruntime", 3), ("litert", 3)]
    for runtime, file in (("onnxruntime", "model.onnx"), ("litert", "model.tflite")):
        assert bench.main([str(out), "--batch", "1", "--runtime", runtime]) == 2
        said = f"batches: found [1], expected [3], as {file} was exported with --batch 3; leave"
        assert said in capsys.readouterr().err


def test_flags_of_bench(exported, paced, tmp_path):
    out, chart, result = (tmp_path / name for name in ("out", "chart.png", "bench.json"))
    shutil.copytree(exported, out)
    flags = ["--runtime", "paced", "--threads", "3", "--batch", "2", "--record"]
    assert bench.main([str(out), *flags, "--plot", str(chart), "--out", str(result)]) == 0
    assert set(paced.threads) == {3}
    recorded = json.loads((out / "report.json").read_text())["latency"]
    assert recorded == json.loads(result.read_text())
    assert "| paced | 2 | 3 | 6000.000 | 2000.000 | 3.00 |" in (out / "README.md").read_text()
    drawn = np.rint(255 * matplotlib.image.imread(chart)[..., :3]).astype(int)
    grey, green = ((drawn == colour).all(-1) for colour in ((0x99,) * 3, (0x2A, 0x7F, 0x62)))
    heights = [bar.any(1).sum() for bar in (grey, green)]
    assert heights[0] > 50
    assert heights[0] / heights[1] == pytest.approx(3, rel=0.05)


def test_threads_reach_the_runtimes(exported, tmp_path, monkeypatch):
    session = OnnxRunner(exported / "model.onnx", threads=3)._session
    assert session.get_session_options().intra_op_num_threads == 3
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    found = []

    class Interpreter(interpreter.Interpreter):
        def __init__(self, **options):
            found.append(options["num_threads"])
            super().__init__(**options)

    monkeypatch.setattr(interpreter, "Interpreter", Interpreter)
    export.export_student(exported, tmp_path / "out", targets=("litert",))
    LiteRTRunner(tmp_path / "out" / "model.tflite", threads=3)
    assert found == [3]
    openvino = pytest.importorskip("openvino")

    class Core(openvino.Core):
        def compile_model(self, model, device, settings):
            found.append(settings["INFERENCE_NUM_THREADS"])
            return super().compile_model(model, device, settings)

    monkeypatch.setattr(openvino, "Core", Core)
    OpenVinoRunner(exported / "model.onnx", threads=3)
    assert found == [3, "3"]


# --- packages that are missing -------------------------------------------------------------------


@pytest.fixture
def both(exported, tmp_path, monkeypatch):
    pytest.importorskip("ai_edge_litert")
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    export.export_student(exported, tmp_path / "both", targets=("onnx", "litert"))
    return tmp_path / "both"


MISSING = {"litert": "ai_edge_litert.interpreter", "onnxruntime": "onnxruntime"}
EXTRAS = {"litert": "lrq_jax[litert]", "onnxruntime": "lrq_jax[onnx]"}


@pytest.mark.parametrize("missing", MISSING)
def test_a_runtime_that_is_missing_is_left_out(missing, both, monkeypatch, capsys):
    (there,) = set(MISSING) - {missing}
    monkeypatch.setitem(sys.modules, MISSING[missing], None)
    arguments = [str(both), "--batch", "1", "--out", str(both / "bench.json"), "--record"]
    assert bench.main(arguments) == 0
    (line,) = (row for row in capsys.readouterr().out.splitlines() if "not timed" in row)
    assert line.startswith(f"{missing}: not timed: found no package '{MISSING[missing]}'")
    assert EXTRAS[missing] in line
    result = json.loads((both / "bench.json").read_text())
    assert [row["runtime"] for row in result["timings"]] == [there]
    assert list(result["untimed"]) == [missing]
    for asked in (missing, "onnxruntime,litert"):
        assert bench.main([str(both), "--runtime", asked]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"lrq_jax.bench: found no package '{MISSING[missing]}'")
        assert EXTRAS[missing] in said


def test_with_no_runtime_left_bench_says_so(both, monkeypatch, capsys):
    for module in MISSING.values():
        monkeypatch.setitem(sys.modules, module, None)
    assert bench.main([str(both)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lrq_jax.bench: found no package 'onnxruntime'")
    assert said.endswith("; no runtime is left to time\n")
    assert all(extra in said for extra in EXTRAS.values())


def test_operators_are_counted_only_beside_onnx_runtime(exported, paced, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = bench.bench(exported, batches=(1,), runtimes=("paced",))
    assert [result[key] for key in ("census", "integer_layers", "float_layers")] == [None] * 3
    assert "layers run as" not in bench.table(result)
    shutil.copytree(exported, tmp_path / "out")
    record(tmp_path / "out", census=result["census"], latency=result)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| paced | 1 |" in card
    assert "ONNX Runtime runs" not in card


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


@pytest.mark.parametrize(
    ("label", "names", "words"),
    [
        (7, None, "found label 7, expected 0 to 4"),
        (-1, None, "found label -1, expected 0 to 4"),
        (0, ("five", "seven"), "found 2 named classes, expected the 5"),
    ],
)
def test_images_of_other_classes_are_refused_as_a_run_does(label, names, words, exported):
    pixels = np.zeros((8, 8, 3), np.uint8)
    data = EvalData(name="other", num_examples=1, class_names=names, source=[(pixels, label)])
    with pytest.raises(ValueError, match=words):
        evaluate.evaluate_model(exported, data, runtimes=("jax",))
