"""The finished student on disk: integers, the same logits to the bit, replaced as a whole."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_networks

from lrq_jax.data import Preprocessing
from lrq_jax.passes import QuantSpec, Student, calibrate, freeze, frozen_logits
from lrq_jax.passes.plan import plan_quantization
from lrq_jax.quantize import normalised_range
from lrq_jax.quantizers.affine import lineage_fake_quant
from lrq_jax.readers import load_teacher
from lrq_jax.writers import codes
from lrq_jax.writers.codes import (
    frozen_from_codes,
    load_student,
    save_student,
    student_codes,
    student_sha256,
)


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("digits")


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(3), (8, 16, 16, 1), minval=-1.0, maxval=2.0)


def calibrated(teacher, images, **spec):
    """A student with ranges, and weights that are not the teacher's."""
    student = Student(
        graph=teacher.graph,
        spec=QuantSpec(**spec),
        input_range=normalised_range(teacher.preprocessing),
    )
    variables = student.initial_variables(jax.tree.map(jnp.asarray, teacher.variables))
    _, variables = jax.jit(calibrate, static_argnums=0)(student, variables, images)
    return student, variables


@pytest.fixture(scope="module")
def integer(teacher, images):
    return calibrated(
        teacher, images, weight_bits=4, act_bits=3, overrides=("stage1_*=w6a8", "classifier=w8")
    )


@pytest.fixture(scope="module")
def paper(teacher, images):
    return calibrated(
        teacher, images, weight_bits=3, act_bits=4, placement="paper", overrides=("conv1=w8",)
    )


