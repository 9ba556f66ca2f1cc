"""Benchmarks: what they measure can still be made, and what they say of it is so."""

import dataclasses
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import compiled_quickly
from small_networks import resnet_like
from test_steps import tiny_settings
from test_terminal import parsed

from lrq_jax import api, losses
from lrq_jax.config import resolve
from lrq_jax.losses.margin import Centers
from lrq_jax.run_directory import RunDirectory
from lrq_jax.training import steps
from lrq_jax.training.loop import phases
from lrq_jax.verify import main as verify

REPOSITORY = Path(__file__).parents[1]
BENCHMARKS = str(REPOSITORY / "benchmarks")


@pytest.fixture
def benchmark_module(monkeypatch):
    """Imports a module of `benchmarks/`."""
    monkeypatch.setattr(sys, "path", [BENCHMARKS, *sys.path])
    return importlib.import_module


@pytest.fixture
def latency(benchmark_module):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("ai_edge_litert")
    return benchmark_module("latency"), benchmark_module("subjects")


def test_the_network_that_is_timed_is_an_export_like_any_other(latency, tmp_path):
    benchmark, subjects = latency
    subject = subjects.topology("resnet20_cifar", 32, count=64)(tmp_path)
    assert verify([str(benchmark.exported(subject, tmp_path))]) == 0


# --- what devices send ---------------------------------------------------------------------------

PROGRAM = """
  %a = f32[3,4]{1,0} parameter(0)
  %sum = f32[3,4]{1,0} all-reduce(f32[3,4]{1,0} %a), replica_groups={}, to_apply=%add
  %both = (f32[5]{0}, bf16[2,2]{1,0}) all-reduce(f32[5]{0} %b, bf16[2,2]{1,0} %c), to_apply=%add
  %begun = u8[7]{0} all-gather-start(u8[7]{0} %d), dimensions={0}
  %ended = u8[7]{0} all-gather-done(u8[7]{0} %begun)
  %scalar = pred[] all-reduce(pred[] %e), to_apply=%or
  %named = f32[9]{0} fusion(f32[3,4]{1,0} %sum), calls=%all-reduce.1
"""


def test_collectives_are_counted_once_each_with_the_bytes_of_their_results(benchmark_module):
    found = benchmark_module("scaling").count_collectives(PROGRAM)
    assert found == {"all-reduce": (3, 3 * 4 * 4 + 5 * 4 + 2 * 2 * 2 + 1), "all-gather": (1, 7)}


# --- where and when ------------------------------------------------------------------------------


def test_every_line_names_machine_load_date_and_commit(benchmark_module):
    module = benchmark_module("provenance")
    found = module.provenance()
    assert set(found) == {"machine", "date", "commit"}
    assert set(found["machine"]) == {"cpu", "usable_cpus", "load_at_start"}
    assert found["machine"]["usable_cpus"] >= 1
    assert time.strptime(found["date"], "%Y-%m-%d")
    assert found["commit"] == module.commit(REPOSITORY)


def test_logs_do_not_make_a_commit_dirty_and_code_does(benchmark_module, tmp_path):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    commit = benchmark_module("provenance").commit
    assert commit(tmp_path) == "unknown"
    git("init")
    (tmp_path / "results").mkdir()
    for name in ("code.py", "results/log.jsonl"):
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-m", "all")
    clean = commit(tmp_path)
    assert len(clean) == 12
    (tmp_path / "results" / "log.jsonl").write_text("2")
    assert commit(tmp_path) == clean
    (tmp_path / "code.py").write_text("2")
    assert commit(tmp_path) == f"{clean}-dirty"


# --- the joint step's two sides ------------------------------------------------------------------

LOSSES = {
    "generator/ce": 2.0, "generator/bns": 3.0, "generator/loss": 2.3,
    "student/ce": 2.5, "student/distill": 0.5, "student/loss": 3.0,
}  # fmt: skip
WEIGHTS = {"generator/ce": 1.0, "generator/bns": 0.1, "student/ce": 1.0, "student/distill": 1.0}


def side(changed, theirs=None):
    """A twin's description whose first losses are ours, changed, and its own, changed further."""
    ours = {**LOSSES, **changed}
    own = {**ours, **(theirs or {})}
    return {"losses": [{n: (ours[n], own[n]) for n in ours}], "weights_of_losses": WEIGHTS}


