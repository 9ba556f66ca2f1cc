"""An export is read where it was not made: other devices, and none of the training code."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small_networks import calibrated, random_images, resnet_like
from test_export import PREPROCESSING, RUN_REPORT

from lrq_jax import export
from lrq_jax.runtimes import Reference
from lrq_jax.writers.codes import save_student

READ = """
import json, sys
import jax, numpy as np
import lrq_jax.evaluate
from lrq_jax.runtimes import Reference

directory, images, out = sys.argv[1:]
np.save(out, Reference.load(directory).logits(np.load(images)))
print(json.dumps({"devices": jax.device_count(), "modules": sorted(sys.modules)}))
"""


def assert_no_training_code(modules):
    training = {"training", "synthesis", "losses", "method", "config", "quantize", "export"}
    loaded = {name.split(".")[1] for name in modules if name.startswith("lrq_jax.")}
    assert not loaded & training
    assert {"runtimes", "writers", "passes"} <= loaded
    assert not {"optax", "flax", "ml_collections", "tensorflow", "torch"} & set(modules)


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_a_command_for_exports_loads_no_training_code(command):
    code = f"import json, sys, lrq_jax.{command}; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
    assert_no_training_code(json.loads(result.stdout.splitlines()[-1]))


def test_a_student_of_eight_devices_is_read_on_three_without_training_code(tmp_path):
    student, variables, _ = calibrated(resnet_like, 4)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(variables, NamedSharding(mesh, P()))
    run = tmp_path / "run"
    save_student(run / "student", student, spread, preprocessing=PREPROCESSING, provenance={})
    (run / "report.json").write_text(json.dumps(RUN_REPORT))
    export.export_student(run, tmp_path / "out", targets=("orbax",))
    np.save(tmp_path / "images.npy", random_images(5))
    arguments = [tmp_path / "out" / "student", tmp_path / "images.npy", tmp_path / "logits.npy"]
    result = subprocess.run(
        [sys.executable, "-c", READ, *map(str, arguments)],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=3"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    assert said["devices"] == 3
    assert jax.device_count() == 8
    assert_no_training_code(said["modules"])
    ours = Reference.load(tmp_path / "out" / "student").logits(np.asarray(random_images(5)))
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), ours)
