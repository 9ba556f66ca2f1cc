"""An export is verified, and every planted fault is found."""

import json
import os
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_networks import calibrated, gated_like, resnet_like

from lrq_jax import export, verify
from lrq_jax.config import get_config, resolve
from lrq_jax.data import Preprocessing
from lrq_jax.passes import QuantSpec, Student
from lrq_jax.quantize import _report
from lrq_jax.sharding import local_mesh
from lrq_jax.writers.codes import load_student, save_student
from lrq_jax.writers.model_card import model_card
from lrq_jax.writers.onnx_writer import codes_name

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

PREPROCESSING = Preprocessing(mean=(0.4, 0.45, 0.5), std=(0.2, 0.21, 0.22), size=8)
RUN_REPORT = {
    "network": "small", "weight_bits": 4, "act_bits": 4, "preset": "lrq", "policy": "U",
    "steps": 1, "seed": 0, "images": 0, "versions": {"lrq_jax": "0"},
    "teacher_sha256": "0",
    "data": None, "teacher": {"top1": None}, "student": {"top1": None},
    "drop": None, "agreement": None,
    "teacher_source": {"file": "t.pt", "sha256": "0"},
    "settings": {"teacher_path": "/home/me/teachers/mine", "method": {"pool_path": ""}},
}  # fmt: skip


def finished_run(directory, build=resnet_like, bits=4):
    student, variables, _ = calibrated(build, bits)
    save_student(
        directory / "student", student, variables, preprocessing=PREPROCESSING, provenance={}
    )
    (directory / "report.json").write_text(json.dumps(RUN_REPORT))
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "out"
    export.export_student(run, out, weight_storage="int8")
    return out


def test_an_export_is_what_it_was_made_of(exported):
    names = {path.name for path in exported.iterdir()}
    assert names == {"student", "model.onnx", "model.jaxexport", "report.json", "README.md"}
    report = json.loads((exported / "report.json").read_text())
    assert report["files"]["model.onnx"] == (exported / "model.onnx").stat().st_size
    assert report["portable_without_vnni"] is True
    _, variables, _ = calibrated(resnet_like, 4)
    kernels = sum(layer.get("kernel", np.zeros(0)).size for layer in variables["params"].values())
    assert 4 * kernels < report["float32_bytes"] < 4 * kernels + 4 * 100
    assert {row["layer"] for row in report["layers"]} > {"conv0", "classifier"}
    card = (exported / "README.md").read_text()
    assert "licence: (to be filled in" in card
    assert '"teacher_path": "mine"' in card
    assert "/home/me" not in card + (exported / "report.json").read_text()
    verdicts = verify.verify(exported)
    names = [verdict.runtime.split()[0] for verdict in verdicts]
    assert names == ["model.onnx", "model.jaxexport", "onnxruntime", "jaxexport", "report.json"]
    for verdict in verdicts:
        assert verdict.passed, verdict
        assert verdict.exact
    assert verdicts[2].images == verify.SYNTHETIC_IMAGES + 64


def test_a_report_names_no_places_of_its_machine(run, tmp_path):
    """The fields of a real run's report, with what a person may have given it."""
    home = Path("/home/me/secret project")
    config = get_config()
    config.teacher.path = str(home / "teacher.pt")
    config.data.path = "~/secret/images"
    config.data.train_path = "secret/beside/train"
    config.method.images = "folder"
    settings = resolve(config, image_size=8)
    student, _, _ = calibrated(resnet_like, 4)
    job = SimpleNamespace(
        spec=SimpleNamespace(mesh=local_mesh()),
        teacher=SimpleNamespace(
            graph=student.graph, source="teacher.pt", source_sha256="0", class_names=None
        ),
        settings=settings,
        data=None,
        config={"teacher_sha256": "0"},
        run=SimpleNamespace(student=home / "student"),
    )
    report = {**_report(job, {}, {}), "warnings": [str(home / "images"), "1/2 of them, a/b"]}
    assert "secret" in report["command"]
    assert "secret" in json.dumps(report["settings"])
    other = tmp_path / "run"
    shutil.copytree(run, other)
    (other / "report.json").write_text(json.dumps(report))
    kept = export.export_student(other, tmp_path / "out", targets=())["run"]
    for file in ("report.json", "README.md"):
        assert "secret" not in (tmp_path / "out" / file).read_text()
    flags = shlex.split(report["command"])
    assert len(flags) > 6
    assert shlex.split(kept["command"]) == [
        f"{flag}={Path(value).name}" if equals and "path" in flag else word
        for word in flags
        for flag, equals, value in [word.partition("=")]
    ]
    assert kept["settings"]["data_path"] == "images"
    assert kept["warnings"] == ["images", "1/2 of them, a/b"]
    assert kept["versions"] == report["versions"]


