"""The running average of weights: its formula, and that it ships; its steps are in `test_steps`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_steps import TEACHER, tiny_settings

from lrq_jax.passes import freeze
from lrq_jax.quantize import prepare, quantize, step_spec
from lrq_jax.training import steps
from lrq_jax.training.averaging import initial_average, update_average
from lrq_jax.writers.codes import load_student

pytestmark = pytest.mark.usefixtures("quick_compilation", "one_device")


@pytest.mark.parametrize("decay", [0.3, 0.9])
def test_average_against_a_second_version(rng, decay):
    history = rng.standard_normal((30, 4)).astype(np.float32)
    average = initial_average({"w": jnp.full(4, 7.0)}, decay=decay)  # the start does not count
    expected = None
    for n, weights in enumerate(history):
        average = update_average(average, {"w": jnp.asarray(weights)}, decay=decay)
        d = min(decay, n / (n + 9))
        expected = weights if n == 0 else d * expected + (1 - d) * weights
        np.testing.assert_allclose(average.weights["w"], expected, rtol=1e-5, atol=1e-6)
    assert int(average.updates) == 30


def test_the_codes_on_disk_are_those_of_the_average(tmp_path, monkeypatch):
    """Also after a run was resumed from a checkpoint, which must hold the average."""
    settings = tiny_settings(average_decay=0.9, student_learning_rate=0.3, steps=6)
    settings = dataclasses.replace(settings, checkpoint_every=3)
    seen = []
    real = steps.final_student
    monkeypatch.setattr(
        "lrq_jax.quantize.final_student",
        lambda state, *, spec: seen.append(jax.device_get(state)) or real(state, spec=spec),
    )
    quantize(prepare(TEACHER, settings, None, tmp_path / "run"))
    (tmp_path / "run" / "report.json").unlink()  # the run now resumes from its last checkpoint
    quantize(prepare(TEACHER, settings, None, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, *seen)
    spec = step_spec(TEACHER, settings, None)
    codes = load_student(tmp_path / "run" / "student")[1]
    average = jax.jit(lambda v: freeze(spec.student, v))(real(seen[0], spec=spec))
    last = jax.jit(lambda v: freeze(spec.student, v))(seen[0].student)
    name = "classifier"
    stored = codes["weights"][name]["codes"]
    np.testing.assert_array_equal(stored, np.asarray(average["weights"][name].codes))
    assert not np.array_equal(stored, np.asarray(last["weights"][name].codes))
