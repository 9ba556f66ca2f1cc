"""Two real processes that train together: the same losses, either of them killed, the rest resumed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from test_steps import tiny_teacher

from lrq_jax import processes
from lrq_jax.readers import save_teacher
from lrq_jax.writers.codes import load_student

pytestmark = pytest.mark.usefixtures("quick_compilation")

REPOSITORY = Path(__file__).parents[1]
STEPS, WARMUP = 40, 4
LOST, REFUSED = 4, 2  # exit codes of lrq_jax.main, whose import reads the command line
TINY_RUN = (
    "--config.data.name=",
    f"--config.steps={STEPS}",
    f"--config.method.warmup_steps={WARMUP}",
    "--config.method.calibration_start=0",
    f"--config.method.calibration_steps={WARMUP}",
    "--config.method.batch_size=8",
    "--config.method.generator_width=8",
    "--config.method.attention=none",  # its shifted products take long to compile
    # Adam's first updates are the gradient's sign, which is noise where the gradient is.
    "--config.method.adam_epsilon=0.01",
    # Of 8 bits and few updates: at 4 a code that rounding moves shows in the loss.
    "--config.student.weight_bits=8",
    "--config.student.act_bits=8",
    "--config.method.student_learning_rate=1e-5",
    "--config.checkpoint_every=4",
    "--config.log_every=1",
    "--config.images_every=1000",
)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(workdir, *flags, config="digits_lrq", devices=1, **environment):
    """The command line as a person starts it, on so many simulated devices; its teacher lies
    beside `workdir`."""
    flags = (
        f"--config={REPOSITORY / 'configs' / config}.py",
        f"--config.teacher.path={workdir.parent / 'teacher'}",  # needs no digits
        *TINY_RUN,
        *(LRQ if config == "digits_lrq" else FAST),
        *flags,
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "lrq_jax.main", f"--workdir={workdir}", *flags],
        env={
            "PYTHONPATH": str(REPOSITORY),
            "PATH": "/usr/bin:/bin",
            "HOME": str(workdir.parent),
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of a run
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    STARTED.append(process)
    return process


STARTED = []


@pytest.fixture(scope="module", autouse=True)
def none_is_left():
    """A test that fails ends what it started."""
    yield
    for process in STARTED:
        process.kill()
        process.wait()


LRQ = ("--config.method.student_optimizer=sgd",)
FAST = (
    "--config.method.noise_batches=2",
    "--config.method.noise_batch_size=16",
    "--config.method.noise_iterations=4",
    "--config.method.reconstruction_iterations=4",
    "--config.method.reconstruction_batch_size=8",
)


def start_two(workdir, *flags, config="digits_lrq", devices=1):
    """Two of the processes of `start`, of so many devices each."""
    shared = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    return [
        start(
            workdir,
            "--config.distributed=True",
            *flags,
            config=config,
            devices=devices,
            **shared,
            JAX_PROCESS_ID=str(number),
        )
        for number in (0, 1)
    ]


def losses_of(workdir, steps=tuple(range(1, WARMUP + STEPS + 1))):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in entries] == list(steps)
    return [{k: v for k, v in e.items() if isinstance(v, float)} for e in entries]


def assert_same_losses(alone, two, steps):
    """Of two runs of `fast`, but for sums in another order."""
    for one, both in zip(losses_of(alone, steps), losses_of(two, steps), strict=True):
        assert one.keys() == both.keys()
        for name, value in one.items():
            if name != "student/agreement":  # of the size of cross-entropies, about 5
                assert both[name] == pytest.approx(value, abs=5e-5, rel=0), name


def saved_steps(workdir):
    return [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]


def killed(processes, number, workdir, *, after):
    """One of two processes killed as soon as that step is saved: the other's exit code and output."""
    kill_after(processes, number, workdir, after)
    other = processes[1 - number]
    output, _ = other.communicate(timeout=120)
    assert not (workdir / "report.json").exists(), "killed too late to prove anything"
    return other.returncode, output


