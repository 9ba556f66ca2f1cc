"""Faults in .tflite and .jaxexport files are found; and what verify says of runtimes not exact."""

import json
import shutil

import jax
import numpy as np
import pytest
from test_export import finished_run

from lrq_jax import export, verify
from lrq_jax.exported import record
from lrq_jax.runtimes import processor
from lrq_jax.runtimes.onnx_runtime import OnnxRunner
from lrq_jax.runtimes.trials import hostile_pixels
from lrq_jax.writers.codes import load_student
from lrq_jax.writers.jax_export import jax_export

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export")
    run = finished_run(directory / "run")
    export.export_student(run, directory / "out", targets=("onnx", "jax"))
    return directory / "out"


@pytest.fixture
def copy(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "out")
    return tmp_path / "out"


# --- .tflite -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tflite(exported, tmp_path_factory):
    pytest.importorskip("ai_edge_litert")
    out = tmp_path_factory.mktemp("tflite") / "out"
    export.export_student(exported, out, targets=("litert",))
    return out


def tensor(model, name):
    (found,) = [t for t in model.subgraphs[0].tensors if t.name.decode() == name]
    return found


def change_data(name, change, dtype=np.int8):
    def apply(model):
        buffer = model.buffers[tensor(model, name).buffer]
        values = np.frombuffer(bytes(buffer.data), dtype).copy()
        before = values.copy()
        change(values)
        assert (values != before).any()
        buffer.data = np.frombuffer(values.tobytes(), np.uint8)

    return apply


def bias_off_by_one(values):
    values[np.abs(values).argmax()] += 1


def int8_overflow(values):
    values[np.abs(values.astype(int)).argmax()] = -128


def swapped_channels(values):  # [4, 3, 3, 4]
    values[:36], values[36:72] = values[36:72].copy(), values[:36].copy()


def transposed(values):
    kernel = values.reshape(4, 3, 3, 4)
    kernel[:] = kernel.swapaxes(1, 2).copy()


def scale_off_by_one_ulp(model):
    meaning = tensor(model, "conv1.weight").quantization
    meaning.scale = np.nextafter(np.float32(meaning.scale), np.float32(9)).astype(np.float32)


def stale_batch_norm(model):
    meaning = tensor(model, "conv1.weight").quantization
    meaning.scale = (np.float32(meaning.scale) * np.float32(1.1)).astype(np.float32)


def zero_point(model):
    meaning = tensor(model, "image.codes").quantization
    meaning.zeroPoint = np.asarray(meaning.zeroPoint) - 1


def missing_clip(model):
    """Of the first convolution with a fused ReLU."""
    for operator in model.subgraphs[0].operators:
        options = operator.builtinOptions
        if getattr(options, "fusedActivationFunction", 0) == 1 and hasattr(options, "strideW"):
            options.fusedActivationFunction = 0
            return
    raise AssertionError("no such operator")


TFLITE_FAULTS = {
    "scale off by one ulp": scale_off_by_one_ulp,
    "bias off by one": change_data("conv1.bias", bias_off_by_one, np.int32),
    "zero point": zero_point,
    "swapped channels": change_data("conv1.weight", swapped_channels),
    "missing clip": missing_clip,
    "transposed weights": change_data("conv1.weight", transposed),
    "stale batch norm": stale_batch_norm,
    "int8 overflow": change_data("conv1.weight", int8_overflow),
}


