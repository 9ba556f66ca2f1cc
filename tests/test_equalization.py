"""Statistics-only corrections: tensor moments, bias correction, cross-layer equalization."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import (
    GRAPHS,
    mobilenet_like,
    random_images,
    random_variables,
    resnet_like,
)

from lrq_jax.graph import GraphBuilder
from lrq_jax.graph import layers as L
from lrq_jax.passes import QuantSpec, Student, float_forward, float_logits
from lrq_jax.passes.bias_correction import bias_corrected, expected_output
from lrq_jax.passes.equalization import equalized
from lrq_jax.passes.moments import clipped_normal, tensor_moments
from lrq_jax.quantizers.affine import dequantize, quantize_weight, weight_parameters

pytestmark = pytest.mark.usefixtures("quick_compilation")


def with_true_statistics(graph, variables, images):
    """The variables with each batch norm's statistics those of what it reads."""
    stats = dict(variables["batch_stats"])
    for layer in graph.batch_norms:
        (tap,) = layer.inputs
        values = float_forward(graph, {**variables, "batch_stats": stats}, images, (tap,))[tap]
        axes = tuple(range(values.ndim - 1))
        stats[layer.name] = {"mean": values.mean(axes), "var": values.var(axes)}
    return {**variables, "batch_stats": stats}


@pytest.mark.parametrize("high", [6.0, np.inf])
def test_moments_of_a_clipped_normal_equal_those_of_samples(high, rng):
    mean, variance = np.array([-2.0, 0.0, 1.0, 5.0, 9.0]), np.array([1.0, 4.0, 0.01, 2.0, 9.0])
    samples = np.clip(rng.normal(size=(400_000, 5)) * np.sqrt(variance) + mean, 0, high)
    found = clipped_normal(jnp.float32(mean), jnp.float32(variance), 0.0, high)
    np.testing.assert_allclose(found.mean, samples.mean(0), atol=0.02)
    np.testing.assert_allclose(found.variance, samples.var(0), rtol=0.03, atol=1e-3)


