"""What a person meets at the terminal: help, hints, estimates, and refusals on empty ground."""

import dataclasses
import io
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from absl import flags
from conftest import TINY_FIELDS, tiny_data
from ml_collections import config_flags
from small_networks import random_variables
from test_steps import tiny_settings, tiny_teacher

from lrq_jax import api, bench, compare, console, evaluate, export, hints, reference, verify
from lrq_jax import estimate as estimates
from lrq_jax.config import base_config, field_names, get_config, resolve, short_schedule
from lrq_jax.data import Preprocessing
from lrq_jax.estimate import PhaseEstimate, describe, duration, estimate, is_long
from lrq_jax.graph import GraphBuilder
from lrq_jax.networks import FAMILIES
from lrq_jax.passes.blocks import blocks_of
from lrq_jax.presets import PRESETS
from lrq_jax.quantize import prepare
from lrq_jax.readers import Teacher
from lrq_jax.reproduce import command

pytestmark = pytest.mark.usefixtures("quick_compilation", "one_device")

REPOSITORY = Path(__file__).resolve().parents[1]


# --- empty ground --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "arguments", "way_out"),
    [
        (export.main, ["--out", "out"], "lrq_jax.main"),
        (export.main, ["--run", ".", "--out", "out"], "lrq_jax.main"),
        (verify.main, ["."], "lrq_jax.export"),
        (verify.main, ["nowhere"], "lrq_jax.export"),
        (bench.main, ["."], "lrq_jax.export"),
        (evaluate.main, ["--model", ".", "--data-name", "digits"], "lrq_jax.export"),
        (evaluate.main, ["--model", ".", "--data", "."], "labels.csv"),
        (evaluate.main, ["--model", "."], "--data"),
        (compare.main, [".", "."], "lrq_jax.main"),
    ],
)  # fmt: skip
def test_every_command_on_an_empty_directory_says_what_to_do(
    tmp_path, monkeypatch, capsys, run, arguments, way_out
):
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert "expected" in error
    assert way_out in error
    assert 1 <= len(error.splitlines()) <= 6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", [bench, compare, evaluate, export, verify])
def test_help_fits_a_screen_and_shows_the_command(module, capsys):
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"python -m {module.__name__}" in text
    assert len(text.splitlines()) < 50


def start(cwd, *arguments):
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "HOME": str(cwd),
                   "JAX_PLATFORMS": "cpu"}  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "lrq_jax.main", *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_resnet18s_config_without_a_teacher_says_what_to_do_in_one_screen(tmp_path):
    result = start(tmp_path, f"--config={REPOSITORY / 'configs' / 'r18.py'}")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) <= 10
    for text in ("teachers/r18", "expected", "--config.teacher.path=FILE", "convert_teacher.py"):
        assert text in result.stderr
    assert not (tmp_path / "runs").exists()


def test_help_of_the_main_command_is_one_a_person_can_read(tmp_path):
    result = start(tmp_path, "--help")
    assert result.returncode == 0
    for text in ("Examples:", "configs/r18.py", "estimate:", "list:", "fields:", "Exit codes"):
        assert text in result.stdout
    assert len(result.stdout.splitlines()) < 60


# --- lists ---------------------------------------------------------------------------------------


def test_the_lists_hold_every_network_preset_and_field():
    text = reference.overview()
    for name in (*FAMILIES, "lrq", "lrq_released", "gdfq", ".safetensors", ".onnx"):
        assert name in text
    fields = reference.config_fields()
    assert [field.name for field in fields] == field_names(base_config().to_dict())
    for field in fields:
        assert len(field.meaning) > 3, field
        assert f"--config.{field.name}=" in reference.fields_text()
    meanings = [field.meaning for field in fields if field.name.startswith("method.")]
    assert len(set(meanings)) == len(meanings), "a comment stands for two fields"
    assert "noise images (images = noise)" not in meanings  # a section's title says nothing
    assert all(sentence.endswith(".") for sentence in reference.presets().values())


def test_the_configuration_reference_and_results_are_current():
    made = runpy.run_path(str(REPOSITORY / "scripts" / "make_docs.py"))
    for name, make in made["PAGES"].items():
        page = (REPOSITORY / "docs" / name).read_text(encoding="utf-8")
        assert page == make(), f"docs/{name}: run python scripts/make_docs.py"
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert text == made["readme"](), "README.md: run python scripts/make_docs.py"


def test_a_table_of_drops_prefers_todays_recipe_and_names_lone_seeds():
    drop = runpy.run_path(str(REPOSITORY / "scripts" / "make_docs.py"))["_drop"]
    drops = {
        "U W4A4 seed 0": 1.0, "U W4A4 seed 1": 2.0, "U W4A4 seed 2": 3.0,
        "U W4A4 seed 0, rounded to the nearest": 9.0, "U W4A4 seed 3, rate 5e-4": 9.0,
        "U W3A3 seed 1": 4.0, "U W5A5 seed 0": 0.5,
        "R W4A4 seed 0, white noise": 0.25, "R W3A3 seed 0": 1.0, "R W3A3 seed 1": 2.0,
    }  # fmt: skip
    assert drop("U W4A4", drops) == "2.00 +- 1.00 (3 seeds)"
    assert drop("U W3A3", drops) == "4.00 (seed 1)"
    assert drop("U W5A5", drops) == "0.50"
    assert drop("R W4A4", drops) == "0.25*"
    assert drop("R W3A3", drops) == "1.00 (seed 0), 2.00 (seed 1)"
    assert drop("R W2A4", drops) == ""