def test_the_same_losses_are_accepted_up_to_rounding(benchmark_module):
    module = benchmark_module("joint_step")
    case = module.CASES["r20-64"]
    module.check_first_step(case, side({}, {"generator/ce": 2.00001, "student/distill": 0.51}))


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ({}, {"generator/loss": 2.31}, "generator/loss is 2.3 and the twin's 2.31"),
        ({}, {"generator/bns": 3.003}, "generator/bns"),
        ({}, {"student/distill": 0.6}, "student/distill"),
        ({}, {"student/loss": math.nan}, "student/loss"),
        ({"generator/bns": 0.01}, {}, "generator/bns is 0.01 in a sum of 2.3"),
        ({"student/distill": 0.0}, {}, "nothing would show an error of this term"),
    ],
)
def test_steps_that_differ_or_show_nothing_are_refused(benchmark_module, ours, theirs, words):
    module = benchmark_module("joint_step")
    with pytest.raises(module.DifferentSteps, match=words):
        module.check_first_step(module.CASES["r20-64"], side(ours, theirs))


def test_students_are_compared_where_their_quantizers_and_precision_are_the_same(benchmark_module):
    module = benchmark_module("joint_step")
    cases, student = module.CASES, side({}, {"student/loss": 4.0})
    generator = side({}, {"generator/loss": 4.0})
    module.check_first_step(cases["r20-64-integer"], student)
    with pytest.raises(module.DifferentSteps):
        module.check_first_step(cases["r20-64-integer"], generator)
    coarse = dataclasses.replace(cases["r20-64"], precision="tf32")
    module.check_first_step(coarse, generator)


def test_shares_are_of_the_one_largest_peak(benchmark_module):
    shares = benchmark_module("joint_step").shares_of_peak
    found = shares({"ours": 100.0, "torch": 300.0}, {"ours": 400.0, "torch": 200.0})
    assert found == {"ours": 0.25, "torch": 0.75}


def test_operations_are_counted_in_the_program_as_it_is_written(benchmark_module):
    count = benchmark_module("joint_worker").counted_flops
    x = jnp.ones((3, 5))
    assert count(lambda x: x @ x.T, x, platform="cpu") == 2 * 3 * 5 * 3


def test_where_no_operations_are_counted_there_is_no_number(benchmark_module, monkeypatch):
    """As with jax's plugins for GPUs, which cannot count before they compile."""
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
    count = benchmark_module("joint_worker").counted_flops
    assert count(lambda x: x @ x.T, jnp.ones((3, 5)), platform="cpu") is None


WORKER = """
import json, sys, time
side, text, exchange = sys.argv[1:]
case = json.loads(text)
seconds = {"ours": 2.0, "torch": 3.0, "compiled": 1.0}[side]
if side == "compiled" and case["attention"] == "none":
    time.sleep(60)
about = {"flops": {"ours": 4e9, "torch": 9e9}.get(side), "compile_seconds": 1.0,
         "matmul_flops": {"ours": 6e9, "torch": 3e9, "compiled": 3e9}[side]}
if side != "ours":
    about |= {"losses": [SAME, SAME], "weights_of_losses": WEIGHTS, "layout": "channels_last"}
assert side != "compiled" or case["layout"] == "channels_last"
print(json.dumps(about), flush=True)
for line in sys.stdin:
    assert side != "compiled" or line.strip() in ("generator", "joint")
    print(json.dumps([seconds, 2 * seconds]), flush=True)
print(json.dumps({"peak_bytes": 5}), flush=True)
"""
"""Stands for a side whose calls take whole seconds; the compiled one of a case without attention is
not ready in time."""


@pytest.fixture
def joint_step(benchmark_module, monkeypatch, tmp_path):
    """Runs the command with `WORKER`, of losses that differ by this factor: its exit code and lines."""
    module = benchmark_module("joint_step")

    def run(*arguments, factor=1.0):
        losses = {name: (value, factor * value) for name, value in LOSSES.items()}
        script = tmp_path / "worker.py"
        script.write_text(WORKER.replace("SAME", repr(losses)).replace("WEIGHTS", repr(WEIGHTS)))
        out = tmp_path / "out.jsonl"
        monkeypatch.setattr(module, "WORKER", script)
        monkeypatch.setattr(module.child_processes, "leave_on_sigterm", lambda: None)
        monkeypatch.setattr(sys, "argv", ["joint_step.py", "--out", str(out), *arguments])
        code = module.main()
        return code, list(map(json.loads, out.read_text().splitlines())) if out.exists() else []

    return run