def test_moments_follow_the_graph():
    graph = resnet_like()
    variables = random_variables(graph)
    moments = tensor_moments(graph, variables)
    entry, stats = variables["params"]["bn0"], variables["batch_stats"]["bn0"]
    np.testing.assert_allclose(moments["bn0"].mean, entry["bias"], atol=1e-5)
    share = stats["var"] / (stats["var"] + 1e-5)
    np.testing.assert_allclose(moments["bn0"].variance, entry["scale"] ** 2 * share, atol=1e-5)
    both = [moments[name] for name in graph.by_name["add0"].inputs]
    np.testing.assert_allclose(moments["add0"].mean, both[0].mean + both[1].mean, rtol=1e-6)
    np.testing.assert_allclose(
        moments["add0"].variance, both[0].variance + both[1].variance, rtol=1e-6
    )
    assert "conv0" not in moments
    assert graph.features in moments


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_expected_output_equals_a_convolution_of_the_mean(groups, naive_conv2d, rng):
    layer = L.Conv(name="c", inputs=("x",), features=8, kernel_size=(3, 3), groups=groups)
    kernel, mean = rng.normal(size=(3, 3, 4 // groups, 8)), rng.normal(size=4)
    constant = np.broadcast_to(mean, (1, 3, 3, 4))
    expected = naive_conv2d(constant, kernel, groups=groups)[0, 0, 0]
    found = expected_output(layer, jnp.float32(kernel), jnp.float32(mean))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_bias_correction_takes_the_mean_error_out():
    """Two layers whose input's mean is known exactly: one with a batch norm, one with a bias."""
    net = GraphBuilder("line", input_shape=(8, 8, 3))
    x = net.batch_norm(net.conv(net.image, 6, 3), name="known")
    y = net.batch_norm(net.conv(x, 5, 1, name="normed"), name="after")
    net.dense(net.global_pool(y), 4, name="biased")
    graph = net.build()
    images = random_images(3, batch=64)
    teacher = with_true_statistics(graph, random_variables(graph), images)
    spec = QuantSpec(weight_bits=2)
    student = Student(graph=graph, spec=spec, input_range=(-2.0, 2.5))
    before = student.initial_variables(teacher)
    after = bias_corrected(student, before, teacher)
    assert after["params"]["normed"] is before["params"]["normed"]

    def error(variables, name, taps):
        """Mean over images of the quantized layer's output less the float one's, per channel."""
        kernel = teacher["params"][taps]["kernel"]
        parameters = weight_parameters(
            kernel.min(tuple(range(kernel.ndim - 1))), kernel.max(tuple(range(kernel.ndim - 1))), 2
        )
        coarse = dequantize(quantize_weight(kernel, parameters, 2), parameters)
        params = {**variables["params"], taps: {**variables["params"][taps], "kernel": coarse}}
        new = {**variables, "params": params}
        difference = (
            float_forward(graph, new, images, (name,))[name]
            - float_forward(graph, teacher, images, (name,))[name]
        )
        return np.abs(difference.mean(tuple(range(difference.ndim - 1))))

    only = {**before, "batch_stats": after["batch_stats"]}  # the batch norm's alone
    assert error(before, "after", "normed").max() > 0.01
    assert error(only, "after", "normed").max() < 1e-4
    only = {**before, "params": after["params"]}
    assert error(before, "biased", "biased").max() > 0.01
    assert error(only, "biased", "biased").max() < 1e-4


def read_by_batch_norms():
    """A tensor that a convolution reads and a batch norm too, as in networks that activate first."""
    net = GraphBuilder("read", input_shape=(8, 8, 3))
    x = net.relu(net.batch_norm(net.conv(net.image, 6, 3)))
    y = net.relu(net.batch_norm(x, name="reader"))
    y = net.add(net.conv(x, 5, 1), net.conv(y, 5, 3))
    net.dense(net.global_pool(y), 4, name="classifier")
    return net.build()


@pytest.mark.parametrize("build", [*GRAPHS, read_by_batch_norms], ids=lambda build: build.__name__)
def test_equalization_leaves_the_float_network_as_it_was(build):
    graph, images = build(), random_images(4, batch=32)
    variables = with_true_statistics(graph, random_variables(graph), images)
    new = equalized(graph, variables)
    before, after = float_logits(graph, variables, images), float_logits(graph, new, images)
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())
    true = with_true_statistics(graph, new, images)["batch_stats"]  # still those of what is read
    for name, entry in new["batch_stats"].items():
        np.testing.assert_allclose(entry["var"], true[name]["var"], rtol=1e-3, err_msg=name)
        np.testing.assert_allclose(entry["mean"], true[name]["mean"], atol=1e-4, err_msg=name)
    moved = [name for name, entry in new["params"].items()
             if any((entry[k] != variables["params"][name][k]).any() for k in entry)]  # fmt: skip
    assert bool(moved) == (build.__name__ not in ("gated_like", "vgg_like"))


def test_equalization_evens_out_what_a_tensor_holds():
    """Channels of one tensor that depthwise taps read end up of one size, below ReLU6's ceiling."""
    graph, images = mobilenet_like(), random_images(4, batch=32)
    variables = with_true_statistics(graph, random_variables(graph), images)
    name = "bn1"  # of the first expansion, which a depthwise convolution reads
    scale = jnp.geomspace(0.05, 0.8, 12)
    entry = {"scale": scale, "bias": 0.5 * scale}
    variables = {**variables, "params": {**variables["params"], name: entry}}
    new = equalized(graph, variables)
    reach = [np.asarray(tensor_moments(graph, v)["relu61"].reach(3.0)) for v in (variables, new)]
    assert reach[0].max() / reach[0].min() > 10
    assert reach[1].max() / reach[1].min() < 1.5
    assert tensor_moments(graph, new)[name].reach(5.9).max() < 6