@pytest.fixture(scope="module")
def saved(integer, teacher, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "student"
    student, variables = integer
    codes = save_student(
        directory,
        student,
        variables,
        preprocessing=teacher.preprocessing,
        provenance={"seed": 3},
    )
    return directory, codes


def assert_same_tree(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(a, b)


# --- integer placement ---------------------------------------------------------------------------


def test_integers_are_stored_as_integers(integer, saved):
    student, _ = integer
    _, codes = saved
    bits = {op.layer.name: op.weight_bits for op in plan_quantization(student.graph, student.spec)}
    assert set(codes) == {"weights", "tensors", "tables"}
    assert set(codes["weights"]) == {name for name, b in bits.items() if b}
    for name, layer in codes["weights"].items():
        types = {part: np.asarray(array).dtype.name for part, array in layer.items()}
        assert types == {
            "codes": "uint8",
            "zero_point": "uint8",
            "scale": "float32",
            "bias": "int32",
        }
        assert layer["codes"].shape == student.graph.variable_shapes()["params"][name]["kernel"]
        assert layer["codes"].max() <= 2 ** bits[name] - 1
        assert (layer["scale"] > 0).all()
    assert codes["weights"]["classifier"]["codes"].max() > 15, "the override's 8 bits are not used"
    assert codes["weights"]["stage1_block0_conv1"]["codes"].max() > 15
    for tensor in codes["tensors"].values():
        assert {part: np.asarray(array).dtype.name for part, array in tensor.items()} == {
            "scale": "float32",
            "zero_point": "uint8",
        }


def test_stored_codes_are_the_frozen_network(integer, saved):
    """No value is lost on its way into a smaller type."""
    student, variables = integer
    _, codes = saved
    frozen = jax.jit(freeze, static_argnums=0)(student, variables)
    assert_same_tree(frozen_from_codes(codes), jax.tree.map(jnp.asarray, frozen))


def test_the_file_gives_the_same_logits_to_the_bit(integer, saved, images, teacher):
    student, variables = integer
    directory, codes = saved
    loaded, stored, preprocessing = load_student(directory)
    assert loaded == student
    assert preprocessing == teacher.preprocessing
    assert_same_tree(stored, codes)
    logits = jax.jit(frozen_logits, static_argnums=0)
    frozen = jax.jit(freeze, static_argnums=0)(student, variables)
    expected = np.asarray(logits(student, frozen, images))
    found = np.asarray(logits(loaded, frozen_from_codes(stored), images))
    assert expected.shape == (8, 10)
    assert len(np.unique(expected)) > 40
    np.testing.assert_array_equal(found, expected)


def test_the_description_says_what_it_is(integer, saved):
    student, _ = integer
    directory, _ = saved
    assert sorted(entry.name for entry in directory.iterdir()) == ["codes", "student.json"]
    assert [entry.name for entry in directory.parent.iterdir()] == ["student"]
    description = json.loads((directory / "student.json").read_text())
    assert description["format"] == "lrq_jax student"
    assert description["provenance"] == {"seed": 3}
    assert description["spec"]["weight_bits"] == 4
    assert description["spec"] == json.loads(json.dumps(dataclasses.asdict(student.spec)))


# --- paper placement -----------------------------------------------------------------------------


def test_paper_codes_rebuild_the_fake_quantized_kernels(paper):
    student, variables = paper
    codes = student_codes(student, variables)
    assert set(codes) == {"weights", "params", "batch_stats", "ranges"}
    assert set(codes["weights"]) == {layer.name for layer in student.graph.weighted}
    fake = jax.jit(lineage_fake_quant, static_argnums=3)
    for name, stored in codes["weights"].items():
        bits = 8 if name == "conv1" else 3
        assert stored["codes"].dtype == np.uint8
        assert stored["offset"].dtype == np.int32
        assert stored["scale"].dtype == np.float32
        assert stored["codes"].max() <= 2**bits - 1
        kernel = variables["params"][name]["kernel"]
        axes = tuple(range(kernel.ndim - 1))
        expected = np.asarray(fake(kernel, kernel.min(axes), kernel.max(axes), bits))
        signed = stored["codes"].astype(np.float32) - 2 ** (bits - 1)
        integers = signed + stored["offset"].astype(np.float32)
        # The same integers. Their real values may differ in the last place: XLA compiles
        # integers / scale to other roundings inside the student than numpy's.
        np.testing.assert_array_equal(np.rint(expected * stored["scale"]), integers)
        np.testing.assert_allclose(integers / stored["scale"], expected, rtol=3e-7)


def test_paper_students_keep_the_rest_in_float(paper, teacher, tmp_path):
    student, variables = paper
    codes = save_student(
        tmp_path / "student", student, variables, preprocessing=teacher.preprocessing, provenance={}
    )
    loaded, stored, _ = load_student(tmp_path / "student")
    assert loaded == student
    assert_same_tree(stored, codes)
    assert "kernel" not in {name for layer in codes["params"].values() for name in layer}
    for layer in student.graph.batch_norms:
        for name, value in variables["params"][layer.name].items():
            np.testing.assert_array_equal(stored["params"][layer.name][name], value)
        for name, value in variables["batch_stats"][layer.name].items():
            np.testing.assert_array_equal(stored["batch_stats"][layer.name][name], value)
    activations = variables["quant"]["activations"]
    assert_same_tree(stored["ranges"], jax.device_get(activations))


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_directory_without_a_student_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found no student\.json in .*expected the"):
        load_student(tmp_path / "nowhere")
    (tmp_path / "student.json").mkdir()
    with pytest.raises(FileNotFoundError, match=r"found no student\.json"):
        load_student(tmp_path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused(tmp_path, version):
    (tmp_path / "student.json").write_text(json.dumps({"version": version}))
    with pytest.raises(ValueError, match=f"version {version!r}, expected 1; quantize again"):
        load_student(tmp_path)


def rewritten(change):
    """Changes the description."""

    def apply(directory):
        path = directory / "student.json"
        description = json.loads(path.read_text())
        change(description)
        path.write_text(json.dumps(description))

    return apply


def cut(directory):
    (path, *_) = (directory / "codes" / "d").iterdir()
    path.write_bytes(path.read_bytes()[:-10])


DAMAGES = {
    "cut description": (
        lambda d: (d / "student.json").write_text('{"version": 1,'), "found no readable JSON"
    ),
    "a list": (lambda d: (d / "student.json").write_text("[]"), "found a JSON list"),
    **{
        f"no {key}": (rewritten(lambda s, key=key: s.pop(key)), f"description of a student (KeyError: '{key}')")
        for key in ("spec", "graph", "input_range", "preprocessing")
    },
    "no bits": (
        rewritten(lambda s: s["preprocessing"].pop("mean")), "description of a student (TypeError: "
    ),
    "unknown layer": (
        rewritten(lambda s: s["graph"]["layers"][0].update(type="Quux")), "found type 'Quux'"
    ),
    "graph of numbers": (rewritten(lambda s: s["graph"].update(layers=[1])), "AttributeError"),
    "no codes": (lambda d: shutil.rmtree(d / "codes"), "codes: found no readable codes"),
    "cut codes": (cut, "codes: found no readable codes (missing or changed files"),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_student_is_refused_by_file(damage, saved, tmp_path):
    apply, message = DAMAGES[damage]
    directory = tmp_path / "student"
    shutil.copytree(saved[0], directory)
    apply(directory)
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        load_student(directory)
    assert str(directory) in str(refusal.value)


def test_a_student_of_an_earlier_version_has_no_hashes_of_its_files(saved, tmp_path):
    directory = tmp_path / "student"
    shutil.copytree(saved[0], directory)
    (tmp_path / "student" / "codes" / "unknown").touch()  # of a tool that synchronises, say
    _, codes, _ = load_student(directory)
    rewritten(lambda description: description.pop("files"))(directory)
    _, again, _ = load_student(directory)
    assert student_sha256(directory, again) == student_sha256(saved[0], codes)


@pytest.mark.parametrize(("place", "change"), [
    (("weights",), None),
    (("weights", "conv1"), None),
    (("weights", "conv1", "bias"), None),
    (("weights", "conv1", "codes"), lambda array: array[..., :-1]),
    (("weights", "conv1", "scale"), lambda array: array[:-1]),
    (("tensors", "image"), None),
    (("tensors", "image", "zero_point"), None),
])  # fmt: skip
def test_codes_that_do_not_fit_the_description_are_named(place, change, integer, teacher, tmp_path,
                                                         monkeypatch):  # fmt: skip
    whole = codes.student_codes

    def lacking(student, variables):
        made = whole(student, variables)
        *path, last = place
        within = functools.reduce(dict.__getitem__, path, made)
        if change is None:
            del within[last]
        else:
            within[last] = change(within[last])
        return made

    monkeypatch.setattr(codes, "student_codes", lacking)
    student, variables = integer
    save_student(tmp_path / "s", student, variables, preprocessing=teacher.preprocessing, provenance={})  # fmt: skip
    with pytest.raises(ValueError, match=f"found (nothing|shape .*) as {'/'.join(place)}") as said:
        load_student(tmp_path / "s")
    assert str(tmp_path / "s" / "codes") in str(said.value)


def test_a_missing_table_of_codes_is_named(tmp_path, monkeypatch):
    student, variables, _ = small_networks.calibrated(small_networks.gated_like, 4)
    whole = codes.student_codes(student, variables)
    name = whole["tables"].popitem()[0]
    monkeypatch.setattr(codes, "student_codes", lambda *_: whole)
    how = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3, size=8)
    save_student(tmp_path / "s", student, variables, preprocessing=how, provenance={})
    with pytest.raises(ValueError, match=f"found nothing as tables/{name}, expected an array"):
        load_student(tmp_path / "s")


def test_the_hash_of_a_student_is_of_every_number_and_word(saved, tmp_path):
    directory, stored = saved
    before = student_sha256(directory, stored)
    shutil.copytree(directory, tmp_path / "s")
    path = tmp_path / "s" / "student.json"
    path.write_text(json.dumps(json.loads(path.read_text())))  # in another layout
    assert student_sha256(tmp_path / "s", load_student(tmp_path / "s")[1]) == before
    rewritten(lambda s: s["preprocessing"].update(size=15))(tmp_path / "s")
    assert student_sha256(tmp_path / "s", stored) != before
    other = jax.tree.map(np.copy, stored)
    other["weights"]["classifier"]["bias"][-1] += 1
    assert student_sha256(directory, other) != before
    other["weights"]["classifier"]["bias"][-1] -= 1
    assert student_sha256(directory, other) == before
    other["weights"]["classifier_"] = other["weights"].pop("classifier")
    assert student_sha256(directory, other) != before


def test_saving_again_replaces_the_old_student_whole(saved, paper, teacher, tmp_path):
    directory = tmp_path / "student"
    directory.mkdir()
    (directory / "left_over").write_text("of an earlier, unfinished try")
    student, variables = paper
    save_student(directory, student, variables, preprocessing=teacher.preprocessing, provenance={})
    assert sorted(entry.name for entry in directory.iterdir()) == ["codes", "student.json"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["student"]


def test_a_failed_save_leaves_the_old_student(integer, teacher, tmp_path):
    directory = tmp_path / "student"
    directory.mkdir()
    (directory / "old").write_text("x")
    student, variables = integer
    with pytest.raises(TypeError):
        save_student(
            directory,
            student,
            variables,
            preprocessing=teacher.preprocessing,
            provenance={"not JSON": object()},
        )
    assert [entry.name for entry in directory.iterdir()] == ["old"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["student"]