@pytest.mark.parametrize(("word", "kept"), [
    ("--config.data.path=/home/me/images", "--config.data.path=images"),
    ("--other=/home/me/a=b/images", "--other=images"),
    ("--other=~/images", "--other=images"),
    (r"--other=C:\Users\me\images", "--other=images"),
    ("/home/me/bin/python", "python"),
    ("--config.student.overrides=('stage1/a=w8',)", "--config.student.overrides=('stage1/a=w8',)"),
    ("--config.data.name=imagenet2012/validation", "--config.data.name=imagenet2012/validation"),
])  # fmt: skip
def test_places_in_a_command_become_their_last_name(word, kept):
    found = export._without_places({"command": shlex.join(["python", word])})
    assert shlex.split(found["command"]) == ["python", kept]


def test_the_tables_hold_what_the_codes_do(exported):
    report = json.loads((exported / "report.json").read_text())
    _, codes, _ = load_student(exported / "student")
    used = {row["layer"]: row["codes_used"] for row in report["layers"]}
    assert used == {n: len(set(w["codes"].ravel().tolist())) for n, w in codes["weights"].items()}
    assert len(set(used.values())) > 1
    scales = {row["tensor"]: (row["scale"], row["zero_point"]) for row in report["tensors"]}
    assert scales == {n: (t["scale"], t["zero_point"]) for n, t in codes["tensors"].items()}
    assert len(set(scales.values())) > 2


@pytest.mark.parametrize("settings", [
    {"input_kind": "uint8", "targets": ("onnx", "orbax")},
    {"weight_storage": "uint4", "batch": 3, "targets": ("onnx", "jax")},
    {"targets": ("onnx", "litert")},
])  # fmt: skip
def test_other_forms_verify_too(settings, run, tmp_path):
    if "litert" in settings["targets"]:
        pytest.importorskip("ai_edge_litert")
    export.export_student(run, tmp_path / "out", **settings)
    verdicts = verify.verify(tmp_path / "out")
    assert len(verdicts) == 1 + 2 * len({*settings["targets"]} - {"orbax"})
    assert all(verdict.passed and verdict.exact for verdict in verdicts), verdicts


def test_a_network_with_gates_verifies(tmp_path):
    export.export_student(finished_run(tmp_path / "run", gated_like), tmp_path / "out")
    assert all(verdict.passed for verdict in verify.verify(tmp_path / "out"))


# --- the card ------------------------------------------------------------------------------------


def section(card, name):
    return card.partition(f"## {name}\n")[2].partition("\n## ")[0]


def test_the_card_has_the_bits_of_every_layer(exported):
    report = json.loads((exported / "report.json").read_text())
    for index, row in enumerate(report["layers"]):
        row |= {"weight_bits": 2 + index % 3, "input_bits": 5 + index % 4}
    card = section(model_card(report, PREPROCESSING), "Bits per layer").splitlines()[3:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card]
    assert [[row[0], *row[3:]] for row in rows] == [
        [row["layer"], str(row["weight_bits"]), str(row["input_bits"])] for row in report["layers"]
    ]