@pytest.mark.parametrize("fault", [*TFLITE_FAULTS, "truncated"])
def test_a_fault_in_a_tflite_file_is_found(fault, tflite, tmp_path, capsys):
    from lrq_jax.writers.tflite_builder import packed, schema

    out = tmp_path / "out"
    shutil.copytree(tflite, out)
    content = (out / "model.tflite").read_bytes()
    if fault == "truncated":
        content = content[: len(content) // 2]
    else:
        model = schema().ModelT.InitFromPackedBuf(content)
        TFLITE_FAULTS[fault](model)
        content = packed(model)
    (out / "model.tflite").write_bytes(content)
    assert verify.main([str(out)]) == 1
    said = capsys.readouterr().out
    assert said.startswith("FAILED  model.tflite against the stored codes: ")
    if fault in ("swapped channels", "transposed weights", "stale batch norm"):
        assert "tensor 'conv1.weight'" in said
        assert "first tensor that differs: 'relu1'" in said


# --- .jaxexport ----------------------------------------------------------------------------------


def in_layer(name, part, change):
    def apply(codes):
        value = codes["weights"][name][part] = codes["weights"][name][part].copy()
        change(value)

    return apply


def one_ulp(values):
    values[0] = np.nextafter(values[0], np.float32(9))


def add_one(values):
    values.reshape(-1)[0] += 1


def mirrored(values):
    values[:] = values.swapaxes(0, 1).copy()


JAX_FAULTS = {
    "conv1.scale": in_layer("conv1", "scale", one_ulp),
    "classifier.bias": in_layer("classifier", "bias", add_one),
    "conv1.zero_point": in_layer("conv1", "zero_point", add_one),
    "conv1.codes": in_layer("conv1", "codes", mirrored),
}


@pytest.mark.parametrize("fault", list(JAX_FAULTS))
def test_a_fault_in_a_jax_function_is_found(fault, copy, capsys):
    student, codes, _ = load_student(copy / "student")
    JAX_FAULTS[fault](codes)
    (copy / "model.jaxexport").write_bytes(jax_export(student, codes))
    assert verify.main([str(copy), "--runtime", "jax"]) == 1
    said = capsys.readouterr().out
    constants = f"FAILED  model.jaxexport against the stored codes: constant '{fault}' differs"
    assert said.startswith(constants)


def test_a_function_of_another_jax_is_not_compared_byte_by_byte(copy):
    record(copy, jax="0.0.1")
    constants, logits = verify.verify(copy, runtimes=("jax",))
    assert f"not compared, since jax 0.0.1 wrote it and this is jax {jax.__version__}" in str(
        constants
    )
    assert logits.images
    assert logits.passed


def test_a_jax_function_says_nothing_of_where_it_was_made(exported):
    content = (exported / "model.jaxexport").read_bytes()
    assert b"jax_export.py" not in content
    student, codes, _ = load_student(exported / "student")
    assert jax_export(student, codes) == content


# --- runtimes that are not exact -----------------------------------------------------------------


class Near(OnnxRunner):
    """Turns the class of every eighth image of a batch."""

    name = "near"
    exact = False

    def logits(self, images):
        found = super().logits(images) + np.float32(0.25)
        found[::8] *= -1
        return found


def test_flips_beyond_the_tolerance_fail(exported, monkeypatch):
    monkeypatch.setitem(verify.RUNTIMES, "near", ("model.onnx", Near))
    _, near = verify.verify(exported, runtimes=("near",), tolerance=1.0)
    assert near.passed
    assert near.different == near.images
    assert f"{near.flips} classed otherwise" in str(near)
    share = near.flips / near.images
    assert share == pytest.approx(1 / 8)
    _, strict = verify.verify(exported, runtimes=("near",), tolerance=0.99 * share)
    assert not strict.passed
    assert str(strict).startswith("FAILED")
    _, enough = verify.verify(exported, runtimes=("near",), tolerance=1.01 * share)
    assert enough.passed


def test_openvino_is_near(exported):
    pytest.importorskip("openvino")
    constants, near = verify.verify(exported, runtimes=("openvino",))
    assert constants.passed
    assert not near.exact
    assert near.passed
    assert near.tolerance == verify.TOLERANCE


def test_a_tolerance_is_a_share(exported, capsys):
    for tolerance in ("-0.1", "30"):
        assert verify.main([str(exported), "--tolerance", tolerance]) == 2
        assert "expected a share from 0 to 1" in capsys.readouterr().err


# --- processors without VNNI ---------------------------------------------------------------------


def test_saturating_pairs_are_named_as_the_cause(tmp_path, monkeypatch):
    """An 8-bit file whose logits differ: on a processor without VNNI it may be that."""
    export.export_student(
        finished_run(tmp_path / "run", bits=8), tmp_path / "out", targets=("onnx",)
    )
    found = OnnxRunner.logits

    def saturated(runner, images):
        return found(runner, images) + (0 if runner._wide_pairs else np.float32(1))

    monkeypatch.setattr(OnnxRunner, "logits", saturated)
    for without_vnni, said in ((True, "All images are identical so"), (False, None)):
        monkeypatch.setattr(verify, "saturates_pairs", lambda known=without_vnni: known)
        constants, runtime = verify.verify(tmp_path / "out", runtimes=("onnxruntime",))
        assert constants.passed
        assert not runtime.passed
        assert ("without VNNI" in runtime.fault) == without_vnni
        if said:
            assert said in runtime.fault
            assert processor.machine()["processor"] in runtime.fault
            assert "session.x64quantprecision=1" in runtime.fault
            assert "--config.student.weight_bits=7" in runtime.fault
    _, wide = verify.verify(tmp_path / "out", runtimes=("onnxruntime",), wide_pairs=True)
    assert wide.passed


def test_a_portable_file_has_no_such_excuse(exported, monkeypatch):
    found = OnnxRunner.logits
    monkeypatch.setattr(OnnxRunner, "logits", lambda runner, x: found(runner, x) + np.float32(1))
    monkeypatch.setattr(verify, "saturates_pairs", lambda: True)
    _, runtime = verify.verify(exported, runtimes=("onnxruntime",))
    assert not runtime.passed
    assert "VNNI" not in runtime.fault


# --- what is tried, and kept ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8, 3), (32, 32, 1), (2, 4, 3)])
def test_hostile_pixels_hold_every_value_in_every_channel(shape):
    pixels = hostile_pixels(shape)
    assert pixels.shape == (64, *shape)
    assert pixels.dtype == np.uint8
    for channel in range(shape[-1]):
        assert set(pixels[..., channel].reshape(-1).tolist()) == set(range(256))
    assert set(np.unique(pixels[-1])) <= {0, 255}


def test_a_file_of_pixels_is_tried_on_hostile_ones(exported, tmp_path):
    out = tmp_path / "out"
    export.export_student(exported, out, targets=("onnx",), input_kind="uint8")
    verdicts = verify.verify(out)
    assert verdicts[1].images == verify.SYNTHETIC_IMAGES + 64
    assert all(verdict.passed for verdict in verdicts)


def test_the_export_measures_itself(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lrq_jax.bench.SECONDS", 0.01)
    out = tmp_path / "out"
    assert export.main(["--run", str(exported), "--out", str(out), "--targets", "onnx,orbax"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert [row["passed"] for row in report["agreement"]] == [True, True]
    assert report["latency"]["float_layers"] == 0
    assert report["census"]["QLinearConv"] == 6
    card = (out / "README.md").read_text()
    assert "| onnxruntime 1" in card
    assert "7 convolutions and dense layers as integers and 0 as floats" in card
    assert report["latency"]["machine"]["processor"] in card
    assert "Not measured: `" not in card.partition("## Limits")[0].partition("## Agreement")[2]
    assert "written to" in capsys.readouterr().out


def test_unmeasured_exports_say_so_until_they_are(exported, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--run", str(exported), "--out", str(out), "--targets", "jax", "--unmeasured"]
    assert export.main(arguments) == 0
    assert "agreement" not in json.loads((out / "report.json").read_text())
    assert "verify DIR --record` does" in (out / "README.md").read_text()
    assert verify.main([str(out), "--record"]) == 0
    assert "verify DIR --record` does" not in (out / "README.md").read_text()
