"""Runtimes take any number of images, whatever number their file is fixed to, and name damaged files."""

import shutil

import numpy as np
import pytest
from small_networks import random_images
from test_export import finished_run

from lrq_jax import export, verify
from lrq_jax.runtimes import Reference
from lrq_jax.runtimes.batches import in_batches
from lrq_jax.runtimes.jax_exported import JaxExportRunner
from lrq_jax.runtimes.litert import LiteRTRunner
from lrq_jax.runtimes.onnx_runtime import OnnxRunner
from lrq_jax.runtimes.openvino import OpenVinoRunner
from lrq_jax.writers.targets import FILES, STUDENT

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")

RUNNERS = {
    OnnxRunner: FILES["onnx"],
    OpenVinoRunner: FILES["onnx"],
    LiteRTRunner: FILES["litert"],
    JaxExportRunner: FILES["jax"],
}
EACH_RUNNER = pytest.mark.parametrize("runner", RUNNERS, ids=lambda runner: runner.name)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Of one student, by images a call."""
    directory = tmp_path_factory.mktemp("exports")
    run = finished_run(directory / "run")
    for batch in (3, None):
        export.export_student(run, directory / str(batch), targets=tuple(FILES), batch=batch)
    return {batch: directory / str(batch) for batch in (3, None)}


def loaded(runner, directory):
    if runner is OpenVinoRunner:
        pytest.importorskip("openvino")
    return runner(directory / RUNNERS[runner])


@EACH_RUNNER
@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_fixed_batch_is_padded_and_split(runner, count, exports):
    fixed = loaded(runner, exports[3])
    assert fixed.fixed_batch == 3
    images = np.asarray(random_images(0, batch=count))
    expected = Reference.load(exports[3] / STUDENT).logits(images)
    found = fixed.logits(images)
    if runner.exact:
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_array_equal(found, loaded(runner, exports[None]).logits(images))


@EACH_RUNNER
def test_other_files_are_fixed_to_no_batch(runner, exports):
    assert loaded(runner, exports[None]).fixed_batch is None


def test_any_number_of_images_is_one_call_of_onnx_runtime(exports, monkeypatch):
    """Or what is timed as a call of many images would be several."""
    runner = OnnxRunner(exports[None] / FILES["onnx"])
    session, fed = runner._session, []

    class Session:
        def run(self, outputs, feed):
            fed.extend(len(images) for images in feed.values())
            return session.run(outputs, feed)

    monkeypatch.setattr(runner, "_session", Session())
    assert len(runner.logits(np.asarray(random_images(0, batch=130)))) == 130
    assert fed == [130]


def test_images_that_fit_are_not_copied():
    """It would be timed."""
    images, fed = np.zeros((6, 2)), []
    for size in (None, 6, 3):
        in_batches(lambda some: fed.append(some) or some, images, size)
    assert [len(some) for some in fed] == [6, 6, 3, 3]
    assert all(np.shares_memory(some, images) for some in fed)


@EACH_RUNNER
@pytest.mark.parametrize("share", [0, 0.5, 0.95])
def test_a_cut_file_is_named(runner, share, exports, tmp_path):
    if runner is OpenVinoRunner:
        pytest.importorskip("openvino")
    path = tmp_path / RUNNERS[runner]
    content = (exports[None] / path.name).read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"lrq_jax\.export") as caught:
        runner(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_verify_fails_a_cut_file_in_openvino(exports, tmp_path, capsys):
    pytest.importorskip("openvino")
    shutil.copytree(exports[None], tmp_path / "out")
    path = tmp_path / "out" / FILES["onnx"]
    path.write_bytes(path.read_bytes()[:-100])
    assert verify.main([str(tmp_path / "out"), "--runtime", "openvino"]) == 1
    assert f"FAILED  openvino: {path}: OpenVINO" in capsys.readouterr().out