# --- estimates, hints, colours -------------------------------------------------------------------


def test_an_estimate_measures_every_phase_and_writes_nothing(tmp_path):
    settings = tiny_settings(steps=0, calibration_start=0, calibration_steps=2)
    job = prepare(tiny_teacher(), settings, None, tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    found = estimate(job)
    assert [(phase.name, phase.steps) for phase in found] == [("calibration", 2)]
    assert found[0].seconds_per_step > 0
    assert found[0].compile_seconds > 0
    assert found[0].bytes > 10_000
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before


def test_an_estimate_counts_every_blocks_reconstruction(tmp_path, monkeypatch):
    learned = {"rounding": "adaround", "reconstruction_iterations": 50}
    pool = {"noise_batches": 3, "noise_batch_size": 16, "reconstruction_batch_size": 8}
    settings = tiny_settings(**learned, **pool, steps=0, warmup_steps=1, calibration_start=0)
    job = prepare(teacher_of_equal_blocks(), settings, None, tmp_path)
    compiled, compile_one = [], estimates.compile_step

    def counting(*arguments, **options):
        compiled.append(options.get("block"))
        return compile_one(*arguments, **options)

    monkeypatch.setattr(estimates, "compile_step", counting)
    found = {phase.name: phase for phase in estimate(job)}
    assert list(found) == ["image synthesis", "calibration", "reconstruction"]
    rebuilt = found["reconstruction"]
    assert rebuilt.steps == 50
    assert len(blocks_of(job.spec.student)) == 4
    assert len([block for block in compiled if block]) == 3  # the two in the middle are alike
    assert rebuilt.bytes > 3 * 48 * 8 * 8 * 8 * 4  # of all 48 images, what a block reads and makes

    def one_second(program, compile_seconds, state, arguments, *, count):
        return {"seconds_per_step": 1.0, "compile_seconds": 2.0, "bytes": None}

    monkeypatch.setattr(estimates, "_timed", one_second)
    rebuilt = {phase.name: phase for phase in estimate(job)}["reconstruction"]
    assert (rebuilt.seconds_per_step, rebuilt.compile_seconds, rebuilt.bytes) == (4.0, 6.0, None)


def teacher_of_equal_blocks():
    """A stem, two convolutions alike and a classifier."""
    net = GraphBuilder("equal", input_shape=(8, 8, 1))
    x = net.image
    for _ in range(3):
        x = net.relu(net.batch_norm(net.conv(x, 8, 3)))
    net.dense(net.global_pool(x), 10, name="classifier")
    graph = net.build()
    variables = jax.device_get(random_variables(graph))
    preprocessing = Preprocessing(mean=(0.5,), std=(0.5,), size=8)
    return Teacher(graph=graph, variables=variables, preprocessing=preprocessing, arch="equal")


def test_an_estimate_counts_images_optimised_from_noise(tmp_path):
    noise = {"images": "noise", "noise_batches": 3, "noise_iterations": 7, "noise_batch_size": 16}
    settings = tiny_settings(steps=2, warmup_steps=2, calibration_start=0, **noise)
    job = prepare(tiny_teacher(), settings, None, tmp_path / "run")
    found = estimate(job)
    assert found[0].name == "image synthesis"
    assert found[0].steps == 21
    taken = dataclasses.replace(settings, pool_path="earlier")
    assert estimate(dataclasses.replace(job, settings=taken))[0].name != "image synthesis"


@pytest.mark.parametrize(("side", "steps", "long"), [
    (32, 5_000, False), (32, 5_001, True), (224, 102, False), (224, 103, True),
])  # fmt: skip
def test_pixels_count_in_what_is_long(side, steps, long):
    assert is_long(steps, side, side) == long


def test_an_estimate_sums_up():
    phases = (
        PhaseEstimate(name="warm-up", steps=10, seconds_per_step=1.0, compile_seconds=5, bytes=2**21),
        PhaseEstimate(name="training", steps=7200, seconds_per_step=2, compile_seconds=0, bytes=2**22),
    )  # fmt: skip
    assert [phase.seconds for phase in phases] == [15, 14400]
    lines = describe(phases).splitlines()
    assert lines[1].startswith("training: 7,200 steps of 2 s, 4.0 h")
    assert lines[2].startswith("in all about 4.0 h, 4 MiB a device at most")


@pytest.mark.parametrize(
    ("seconds", "text"), [(90, "90 s"), (600, "10 min"), (7200, "2.0 h"), (2 * 86400, "2.0 days")]
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_a_gpu_that_jax_does_not_use_is_hinted_at(tmp_path, monkeypatch):
    monkeypatch.setattr(hints.shutil, "which", lambda name: None)
    monkeypatch.setattr(hints, "_NVIDIA", (tmp_path / "nvidia",))
    monkeypatch.setattr(hints, "_TPU", tmp_path / "accel0")
    assert hints.accelerator_hint("cpu") is None
    (tmp_path / "accel0").touch()
    assert "jax[tpu]" in hints.accelerator_hint("cpu")
    (tmp_path / "nvidia").touch()
    assert "jax[cuda" in hints.accelerator_hint("cpu")
    assert hints.accelerator_hint("gpu") is None


@pytest.mark.parametrize(
    ("top1", "images", "classes", "recorded", "words"),
    [
        (69.5, 50_000, 1000, 69.76, None),
        (60.0, 50_000, 1000, 69.76, "69.76 % are recorded"),
        (60.0, 200, 1000, 69.76, None),  # so few images prove nothing
        (0.1, 50_000, 1000, None, "guessing"),
        (12.0, 500, 10, None, "guessing"),
        (100.0, 500, 2, None, None),  # twice what guessing gets is no bar for two classes
        (97.0, 500, 2, None, None),
        (52.0, 500, 2, None, "guessing"),
        (34.0, 500, 3, None, "guessing"),
        (99.0, 500, 3, None, None),
        (60.0, 500, 10, None, None),
    ],
)
def test_a_teacher_that_is_fed_wrongly_is_warned_of(top1, images, classes, recorded, words):
    warning = hints.preprocessing_warning(
        top1, images=images, num_classes=classes, recorded=recorded
    )
    if words is None:
        assert warning is None
    else:
        assert words in warning
        assert "convert_teacher.py --mean" in warning


def test_a_run_warns_before_it_trains(tmp_path, capsys, monkeypatch):
    class Trained(Exception):
        """The loop was reached."""

    def loop(*_):
        raise Trained

    monkeypatch.setattr("lrq_jax.quantize.TrainingLoop", loop)
    data = tiny_data()
    wrong = [(image, (label + 1) % 10) for image, label in data.source]
    teacher = dataclasses.replace(tiny_teacher(), top1=95.0)
    for name, source, warned in (("right", data.source, False), ("wrong", wrong, True)):
        with pytest.raises(Trained):
            api.quantize(
                teacher,
                workdir=tmp_path / name,
                fields=TINY_FIELDS,
                data=dataclasses.replace(data, source=source),
            )
        assert ("95.00 % are recorded" in capsys.readouterr().out) == warned


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colours_are_for_terminals_only(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert console.coloured("x", "red", io.StringIO()) == "x"
    assert console.coloured("x", "red", Terminal()) == "\x1b[31mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.coloured("x", "red", Terminal()) == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert console.coloured("x", "red", Terminal()) == "x"


# --- the command that repeats a run --------------------------------------------------------------


def parsed(line, config=None):
    """The config that the main command makes of a line, from the default or another one."""
    values, argv = flags.FlagValues(), shlex.split(line)[2:]
    config = config_flags.DEFINE_config_dict(
        "config", config or get_config(), flag_values=values, sys_argv=argv
    )
    values(argv)
    return config.value


def changed():
    config = short_schedule(base_config(), steps=7)
    config.student.overrides = ("stage1_*=w6a8", "head=w8")
    config.student.clip_mask = False
    config.method.preset = "gdfq"
    config.method.student_milestones = (5, 6)
    config.method.bns_weight = 0.5
    config.teacher.path = "a folder/with 'quotes'"
    config.data.name, config.data.path = "", "images"
    config.student.learned_steps = "both"
    config.seed = 3
    config.precision, config.micro_batches = "bfloat16", 2
    return config


@pytest.mark.parametrize("make", [base_config, changed])
def test_the_command_in_the_report_repeats_the_run(make):
    settings = resolve(make(), image_size=32)
    line = command(settings, image_size=32)
    assert line.startswith("python -m lrq_jax.main")
    assert resolve(parsed(line), image_size=32) == settings
    assert len(re.findall(r"--config\.seed", line)) == (settings.seed != 0)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("steps", [None, 1_000, 2_000])
def test_the_command_names_steps_that_are_not_the_presets_at_these_bits(bits, steps):
    config = base_config()
    config.student.weight_bits, config.steps = bits, steps
    settings = resolve(config, image_size=32)
    line = command(settings, image_size=32)
    assert resolve(parsed(line), image_size=32) == settings
    assert ("--config.steps=" in line) == (steps not in (None, {3: 2_000, 4: 1_000}[bits]))
    assert ("weight_bits=3" in line) == (bits == 3)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("size", [32, 224])
def test_the_command_repeats_a_run_of_every_preset(preset, size):
    config = base_config()
    config.method.preset = preset
    settings = resolve(config, image_size=size)
    line = command(settings, image_size=size)
    assert f"--config.method.preset={preset}" in line  # also should the default become another
    assert resolve(parsed(line), image_size=size) == settings
