"""The host loop: resuming, killing, diverging, the pool of noise images."""

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from compiled_programs import compiled_programs
from small_networks import random_variables
from test_steps import tiny_settings, tiny_teacher

from lrq_jax.config import RunSettings, base_config, resolve
from lrq_jax.data import Preprocessing
from lrq_jax.graph import GraphBuilder
from lrq_jax.presets import PRESETS
from lrq_jax.quantize import prepare, quantize, step_spec
from lrq_jax.readers import Teacher
from lrq_jax.sharding import data_mesh
from lrq_jax.training import loop, noise_pool, reconstruction
from lrq_jax.training.compilation import put_replicated
from lrq_jax.training.errors import TrainingDiverged
from lrq_jax.training.loop import TrainingLoop
from lrq_jax.training.reconstruction import reconstruction_step
from lrq_jax.writers.codes import load_student

pytestmark = pytest.mark.usefixtures("quick_compilation", "one_device")

REPOSITORY = Path(__file__).parents[1]
TINY_RUN = (
    f"--config={REPOSITORY / 'configs' / 'digits_lrq.py'}",
    "--config.steps=40",
    "--config.method.warmup_steps=6",
    "--config.method.calibration_start=2",
    "--config.method.calibration_steps=4",
    "--config.method.batch_size=8",
    "--config.method.generator_width=8",
    "--config.method.attention=none",  # large kernels take long to compile
    "--config.data.name=",
    "--config.checkpoint_every=4",
    "--config.log_every=1",
    "--config.images_every=1000",
)
NO_WARM_UP = {"calibration_start": 0, "calibration_steps": 2}
"""Ranges are found from the first step on: one program less to compile."""


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher()


def small_teacher():
    """One convolution and a classifier, at random: as little as has a block to rebuild."""
    net = GraphBuilder("small", input_shape=(8, 8, 1))
    x = net.relu(net.batch_norm(net.conv(net.image, 4, 3)))
    net.dense(net.global_pool(x), 10, name="classifier")
    graph = net.build()
    variables = jax.device_get(random_variables(graph))
    preprocessing = Preprocessing(mean=(0.5,), std=(0.5,), size=8)
    return Teacher(graph=graph, variables=variables, preprocessing=preprocessing, arch="small")


def codes_of(workdir):
    return jax.tree_util.tree_leaves_with_path(load_student(workdir / "student")[1])


