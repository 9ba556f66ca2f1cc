"""The README's port of a user's own Flax model, run as it stands there."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from lrq_jax.passes import QuantSpec, Student, calibrate, student_forward
from lrq_jax.passes.float_forward import float_logits
from lrq_jax.readers import load_teacher

pytestmark = pytest.mark.usefixtures("quick_compilation")

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Your own Flax model")[2].partition("\n## ")[0]
LINEN, NNX = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


@pytest.fixture
def readme(tmp_path, monkeypatch):
    """Names of the README's first snippet, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(LINEN, "README.md", "exec"), names)
    return names


def random_like(tree, rng):
    """Weights and statistics unlike the fresh ones, for which a batch norm does nothing."""

    def make(path, leaf):
        spread = str(path[-1].key) in ("var", "scale")
        values = rng.uniform(0.3, 1.5, leaf.shape) if spread else 0.3 * rng.normal(size=leaf.shape)
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(make, jax.device_get(tree))


def test_the_port_computes_what_linen_does(readme, rng):
    variables = random_like(readme["variables"], rng)
    teacher = dataclasses.replace(readme["teacher"], variables=variables)
    x = rng.normal(size=(3, 32, 32, 3)).astype(np.float32)
    expected = readme["CNN"]().apply(variables, x)
    found = float_logits(teacher.graph, teacher.variables, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    loaded = load_teacher("teachers/cnn")
    np.testing.assert_array_equal(
        loaded.variables["params"]["conv2"]["kernel"],
        readme["variables"]["params"]["conv2"]["kernel"],
    )


class NnxCNN(nnx.Module):
    """The README's model in nnx."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 16, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(32, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        return self.head(nnx.relu(self.bn2(self.conv2(x))).mean((1, 2)))


def test_variables_of_nnx_fit_the_same_port(readme, rng):
    model = NnxCNN(nnx.Rngs(0))
    names = {"nnx": nnx, "model": model}
    exec(compile(NNX, "README.md", "exec"), names)
    variables = random_like(names["variables"], rng)
    state = {**variables["params"]}
    for layer, statistics in variables["batch_stats"].items():
        state[layer] = {**state[layer], **statistics}
    for path, value in flatten_dict(state).items():
        setattr(
            getattr(model, path[0]), path[1], type(getattr(getattr(model, path[0]), path[1]))(value)
        )
    teacher = dataclasses.replace(readme["teacher"], variables=variables)
    x = rng.normal(size=(3, 32, 32, 3)).astype(np.float32)
    found = float_logits(teacher.graph, teacher.variables, x)
    np.testing.assert_allclose(found, model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("placement", ["integer", "paper"])
def test_the_ported_model_is_quantized(readme, rng, placement):
    # The command the README ends with takes minutes to compile: here its student alone.
    variables = random_like(readme["variables"], rng)
    graph = readme["teacher"].graph
    x = rng.uniform(-2, 2, (8, 32, 32, 3)).astype(np.float32)
    expected = float_logits(graph, variables, x)
    errors = []
    for bits in (4, 8):
        spec = QuantSpec(weight_bits=bits, act_bits=bits, placement=placement)
        student = Student(graph=graph, spec=spec, input_range=(-2.0, 2.0))
        _, ranged = calibrate(student, student.initial_variables(variables), x)
        found = student_forward(student, ranged, x, (graph.output,))[graph.output]
        errors.append(float(np.abs(found - expected).max() / np.abs(expected).max()))
    assert errors[1] < 0.05
    assert errors[1] < errors[0] < 0.6
