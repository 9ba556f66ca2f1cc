"""Faults in .tflite and .jaxexport files are found; and what verify says of runtimes not exact."""

import json
import shutil

import jax
import numpy as np
import pytest
from test_export import finished_run

from lrq_jax import export, verify
from lrq_jax.exported import record, run_sha256
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


def test_another_version_of_lrq_jax_may_have_written_a_tflite_file(tflite, monkeypatch):
    monkeypatch.setattr("lrq_jax.writers.targets.__version__", "99.0")
    (constants, *_) = verify.verify(tflite)
    assert constants.passed, constants


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


def test_a_function_of_another_jax_is_what_was_written_at_export(copy, capsys):
    """Its bytes are another's, so only the hash in the report tells."""
    record(copy, jax="0.0.1")
    assert verify.main([str(copy), "--runtime", "jax"]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert "as written at export (sha256); constants not compared, since jax 0.0.1 wrote it" in said
    assert f"this is jax {jax.__version__}" in said
    assert "every bit" not in said
    student, codes, _ = load_student(copy / "student")
    codes["weights"]["conv1"]["scale"] = np.nextafter(
        codes["weights"]["conv1"]["scale"], np.float32(9)
    )
    (copy / "model.jaxexport").write_bytes(jax_export(student, codes))
    constants, *_ = verify.verify(copy, runtimes=("jax",))
    assert constants.fault.startswith("found sha256 ")
    assert not constants.passed


def test_a_function_of_another_jax_without_a_hash_is_said_not_to_be_compared(copy):
    change_report(copy, lambda report: report.update(jax="0.0.1"))
    change_report(copy, lambda report: report.pop("sha256"))
    constants, logits, report = verify.verify(copy, runtimes=("jax",))
    assert constants.passed
    assert "not compared, since jax 0.0.1 wrote it" in str(constants)
    assert "every bit" not in str(constants)
    assert logits.images
    assert logits.passed
    assert report.passed
    assert "sha256 not compared, since an earlier version recorded none" in str(report)


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
    _, near, _ = verify.verify(exported, runtimes=("near",), tolerance=1.0)
    assert near.passed
    assert near.different == near.images
    assert f"{near.flips} classed otherwise" in str(near)
    share = near.flips / near.images
    assert share == pytest.approx(1 / 8)
    _, strict, _ = verify.verify(exported, runtimes=("near",), tolerance=0.99 * share)
    assert not strict.passed
    assert str(strict).startswith("FAILED")
    _, enough, _ = verify.verify(exported, runtimes=("near",), tolerance=1.01 * share)
    assert enough.passed


def test_openvino_is_near(exported):
    pytest.importorskip("openvino")
    constants, near, _ = verify.verify(exported, runtimes=("openvino",))
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
        constants, runtime, _ = verify.verify(tmp_path / "out", runtimes=("onnxruntime",))
        assert constants.passed
        assert not runtime.passed
        assert ("without VNNI" in runtime.fault) == without_vnni
        if said:
            assert said in runtime.fault
            assert processor.machine()["processor"] in runtime.fault
            assert "session.x64quantprecision=1" in runtime.fault
            assert "--config.student.weight_bits=7" in runtime.fault
    _, wide, _ = verify.verify(tmp_path / "out", runtimes=("onnxruntime",), wide_pairs=True)
    assert wide.passed


def test_a_portable_file_has_no_such_excuse(exported, monkeypatch):
    found = OnnxRunner.logits
    monkeypatch.setattr(OnnxRunner, "logits", lambda runner, x: found(runner, x) + np.float32(1))
    monkeypatch.setattr(verify, "saturates_pairs", lambda: True)
    _, runtime, _ = verify.verify(exported, runtimes=("onnxruntime",))
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
    assert [row["passed"] for row in report["agreement"]] == [True, True, True]
    assert report["latency"]["float_layers"] == 0
    assert report["census"]["QLinearConv"] == 6
    card = (out / "README.md").read_text()
    assert "| onnxruntime 1" in card
    assert "7 convolutions and dense layers as integers and 0 as floats" in card
    assert report["latency"]["machine"]["processor"] in card
    assert "Not measured: `" not in card.partition("## Limits")[0].partition("## Agreement")[2]
    assert "written to" in capsys.readouterr().out


def test_an_export_that_fails_is_timed_all_the_same(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lrq_jax.bench.SECONDS", 0.01)
    fault = verify.Verdict(runtime="onnxruntime 0", exact=True, images=3, different=2, fault="bias")
    monkeypatch.setattr(export, "verify", lambda directory: [fault])
    out = tmp_path / "out"
    assert export.main(["--run", str(exported), "--out", str(out), "--targets", "onnx"]) == 1
    report = json.loads((out / "report.json").read_text())
    assert report["latency"]["timings"]
    assert report["agreement"] == [fault.as_dict()]
    card = (out / "README.md").read_text()
    assert "| onnxruntime 0 | 3 | 2 | 0 | FAILED bias |" in card
    assert "passed" not in card
    assert "FAILED  onnxruntime 0" in capsys.readouterr().out


def test_a_card_tells_flips_beyond_the_tolerance(copy, monkeypatch, capsys):
    monkeypatch.setitem(verify.RUNTIMES, "near", ("model.onnx", Near))
    arguments = [str(copy), "--runtime", "near", "--record", "--tolerance", "0.01"]
    assert verify.main(arguments) == 1
    assert " | FAILED |" in (copy / "README.md").read_text()
    assert verify.main([*arguments[:-1], "1"]) == 0
    card = (copy / "README.md").read_text()
    assert "FAILED" not in card
    (row,) = [line for line in card.splitlines() if line.startswith("| near")]
    assert row.endswith("| passed |")
    assert "| model.onnx against the stored codes | - | 0 | 0 | every bit the same |" in card


def test_findings_of_other_runtimes_stay(copy):
    rows = [
        {**verify.Verdict(runtime=runtime, exact=True).as_dict(), "fault": fault}
        for runtime, fault in (("onnxruntime 1.0", "a"), ("jaxexport 1", "b"), ("jaxexport 2", "c"))
    ]
    record(copy, agreement=rows[:2])
    record(copy, agreement=rows[2:])
    report = json.loads((copy / "report.json").read_text())
    assert [row["fault"] for row in report["agreement"]] == ["a", "c"]


def latency(runtime, processor, **census):
    timing = {"runtime": runtime, "batch": 1, "threads": 1, "speedup": 1.0}
    return {
        "timings": [{**timing, "float32": [1, 2, 3], "integer": [1, 2, 3]}],
        "census": census,
        "integer_layers": len(census),
        "float_layers": 0,
        "bytes": {runtime: {"integer": 1}},
        "machine": {"processor": processor, "features": []},
        "versions": {runtime: "1"},
    }


def test_timings_of_other_runtimes_stay_if_of_the_same_machine(copy):
    def kept():
        report = json.loads((copy / "report.json").read_text())
        assert report["census"] == report["latency"]["census"]
        return report["latency"]

    def put(result):
        record(copy, census=result["census"], latency=result)

    put(latency("onnxruntime", "here", QLinearConv=5))
    put(latency("litert", "here"))
    put(latency("litert", "here"))
    both = kept()
    assert [row["runtime"] for row in both["timings"]] == ["onnxruntime", "litert"]
    assert both["census"] == {"QLinearConv": 5}
    assert both["integer_layers"] == 1
    assert both["bytes"].keys() == both["versions"].keys() == {"onnxruntime", "litert"}
    put(latency("onnxruntime", "here", QGemm=1, QLinearConv=2))
    assert kept()["integer_layers"] == 2
    put(latency("litert", "elsewhere"))
    assert [row["runtime"] for row in kept()["timings"]] == ["litert"]
    assert kept()["census"] == {}


# --- packages that are missing -------------------------------------------------------------------


def test_a_missing_package_leaves_the_other_verdicts(copy, monkeypatch, capsys):
    def missing(*_, **__):
        raise ImportError("found no package 'onnxruntime': pip install 'lrq_jax[onnx]'")

    monkeypatch.setattr(OnnxRunner, "__init__", missing)
    assert verify.main([str(copy), "--record"]) == 2
    said = capsys.readouterr().out.splitlines()
    (line,) = [line for line in said if not line.startswith("ok ")]
    assert line.startswith("-       onnxruntime: not tried: found no package 'onnxruntime'")
    assert len(said) == 5
    assert "| onnxruntime | - | 0 | 0 | not tried: found no" in (copy / "README.md").read_text()
    verdict = next(row for row in verify.verify(copy) if row.untried)
    assert not verdict.passed
    assert not verdict.failed

    assert verify.main([str(copy), "--runtime", "onnxruntime"]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert "pip install 'lrq_jax[onnx]'" in said.err

    (copy / "model.jaxexport").write_bytes(b"x")
    assert verify.main([str(copy)]) == 1


def test_an_export_without_the_runtimes_package_is_made_and_says_so(exported, tmp_path, monkeypatch,
                                                                    capsys):  # fmt: skip
    def missing(*_, **__):
        raise ImportError("found no package 'onnxruntime': pip install 'lrq_jax[onnx]'")

    monkeypatch.setattr(OnnxRunner, "__init__", missing)
    out = tmp_path / "out"
    assert export.main(["--run", str(exported), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "onnxruntime: not tried: found no package" in said
    assert "not timed: found no package" in said
    assert "| every bit the same |" in (out / "README.md").read_text()


# --- the report ----------------------------------------------------------------------------------


def change_report(directory, change):
    path = directory / "report.json"
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))


def forged(report):
    """With the hash of what it says now."""
    report["run_sha256"] = run_sha256(report["run"])


REPORT_FAULTS = {
    "layers/1/weight_bits: found 8, expected 4": lambda r: r["layers"][1].update(weight_bits=8),
    "layers/0/codes_used: found 1, expected ": lambda r: r["layers"][0].update(codes_used=1),
    "tensors/2/scale: found 1.0, expected ": lambda r: r["tensors"][2].update(scale=1.0),
    "tensors/0: found nothing, expected ": lambda r: r.update(tensors=[]),
    "portable_without_vnni: found False, expected True": lambda r: r.update(
        portable_without_vnni=False
    ),
    "float32_bytes: found 5, expected ": lambda r: r.update(float32_bytes=5),
    "files/model.onnx: found 5, expected ": lambda r: r["files"].update({"model.onnx": 5}),
    "files/student/: found 5, expected ": lambda r: r["files"].update({"student/": 5}),
    "files/model.x: found 5, expected nothing": lambda r: r["files"].update({"model.x": 5}),
    "sha256/model.onnx: found '0', expected '": lambda r: r["sha256"].update({"model.onnx": "0"}),
    "sha256/student/: found '0', expected '": lambda r: r["sha256"].update({"student/": "0"}),
    "run/weight_bits: found 2, expected 4": lambda r: r["run"].update(weight_bits=2) or forged(r),
    "run/policy: found 'R', expected 'U'": lambda r: r["run"].update(policy="R") or forged(r),
    "run_sha256: found '": lambda r: r["run"]["student"].update(top1=100.0),
    "sha256/model.jaxexport: found nothing, expected '": lambda r: r["sha256"].pop(
        "model.jaxexport"
    ),
}


@pytest.mark.parametrize("fault", list(REPORT_FAULTS))
def test_a_tampered_report_is_a_failure_that_names_the_field(fault, copy, capsys):
    change_report(copy, REPORT_FAULTS[fault])
    assert verify.main([str(copy), "--runtime", "jax"]) == 1
    said = capsys.readouterr().out
    assert f"FAILED  report.json against student/ and the files: {fault}" in said
    assert said.count("FAILED") == 1


def test_a_run_without_a_hash_is_said_not_to_be_compared(copy, capsys):
    change_report(copy, lambda report: report.pop("run_sha256"))
    assert verify.main([str(copy), "--runtime", "jax"]) == 0
    assert "the run's figures not compared" in capsys.readouterr().out


def test_a_tampered_student_is_found_without_any_other_file(exported, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--run", str(exported), "--out", str(out), "--targets", "orbax"]
    assert export.main(arguments) == 0
    assert verify.main([str(out)]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "ok      report.json against student/ and the files: as written at export"
    path = out / "student" / "student.json"
    path.write_text(path.read_text().replace('"size": 8', '"size": 9'))
    assert verify.main([str(out)]) == 1
    assert "sha256/student/: found '" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "message"), [
    ("{", "found no readable JSON"),
    ("[]", "found a JSON list"),
    ("{}", "found format None, expected 'lrq_jax export'"),
    ('{"format": "lrq_jax export", "run": {}}', "found no usable version, options, layers"),
])  # fmt: skip
def test_a_damaged_report_is_named(text, message, copy, capsys):
    (copy / "report.json").write_text(text)
    for arguments in ([str(copy)], [str(copy), "--record"]):
        assert verify.main(arguments) == 2
        said = capsys.readouterr().err
        assert f"{copy / 'report.json'}: {message}" in said


def test_fields_that_the_card_and_the_files_need_are_named(copy, capsys):
    def lacking(report):
        del report["options"]["batch"], report["run"]["seed"]

    change_report(copy, lacking)
    assert verify.main([str(copy)]) == 2
    assert "found no usable options/batch, run/seed, expected" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "place"), [
    (lambda said: said["preprocessing"]["mean"].__setitem__(1, 0.5), "preprocessing/mean/1: found 0.5, expected 0.45"),
    (lambda said: said.update(num_classes=7), "num_classes: found 7, expected "),
    (lambda said: said["options"].pop("batch"), "options/batch: found nothing, expected None"),
    (lambda said: said.clear(), "num_classes: found nothing"),
    (lambda said: said.update(version="0.0.1"), None),
])  # fmt: skip
def test_what_an_onnx_file_says_of_itself_is_compared(change, place, copy):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(copy / "model.onnx")
    (entry,) = model.metadata_props
    said = json.loads(entry.value)
    change(said)
    entry.value = json.dumps(said)
    onnx.save(model, copy / "model.onnx")
    constants, *_ = verify.verify(copy, runtimes=("onnxruntime",))
    assert constants.passed == (place is None)
    if place and said:
        assert constants.fault.startswith(f"metadata lrq_jax/{place}")


def test_an_onnx_file_that_says_nothing_of_itself_is_found(copy):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(copy / "model.onnx")
    for text in ("{", None):
        model.metadata_props[0].value = text or ""
        if text is None:
            del model.metadata_props[:]
        onnx.save(model, copy / "model.onnx")
        constants, *_ = verify.verify(copy, runtimes=("onnxruntime",))
        assert constants.fault.startswith("metadata lrq_jax: found ")


def test_unmeasured_exports_say_so_until_they_are(exported, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--run", str(exported), "--out", str(out), "--targets", "jax", "--unmeasured"]
    assert export.main(arguments) == 0
    assert "agreement" not in json.loads((out / "report.json").read_text())
    assert "verify DIR --record` does" in (out / "README.md").read_text()
    assert verify.main([str(out), "--record"]) == 0
    assert "verify DIR --record` does" not in (out / "README.md").read_text()


def test_a_card_keeps_the_licence_that_was_filled_in(copy):
    card = copy / "README.md"
    text = card.read_text(encoding="utf-8")
    line = "- licence: BSD, \\1 und Ähnliches"
    card.write_text(
        text.replace("- licence: (to be filled in: that of the teacher's weights)", line)
    )
    record(copy, agreement=[])
    assert line in card.read_text(encoding="utf-8").splitlines()
    assert "filled in" not in card.read_text(encoding="utf-8")