@pytest.mark.parametrize("given", [True, False])
def test_ratios_shares_and_the_compiled_side_are_reported(joint_step, capsys, monkeypatch, given):
    monkeypatch.setattr("lrq_jax.huge_pages.given", lambda tunables: given)
    code, (line,) = joint_step("--only", "r20-64", "--compiled")
    assert code == 0
    assert (line["speedup"], line["seconds"]["joint"]["compiled_speedup"]) == (1.5, 0.5)
    assert (line["processor_speedup"], line["left_out"]) == (1.5, {})
    shares = {name: found["share_of_matmul_peak"] for name, found in line["sides"].items()}
    assert shares == {"ours": 0.333, "torch": 0.5, "compiled": 1.5}
    assert {"machine", "date", "commit"} <= set(line)
    assert line["huge_pages"] == given
    text = capsys.readouterr().out
    assert re.search(r"of the matmul peak +0\.333 +0\.500 +1\.500\n", text)
    joint, teacher = (re.search(rf"  {part} .*", text)[0] for part in ("joint", "teacher"))
    assert joint.split()[1::2] == ["2.0000", "3.0000", "1.50", "1.0000", "0.50"]
    assert len(teacher.split()) == 7


def test_a_compiled_side_that_is_late_is_left_out_and_the_rest_reported(joint_step, capsys):
    code, (line,) = joint_step("--only", "r20-64-none", "--compiled", "--compile-budget", "1.5")
    assert code == 0
    assert line["speedup"] == 1.5
    assert line["left_out"] == {"compiled": "not ready after 1.5 s"}
    assert "compiled was left out: not ready after 1.5 s" in capsys.readouterr().out


def test_different_steps_end_the_command_before_anything_is_written(joint_step, capsys):
    assert joint_step("--only", "r20-64", factor=1.1) == (1, [])
    assert "expected a relative difference of at most" in capsys.readouterr().err


@pytest.fixture
def twin(benchmark_module):
    pytest.importorskip("torch", reason="PyTorch's side of the step: pip install torch")
    return benchmark_module("torch_twin")


def test_the_twins_losses_are_ours_on_the_same_outputs(twin, rng):
    import torch

    method = tiny_settings().method
    student, teacher = rng.normal(size=(2, 6, 5)).astype(np.float32) * 3
    labels = rng.integers(0, 5, 6)
    ours = losses.decoupled_distillation(
        jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(labels),
        alpha=method.distill_weight, beta=method.dkd_beta, temperature=method.temperature,
    )  # fmt: skip
    given = torch.from_numpy(student), torch.from_numpy(teacher), torch.from_numpy(labels)
    theirs = twin.decoupled_distillation(*given, method)
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)

    features, sums = rng.normal(size=(6, 7)), rng.normal(size=(5, 7))
    counts = np.asarray([2, 0, 1, 3, 1])
    floats = [np.float32(x) for x in (features, sums, counts)]
    spec = SimpleNamespace(method=method)
    centers = Centers(*map(jnp.asarray, floats[1:]))
    ours = steps.margin_loss(jnp.asarray(floats[0]), jnp.asarray(labels), centers, {}, spec)
    tensors = [torch.from_numpy(x) for x in floats]
    theirs = twin.margin_loss(tensors[0], given[2], *tensors[1:], method)
    assert ours > 0
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)


def test_the_twin_makes_our_step(twin, benchmark_module, monkeypatch, tmp_path):
    worker, module = benchmark_module("joint_worker"), benchmark_module("joint_step")
    settings = tiny_settings()
    paper = dataclasses.replace(settings.student, placement="paper")
    settings = dataclasses.replace(settings, student=paper)
    monkeypatch.setattr(worker, "run_settings", lambda case: (resnet_like(), settings))
    monkeypatch.setattr(worker, "MATMUL_SIDE", {"cpu": 4, "gpu": 4})
    case = worker.Case(network="tiny", batch=16, attention="none")
    with compiled_quickly():
        ours, parts, _ = worker.our_side(case, tmp_path / "exchange.npz")
    assert set(parts) == set(worker.PARTS)
    theirs, parts, _ = worker.torch_side(case, tmp_path / "exchange.npz")
    assert set(parts) == set(worker.PARTS)
    module.check_first_step(case, theirs)
    first, second = module.relative_differences(theirs)
    assert max(first.values()) < 1e-4  # few activations: none rounds to another code
    assert max(second.values()) < 1e-2  # losses after both updates
    # The plain step needs more operations than ours, but of the same order.
    assert 0.1 < ours["flops"] / theirs["flops"] < 1


