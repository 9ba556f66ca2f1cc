"""Training checkpoints: the latest and the best by training loss, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrq_jax.checkpoints import TrainingCheckpoints
from lrq_jax.sharding import data_mesh, replicated


@pytest.fixture
def mesh():
    return data_mesh(1)


def make_state(value):
    return {
        "kernel": jnp.full((2, 3), value, jnp.float32),
        "step": jnp.int32(value),
        "key": jax.random.key_data(jax.random.key(value)),
        "codes": jnp.arange(4, dtype=jnp.uint8),
    }


def kept(path):
    return sorted(int(entry.name) for entry in path.iterdir() if entry.name.isdigit())


def test_the_latest_and_the_best_are_kept_and_nothing_else(tmp_path, mesh):
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.5, 50: 2.4}
    with TrainingCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step is None
        assert checkpoints.best_step is None
        for step, loss in losses.items():
            checkpoints.save(step, make_state(step), loss)
    assert kept(tmp_path) == [20, 50]
    with TrainingCheckpoints(tmp_path) as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step) == (50, 20)
        for step in (20, 50):
            found = checkpoints.restore(step, make_state(0), mesh)
            np.testing.assert_array_equal(found["kernel"], np.full((2, 3), step))
        checkpoints.save(60, make_state(60), 0.5)
        assert (checkpoints.latest_step, checkpoints.best_step) == (60, 60)
    assert kept(tmp_path) == [60]


def test_steps_before_the_first_student_loss_are_never_the_best(tmp_path):
    with TrainingCheckpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), None)
        assert (checkpoints.latest_step, checkpoints.best_step) == (3, None)
        checkpoints.save(4, make_state(4), 1e30)
        checkpoints.save(5, make_state(5), 1e31)
        assert (checkpoints.latest_step, checkpoints.best_step) == (5, 4)
    assert kept(tmp_path) == [4, 5]


def test_restore_is_bit_exact_and_keeps_types(tmp_path, mesh):
    odd = np.array([0.1, 1e-45, -0.0, np.inf, 3.4e38, 1 / 3], np.float32)  # with a denormal
    state = {
        "odd": jnp.asarray(odd),
        "key": jax.random.key_data(jax.random.key(7)),
        "step": jnp.int32(2**31 - 1),
        "codes": jnp.arange(256, dtype=jnp.uint8),
        "nested": {"half": jnp.asarray([0.1, 65504], jnp.bfloat16)},
    }
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, 1.0)
        # No save under way may see what the donated buffers hold later.
        found = checkpoints.restore(1, state, mesh)
    for saved, read in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
        assert read.dtype == saved.dtype
        assert np.asarray(read).tobytes() == np.asarray(saved).tobytes()
        assert read.sharding.is_equivalent_to(replicated(mesh), read.ndim)


def test_a_save_holds_the_values_of_its_moment(tmp_path, mesh):
    """States are donated to the next step while the save is still under way."""
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + x.dtype.type(1), s), donate_argnums=0)
    state = {"x": jnp.zeros((512, 512), jnp.float32)}
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, 1.0)
        for _ in range(3):
            state = step(state)
        found = checkpoints.restore(1, state, mesh)
    assert not np.any(found["x"])
    assert np.all(np.asarray(state["x"]) == 3)


def test_a_state_restores_onto_other_devices(tmp_path):
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(3, jax.device_put(make_state(3), replicated(data_mesh(1))), 1.0)
    with TrainingCheckpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(3, make_state(0), data_mesh(8))
    assert len(found["kernel"].sharding.device_set) == 8
    np.testing.assert_array_equal(found["kernel"], np.full((2, 3), 3))


def test_the_same_step_is_not_saved_twice(tmp_path, mesh):
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(5, make_state(5), 1.0)
        checkpoints.save(5, make_state(6), 0.5)
        found = checkpoints.restore(5, make_state(0), mesh)
        assert int(found["step"]) == 5
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(5, make_state(7), 0.1)
    assert kept(tmp_path) == [5]


def test_an_earlier_step_is_refused_instead_of_silently_dropped(tmp_path):
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(5, make_state(5), 1.0)
        with pytest.raises(RuntimeError, match=r"step 4: orbax did not save it.*\[5\]"):
            checkpoints.save(4, make_state(4), 0.5)


def test_leaving_waits_for_the_save_under_way(tmp_path, mesh):
    """Leaving by an exception as well: the last good checkpoint is what a person resumes from."""
    state = {"x": jnp.arange(2_000_000, dtype=jnp.float32)}

    def interrupted():
        with TrainingCheckpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state, 1.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with TrainingCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 1
        found = checkpoints.restore(1, state, mesh)
    np.testing.assert_array_equal(found["x"], state["x"])
