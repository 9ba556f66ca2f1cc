"""The integer network against a second one in numpy int64, and the properties it must have."""

import functools
from fractions import Fraction
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from lrq_jax.graph import INPUT, GraphBuilder
from lrq_jax.graph import layers as L
from lrq_jax.passes import QuantSpec, Student, calibrate, freeze
from lrq_jax.passes.integer_forward import integer_forward

f32 = np.float32


# --- networks and random variables ---------------------------------------------------------------


def resnet_like():
    net = GraphBuilder("resnet_like", input_shape=(8, 8, 3))
    x = net.relu(net.batch_norm(net.conv(net.image, 4, 3)))
    y = net.relu(net.batch_norm(net.conv(x, 4, 3)))
    y = net.batch_norm(net.conv(y, 4, 3))
    x = net.relu(net.add(x, y))
    y = net.relu(net.batch_norm(net.conv(x, 6, 3, strides=2)))
    y = net.batch_norm(net.conv(y, 6, 3, use_bias=True))
    x = net.relu(net.add(y, net.batch_norm(net.conv(x, 6, 1, strides=2))))
    y = net.relu(net.batch_norm(net.conv(x, 8, 3, strides=2)))
    y = net.batch_norm(net.conv(y, 8, 3))
    x = net.relu(net.add(y, net.pad(net.slice(x, step=(2, 2, 1)), channels=(1, 1))))
    net.dense(net.global_pool(x), 5, name="classifier")
    return net.build()


def mobilenet_like():
    net = GraphBuilder("mobilenet_like", input_shape=(8, 8, 3))
    x = net.relu6(net.batch_norm(net.conv(net.image, 4, 3, strides=2, padding="tf_same")))
    for strides, features in ((1, 4), (2, 6)):
        channels = 3 * net.shape(x)[-1]
        y = net.relu6(net.batch_norm(net.conv(x, channels, 1)))
        y = net.conv(y, channels, 3, strides=strides, groups=channels)
        y = net.batch_norm(net.conv(net.relu6(net.batch_norm(y)), features, 1))
        x = net.add(x, y) if net.shape(x) == net.shape(y) else y
    x = net.relu6(net.batch_norm(net.conv(x, 8, 1)))
    net.dense(net.global_pool(x), 5, name="classifier")
    return net.build()


def vgg_like():
    net = GraphBuilder("vgg_like", input_shape=(8, 8, 3))
    x = net.relu(net.conv(net.image, 5, 3, use_bias=True))
    x = net.max_pool(x, 2)
    x = net.relu(net.batch_norm(net.conv(x, 6, 3, use_bias=True, groups=1, dilation=2)))
    x = net.max_pool(x, 3, strides=2, padding=1)
    x = net.relu(net.dense(net.flatten(x), 7, use_bias=False))
    net.dense(x, 5, name="classifier")
    return net.build()


def concat_like():
    """Pre-activation batch norms, concatenation, average pools, a grouped convolution."""
    net = GraphBuilder("concat_like", input_shape=(8, 8, 3))
    x = net.conv(net.image, 4, 3)
    y = net.conv(net.relu(net.batch_norm(x)), 4, 3, groups=2)
    x = net.concat(x, y, net.avg_pool(x, 3, strides=1, padding=1, count_include_pad=False))
    x = net.batch_norm(x, affine=False)
    x = net.avg_pool(x, 3, strides=2, padding=1)
    x = net.relu(net.batch_norm(net.add(x, x)))
    net.dense(net.global_pool(x), 5, name="classifier")
    return net.build()


def leaky_like():
    net = GraphBuilder("leaky_like", input_shape=(8, 8, 3))
    x = net.activation(net.batch_norm(net.conv(net.image, 4, 3)), "leaky_relu", negative_slope=0.1)
    y = net.conv(x, 4, 3, use_bias=True)
    y = net.activation(net.add(x, y), "leaky_relu", negative_slope=0.2)
    y = net.relu(net.max_pool(y, 3, strides=1, padding=1))
    net.dense(net.batch_norm(net.dense(net.flatten(y), 6)), 5, name="classifier")
    return net.build()


def long_sums():
    """Sums of 1,152 and 2,048 products: beyond 2^24 at W8A8."""
    net = GraphBuilder("long_sums", input_shape=(8, 8, 3))
    x = net.relu(net.conv(net.image, 128, 3, strides=2, use_bias=True))
    x = net.relu(net.conv(x, 128, 3, use_bias=True))
    x = net.relu(net.conv(x, 8, 3, groups=2, padding=0))
    net.dense(net.flatten(x), 5, name="classifier")
    return net.build()


GRAPHS = (resnet_like, mobilenet_like, vgg_like, concat_like, leaky_like)


