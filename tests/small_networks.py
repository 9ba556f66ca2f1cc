"""Small networks that between them hold every layer, with random variables and ranges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lrq_jax.graph import INPUT, GraphBuilder
from lrq_jax.passes import QuantSpec, Student, calibrate, freeze
from lrq_jax.passes.integer_forward import integer_forward
from lrq_jax.writers.codes import frozen_from_codes


def resnet_like():
    net = GraphBuilder("resnet_like", input_shape=(8, 8, 3))
    x = net.relu(net.batch_norm(net.conv(net.image, 4, 3)))
    y = net.relu(net.batch_norm(net.conv(x, 4, 3)))
    y = net.batch_norm(net.conv(y, 4, 3))
    x = net.relu(net.add(x, y))
    y = net.relu(net.batch_norm(net.conv(x, 4, 3)))
    y = net.batch_norm(net.conv(y, 6, 3, strides=2, use_bias=True))
    x = net.relu(net.add(y, net.batch_norm(net.conv(x, 6, 1, strides=2))))
    net.dense(net.global_pool(x), 5, name="classifier")
    return net.build()


def mobilenet_like():
    net = GraphBuilder("mobilenet_like", input_shape=(8, 8, 3))
    x = net.relu6(net.batch_norm(net.conv(net.image, 4, 3, strides=2, padding="tf_same")))
    for strides, features in ((1, 4), (2, 6)):
        y = net.relu6(net.batch_norm(net.conv(x, 12, 1)))
        y = net.conv(y, 12, 3, strides=strides, groups=12)
        y = net.batch_norm(net.conv(net.relu6(net.batch_norm(y)), features, 1))
        x = net.add(x, y) if net.shape(x) == net.shape(y) else y
    net.dense(net.global_pool(x), 5, name="classifier")
    return net.build()


def vgg_like():
    net = GraphBuilder("vgg_like", input_shape=(8, 8, 3))
    x = net.relu(net.conv(net.image, 4, 3, use_bias=True))
    x = net.max_pool(x, 2)
    x = net.relu(net.batch_norm(net.conv(x, 6, 3, use_bias=True, dilation=2)))
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
    x = net.avg_pool(net.batch_norm(x, affine=False), 3, strides=2, padding=1)
    x = net.relu(net.batch_norm(net.add(x, x)))
    net.dense(net.global_pool(x), 5, name="classifier")
    return net.build()


def leaky_like():
    """Leaky and lone ReLUs, a shortcut without weights, dense layers with and without bias."""
    net = GraphBuilder("leaky_like", input_shape=(8, 8, 3))
    x = net.activation(net.batch_norm(net.conv(net.image, 4, 3)), "leaky_relu", negative_slope=0.1)
    y = net.conv(x, 6, 3, strides=2, use_bias=True)
    x = net.pad(net.slice(x, step=(2, 2, 1)), channels=(1, 1))
    x = net.activation(net.add(x, y), "leaky_relu", negative_slope=0.2)
    x = net.relu(net.max_pool(x, 3, strides=1, padding=1))
    net.dense(net.batch_norm(net.dense(net.flatten(x), 6)), 5, name="classifier")
    return net.build()


def gated_like():
    """Squeeze-and-excitation, a channel shuffle, activations that do not clip."""
    net = GraphBuilder("gated_like", input_shape=(8, 8, 3))
    x = net.activation(net.batch_norm(net.conv(net.image, 6, 3)), "hard_swish")
    gate = net.relu(net.conv(net.unflatten(net.global_pool(x)), 4, 1, use_bias=True))
    gate = net.activation(net.conv(gate, 6, 1, use_bias=True), "hard_sigmoid")
    x = net.channel_shuffle(net.multiply(x, gate), 3)
    y = net.activation(net.batch_norm(net.conv(x, 6, 3)), "silu")
    x = net.multiply(y, net.activation(net.conv(x, 6, 1), "sigmoid"))
    net.dense(net.global_pool(x), 5, name="classifier")
    return net.build()


GRAPHS = (resnet_like, mobilenet_like, vgg_like, concat_like, leaky_like, gated_like)


def random_variables(graph, seed=0):
    """Any weights, statistics as training never makes them: half the gammas negative, one 0."""
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        if name == "kernel":
            return rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1]))
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


def random_images(seed, batch=8):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.uniform(-2.1, 2.6, size=(batch, 8, 8, 3)), jnp.float32)


@functools.cache
def calibrated(build, bits, policy="U"):
    """A student with ranges from two batches, its variables and its frozen integers."""
    graph = build()
    spec = QuantSpec(weight_bits=bits, act_bits=bits, policy=policy)
    student = Student(graph=graph, spec=spec, input_range=(-2.0, 2.5))
    variables = student.initial_variables(random_variables(graph))
    for seed in (1, 2):
        _, variables = calibrate(student, variables, random_images(seed))
    return student, variables, freeze(student, variables)


def our_results(student, codes, images):
    """Codes of every tensor and the logits, from the codes as they are stored."""
    frozen = frozen_from_codes(codes)
    names = [INPUT, *(op.output for op in student.operations)]
    found = jax.jit(
        lambda frozen, images: integer_forward(
            student.operations, frozen, images, names, input_bits=student.spec.boundary_bits
        )
    )(frozen, images)
    results = {"logits": np.asarray(found.pop(student.graph.output))}
    for name, real in found.items():
        tensor = codes["tensors"][student.origins[name]]
        results[name] = np.rint(np.asarray(real) / tensor["scale"]) + tensor["zero_point"]
    return results
