"""The integer network over int8 convolutions, and over several devices: the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small_networks import calibrated, random_images

from lrq_jax.graph import GraphBuilder
from lrq_jax.ops.convolution import int8_conv2d, int8_is_fast
from lrq_jax.passes import frozen_logits, integer_forward, student_forward


def wide_like():
    """Convolutions of enough channels for int8: strided, dilated, behind tensors of 8 bits."""
    net = GraphBuilder("wide_like", input_shape=(8, 8, 3))
    x = net.relu(net.batch_norm(net.conv(net.image, 20, 3)))
    y = net.relu(net.batch_norm(net.conv(x, 24, 3, strides=2, dilation=2)))
    y = net.batch_norm(net.conv(y, 20, 1))
    x = net.add(y, net.conv(x, 20, 1, strides=2))
    x = net.relu(net.batch_norm(net.conv(x, 18, 3, use_bias=True)))
    net.dense(net.global_pool(x), 5, name="classifier")
    return net.build()


@pytest.mark.parametrize("bits", [2, 7, 8])
@pytest.mark.parametrize("zero", [0.0, 0.4, 1.0])
def test_int8_sums_are_exact(bits, zero, rng, naive_conv2d):
    """At the largest sums there are, which float32 could not hold."""
    top = 2**bits - 1
    zero_point = np.float32(round(zero * top))
    codes = rng.choice([0, top], (3, 6, 7, 192)).astype(np.float32)
    codes[0], codes[1] = 0, top
    kernel = rng.choice([-127, 127], (3, 3, 192, 20)).astype(np.float32)
    kernel[..., 0], kernel[..., 1] = 127, -127
    bias = rng.integers(-(2**23), 2**23, 20).astype(np.float32)
    window = {"strides": (2, 1), "padding": ((1, 2), (2, 0)), "dilation": (1, 2)}
    exact = naive_conv2d((codes - zero_point).astype(np.int64), kernel.astype(np.int64), **window)
    expected = (exact + bias.astype(np.int64)).astype(np.float32)
    if bits == 8:
        assert abs(exact).max() > 2**24
    found = functools.partial(int8_conv2d, bits=bits, **window)
    arguments = codes, zero_point, kernel, bias
    np.testing.assert_array_equal(found(*arguments), expected)
    np.testing.assert_array_equal(jax.jit(found)(*arguments), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_int8_changes_no_logit(bits, monkeypatch):
    student, _, frozen = calibrated(wide_like, bits)
    images = random_images(7)
    found = jax.jit(frozen_logits, static_argnums=0)(student, frozen, images)
    monkeypatch.setattr(integer_forward, "int8_is_fast", lambda kernel, groups: False)
    over_floats = jax.jit(lambda f, x: frozen_logits(student, f, x))(frozen, images)
    np.testing.assert_array_equal(found, over_floats)
    assert len(np.unique(found, axis=0)) == len(images)


def test_int8_where_it_is_fast_and_nowhere_else():
    student, variables, frozen = calibrated(wide_like, 4)
    images = random_images(7)

    def convolutions(function, *arguments, platform):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
        lines = [x for x in lowered.as_text().splitlines() if "stablehlo.convolution" in x]
        return ["i8>" in line for line in lines]

    def logits(frozen, images):
        return frozen_logits(student, frozen, images)

    assert sum(convolutions(logits, frozen, images, platform="cpu")) == 4  # all but the image's
    assert not convolutions(logits, frozen, images, platform="cuda")  # matrix products
    found = convolutions(logits, frozen, images, platform="tpu")
    assert found
    assert not any(found)

    def training(variables, images):
        return student_forward(student, variables, images, (student.graph.output,))

    assert not any(convolutions(training, variables, images, platform="cpu"))
    assert not int8_is_fast(jnp.zeros((3, 3, 3, 64)), 1)
    assert not int8_is_fast(jnp.zeros((3, 3, 64, 16)), 1)
    assert not int8_is_fast(jnp.zeros((3, 3, 1, 64)), 64)


@pytest.mark.parametrize("bits", [4, 8])
def test_eight_devices_give_the_logits_of_one(bits):
    student, _, frozen = calibrated(wide_like, bits)
    images = random_images(7, batch=16)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    logits = jax.jit(lambda frozen, images: frozen_logits(student, frozen, images))
    one = np.asarray(logits(frozen, images))
    spread = jax.device_put(images, NamedSharding(mesh, P("data")))
    copied = jax.device_put(frozen, NamedSharding(mesh, P()))
    eight = logits(copied, spread)
    assert len(eight.sharding.device_set) == 8
    np.testing.assert_array_equal(one, eight)