@pytest.mark.parametrize(
    ("features", "groups", "stride"), [(6, 6, 1), (4, 1, 2), (4, 2, 1)],
    ids=["depthwise", "strided", "grouped"],
)  # fmt: skip
def test_torchs_operations_are_counted_forward_and_backward(
    features, groups, stride, benchmark_module
):
    torch = pytest.importorskip("torch")
    images = torch.ones(2, 6, 8, 8, requires_grad=True)
    kernel = torch.ones(features, 6 // groups, 3, 3, requires_grad=True)

    def step():
        convolve = torch.nn.functional.conv2d
        convolve(images, kernel, stride=stride, padding=1, groups=groups).sum().backward()

    once = 2 * 2 * features * (8 // stride) ** 2 * (6 // groups) * 3 * 3
    assert benchmark_module("joint_worker").torch_flops(step) == 3 * once


# --- from a command to a step --------------------------------------------------------------------


@pytest.mark.parametrize("phase", [None, "training"])
def test_cold_start_waits_for_a_line_of_the_phase_and_ends_the_command(benchmark_module, tmp_path, phase):  # fmt: skip
    module, metrics, reached = (benchmark_module("cold_start"), *paths(tmp_path))
    script = f"""
        import pathlib, time
        file = open({str(metrics)!r}, "w")
        def say(text):
            file.write(text); file.flush(); time.sleep(0.1)
        say('{{"step": 1, "phase": "warm-up"}}\\n')
        say('{{"step": 2, "phase": "calibra')
        say('tion"}}\\n')
        pathlib.Path({str(reached)!r}).touch()
        say('{{"step": 3, "phase": "training"}}\\n')
        time.sleep(60)
    """
    seconds = module.seconds_until(fake(script), {}, metrics, phase)
    assert 0 < seconds < 30
    assert reached.exists() == (phase == "training")


@pytest.mark.parametrize(
    ("lines", "after", "words"),
    [
        ("", "raise SystemExit('no such teacher')", r"no phase.*no such teacher"),
        ("warm-up", "", r"\['warm-up'\], expected one of calibration"),
        ("training", "time.sleep(60)", r"\['training'\], expected one of calibration"),
    ],
)
def test_cold_start_says_so_where_the_phase_does_not_come(benchmark_module, tmp_path, lines, after, words):  # fmt: skip
    module, metrics, _ = (benchmark_module("cold_start"), *paths(tmp_path))
    write = f"""open({str(metrics)!r}, "w").write('{{"step": 1, "phase": "{lines}"}}\\n')"""
    script = f"""
        import time
        {write if lines else ""}
        {after}
    """
    with pytest.raises(RuntimeError, match=f"(?s){words}"):
        module.seconds_until(fake(script), {}, metrics, "calibration")


def paths(folder):
    return folder / "metrics.jsonl", folder / "reached"


def fake(script):
    """A command that runs these lines."""
    return [sys.executable, "-S", "-c", textwrap.dedent(script)]


def test_cold_start_reads_the_lines_that_runs_write(benchmark_module, tmp_path):
    module, run = benchmark_module("cold_start"), RunDirectory(tmp_path / "run", {})
    metrics = run.path / "metrics.jsonl"
    assert module.phases_logged(metrics) == []
    run.open_metrics(0)
    run.log(1, "warm-up", {"loss": 1.0})
    run.log(2, "training", {"loss": 1.0})
    assert module.phases_logged(metrics) == ["warm-up", "training"]


@pytest.mark.parametrize(
    ("preset", "phase", "expected"),
    [
        ("lrq", "warm-up", [("warm-up", 1), ("calibration", 1)]),
        ("lrq", "training", [("calibration", 1)]),
        ("gdfq", "training", [("calibration", 1)]),
        ("fast", "training", [("calibration", 1), ("reconstruction", 1)]),
        ("fast", "calibration", [("calibration", 1), ("reconstruction", 1)]),
    ],
)
def test_cold_starts_phases_are_as_short_as_can_be(benchmark_module, monkeypatch, preset, phase, expected):  # fmt: skip
    module = benchmark_module("cold_start")
    method = method_of(module.command_of(preset, "digits", 8, phase, "run"), monkeypatch)
    found = [(part.name, part.stop - part.start) for part in phases(SimpleNamespace(method=method))]
    assert found == [*expected, ("training", method.steps)]
    assert method.noise_batches == method.noise_iterations == method.reconstruction_iterations == 1
    assert (method.batch_size, method.images == "noise") == (8, preset == "fast")


def method_of(command, monkeypatch):
    """The method that a command of `lrq_jax.main` runs, at 32 px."""
    monkeypatch.chdir(REPOSITORY)
    assert command[1:3] == ["-m", "lrq_jax.main"]
    files = [word.partition("=")[2] for word in command if word.startswith("--config=")]
    kept = [word for word in command if not word.startswith(("--workdir=", "--config="))]
    config = parsed(shlex.join(kept), api._config(files[-1]) if files else None)
    return resolve(config, image_size=32).method


# --- time to accuracy ----------------------------------------------------------------------------


def asked(module, *words):
    return module._parser().parse_args(["--teacher", "digits", *words])


def test_a_preset_runs_ever_longer_until_it_is_good_enough(benchmark_module, monkeypatch):
    module = benchmark_module("time_to_accuracy")
    drops, ran = {100: 9.0, 200: 4.0, 400: 3.7, 800: 0.1}, []

    def run(command, workdir, cache):
        (steps,) = (int(x.partition("=")[2]) for x in command if x.startswith("--config.steps="))
        ran.append((steps, workdir, cache))
        if drops[steps] is None:
            raise RuntimeError("no memory")
        return {"steps": steps, "seconds": float(steps), "drop": drops[steps]}

    monkeypatch.setattr(module, "run", run)
    found = module.measure("fast", asked(module))
    assert found["reached"] == {"steps": 400, "seconds": 400.0, "drop": 3.7}
    assert [each["steps"] for each in found["runs"]] == [100, 200, 400]
    assert len({place for _, *places in ran for place in places}) == 6  # all new
    found = module.measure("fast", asked(module, "--most-steps", "300"))
    assert (found["reached"], len(found["runs"])) == (None, 2)
    drops[200] = None
    found = module.measure("fast", asked(module))
    assert found["reached"] is None
    assert found["runs"][1:] == [{"steps": 200, "error": "no memory"}]


def test_the_commands_timed_are_of_their_presets(benchmark_module, monkeypatch):
    module = benchmark_module("time_to_accuracy")
    for preset in module._parser().parse_args(["--teacher", "digits"]).presets:
        for count in module.ladder(preset, 100, 150):
            command = module.command_of(preset, count, asked(module, "--bits", "3"), "run")
            method = method_of(command, monkeypatch)
            assert method.steps == (count or 0)
            assert (method.images == "noise") == (preset in ("fast", "squant"))
            assert (method.rounding == "squant") == (preset == "squant")
            assert {"--config.student.weight_bits=3", "--config.student.act_bits=3"} < set(command)


def test_time_to_accuracy_reads_what_a_run_reports(benchmark_module, tmp_path, capsys, monkeypatch):
    module, out = benchmark_module("time_to_accuracy"), tmp_path / "out.jsonl"
    small = "--config.method.noise_batch_size=8 --config.method.noise_iterations=2"
    words = [
        "--teacher=digits",
        "--presets=squant",
        "--drop=100",
        f"--flags={small}",
        f"--out={out}",
    ]
    monkeypatch.setattr(sys, "argv", ["time_to_accuracy.py", *words])
    monkeypatch.setattr(module.child_processes, "leave_on_sigterm", lambda: None)
    monkeypatch.delenv("XLA_FLAGS")  # one device, as on a person's computer
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    module.main()
    line = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == line
    found = line["reached"]
    assert line["runs"] == [found]
    assert found["images"] > 100
    assert 0 < found["without_evaluation"] < found["seconds"]
    assert found["steps"] == 0
    assert {"commit", "machine", "date", "seed"} < line.keys()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("raise SystemExit('no such teacher')", "exit code 1.*no such teacher"),
        (None, "give --data"),
    ],
)
def test_time_to_accuracy_says_what_is_wrong(benchmark_module, tmp_path, script, words):
    module = benchmark_module("time_to_accuracy")
    (tmp_path / "report.json").write_text('{"drop": null}')
    with pytest.raises(RuntimeError, match=f"(?s){words}"):
        module.run(fake(script or "pass"), tmp_path, tmp_path)