@pytest.mark.parametrize(("more", "said"), [
    ({}, "network, without the data it was trained on."),
    ({"zero_shot": True}, "network, without the data it was trained on."),
    ({"zero_shot": False, "settings": {"train_images": 1024}},
     "network, NOT zero-shot: trained on 1,024 real images."),
])  # fmt: skip
def test_the_card_says_whether_real_images_were_used(more, said, run, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    (other / "report.json").write_text(json.dumps(RUN_REPORT | more))
    export.export_student(other, tmp_path / "out", targets=())
    card = (tmp_path / "out" / "README.md").read_text()
    assert said in card
    assert ("without the data" in card) != ("NOT zero-shot" in card)


@pytest.mark.parametrize(("settings", "lines"), [
    ({"targets": ("orbax",)}, []),
    ({"targets": ("onnx", "jax")}, [
        "- model.onnx: `image`, normalised float32 `[batch, 3, 8, 8]`",
        "- model.jaxexport: normalised float32 `[batch, 8, 8, 3]`",
    ]),
    ({"targets": ("onnx", "jax"), "batch": 3, "input_kind": "uint8"}, [
        "- model.onnx: `image`, raw uint8 pixels, normalised inside, `[3, 8, 8, 3]`",
        "- model.jaxexport: normalised float32 `[3, 8, 8, 3]`",
    ]),
    ({"targets": ("litert",)}, [
        "- model.tflite: normalised float32 `[1, 8, 8, 3]`; the runtime can resize the batch",
    ]),
    ({"targets": ("litert",), "batch": 2, "input_kind": "uint8"}, [
        "- model.tflite: raw uint8 pixels, normalised inside, `[2, 8, 8, 3]`; the runtime can "
        "resize the batch",
    ]),
])  # fmt: skip
def test_the_card_describes_the_inputs_of_the_files_there_are(settings, lines, run, tmp_path):
    if "litert" in settings["targets"]:
        pytest.importorskip("ai_edge_litert")
    export.export_student(run, tmp_path / "out", **settings)
    said = section((tmp_path / "out" / "README.md").read_text(), "Input").splitlines()
    assert [line for line in said if line.startswith("-")] == lines
    assert said[1].endswith("mean 0.4, 0.45, 0.5 and std 0.2, 0.21, 0.22.")
    assert sum("model." in line for line in said) == len(lines)
    if "model.onnx" in str(lines):
        image = onnx.load(tmp_path / "out" / "model.onnx").graph.input[0].type.tensor_type
        shape = [dim.dim_param or dim.dim_value for dim in image.shape.dim]
        assert f"`[{', '.join(map(str, shape))}]`" in lines[0]


# --- planted faults ------------------------------------------------------------------------------


def constant(model, name):
    (tensor,) = [c for c in model.graph.initializer if c.name == name]
    return tensor, onnx.numpy_helper.to_array(tensor).copy()


def replace(model, name, change):
    tensor, array = constant(model, name)
    changed = np.asarray(change(array.copy()), array.dtype)
    assert changed.shape == array.shape
    assert (changed != array).any()
    tensor.CopyFrom(onnx.numpy_helper.from_array(changed, name))


def one_entry(change):
    def apply(array):
        index = np.unravel_index(np.abs(array.astype(float)).argmax(), array.shape)
        array[index] = change(array[index])
        return array

    return apply


def without_clip(model):
    """The second tensor's codes may leave 4 bits."""
    (clip, *_) = [node for node in model.graph.node if node.op_type == "Clip"]
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == clip.output[0]:
                node.input[i] = clip.input[0]
    model.graph.node.remove(clip)


def moved_zero_point(model):
    """The image's code of 0.0 one lower, in the quantizer and in what reads it."""
    _, zero = constant(model, quantizer_of(model, "image").input[2])
    model.graph.initializer.append(onnx.numpy_helper.from_array(zero - 1, "moved"))
    for node in model.graph.node:
        if "image.scale" in node.input:
            node.input[2] = "moved"


def quantizer_of(model, tensor):
    (node,) = [n for n in model.graph.node if n.output[0] == codes_name(tensor)]
    return node


def half_up(model):
    """The image rounded half away from zero: scaled, half a step added, floored."""
    nodes = model.graph.node
    quantizer = quantizer_of(model, "image")
    index = list(nodes).index(quantizer)
    _, scale = constant(model, "image.scale")
    _, zero = constant(model, quantizer.input[2])
    values = {"div": scale, "half": np.float32(0.5 + float(zero)), "lo": np.float32(0), "hi": np.float32(255)}  # fmt: skip
    for name, value in values.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    make = onnx.helper.make_node
    steps = [
        make("Div", ["image", "div"], ["q0"]),
        make("Add", ["q0", "half"], ["q1"]),
        make("Floor", ["q1"], ["q2"]),
        make("Clip", ["q2", "lo", "hi"], ["q3"]),
        make("Cast", ["q3"], [codes_name("image")], to=onnx.TensorProto.UINT8),
    ]
    nodes.remove(quantizer)
    for offset, step in enumerate(steps):
        nodes.insert(index + offset, step)


def swapped(array):
    array[[0, 1]] = array[[1, 0]]
    return array


WEIGHT = "conv1.weight.centred"
FAULTS = {
    "scale off by one ulp": lambda m: replace(
        m, "conv1.weight.scale", lambda s: np.nextafter(s, np.float32(9))
    ),
    "bias off by one": lambda m: replace(m, "classifier.bias.codes", one_entry(lambda x: x + 1)),
    "zero point": moved_zero_point,
    "swapped channels": lambda m: replace(m, WEIGHT, swapped),
    "missing clip": without_clip,
    "wrong rounding": half_up,
    "transposed weights": lambda m: replace(m, WEIGHT, lambda w: np.swapaxes(w, 2, 3)),
    "stale batch norm": lambda m: replace(m, "conv1.weight.scale", lambda s: s * np.float32(1.1)),
    "int8 overflow": lambda m: replace(m, WEIGHT, one_entry(lambda x: np.int8(-x - 1))),
}
HIDDEN = {"scale off by one ulp", "wrong rounding"}
"""Faults that may change no logit of the images tried; the constants still show them."""


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_planted_fault_is_found(fault, exported, tmp_path, capsys):
    directory = tmp_path / "out"
    shutil.copytree(exported, directory)
    model = onnx.load(directory / "model.onnx")
    FAULTS[fault](model)
    onnx.save(model, directory / "model.onnx")
    code = verify.main([str(directory), "--runtime", "onnxruntime"])
    said = capsys.readouterr().out
    assert code == 1, said
    constants, *runtime = said.split("FAILED  ")[1:]
    assert constants.startswith("model.onnx against the stored codes: ")
    if fault not in HIDDEN:
        assert "differ" in runtime[0]


def test_the_first_tensor_that_differs_is_named(exported, tmp_path):
    directory = tmp_path / "out"
    shutil.copytree(exported, directory)
    model = onnx.load(directory / "model.onnx")
    FAULTS["swapped channels"](model)
    onnx.save(model, directory / "model.onnx")
    constants, runtime, _ = verify.verify(directory, runtimes=("onnxruntime",))
    assert constants.fault.startswith(f"constant '{WEIGHT}' differs")
    student, _, _ = calibrated(resnet_like, 4)
    (operation,) = [op for op in student.operations if op.layer.name == "conv1"]
    assert f"first tensor that differs: '{operation.output}'" in runtime.fault
    assert runtime.different > 100


@pytest.mark.parametrize("file", ["model.onnx", "model.jaxexport"])
def test_a_truncated_file_is_found(file, exported, tmp_path, capsys):
    directory = tmp_path / "out"
    shutil.copytree(exported, directory)
    whole = (directory / file).read_bytes()
    (directory / file).write_bytes(whole[: len(whole) // 2])
    assert verify.main([str(directory)]) == 1
    assert "FAILED" in capsys.readouterr().out


# --- refusals ------------------------------------------------------------------------------------


@pytest.fixture
def earlier(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "out")
    return tmp_path / "out"


def tree(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_nothing_is_overwritten_unasked(run, earlier, tmp_path):
    before = tree(earlier)
    with pytest.raises(FileExistsError, match="found an earlier export; --overwrite replaces it"):
        export.export_student(run, earlier)
    assert tree(earlier) == before
    (tmp_path / "thesis.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(FileExistsError, match="found other files, expected an empty"):
            export.export_student(run, out, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_finished_run_is_not_overwritten(run, tmp_path):
    """It too has a student and a report."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    before = tree(other)
    with pytest.raises(FileExistsError, match="found other files, expected an empty"):
        export.export_student(run, other, overwrite=True)
    assert tree(other) == before
    for out in (other, other / "exported", tmp_path / "x" / ".." / "other" / "exported"):
        with pytest.raises(ValueError, match="expected one outside of it"):
            export.export_student(other, out, overwrite=True)
    assert tree(other) == before
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_what_lies_beside_an_earlier_export_is_named_and_kept(run, earlier):
    (earlier / "thesis.txt").write_text("mine")
    (earlier / "plots").mkdir()
    with pytest.raises(FileExistsError, match=r"beside it plots, thesis\.txt, expected nothing"):
        export.export_student(run, earlier, overwrite=True)
    assert (earlier / "thesis.txt").read_text() == "mine"


def test_a_new_export_replaces_an_earlier_one_whole(run, earlier, tmp_path):
    export.export_student(run, earlier, targets=("jax",), overwrite=True)
    names = {path.name for path in earlier.iterdir()}
    assert names == {"student", "model.jaxexport", "report.json", "README.md"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_still_leads_to_the_export(run, earlier, tmp_path):
    for name, target in (("link", earlier), ("new", tmp_path / "made" / "later")):
        link = tmp_path / name
        link.symlink_to(target)
        export.export_student(run, link, targets=("jax",), overwrite=True)
        assert link.is_symlink()
        assert (target / "model.jaxexport").exists()
        assert not (target / "model.onnx").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "link", "new", "made"}
    with pytest.raises(ValueError, match="expected one outside of it"):
        export.export_student(earlier, tmp_path / "link", overwrite=True)


def test_a_failed_export_leaves_the_earlier_one(run, earlier, tmp_path, monkeypatch):
    before = tree(earlier)

    def full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export, "model_card", full)
        with pytest.raises(OSError, match="no space left"):
            export.export_student(run, earlier, targets=("jax",), overwrite=True)
    assert tree(earlier) == before

    move = os.replace

    def stuck(source, target):
        if Path(source).name == "new":
            full()
        move(source, target)

    monkeypatch.setattr("os.replace", stuck)
    with pytest.raises(OSError, match="no space left"):
        export.export_student(run, earlier, targets=("jax",), overwrite=True)
    assert tree(earlier) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("report", "message"), [
    ({}, "found no network, weight_bits, act_bits, policy, preset, steps, seed, images, data"),
    ({key: value for key, value in RUN_REPORT.items() if key != "seed"}, "found no seed, expected"),
    ([], "found a JSON list"),
])  # fmt: skip
def test_a_report_that_lacks_something_is_named(report, message, run, tmp_path, capsys):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    (other / "report.json").write_text(json.dumps(report))
    assert export.main(["--run", str(other), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(other / "report.json") in said
    assert not (tmp_path / "out").exists()


def test_the_commands_refuse_with_a_message(run, tmp_path, capsys):
    for command, arguments, message in (
        (export, ["--run", str(tmp_path), "--out", str(tmp_path / "x")], "found no student.json"),
        (export, ["--run", str(run), "--out", str(tmp_path / "x"), "--targets", "tensorrt"],
         "targets: found ['tensorrt'], expected some of"),
        (export, ["--run", str(run), "--out", str(tmp_path / "x"), "--batch", "many"],
         "--batch: found 'many', expected a number"),
        (verify, [str(tmp_path)], "found no student.json"),
        (verify, [str(run), "--runtime", "tensorrt"], "found ['tensorrt'], expected some of"),
    ):  # fmt: skip
        assert command.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("batch", [0, -3, "dynamic", 1.5])
def test_a_batch_that_cannot_be_is_refused_before_anything_is_written(batch, run, tmp_path):
    with pytest.raises(ValueError, match=f"batch: found {batch!r}, expected a number from 1 up"):
        export.export_student(run, tmp_path / "x", batch=batch)
    assert not (tmp_path / "x").exists()


def test_one_target_may_be_named_alone(run, tmp_path):
    report = export.export_student(run, tmp_path / "x", targets="onnx")
    assert set(report["files"]) == {"model.onnx", "student/"}


def test_a_paper_student_is_not_exported(tmp_path):
    graph = resnet_like()
    student = Student(graph=graph, spec=QuantSpec(placement="paper"), input_range=(-2.0, 2.5))
    _, integer_variables, _ = calibrated(resnet_like, 4)
    variables = student.initial_variables(integer_variables)
    run = tmp_path / "run"
    save_student(run / "student", student, variables, preprocessing=PREPROCESSING, provenance={})
    (run / "report.json").write_text(json.dumps(RUN_REPORT))
    with pytest.raises(ValueError, match="found placement 'paper', expected 'integer'"):
        export.export_student(run, tmp_path / "out")


def test_seven_bits_are_portable_and_eight_are_not(tmp_path):
    for bits, portable in ((7, True), (8, False)):
        run = finished_run(tmp_path / f"run{bits}", bits=bits)
        report = export.export_student(run, tmp_path / f"out{bits}", targets=())
        assert report["portable_without_vnni"] is portable