def assert_same_codes(first, second):
    pairs = list(zip(codes_of(first), codes_of(second), strict=True))
    assert pairs
    for (path, a), (other, b) in pairs:
        assert path == other
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def start(workdir, flags, *, quick):
    """The command line, as a person starts it, on one device."""
    command = [sys.executable, "-m", "lrq_jax.main", f"--workdir={workdir}", *flags]
    environment = {
        **({"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if quick else {}),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(REPOSITORY),
        "PATH": "/usr/bin:/bin",
        "HOME": str(workdir.parent),
    }
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize(
    ("flags", "trained", "steps"),
    [
        pytest.param(TINY_RUN, 8, 46, id="quick"),  # warm-up ends at step 6
        pytest.param(
            ("--config.checkpoint_every=50", "--config.log_every=1"),  # else as it is shipped
            250,
            500,
            id="default",
            marks=pytest.mark.skipif(
                "LRQ_SLOW_TESTS" not in os.environ,
                reason="takes minutes: set LRQ_SLOW_TESTS=1 to run it",
            ),
        ),
    ],
)
def test_a_killed_run_ends_with_the_codes_of_an_undisturbed_one(tmp_path, flags, trained, steps):
    """Killed after a checkpoint of step `trained`, which holds a trained student, its optimizer ..."""
    run = functools.partial(start, flags=flags, quick=flags is TINY_RUN)
    undisturbed = run(tmp_path / "whole")
    output, _ = undisturbed.communicate(timeout=600)
    assert undisturbed.returncode == 0, output

    process = run(tmp_path / "killed")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 600
    while not any(int(p.name) >= trained for p in checkpoints.glob("*") if p.name.isdigit()):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "report.json").exists(), "killed too late to prove anything"

    resumed = run(tmp_path / "killed")
    output, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, output
    assert int(re.search(r"resuming after step (\d+)", output)[1]) >= trained
    assert_same_codes(tmp_path / "whole", tmp_path / "killed")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    numbers = [line["step"] for line in lines]
    assert numbers == sorted(set(numbers)) == list(range(1, steps + 1))


def test_a_diverging_run_names_step_terms_and_checkpoint(teacher, tmp_path):
    settings = tiny_settings(
        student_optimizer="sgd",
        student_learning_rate=1e30,
        student_schedule="constant",
        **NO_WARM_UP,
    )
    settings = RunSettings(**{**vars(settings), "log_every": 1, "checkpoint_every": 2})
    with pytest.raises(TrainingDiverged) as raised:
        quantize(prepare(teacher, settings, None, tmp_path / "run"))
    message = str(raised.value)
    assert "not finite at step" in message
    assert "student/loss" in message
    assert str(tmp_path / "run" / "checkpoints" / "2") in message
    assert not (tmp_path / "run" / "report.json").exists()


def test_an_update_that_overflows_is_not_kept(teacher, tmp_path):
    """The losses of its step are those before it: only the state shows it."""
    settings = tiny_settings(
        student_optimizer="sgd",
        student_learning_rate=1e38,
        gradient_clip=1e30,
        student_schedule="constant",
        steps=1,
        **NO_WARM_UP,
    )
    settings = RunSettings(**{**vars(settings), "log_every": 1, "checkpoint_every": 1})
    with pytest.raises(TrainingDiverged, match=r"arrays are not finite, the first .*student") as e:
        quantize(prepare(teacher, settings, None, tmp_path / "run"))
    named = Path(re.search(r"last good checkpoint: (\S+);", str(e.value))[1])
    assert named.is_dir()
    kept = sorted(int(p.name) for p in named.parent.glob("*") if p.name.isdigit())
    assert kept[-1] == int(named.name)
    assert not (tmp_path / "run" / "student").exists()


def test_a_diverging_pool_says_so(teacher, tmp_path):
    settings = tiny_settings(images="noise", noise_learning_rate=1e30, **NO_WARM_UP)
    message = r"loss is not finite at iteration \d+: .*lower .*checkpoint: .*/checkpoints/2$"
    with pytest.raises(TrainingDiverged, match=message):
        quantize(prepare(teacher, settings, None, tmp_path / "run"))


def test_an_interrupted_pool_is_finished_with_the_same_images(teacher, tmp_path, monkeypatch):
    spec = step_spec(teacher, tiny_settings(images="noise"), data_mesh(1))
    variables = put_replicated(teacher.variables, spec.mesh)
    whole = noise_pool.synthesize_pool(spec, variables, tmp_path / "whole", seed=3)
    assert whole.images.shape == (16, 8, 8, 1)
    assert whole.labels.shape == (16,)
    assert not np.array_equal(whole.images[:8], whole.images[8:])

    real, calls = noise_pool._optimise, []

    def fails_in_the_second_batch(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(noise_pool, "_optimise", fails_in_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        noise_pool.synthesize_pool(spec, variables, tmp_path / "cut", seed=3)
    monkeypatch.setattr(noise_pool, "_optimise", real)
    finished = noise_pool.synthesize_pool(spec, variables, tmp_path / "cut", seed=3)
    np.testing.assert_array_equal(whole.images, finished.images)
    np.testing.assert_array_equal(whole.labels, finished.labels)
    other = noise_pool.synthesize_pool(spec, variables, tmp_path / "other", seed=4)
    assert not np.array_equal(whole.images, other.images)


@pytest.mark.parametrize("most", [1, 4, 5, 50])
def test_a_resumed_phase_makes_the_calls_that_were_left(most):
    phase = loop.Phase(name="training", step=None, start=7, stop=7 + 18)
    whole, done = loop.dispatches(phase, 7, most), 7
    assert sum(whole) == 18
    assert max(whole) == min(most, 18)
    for number, count in enumerate(whole):
        assert loop.dispatches(phase, done, most) == whole[number:]
        done += count
    assert loop.dispatches(phase, done, most) == []


def test_without_a_generator_there_is_none_to_warm_up(teacher):
    settings = tiny_settings(images="noise", calibration_images="pool", warmup_steps=9)
    found = loop.phases(step_spec(teacher, settings, None))
    assert [(p.name, p.start, p.stop) for p in found] == [("calibration", 0, 1), ("training", 1, 4)]
    warmed = loop.phases(step_spec(teacher, tiny_settings(warmup_steps=9), None))
    assert [(p.name, p.start, p.stop) for p in warmed] == [
        ("warm-up", 0, 1), ("calibration", 1, 2), ("warm-up", 2, 9), ("training", 9, 12),
    ]  # fmt: skip


def test_a_report_shows_the_images_the_student_trained_on(teacher, tmp_path):
    settings = tiny_settings(images="noise")  # a generator too, for the ranges
    job = prepare(teacher, settings, None, tmp_path / "run")
    training = TrainingLoop(job.spec, teacher, settings, job.run)
    images, labels = training.preview(None, 5)
    pool = training.pool()
    assert len(images) == 5
    for count in (len(pool.labels), 1000):  # no image twice, however many are wanted
        everything, _ = training.preview(None, count)
        np.testing.assert_array_equal(everything, pool.images)
    places = [int(np.argmax([np.array_equal(x, y) for y in pool.images])) for x in images]
    np.testing.assert_array_equal(images, np.asarray(pool.images)[places])
    np.testing.assert_array_equal(labels, np.asarray(pool.labels)[places])


def test_a_pool_is_used_again_by_a_student_of_other_bits(teacher, tmp_path):
    settings = tiny_settings(images="noise")
    first = prepare(teacher, settings, None, tmp_path / "first")
    made = TrainingLoop(first.spec, teacher, settings, first.run).pool()

    def start_again(name, settings):
        other = dataclasses.replace(settings, pool_path=str(tmp_path / "first"))
        return prepare(teacher, other, None, tmp_path / name)

    student = dataclasses.replace(settings.student, weight_bits=3)
    second = start_again("second", dataclasses.replace(settings, student=student))
    taken = TrainingLoop(second.spec, teacher, second.settings, second.run).pool()
    np.testing.assert_array_equal(made.images, taken.images)
    np.testing.assert_array_equal(made.labels, taken.labels)
    assert not (tmp_path / "second" / "pool").exists()

    with pytest.raises(ValueError, match=r"pool of other images.*\n.*seed: 0 -> 5\n"):
        start_again("other seed", dataclasses.replace(settings, seed=5))
    method = dataclasses.replace(settings.method, noise_iterations=4)
    with pytest.raises(ValueError, match=r"method\.noise_iterations: 3 -> 4"):
        start_again("other images", dataclasses.replace(settings, method=method))
    method = dataclasses.replace(settings.method, class_focus=2.0)
    with pytest.raises(ValueError, match=r"method\.class_focus: 0\.0 -> 2\.0"):
        start_again("other losses", dataclasses.replace(settings, method=method))
    resources = dataclasses.replace(settings.resources, precision="bfloat16")
    with pytest.raises(ValueError, match=r"precision: 'float32' -> 'bfloat16'"):
        start_again("other precision", dataclasses.replace(settings, resources=resources))
    (tmp_path / "first" / "pool" / "batch_001.npz").unlink()
    with pytest.raises(ValueError, match=r"found no batch_001\.npz .*expected a finished pool"):
        start_again("third", settings)
    (tmp_path / "first" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"data\.pool_path: found no run in"):
        start_again("fourth", settings)


@pytest.mark.parametrize("images", ["generator", "noise"])
def test_several_steps_a_dispatch_log_and_save_what_single_ones_do(teacher, tmp_path, images):
    """A count that divides neither the phase nor the distance of logs and checkpoints."""
    method = {"images": images, "adam_epsilon": 1e-2, "student_optimizer": "sgd",
              "noise_iterations": 4}  # fmt: skip
    settings = dataclasses.replace(
        tiny_settings(**NO_WARM_UP, **method, steps=7), log_every=1, checkpoint_every=3
    )
    found = {}
    for count in (1, 2):
        several = dataclasses.replace(settings, steps_per_dispatch=count)
        quantize(prepare(teacher, several, None, tmp_path / str(count)))
        lines = (tmp_path / str(count) / "metrics.jsonl").read_text().splitlines()
        found[count] = [json.loads(line) for line in lines]
    assert [line["step"] for line in found[1]] == list(range(1, 10))
    assert [line["step"] for line in found[2]] == [2, 4, 6, 8, 9]
    single = {line["step"]: line for line in found[1]}
    for line in found[2]:  # means over a dispatch, whose last one has a single step
        count = 1 if line["step"] == 9 else 2
        these = [single[step] for step in range(line["step"] - count + 1, line["step"] + 1)]
        names = {"generator/loss", "student/loss"} & line.keys()
        assert names
        for name in names:
            mean = np.mean([each[name] for each in these])
            assert line[name] == pytest.approx(mean, rel=1e-4), name


def test_losses_are_read_while_the_next_steps_run(teacher, tmp_path, monkeypatch):
    """Only a checkpoint and the end of a phase wait for the steps just dispatched."""
    events = []
    compiled, logged = TrainingLoop._compile, TrainingLoop._log

    def compile_and_note(self, *arguments):
        program = compiled(self, *arguments)

        def call(*arguments):
            events.append("dispatch")
            return program(*arguments)

        return call

    def log(self, phase, done, *arguments):
        events.append(done)
        return logged(self, phase, done, *arguments)

    monkeypatch.setattr(TrainingLoop, "_compile", compile_and_note)
    monkeypatch.setattr(TrainingLoop, "_log", log)
    settings = dataclasses.replace(
        tiny_settings(**NO_WARM_UP, steps=7), log_every=1, checkpoint_every=4
    )
    job = prepare(teacher, settings, None, tmp_path / "run")
    TrainingLoop(job.spec, teacher, settings, job.run).run()
    calibration = ["dispatch", "dispatch", 1, 2]
    training = "dispatch dispatch 3 4 dispatch dispatch 5 dispatch 6 dispatch 7 8 dispatch 9"
    assert events == calibration + [int(e) if e.isdigit() else e for e in training.split()]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 10))


@pytest.fixture
def compiled_between_steps(monkeypatch):
    """By the step's name, the programs compiled from the first call of a phase to its last, with all
    that is logged, saved and drawn between. A step that is compiled ahead of time has none to
    compile in its first call; that of reconstruction is called for one block after another, and what is
    compiled between two of them is not counted."""
    found = {}

    def watching(real):
        def compile_and_watch(step, *arguments, **options):
            program, before = real(step, *arguments, **options), []

            def call(state, *arguments):
                if step is reconstruction_step and jax.device_get(state.step) == 0:
                    before.clear()
                before.append(len(names))
                result = program(state, *arguments)
                if len(before) > 1:
                    found.setdefault(step.__name__, []).extend(names[before[-2] :])
                return result

            call.memory_analysis = program.memory_analysis
            return call

        return compile_and_watch

    for module in (loop, noise_pool, reconstruction):
        monkeypatch.setattr(module, "compile_step", watching(module.compile_step))
    with compiled_programs() as names:
        yield found


def few_steps(preset, placement="integer"):
    """Settings of a preset cut down to three steps a phase."""
    config = base_config()
    config.method.preset = preset
    config.student.placement = placement
    if placement == "paper":
        config.method.rounding = "nearest"  # no other is defined there
    config.steps = 3
    config.log_every = 1
    config.checkpoint_every = config.images_every = 2
    for name, value in {
        "batch_size": 8,
        "warmup_steps": 3,
        "calibration_steps": 3,
        "generator_width": 8,
        "noise_batches": 2,
        "noise_batch_size": 8,
        "noise_iterations": 2,
        "reconstruction_iterations": 2,
        "reconstruction_batch_size": 8,
    }.items():
        config.method[name] = value
    return resolve(config, image_size=8)


WHOLE = ("fast", "hast", "squant")
"""Presets that are run from start to report, besides `gdfq` of the paper placement. The others
are run until the student is trained."""


def steps_of(method):
    """Names of the steps of a method's phases."""
    pool = method.images == "noise"
    return {
        "noise_step": pool,
        "calibration_step": method.calibration_images == "generator",
        "pool_calibration_step": method.calibration_images == "pool",
        "reconstruction_step": method.rounding == "adaround",
        "pool_step": pool,
        "joint_step": not pool,
    }


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {*WHOLE, "gdfq"}))
def test_every_other_preset_trains_and_compiles_nothing_between_steps(
    tmp_path, preset, compiled_between_steps
):
    settings = few_steps(preset)
    method = dataclasses.replace(settings.method, attention="none")  # takes long to compile
    job = prepare(
        small_teacher(), dataclasses.replace(settings, method=method), None, tmp_path / "run"
    )
    state = TrainingLoop(job.spec, job.teacher, job.settings, job.run).run()
    assert int(state.step) == loop.phases(job.spec)[-1].stop
    expected = {name: [] for name, there in steps_of(settings.method).items() if there}
    assert compiled_between_steps == expected


