"""The `paper` placement against the lineage's formulas written out in numpy; what it stores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrq_jax.graph import GraphBuilder
from lrq_jax.graph import layers as L
from lrq_jax.passes import QuantSpec, Student, calibrate, student_forward
from lrq_jax.passes.float_forward import apply_layer
from lrq_jax.passes.student import paper_weight_codes

f32 = np.float32


def residual_network():
    net = GraphBuilder("residual", input_shape=(8, 8, 3))
    x = net.relu(net.batch_norm(net.conv(net.image, 6, 3, name="first")))
    y = net.batch_norm(net.conv(x, 6, 3, use_bias=True, groups=6))
    x = net.relu6(net.add(net.batch_norm(net.conv(y, 6, 1)), x))
    net.dense(net.global_pool(net.max_pool(x, 2)), 5, name="last")
    return net.build()


@pytest.fixture
def variables():
    rng = np.random.default_rng(0)
    draw = {
        "kernel": lambda shape: rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1])),
        "var": lambda shape: rng.uniform(0.3, 2, size=shape),
        "scale": lambda shape: rng.normal(size=shape) + 1,
    }
    return {
        collection: {
            layer: {
                name: jnp.asarray(draw.get(name, lambda s: rng.normal(size=s))(shape), jnp.float32)
                for name, shape in shapes.items()
            }
            for layer, shapes in layers.items()
        }
        for collection, layers in residual_network().variable_shapes().items()
    }


def images(seed, batch=16):
    return jax.random.normal(jax.random.key(seed), (batch, 8, 8, 3))


def lineage(x, low, high, bits):
    """method: n, S, Z, q and w_hat, in float32 as the lineage computes them; and S*x - Z."""
    n = f32(2**bits - 1)
    scale = n / np.maximum(f32(high) - f32(low), f32(1e-8))
    offset = np.round(scale * f32(low)) + f32(2 ** (bits - 1))
    value = scale * x - offset
    codes = np.clip(np.round(value), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes + offset) / scale, value


def expected_bits(name, policy, bits):
    edge = policy == "R" and name in ("first", "last")
    return 7 if edge else bits


@pytest.mark.parametrize("policy", ["U", "R"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_layer_of_the_paper_placement_equals_the_formulas(variables, bits, policy):
    graph = residual_network()
    spec = QuantSpec(weight_bits=bits, act_bits=bits, policy=policy, placement="paper")
    student = Student(graph=graph, spec=spec, input_range=(-2.0, 2.0))
    state = student.initial_variables(variables)
    for seed in range(3):
        _, state = calibrate(student, state, images(seed))
    names = [layer.name for layer in graph.layers]
    x = images(7)
    found = {n: np.asarray(v) for n, v in student_forward(student, state, x, names).items()}
    found["image"] = np.asarray(x)
    quantized = 0
    for layer in graph.layers:
        inputs = [found[name] for name in layer.inputs]
        params = {
            **{k: np.asarray(v) for k, v in variables["params"].get(layer.name, {}).items()},
            **{k: np.asarray(v) for k, v in variables["batch_stats"].get(layer.name, {}).items()},
        }
        if "kernel" in params:
            kernel = params["kernel"]
            rows = kernel.reshape(-1, kernel.shape[-1])  # one range an output channel
            bits_here = expected_bits(layer.name, policy, bits)
            params["kernel"], _ = lineage(kernel, rows.min(0), rows.max(0), bits_here)
        plain = np.asarray(apply_layer(layer, params, *inputs))
        if isinstance(layer, L.Activation):
            limits = state["quant"]["activations"][layer.name]
            plain, value = lineage(plain, limits["low"], limits["high"], bits)
            # Two roundings of one float32 product may differ at a tie between codes.
            sure = np.abs(value - np.floor(value) - 0.5) > 1e-3
            assert sure.mean() > 0.98
            np.testing.assert_allclose(found[layer.name][sure], plain[sure], rtol=1e-6, atol=1e-6)
            assert len(np.unique(found[layer.name])) <= 2**bits
            quantized += 1
        else:
            np.testing.assert_allclose(found[layer.name], plain, rtol=1e-4, atol=1e-4)
    assert quantized == 2
    assert set(state["quant"]["activations"]) == {"relu0", "relu60"}


def test_ranges_of_the_paper_placement_are_the_running_average_of_batches(variables):
    """0.9 of what was, 0.1 of the batch's own minimum and maximum, from the first batch on."""
    graph = residual_network()
    spec = QuantSpec(weight_bits=8, act_bits=8, placement="paper")
    student = Student(graph=graph, spec=spec, input_range=(-2.0, 2.0))
    state, expected = student.initial_variables(variables), None
    for seed in range(4):
        _, state = calibrate(student, state, images(seed))
        kernel = np.asarray(variables["params"]["first"]["kernel"])
        rows = kernel.reshape(-1, kernel.shape[-1])
        quantized, _ = lineage(kernel, rows.min(0), rows.max(0), 8)
        x = apply_layer(graph.by_name["first"], {"kernel": quantized}, images(seed))
        norm = {**variables["params"]["bn0"], **variables["batch_stats"]["bn0"]}
        x = np.maximum(np.asarray(apply_layer(graph.by_name["bn0"], norm, x)), 0)
        batch = np.array([x.min(), x.max()])
        expected = batch if expected is None else 0.9 * expected + 0.1 * batch
        limits = state["quant"]["activations"]["relu0"]
        found = [float(limits["low"]), float(limits["high"])]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert int(state["quant"]["updates"]) == 4