def random_variables(graph, seed=0, *, positive=False):
    """Any weights, statistics as training never makes them: half the gammas negative, one 0."""
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        if name == "kernel":
            values = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1]))
            return np.abs(values) if positive else values
        if name == "var":
            return rng.uniform(0.2, 3, size=shape)
        values = rng.normal(size=shape) * 0.5
        if name == "scale":
            values = rng.uniform(0.2, 1.5, size=shape) * rng.choice([-1, 1], size=shape)
            values[rng.integers(shape[0])] = 0
        return values

    return {
        collection: {
            layer: {name: jnp.asarray(draw(name, shape), jnp.float32) for name, shape in v.items()}
            for layer, v in layers.items()
        }
        for collection, layers in graph.variable_shapes().items()
    }


def random_images(seed, batch=3):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.uniform(-2.1, 2.6, size=(batch, 8, 8, 3)), jnp.float32)


@functools.cache
def calibrated(build, bits, policy="U", *, positive=False):
    """A student with ranges from two batches, its variables and its frozen integers."""
    graph = build()
    spec = QuantSpec(weight_bits=bits, act_bits=bits, policy=policy)
    student = Student(graph=graph, spec=spec, input_range=(-2.0, 2.5))
    variables = student.initial_variables(random_variables(graph, positive=positive))
    for seed in (1, 2):
        _, variables = calibrate(student, variables, random_images(seed, 8))
    return student, variables, freeze(student, variables)


# --- the second version --------------------------------------------------------------------------


def correct_fma(code, factor, addend):
    """`code*factor + addend` rounded once to float32: the exact product in float64, the sum
    rounded to odd there, so that the second rounding cannot go wrong."""
    product = np.asarray(code, np.float64) * np.asarray(factor, np.float64)
    product, addend = np.broadcast_arrays(product, np.asarray(addend, np.float64))
    total = product + addend
    tail = total - product
    error = (product - (total - tail)) + (addend - tail)
    bits = np.atleast_1d(total).view(np.int64).reshape(total.shape)
    step = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where((error != 0) & (bits % 2 == 0), bits + step, bits)
    return np.atleast_1d(odd).view(np.float64).reshape(total.shape).astype(f32)


def nearest_float32(value):
    """Float32 nearest to an exact fraction, half to even, by trying the neighbours."""
    guess = f32(float(value))
    tries = [np.nextafter(guess, f32(-np.inf)), guess, np.nextafter(guess, f32(np.inf))]
    distance = [abs(Fraction(float(t)) - value) for t in tries]
    best = [t for t, d in zip(tries, distance, strict=True) if d == min(distance)]
    return next((t for t in best if t.view(np.int32) % 2 == 0), best[0])


class Codes(NamedTuple):
    codes: np.ndarray  # int64
    scale: np.float32
    zero: int
    bits: int

    @property
    def centred(self):
        return self.codes - self.zero

    @property
    def real(self):
        return self.centred.astype(f32) * self.scale


def naive_windows(x, size, strides, padding, dilation, fill):
    """`[B, H', W', kh, kw, C]`: every window of a padded integer image."""
    x = np.pad(x, ((0, 0), *padding, (0, 0)), constant_values=fill)
    height, width = (
        (x.shape[1 + a] - dilation[a] * (size[a] - 1) - 1) // strides[a] + 1 for a in range(2)
    )
    out = np.empty((x.shape[0], height, width, *size, x.shape[3]), x.dtype)
    for i in range(height):
        for j in range(width):
            top, left = i * strides[0], j * strides[1]
            out[:, i, j] = x[
                :,
                top : top + dilation[0] * (size[0] - 1) + 1 : dilation[0],
                left : left + dilation[1] * (size[1] - 1) + 1 : dilation[1],
            ]
    return out


def naive_sums(layer, x, kernel):
    """int64 accumulators of a weighted layer."""
    if isinstance(layer, L.Dense):
        return x @ kernel
    if isinstance(layer, L.BatchNorm):
        return x * kernel
    windows = naive_windows(x, layer.kernel_size, layer.strides, layer.padding, layer.dilation, 0)
    ins, outs = kernel.shape[2], kernel.shape[3] // layer.groups
    return np.concatenate(
        [
            np.einsum(
                "bhwijc,ijcf->bhwf",
                windows[..., g * ins : (g + 1) * ins],
                kernel[..., g * outs : (g + 1) * outs],
                optimize=True,
            )
            for g in range(layer.groups)
        ],
        axis=-1,
    )