@pytest.mark.parametrize(
    ("preset", "placement", "devices"),
    [(name, "integer", 8 if name == "fast" else 1) for name in WHOLE]
    + [("gdfq", "paper", 1), ("fast", "paper", 1)],
)
def test_every_kind_of_preset_runs_from_start_to_report(
    teacher, tmp_path, preset, placement, devices, compiled_between_steps, monkeypatch
):
    monkeypatch.setattr("lrq_jax.quantize.data_mesh", lambda: data_mesh(devices))
    settings = few_steps(preset, placement)
    if devices > 1:  # orbax cuts what it saves into a slice a device: compiled at its first save
        settings = dataclasses.replace(settings, checkpoint_every=200)
    report = quantize(prepare(teacher, settings, None, tmp_path / "run"))
    assert report["preset"] == preset
    assert report["placement"] == placement
    assert report["images"] == 0
    assert report["drop"] is None
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    learned = settings.method.rounding == "adaround"
    assert learned == (preset == "fast" and placement == "integer")
    assert json.loads(lines[-1])["step"] == 6 + learned
    pool = preset in ("fast", "hast", "squant")
    expected = {name for name, there in steps_of(settings.method).items() if there}
    assert compiled_between_steps == {name: [] for name in expected}
    assert (tmp_path / "run" / "pool").exists() == pool
    made = {path.stem.partition("_")[0] for path in (tmp_path / "run" / "images").glob("*.png")}
    grids = {"hast": {"pool", "step"}, "fast": {"pool"}, "squant": {"pool"}}
    assert made == grids.get(preset, {"step"})
