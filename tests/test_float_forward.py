"""The floating-point pass against numpy, and what it must not compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrq_jax.graph import INPUT, GraphBuilder, GraphError
from lrq_jax.graph import layers as L
from lrq_jax.passes import float_forward, float_logits


def everything():
    """One network with every kind of layer and the settings that are easy to forget."""
    net = GraphBuilder("everything", input_shape=(8, 9, 3))
    x = net.conv(net.image, 4, (3, 2), strides=(2, 1), padding=((1, 2), (0, 1)), use_bias=True)
    x = net.relu(net.batch_norm(x, eps=0.1))
    y = net.conv(x, 6, 3, groups=2, dilation=2)
    z = net.conv(net.batch_norm(x, affine=False), 8, 3, groups=4)  # depthwise, multiplier 2
    z = net.activation(z, "leaky_relu", negative_slope=0.3)
    y = net.concat(y, z, net.relu6(net.conv(x, 4, 3, groups=4, name="depthwise"), name="six"))
    y = net.slice(y, start=(1, 0, 2), stop=(None, 8, 17), step=(1, 2, 3))
    y = net.pad(y, height=(1, 0), width=(0, 3), channels=(2, 1))
    a = net.avg_pool(y, (3, 2), strides=2, padding=1, count_include_pad=False)
    b = net.avg_pool(y, (3, 2), strides=2, padding=1)
    m = net.max_pool(y, (3, 2), strides=2, padding=1)
    s = net.add(net.add(a, b), m)
    gate = net.unflatten(net.global_pool(net.activation(s, "silu")))
    gate = net.activation(net.conv(gate, net.shape(s)[2], 1), "hard_sigmoid")
    gated = net.activation(net.multiply(s, gate), "hard_swish")
    s = net.channel_shuffle(net.multiply(gated, net.activation(s, "sigmoid")), 2)
    flat = net.dense(net.flatten(s), 7, use_bias=False)
    pooled = net.dense(net.global_pool(s), 7, name="pooled")
    net.dense(net.add(flat, pooled), 5, name="classifier")
    return net.build()


def random_variables(graph, seed=0):
    """Any weights; gammas of both signs and one 0; variances far from 1."""
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        if name == "var":
            return rng.uniform(0.05, 3, size=shape)
        values = rng.normal(size=shape)
        if name == "scale":
            values[rng.integers(shape[0])] = 0
        return values

    return {
        collection: {
            layer: {name: jnp.asarray(draw(name, shape), jnp.float32) for name, shape in v.items()}
            for layer, v in layers.items()
        }
        for collection, layers in graph.variable_shapes().items()
    }


def images_for(graph, batch=2):
    rng = np.random.default_rng(9)
    return jnp.asarray(rng.normal(size=(batch, *graph.input_shape)), jnp.float32)


# --- the second version: loops over pixels, float64 ----------------------------------------------


def each_window(x, size, strides, padding, dilation=(1, 1), fill=0.0):
    """Yields (i, j, `[B, kh, kw, C]`) and the shape of the output."""
    x = np.pad(x, ((0, 0), *padding, (0, 0)), constant_values=fill)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, size, strict=True)]
    rows, columns = ((x.shape[1 + a] - reach[a]) // strides[a] + 1 for a in range(2))
    for i in range(rows):
        for j in range(columns):
            top, left = i * strides[0], j * strides[1]
            yield (
                (i, j),
                (x.shape[0], rows, columns),
                x[:, top : top + reach[0] : dilation[0], left : left + reach[1] : dilation[1]],
            )


def by_window(x, size, strides, padding, function, **settings):
    out = None
    for (i, j), shape, window in each_window(x, size, strides, padding, **settings):
        value = function(window)
        out = np.zeros((*shape, value.shape[-1])) if out is None else out
        out[:, i, j] = value
    return out


def naive_conv(layer, kernel, x):
    ins, outs = kernel.shape[2], kernel.shape[3] // layer.groups

    def one(window):
        return np.concatenate(
            [
                np.einsum(
                    "bijc,ijcf->bf",
                    window[..., g * ins : (g + 1) * ins],
                    kernel[..., g * outs : (g + 1) * outs],
                )
                for g in range(layer.groups)
            ],
            axis=-1,
        )

    return by_window(
        x, layer.kernel_size, layer.strides, layer.padding, one, dilation=layer.dilation
    )


def naive_layer(layer, params, *inputs):
    x = inputs[0]
    window = lambda fill, function: by_window(  # noqa: E731
        x, layer.window, layer.strides, layer.padding, function, fill=fill
    )
    match layer:
        case L.Conv():
            return naive_conv(layer, params["kernel"], x) + params.get("bias", 0)
        case L.Dense():
            return x @ params["kernel"] + params.get("bias", 0)
        case L.BatchNorm():
            normal = (x - params["mean"]) / np.sqrt(params["var"] + layer.eps)
            return normal * params.get("scale", 1) + params.get("bias", 0)
        case L.Activation(kind="relu"):
            return np.maximum(x, 0)
        case L.Activation(kind="relu6"):
            return np.minimum(np.maximum(x, 0), 6)
        case L.Activation(kind="leaky_relu"):
            return np.where(x > 0, x, layer.negative_slope * x)
        case L.Activation(kind="sigmoid"):
            return 1 / (1 + np.exp(-x))
        case L.Activation(kind="silu"):
            return x / (1 + np.exp(-x))
        case L.Activation(kind="hard_sigmoid"):
            return np.clip(x / 6 + 0.5, 0, 1)
        case L.Activation(kind="hard_swish"):
            return np.where(x < -3, 0, np.where(x > 3, x, x * (x + 3) / 6))
        case L.Multiply():
            return x * inputs[1]
        case L.Unflatten():
            return x.reshape(len(x), 1, 1, -1)
        case L.ChannelShuffle():
            order = [
                k * x.shape[-1] // layer.groups + i
                for i in range(x.shape[-1] // layer.groups)
                for k in range(layer.groups)
            ]
            return x[..., order]
        case L.Add():
            return x + inputs[1]
        case L.Concat():
            return np.concatenate(inputs, -1)
        case L.Pad():
            return np.pad(x, ((0, 0), layer.height, layer.width, layer.channels))
        case L.Slice():
            index = [
                range(n)[start:stop:step]
                for n, start, stop, step in zip(
                    x.shape[1:], layer.start, layer.stop, layer.step, strict=True
                )
            ]
            return x[:, index[0]][:, :, index[1]][..., index[2]]
        case L.AvgPool(count_include_pad=True):
            return window(0.0, lambda w: w.mean((1, 2)))
        case L.AvgPool():
            return window(np.nan, lambda w: np.nanmean(w, (1, 2)))
        case L.MaxPool():
            return window(-np.inf, lambda w: w.max((1, 2)))
        case L.GlobalPool():
            return x.reshape(x.shape[0], -1, x.shape[-1]).mean(1)
        case L.Flatten():
            return np.stack([one.ravel() for one in x])
    raise AssertionError(layer)


def naive_network(graph, variables, images):
    values = {INPUT: np.asarray(images, np.float64)}
    for layer in graph.layers:
        params = {
            name: np.asarray(value, np.float64)
            for collection in ("params", "batch_stats")
            for name, value in variables[collection].get(layer.name, {}).items()
        }
        inputs = (values[name] for name in layer.inputs)
        values[layer.name] = naive_layer(layer, params, *inputs)
    return values


def test_every_tensor_equals_the_naive_network():
    graph = everything()
    kinds = {type(layer) for layer in graph.layers}
    assert kinds == set(L.Layer.__subclasses__()) | {L.AvgPool}, "a kind of layer is untested"
    variables, images = random_variables(graph), images_for(graph)
    names = (INPUT, *(layer.name for layer in graph.layers))
    found = float_forward(graph, variables, images, names)
    expected = naive_network(graph, variables, images)
    assert tuple(found) == names
    for name in names:
        assert found[name].shape == (2, *graph.shapes[name])
        assert found[name].dtype == jnp.float32
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=2e-4, err_msg=name)
    np.testing.assert_array_equal(float_logits(graph, variables, images), found["classifier"])


def test_a_batch_norm_is_the_published_formula():
    """gamma 0 is exactly beta; a batch norm without affine has no parameters."""
    graph = everything()
    variables, images = random_variables(graph), images_for(graph)
    first, second = graph.batch_norms
    assert second.name not in variables["params"]
    dead = np.flatnonzero(variables["params"][first.name]["scale"] == 0)
    found = float_forward(graph, variables, images, (first.name,))[first.name]
    beta = np.asarray(variables["params"][first.name]["bias"])[dead]
    np.testing.assert_array_equal(found[..., dead], np.broadcast_to(beta, found[..., dead].shape))


# --- only what was asked -------------------------------------------------------------------------


def chain():
    net = GraphBuilder("chain", input_shape=(8, 8, 3))
    x = net.relu(net.batch_norm(net.conv(net.image, 4, 3)))
    side = net.conv(x, 4, 3, name="side")
    x = net.relu(net.conv(x, 4, 3, name="trunk"))
    x = net.add(x, side)
    net.dense(net.global_pool(x), 5, name="classifier")
    return net.build()


def primitives(jaxpr):
    """Names of all primitives of a jaxpr, those inside others included."""
    found = []
    for equation in jaxpr.eqns:
        found.append(equation.primitive.name)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += primitives(inner)
    return found


@pytest.mark.parametrize(
    ("outputs", "convolutions", "products"),
    [(("conv0",), 1, 0), (("trunk",), 2, 0), (("side", "trunk"), 3, 0), (("classifier",), 3, 1)],
)
def test_layers_not_needed_are_not_in_the_program(outputs, convolutions, products):
    graph = chain()
    variables, images = random_variables(graph), images_for(graph)
    program = jax.make_jaxpr(lambda v, x: float_forward(graph, v, x, outputs))(variables, images)
    names = primitives(program.jaxpr)
    assert names.count("conv_general_dilated") == convolutions
    assert names.count("dot_general") == products
    assert len(program.out_avals) == len(outputs)


def test_variables_of_layers_not_needed_need_not_exist():
    graph = chain()
    variables, images = random_variables(graph), images_for(graph)
    partial = {
        c: {k: v for k, v in t.items() if k in ("conv0", "bn0")} for c, t in variables.items()
    }
    full = float_forward(graph, variables, images, ("relu0",))["relu0"]
    np.testing.assert_array_equal(float_forward(graph, partial, images, ("relu0",))["relu0"], full)


def test_unknown_tensors_are_refused_by_name():
    graph = chain()
    with pytest.raises(GraphError, match=r"found no tensor named \['trank'\].*'trunk'"):
        float_forward(graph, random_variables(graph), images_for(graph), ("trank",))


# --- transforms ----------------------------------------------------------------------------------


def test_each_kernel_and_activation_is_transformed_once():
    graph = chain()
    variables, images = random_variables(graph), images_for(graph)
    seen = []

    def kernel_transform(layer, kernel):
        assert kernel is variables["params"][layer.name]["kernel"]
        seen.append(layer)
        return 2 * kernel

    def activation_transform(layer, value):
        assert value.shape == (2, *graph.shapes[layer.name])
        assert (value >= 0).all(), "after the ReLU"
        seen.append(layer)
        return value + 1

    found = float_forward(
        graph,
        variables,
        images,
        ("relu0", "trunk", "classifier"),
        kernel_transform=kernel_transform,
        activation_transform=activation_transform,
    )
    expected = [
        layer for layer in graph.layers if isinstance(layer, L.Conv | L.Dense | L.Activation)
    ]
    assert seen == expected

    # What is computed from them is computed from the transformed values, and taps are too.
    doubled = jax.tree_util.tree_map_with_path(
        lambda path, value: 2 * value if path[-1].key == "kernel" else value, variables["params"]
    )
    plain = float_forward(graph, {**variables, "params": doubled}, images, ("relu0",))
    np.testing.assert_allclose(found["relu0"], plain["relu0"] + 1, rtol=1e-6)
    kernel = doubled["trunk"]["kernel"]
    trunk = naive_conv(graph.by_name["trunk"], np.asarray(kernel), np.asarray(found["relu0"]))
    np.testing.assert_allclose(found["trunk"], trunk, rtol=1e-4, atol=1e-4)

    seen.clear()
    float_forward(graph, variables, images, ("side",), kernel_transform=kernel_transform)
    assert [layer.name for layer in seen] == ["conv0", "side"]


def test_what_each_convolution_reads_is_transformed_and_nothing_else():
    graph = chain()
    variables, images = random_variables(graph), images_for(graph)
    seen = []

    def input_transform(layer, x):
        seen.append(layer)
        return 2 * x

    outputs = ("conv0", "classifier")
    found = float_forward(graph, variables, images, outputs, input_transform=input_transform)
    convolutions = [layer for layer in graph.layers if isinstance(layer, L.Conv)]
    assert seen == convolutions
    params = variables["params"]
    doubled = {
        layer.name: {**params[layer.name], "kernel": 2 * params[layer.name]["kernel"]}
        for layer in convolutions
    }
    variables = {**variables, "params": {**variables["params"], **doubled}}
    plain = float_forward(graph, variables, images, outputs)
    for name in outputs:
        np.testing.assert_allclose(found[name], plain[name], rtol=1e-5, atol=1e-5)


def test_statistics_and_inputs_are_left_alone():
    graph = chain()
    variables, images = random_variables(graph), images_for(graph)
    before = jax.tree.map(np.array, variables)
    float_logits(graph, variables, images)
    jax.tree.map(np.testing.assert_array_equal, before, variables)
    assert set(variables["params"]["conv0"]) == {"kernel"}