# --- what wants a GPU ----------------------------------------------------------------------------


def test_the_gpu_script_prints_commands_that_their_programs_take(
    benchmark_module, tmp_path, monkeypatch, capsys
):
    out, runs = tmp_path / "out", tmp_path / "runs"
    gpu = benchmark_module("gpu")
    assert gpu.main(["--dry-run", f"--out={out}", f"--runs={runs}", f"--data={tmp_path}"]) == 0
    assert list(tmp_path.iterdir()) == []
    lines = capsys.readouterr().out.splitlines()
    names = [line[2:].partition(",")[0] for line in lines[::2]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"# \S+, at most \d+ s", line) for line in lines[::2])
    asked = set()
    for line in lines[1::2]:
        command = shlex.split(line)
        assert command[0] == "python"
        if command[1] == "-m":
            method = method_of(command, monkeypatch)
            assert (method.warmup_steps, method.steps, method.batch_size) == (800, 80_000, 200)
            asked.add("schedule")
            continue
        script = benchmark_module(Path(command[1]).stem)
        assert Path(script.__file__) == REPOSITORY / command[1]
        options = script._parser().parse_args(command[2:])
        assert options.out.parent == out
        if command[1].endswith("joint_step.py"):
            assert set(options.only) <= set(script.GPU_CASES)
            assert options.compiled
            asked |= {(case, options.precision) for case in options.only}
        else:
            assert (options.what, options.sides) == ("growth", [])
            asked.add((options.network, options.side, *options.batches))
    cases = {(case, p) for case in gpu.CASES for p in ("float32", "tf32")}
    assert asked == {"schedule", ("resnet50", 224, 64), *cases}


