"""Documented commands that convert and train, started as they are written, with schedules cut short.

What a command trains for hours is cut by flags behind its own; everything else is as documented. The
README's way from a `.pth` to a verified ONNX file is walked whole.
"""

import json
import os
import re
import shlex
import socket
import subprocess
import sys

import pytest
from PIL import Image
from test_convert_teacher import resnet_state
from test_docs import DOCUMENTED, REPOSITORY, four_commands
from test_readers import of_array, write_zip
from test_readme_flax import LINEN

SHORT = {
    "steps": 1, "method.warmup_steps": 1, "method.calibration_start": 0,
    "method.calibration_steps": 1, "method.batch_size": 2, "method.generator_width": 8,
    "method.attention": "none", "method.noise_batches": 1, "method.noise_batch_size": 2,
    "method.noise_iterations": 1, "method.reconstruction_iterations": 1,
    "method.reconstruction_batch_size": 2,
}  # fmt: skip
"""Fields that are set behind a documented command's own, which stay."""


def write_checkpoint(path, **options):
    """What torch.save writes of a ResNet's state dict, weights at random but of a usual size."""
    state = resnet_state(**options)
    for name, array in state.items():
        if array.ndim > 1:
            array *= (2 / array[0].size) ** 0.5
        elif name.endswith("running_var"):
            array += 0.5
    state = {name: array for name, array in state.items() if "num_batches" not in name}
    tree = {name: of_array(str(key), array) for key, (name, array) in enumerate(state.items())}
    blobs = {str(key): array.tobytes() for key, array in enumerate(state.values())}
    return write_zip(path, tree, blobs)


def resnet18(path):
    options = {"blocks": (2, 2, 2, 2), "width": 64, "stem": 7, "classes": 1000}
    return write_checkpoint(path, **options, shortcut="downsample", head="fc")


def resnet20(path):
    return write_checkpoint(path, blocks=(3, 3, 3), shortcut=None)


@pytest.fixture
def clone(tmp_path):
    """An empty folder with a clone's configs and scripts."""
    for name in ("configs", "scripts"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    return tmp_path


def alone():
    """Variables of a job of one process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return {
        "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"
    }  # fmt: skip


def run(line, cwd, *, quick=True):
    """Runs a documented line with this Python and returns its output; it must end well.

    All lines share one cache of compiled programs, as a person's do.
    """
    words = shlex.split(line)
    assert words[0] == "python"
    if words[1:3] == ["-m", "lrq_jax.main"]:
        words += [
            f"--config.{name}={value}"
            for name, value in SHORT.items()
            if not any(word.startswith(f"--config.{name}=") for word in words)
        ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu",
                   "LRQ_CACHE": str(cwd.parent / "cache")}  # fmt: skip
    environment.pop("XLA_FLAGS", None)  # one device, as on a person's computer
    if "distributed" in line:
        environment |= alone()
    if quick:
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    result = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def documented(pattern):
    """Documented lines that match, without what they only name."""
    lines = {part for _, line in DOCUMENTED for part in line.split(" && ")}
    return sorted(line for line in lines if re.match(pattern, line))


def test_a_pth_becomes_a_verified_onnx_file_by_the_readmes_four_commands(clone):
    install, main, export, verify = four_commands()
    assert install == 'pip install ".[onnx]"'
    resnet18(clone / "resnet18.pth")
    assert "resnet18 W4A4" in run(main, clone)
    assert "model.onnx" in run(export, clone, quick=False)
    said = run(verify, clone, quick=False)
    assert re.search(r"^ok +onnxruntime .*: 320 of 320", said, re.MULTILINE), said


MAIN = documented(r"python -m lrq_jax\.main")
ELSEWHERE = {
    "python -m lrq_jax.main": "test_main.py",
    "python -m lrq_jax.main --list": "test_terminal.py",
    "python -m lrq_jax.main --fields": "test_terminal.py",
}


@pytest.mark.parametrize(
    "line", [line for line in MAIN if line not in (*ELSEWHERE, four_commands()[1])]
)
def test_runs_start_as_they_are_written(line, clone):
    if "resnet18.pth" in line:
        resnet18(clone / "resnet18.pth")
    if "teachers/r20_cifar10" in line:
        source = resnet20(clone / "resnet20.pt")
        convert = (
            "python scripts/convert_teacher.py --arch resnet20_cifar --out teachers/r20_cifar10"
        )
        run(f"{convert} --source {source.name}", clone)
    if "teachers/cnn" in line:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(clone)
            exec(compile(LINEN, "README.md", "exec"), {})
    if folder := re.search(r"DIR_OF_\w+", line):
        place = clone / folder[0]
        place.mkdir()
        for index in range(3):
            Image.new("RGB", (32, 32), (80 * index, 0, 99)).save(place / f"{index}.png")
        (place / "labels.csv").write_text("file,label\n0.png,0\n1.png,1\n2.png,2\n")
    said = run(line, clone)
    if "--estimate" in line:
        assert "in all about" in said
        assert not (clone / "runs").exists()
    else:
        assert "report:" in said


@pytest.mark.parametrize("line", documented(r"python scripts/convert_teacher\.py .*resnet20\.pt"))
def test_conversions_run_as_they_are_written(line, clone):
    resnet20(clone / "resnet20.pt")
    if "--overwrite" in line:
        (clone / "teachers" / "r20_cifar10").mkdir(parents=True)
    assert "resnet20_cifar" in run(line, clone)
    assert (clone / "teachers" / "r20_cifar10").is_dir()


def test_an_onnx_file_is_converted_as_it_is_written(clone):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx_models import Model

    model = Model()
    pixels = model.op("Div", model.op("Sub", "image", 0.45), 0.25)  # else asked for: --mean, --std
    features = model.op("Relu", model.batch_norm(model.conv(pixels, 8, 3), 8))
    pooled = model.op("GlobalAveragePool", features)
    model.save(clone / "model.onnx", model.head(pooled, 8))
    (line,) = documented(r"python scripts/convert_teacher\.py .*model\.onnx")
    assert "Traceback" not in run(line, clone)
    assert (clone / "DIR").is_dir()


def test_bits_are_given_to_layers_as_it_is_written(clone):
    (line,) = documented(r"python scripts/allocate_bits\.py --")
    flag = run(line, clone).splitlines()[-1]
    assert flag.startswith("--config.student.overrides=")
    short = "--config.steps=0 --config.method.reconstruction_iterations=1"
    said = run(f"python -m lrq_jax.main --workdir=runs/mixed {short} {flag}", clone)
    assert "resnet8_cifar" in said
    layers = json.loads((clone / "runs" / "mixed" / "report.json").read_text())["layers"]
    found = {layer["layer"]: layer["weight_bits"] for layer in layers}
    given = dict(re.findall(r"'(\w+)=w(\d)'", flag))
    assert len(set(given.values())) > 1
    assert found == {name: int(bits) for name, bits in given.items()}


def test_a_suite_of_experiments_files_each_report_once(clone):
    line = "python scripts/run_experiments.py --suite digits_lrq --out results --only 'ranges only'"
    assert "W4A4 ranges only: drop" in run(line, clone)
    assert not run(line, clone)  # the cell is there
    (entry,) = (clone / "results" / "digits_lrq.jsonl").read_text().splitlines()
    assert json.loads(entry)["cell"] == "W4A4 ranges only"
    assert json.loads(entry)["student"]["top1"] > 50