def naive_operation(operation, frozen, inputs):
    """One operation, as section 2 of the deployment notes writes it."""
    layer, bits, x = operation.layer, operation.output_bits, inputs[0]
    if isinstance(layer, L.MaxPool) and not isinstance(layer, L.AvgPool):
        windows = naive_windows(x.codes, layer.window, layer.strides, layer.padding, (1, 1), -1)
        return x._replace(codes=windows.max((3, 4)))
    if isinstance(layer, L.Pad):
        amounts = ((0, 0), layer.height, layer.width, layer.channels)
        return x._replace(codes=np.pad(x.codes, amounts, constant_values=x.zero))
    if isinstance(layer, L.Slice):
        return x._replace(codes=x.codes[(slice(None), *layer.slices)])
    if isinstance(layer, L.Flatten):
        return x._replace(codes=x.codes.reshape(len(x.codes), -1))

    if bits is not None:
        scale = f32(frozen["tensors"][operation.output].scale)
        zero = int(frozen["tensors"][operation.output].zero_point)

    def requantized(value):
        assert value.dtype == f32
        inner = np.rint(np.clip(value, f32(-zero), f32(255 - zero))).astype(np.int64) + zero
        return Codes(np.clip(inner, 0, 2**bits - 1), scale, zero, bits)

    if operation.has_weights:
        weights = [np.asarray(value) for value in frozen["weights"][layer.name]]
        codes, weight_zero, bias = (weights[i].astype(np.int64) for i in (0, 1, 3))
        total = naive_sums(layer, x.centred, codes - weight_zero) + bias
        assert np.abs(total).max() < 2**31, "int32 would overflow"
        total, units = total.astype(f32), x.scale * weights[2]
        return total * units if bits is None else requantized(total * (units / scale))
    if isinstance(layer, L.Add):
        y = inputs[1]
        ratio_a, ratio_b = x.scale / scale, y.scale / scale
        offset = f32(zero) - correct_fma(x.zero, ratio_a, ratio_b * f32(y.zero))
        value = correct_fma(x.codes, ratio_a, correct_fma(y.codes, ratio_b, offset))
        codes = np.clip(np.rint(value), 0, 2**bits - 1).astype(np.int64)
        return Codes(codes, scale, zero, bits)
    if isinstance(layer, L.GlobalPool):
        count = f32(x.codes.shape[1] * x.codes.shape[2])
        total = x.centred.sum((1, 2)).astype(f32)
        return requantized(total * (x.scale / (scale * count)))
    if isinstance(layer, L.AvgPool):
        window = (layer.window, layer.strides, layer.padding, (1, 1))
        total = naive_windows(x.centred, *window, 0).sum((3, 4)).astype(f32)
        ones = np.ones_like(x.codes[:1, :, :, :1])
        inside = naive_windows(ones, *window, 1 if layer.count_include_pad else 0)
        count = inside.sum((3, 4)).astype(f32)
        return requantized(total * (x.scale / (scale * count)))
    if isinstance(layer, L.Activation):
        real = x.real
        real = np.where(real < 0, f32(0), real) if layer.kind == "relu" else np.where(
            real < 0, real * f32(layer.negative_slope), real
        )  # fmt: skip
        return requantized(real / scale)
    assert isinstance(layer, L.Concat)
    return requantized(np.concatenate([t.real for t in inputs], -1) / scale)


def naive_network(student, frozen, images):
    """Every tensor of a frozen integer network: Codes, and float32 logits."""
    scale, zero = (np.asarray(v) for v in frozen["tensors"][INPUT])
    codes = np.rint(np.asarray(images) / scale) + zero
    values = {INPUT: Codes(np.clip(codes, 0, 255).astype(np.int64), f32(scale), int(zero), 8)}
    for operation in student.operations:
        inputs = [values[name] for name in operation.inputs]
        values[operation.output] = naive_operation(operation, frozen, inputs)
    return values


def all_tensors(student, frozen, images):
    """The same of `integer_forward`, every tensor in real units."""
    names = tuple(operation.output for operation in student.operations)
    bits = student.spec.boundary_bits
    return integer_forward(student.operations, frozen, images, names, input_bits=bits)


def assert_same(student, found, expected):
    for operation in student.operations:
        want = expected[operation.output]
        want = want.real if isinstance(want, Codes) else want
        got = np.asarray(found[operation.output])
        np.testing.assert_array_equal(got, want, err_msg=f"{operation.output}: {operation.layer}")
        assert got.dtype == f32


# --- identical codes -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["U", "R"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("build", GRAPHS)
def test_every_tensor_equals_the_naive_network(build, bits, policy):
    student, _, frozen = calibrated(build, bits, policy)
    images = random_images(3, 16)
    assert_same(
        student, all_tensors(student, frozen, images), naive_network(student, frozen, images)
    )