@pytest.mark.parametrize("clip_mask", [False, True])
def test_gradients_pass_straight_through_both_quantizers(variables, clip_mask):
    """With one quantized activation between two linear layers, the kernel's gradient is that of
    the network with both roundings taken out; masked where the activation saturates."""
    net = GraphBuilder("line", input_shape=(4, 4, 3))
    x = net.relu(net.conv(net.image, 4, 3, name="first"), name="relu")
    net.dense(net.flatten(x), 3, use_bias=False, name="last")
    graph = net.build()
    rng = np.random.default_rng(3)
    params = {
        name: {"kernel": jnp.asarray(rng.normal(size=v["kernel"]), jnp.float32)}
        for name, v in graph.variable_shapes()["params"].items()
    }
    spec = QuantSpec(weight_bits=3, act_bits=3, placement="paper", clip_mask=clip_mask)
    student = Student(graph=graph, spec=spec, input_range=(-2.0, 2.0))
    state = student.initial_variables({"params": params, "batch_stats": {}})
    high = 4.0
    state["quant"]["activations"]["relu"] = {"low": jnp.float32(0), "high": jnp.float32(high)}
    x = jax.random.normal(jax.random.key(1), (5, 4, 4, 3))
    weights = rng.normal(size=(5, 3)).astype(f32)

    def loss(kernel):
        new = {**params, "first": {"kernel": kernel}}
        out = student_forward(student, {**state, "params": new}, x, (graph.output,))
        return jnp.sum(out[graph.output] * weights)

    found = np.asarray(jax.grad(loss)(params["first"]["kernel"]))

    def quantized(name):
        kernel = np.asarray(params[name]["kernel"])
        rows = kernel.reshape(-1, kernel.shape[-1])
        return lineage(kernel, rows.min(0), rows.max(0), 3)[0]

    hidden = apply_layer(graph.by_name["first"], {"kernel": quantized("first")}, x)
    passes = np.asarray(hidden) > 0
    saturated = np.asarray(hidden) > high
    assert saturated.any()
    if clip_mask:
        passes = passes & ~saturated
    upstream = (weights @ quantized("last").T).reshape(hidden.shape) * passes
    padded = np.pad(np.asarray(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.stack(
        [
            [
                np.einsum("bhwc,bhwf->cf", padded[:, i : i + 4, j : j + 4], upstream)
                for j in range(3)
            ]
            for i in range(3)
        ]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_stored_codes_are_the_kernels_the_forward_uses(variables, bits):
    graph = residual_network()
    spec = QuantSpec(weight_bits=bits, act_bits=4, placement="paper")
    student = Student(graph=graph, spec=spec, input_range=(-2.0, 2.0))
    stored = paper_weight_codes(student, student.initial_variables(variables))
    assert set(stored) == {layer.name for layer in graph.weighted}
    for name, entry in stored.items():
        kernel = np.asarray(variables["params"][name]["kernel"])
        rows = kernel.reshape(-1, kernel.shape[-1])
        expected, _ = lineage(kernel, rows.min(0), rows.max(0), bits)
        codes = np.asarray(entry["codes"])
        assert codes.dtype == np.uint8
        assert codes.max() == 2**bits - 1
        assert codes.min() == 0
        real = (codes.astype(f32) - 2 ** (bits - 1) + np.asarray(entry["offset"])) / np.asarray(
            entry["scale"]
        )
        np.testing.assert_allclose(real, expected, rtol=1e-6, atol=1e-7)