def test_the_gpu_script_goes_on_where_it_stopped(benchmark_module, monkeypatch, tmp_path, capsys):
    gpu = benchmark_module("gpu")
    counted = tmp_path / "count"
    count = f"open({str(counted)!r}, 'a').write('x')"
    monkeypatch.setattr(gpu, "PATIENCE", 5.0)
    monkeypatch.setattr(gpu.child_processes, "leave_on_sigterm", lambda: None)
    scripts = {"good": count, "bad": "raise SystemExit(3)", "slow": "import time; time.sleep(60)"}

    def runs(options):
        return [
            gpu.Run(name=name, seconds=2 if name == "slow" else 60, arguments=("-S", "-c", script))
            for name, script in scripts.items()
        ]

    monkeypatch.setattr(gpu, "runs", runs)
    assert gpu.main([f"--runs={tmp_path / 'runs'}"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "good: finished", "bad: exit code 3", "slow: out of time after 2 s",
    ]  # fmt: skip
    scripts |= {"bad": "pass", "slow": "pass"}
    assert gpu.main([f"--runs={tmp_path / 'runs'}", "--minutes=-1"]) == 1
    assert capsys.readouterr().out.splitlines() == ["bad: not started", "slow: not started"]
    assert gpu.main([f"--runs={tmp_path / 'runs'}"]) == 0
    assert capsys.readouterr().out.splitlines() == ["bad: finished", "slow: finished"]
    assert counted.read_text() == "x"


def test_a_finished_schedule_is_a_line_of_results(
    benchmark_module, monkeypatch, tmp_path, tiny_run
):
    gpu, workdir = benchmark_module("gpu"), tiny_run[0].path
    run = gpu.Run(name="done", seconds=60, arguments=("-S", "-c", "pass"), workdir=workdir)
    monkeypatch.setattr(gpu, "runs", lambda options: [run])
    monkeypatch.setattr(gpu.child_processes, "leave_on_sigterm", lambda: None)
    for _ in range(2):  # the second finds it done
        assert gpu.main([f"--runs={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}"]) == 0
    (line,) = (tmp_path / "out" / "schedule.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["preset"], entry["steps"], entry["precision"]) == ("lrq", 2, "float32")
    assert entry["wall_seconds"]["training"] >= 0
    assert {"machine", "date", "commit", "drop"} <= entry.keys()


def test_a_command_is_ended_with_what_it_started(benchmark_module, tmp_path):
    module, note = benchmark_module("child_processes"), tmp_path / "child"
    script = f"""
        import pathlib, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        pathlib.Path({str(note)!r} + ".part").write_text(str(child.pid))
        pathlib.Path({str(note)!r} + ".part").rename({str(note)!r})
        time.sleep(60)
    """
    process = module.start(fake(script))
    while not note.exists():
        assert process.poll() is None
        time.sleep(0.02)
    module.end(process)
    assert process.returncode is not None
    child = int(note.read_text())
    until = time.monotonic() + 30
    while alive(child) and time.monotonic() < until:
        time.sleep(0.02)
    assert not alive(child)


def alive(number):
    """Whether a process runs; one that has ended and waits to be noticed does not."""
    try:
        os.kill(number, 0)
        status = Path(f"/proc/{number}/stat")
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