def kill_after(processes, number, workdir, step):
    """Kills one of the processes as soon as that step or a later one is saved."""
    deadline = time.monotonic() + 600
    while max(saved_steps(workdir), default=0) < step:
        for process in processes:
            assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes[number].send_signal(signal.SIGKILL)
    processes[number].communicate()
    assert not (workdir / "report.json").exists(), "killed too late to prove anything"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process alone; two, of which the second is killed after step 8, resumed by one alone.

    Always of two devices in all, so that sums over devices are of the same two terms: in another
    order they would differ in the last bit, which now and then moves a code of an activation.
    """
    folder = tmp_path_factory.mktemp("distributed")
    save_teacher(tiny_teacher(), folder / "teacher")
    alone = start(folder / "alone", devices=2)
    output, _ = alone.communicate(timeout=600)
    assert alone.returncode == 0, output

    first = killed(start_two(folder / "two"), 1, folder / "two", after=8)
    metrics = (folder / "two" / "metrics.jsonl").read_text()

    resumed = start(folder / "two", devices=2)
    resumed_output, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, resumed_output
    return {
        "folder": folder,
        "first": first,
        "resumed": resumed_output,
        "metrics": metrics,
    }


def test_a_job_that_loses_a_process_ends_and_says_how_to_go_on(runs):
    code, output = runs["first"]
    assert code == LOST, output
    assert "process 0 of 2" in output
    assert "another process ended" in output
    assert "--workdir: it resumes" in output


def test_two_processes_lose_what_one_does_and_one_goes_on_where_they_stopped(runs):
    folder = runs["folder"]
    assert "resuming after step" in runs["resumed"]
    resumed_after = int(runs["resumed"].split("resuming after step ")[1].split()[0])
    assert resumed_after >= 8  # so these losses are of two processes, and the rest of one
    for one, two in zip(losses_of(folder / "alone"), losses_of(folder / "two"), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            whole = one[f"{name.split('/')[0]}/loss"]  # of which the others are terms
            assert two[name] == pytest.approx(value, abs=1e-5 * whole, rel=0), name


def test_only_one_of_two_processes_writes(runs):
    lines = [json.loads(line)["step"] for line in runs["metrics"].splitlines()]
    assert lines == sorted(set(lines))
    assert len(list((runs["folder"] / "two" / "tensorboard").glob("*"))) == 2  # of two starts


def test_codes_of_both_runs_are_those_of_the_same_network(runs):
    codes = [load_student(runs["folder"] / name / "student")[1] for name in ("alone", "two")]
    for name, weights in codes[0]["weights"].items():
        np.testing.assert_array_equal(weights["codes"], codes[1]["weights"][name]["codes"])


def test_two_processes_make_images_rebuild_blocks_and_train_as_one_and_outlive_the_first(tmp_path):
    """`fast`, of whose two processes, of two devices each, the first is killed, on which jax's
    coordination rests; one alone goes on, is killed too, and two others finish."""
    save_teacher(tiny_teacher(), tmp_path / "teacher")
    alone = start(tmp_path / "alone", config="fast")
    output, _ = alone.communicate(timeout=600)
    assert alone.returncode == 0, output

    two = tmp_path / "two"
    code, output = killed(start_two(two, config="fast", devices=2), 0, two, after=WARMUP + 4)
    assert code != 0
    assert "coordination service" in output, output  # jax ends the process, with its own message
    by_two = max(saved_steps(two))
    kill_after([start(two, config="fast")], 0, two, by_two + 4)
    by_one = max(saved_steps(two))
    assert by_one < WARMUP + STEPS  # or nothing is left to do
    last = start_two(two, config="fast", devices=2)
    outputs = [process.communicate(timeout=600)[0] for process in last]
    assert [process.returncode for process in last] == [0, 0], outputs
    assert f"resuming after step {by_one}\n" in outputs[0]

    steps = (*range(1, WARMUP + 1), *range(WARMUP + 2, WARMUP + STEPS + 2))  # reconstruction: one
    assert_same_losses(tmp_path / "alone", two, steps)
    pools = [
        [np.load(path)["images"] for path in sorted((run / "pool").glob("*.npz"))]
        for run in (tmp_path / "alone", two)
    ]
    np.testing.assert_allclose(*pools, atol=1e-4)


def test_two_processes_train_on_real_images_as_one(tmp_path):
    """Each reads the images itself; the batches are those of one process."""
    save_teacher(tiny_teacher(), tmp_path / "teacher")
    rng = np.random.default_rng(0)
    for label in range(2):
        (tmp_path / "real" / f"{label}").mkdir(parents=True)
        for number in range(10):
            pixels = rng.integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "real" / f"{label}" / f"{number}.png")
    flags = (
        "--config.method.images=folder",
        "--config.method.rounding=nearest",
        f"--config.data.train_path={tmp_path / 'real'}",
        "--config.data.train_images=16",
    )
    started = [start(tmp_path / "alone", *flags, config="fast", devices=2)]
    started += start_two(tmp_path / "two", *flags, config="fast")
    outputs = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    steps = range(1, WARMUP + STEPS + 1)
    assert_same_losses(tmp_path / "alone", tmp_path / "two", steps)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
         "whole numbers"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
         "expected 0 to 1"),
    ],
)  # fmt: skip
def test_incomplete_or_impossible_jobs_are_refused(environment, message, monkeypatch):
    for name in (processes.ADDRESS, processes.COUNT, processes.NUMBER):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        processes.join_processes()


def test_a_job_without_a_cluster_says_what_it_needs(tmp_path):
    process = start(tmp_path / "run", "--config.distributed=True")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == REFUSED, output
    assert "JAX_COORDINATOR_ADDRESS=HOST:PORT" in output
    assert not (tmp_path / "run").exists()


def test_a_process_alone_is_the_first_and_waits_for_nobody():
    assert jax.process_count() == 1
    assert processes.is_first()
    processes.wait_for_all("nobody")
    assert "JAX_PROCESS_ID" not in os.environ
