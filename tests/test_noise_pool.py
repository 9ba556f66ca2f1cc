"""The pool's host loop: several iterations a program call make what single ones do."""

import numpy as np
import pytest
from test_steps import TEACHER, tiny_settings

from lrq_jax.console import audience
from lrq_jax.quantize import step_spec
from lrq_jax.sharding import data_mesh
from lrq_jax.training import noise_pool
from lrq_jax.training.compilation import iterations_per_call, put_replicated
from lrq_jax.training.errors import TrainingDiverged

pytestmark = pytest.mark.usefixtures("quick_compilation")


def synthesize(directory, steps_per_dispatch, **method):
    """A pool of one batch, after which iterations was reported, and what."""
    settings = tiny_settings(images="noise", **{"noise_batches": 1, **method})
    spec = step_spec(TEACHER, settings, data_mesh(1))
    variables = put_replicated(TEACHER.variables, spec.mesh)
    seen = []
    with audience(seen.append, verbose=False):
        pool = noise_pool.synthesize_pool(
            spec, variables, directory, seed=3, steps_per_dispatch=steps_per_dispatch
        )
    return pool, [step.done for step in seen], [step.losses for step in seen]


def test_several_iterations_a_call_make_the_same_images(tmp_path, monkeypatch):
    counts, real = [], noise_pool.compile_step

    def counting(*arguments, count, **options):
        counts.append(count)
        return real(*arguments, count=count, **options)

    monkeypatch.setattr(noise_pool, "compile_step", counting)
    monkeypatch.setattr(noise_pool, "_REPORT_EVERY", 5)
    made = [synthesize(tmp_path / str(most), most, noise_iterations=12) for most in (1, 5)]
    assert counts == [1, 4]
    (single, reports, losses), (several, fewer_reports, same_losses) = made
    assert reports == [5, 10, 12]
    assert fewer_reports == [8, 12]
    assert losses[-1] == pytest.approx(same_losses[-1], rel=1e-4)
    np.testing.assert_array_equal(single.labels, several.labels)
    np.testing.assert_allclose(single.images, several.images, atol=1e-4)


def test_a_divergence_inside_a_call_names_its_iteration(tmp_path):
    found = []
    for most in (1, 6):
        with pytest.raises(TrainingDiverged) as raised:
            synthesize(tmp_path / str(most), most, noise_iterations=6, noise_learning_rate=1e30)
        found.append(str(raised.value))
    assert "iteration 1:" in found[0]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("iterations", "most", "count"),
    [(125, 20, 5), (250, 20, 10), (4000, 50, 50), (1000, 1, 1), (7, 5, 1), (3, 20, 3)],
)
def test_every_call_runs_equally_many_iterations(iterations, most, count):
    assert iterations_per_call(iterations, most) == count
