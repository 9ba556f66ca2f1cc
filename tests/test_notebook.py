"""The Colab notebook, executed headless on the embedded default with a few steps."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("quick_compilation")

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOK = REPOSITORY / "notebooks" / "lrq_colab.ipynb"
QUICK = """STEPS = 1
FIELDS = {"images_every": 1, "log_every": 1, "method.warmup_steps": 1, "method.batch_size": 8,
          "method.calibration_start": 0, "method.calibration_steps": 1, "method.generator_width": 8,
          "method.attention": "none"}
"""
EXECUTE = """
import sys, nbformat, nbclient
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=3000, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[1])
"""


def source(cell):
    return "".join(cell["source"])


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook's cells after their execution, all as they stand but the number of steps."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("onnxruntime")
    cwd = tmp_path_factory.mktemp("notebook") / "notebooks"
    cwd.mkdir()
    (cwd.parent / "configs").symlink_to(REPOSITORY / "configs")
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    settings = [
        cell for cell in notebook["cells"] if source(cell).startswith("STEPS = 300\nFIELDS")
    ]
    assert len(settings) == 1
    settings[0]["source"] = QUICK.splitlines(keepends=True)
    (cwd / "quick.ipynb").write_text(json.dumps(notebook))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu",
                   "IPYTHONDIR": str(cwd / "ipython")}  # fmt: skip
    environment.pop("XLA_FLAGS", None)
    result = subprocess.run(
        [sys.executable, "-c", EXECUTE, "quick.ipynb"],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=3600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return cwd, json.loads((cwd / "quick.ipynb").read_text())["cells"]


def output_of(cells, words):
    (cell,) = [c for c in cells if c["cell_type"] == "code" and words in source(c)]
    text = "".join("".join(out.get("text", "")) for out in cell["outputs"])
    images = sum("image/png" in out.get("data", {}) for out in cell["outputs"])
    return text, images


def test_every_cell_ran(executed):
    _, cells = executed
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))


def test_it_shows_the_device_the_images_and_the_accuracy(executed):
    _, cells = executed
    assert "CpuDevice" in output_of(cells, "jax.devices()")[0]
    text, images = output_of(cells, "api.quantize(\n    teacher")
    assert images >= 1
    assert re.search(r"W4A4.*1 steps.*\nteacher 99\.80 %, student \d+\.\d\d % top-1 on the same 500", text)  # fmt: skip


def test_it_exports_proves_and_runs_onnx(executed):
    cwd, cells = executed
    text, _ = output_of(cells, "result.export")
    assert len(re.findall(r"^ok ", text, re.MULTILINE)) == 3  # codes, answers, report
    report = json.loads((cwd / "runs" / "digits" / "report.json").read_text())
    accuracy = f"ONNX Runtime: {report['student']['top1']:.2f} % of 500 digits"
    assert accuracy in output_of(cells, "session.run")[0]
    assert (cwd / "runs" / "digits" / "report.html").stat().st_size < 5e6


def test_without_a_checkpoint_the_second_part_says_so(executed):
    assert "no checkpoint named" in output_of(executed[1], "R18_STEPS = 2000")[0]


def test_it_is_kept_without_outputs_and_calls_nothing_deprecated():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    code = "\n".join(source(cell) for cell in cells)
    assert not re.search(r"setup_tpu|tpu_driver|jax\.tools|xla_bridge|COLAB_TPU_ADDR", code)
    assert (REPOSITORY / "configs" / "r18.py").is_file()


def test_the_second_parts_settings_are_ones_the_config_admits():
    from lrq_jax import api
    from lrq_jax.config import resolve

    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    (cell,) = [source(cell) for cell in cells if 'config=CONFIGS / "r18.py"' in source(cell)]
    seen = {}

    def quantize(teacher, *, config, steps, fields, **others):
        made = api._config(config)
        api._set_fields(made, {**fields, "steps": steps})
        seen.update(vars(resolve(made, image_size=224)), others=others)
        raise KeyboardInterrupt

    class Fake:
        pass

    fake = Fake()
    fake.quantize = quantize
    names = {"CHECKPOINT": "x.pth", "R18_STEPS": 2000, "api": fake, "show_images_of": str,
             "CONFIGS": REPOSITORY / "configs"}  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        exec(compile(cell, "notebook", "exec"), names)
    assert seen["method"].steps == 2000
    assert seen["method"].conditioning == "batch_norm"  # the ImageNet column
    assert seen["others"]["callback"] == seen["others"]["workdir"] == "runs/r18"


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(
    ("place", "found"), [("lrq_jax_clone", "lrq_jax_clone"), ("..", ".."), ("mine", "mine")]
)
def test_the_configs_are_the_clones_after_a_restart_too(
    tmp_path, monkeypatch, installed, place, found
):
    """The first cell again, in a kernel that has or has not the package installed by then."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    (cell,) = [source(cell) for cell in cells if "REPOSITORY = " in source(cell)]
    here = tmp_path / "notebooks"
    here.mkdir()
    monkeypatch.chdir(here)
    clone = here / place
    (clone / "configs").mkdir(parents=True)
    (clone / "pyproject.toml").touch()
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: installed or None)
    if place == "mine":
        cell = cell.replace('REPOSITORY = ""', 'REPOSITORY = "mine"')
    names = {}
    exec(compile(cell, "notebook", "exec"), names)
    assert names["CONFIGS"] == Path(found) / "configs"
    assert [command[1:4] for command in commands] == [["-m", "pip", "install"]] * (not installed)


def test_a_fresh_machine_clones_the_address_it_was_given(tmp_path, monkeypatch):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    (cell,) = [source(cell) for cell in cells if "REPOSITORY = " in source(cell)]
    (tmp_path / "content").mkdir()
    monkeypatch.chdir(tmp_path / "content")
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="set REPOSITORY"):
        exec(compile(cell, "notebook", "exec"), {})
    cell = cell.replace('REPOSITORY = ""', 'REPOSITORY = "https://example.org/lrq_jax"')
    exec(compile(cell, "notebook", "exec"), {})
    assert [command[:2] for command in commands] == [["git", "clone"], [sys.executable, "-m"]]
