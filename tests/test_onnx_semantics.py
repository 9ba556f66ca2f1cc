"""Each integer operation gives ONNX Runtime's codes, bit for bit.

One operator a model, random codes, scales and zero points; nothing of ours writes the models.
Weights stay within 7 bits, so that x86 CPUs without VNNI do not saturate.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrq_jax.graph import INPUT, GraphBuilder
from lrq_jax.passes import QuantSpec, plan_quantization
from lrq_jax.passes.integer_forward import QuantizedWeights, integer_forward
from lrq_jax.quantizers.affine import AffineParameters

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

f32 = np.float32
MS = "com.microsoft"


def run_node(kind, inputs, *, live=(0,), domain="", result=np.uint8, **attributes):
    """Runs one ONNX operator. Inputs in its order; those not `live` are constants of the model,
    as scales and weights must be."""
    helper = onnx.helper
    names = [f"x{i}" for i in range(len(inputs))]
    fed = {names[i]: np.array(inputs[i], order="C") for i in live}

    def described(name, dtype, shape):
        element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return helper.make_tensor_value_info(name, element, shape)

    graph = helper.make_graph(
        [helper.make_node(kind, names, ["y"], domain=domain, **attributes)],
        "one",
        [described(name, value.dtype, value.shape) for name, value in fed.items()],
        [described("y", result, None)],
        [
            onnx.numpy_helper.from_array(np.array(value, order="C"), name)
            for name, value in zip(names, inputs, strict=True)
            if name not in fed
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, fed)[0]


def scale_of(rng, low=1e-3, high=0.5):
    """A scale as ranges make them, or one of few digits, under which sums fall on ties."""
    if rng.random() < 0.5:
        return f32(rng.choice([0.01, 0.02, 0.05, 0.1, 0.2, 0.5]))
    return f32(np.exp(rng.uniform(np.log(low), np.log(high))))


def tensor(scale, zero):
    return AffineParameters(jnp.float32(scale), jnp.float32(zero))


def real(codes, parameters):
    """Values that quantize to these codes."""
    return (jnp.asarray(codes, jnp.float32) - parameters.zero_point) * parameters.scale


@functools.cache
def compiled(graph, spec, outputs):
    operations = plan_quantization(graph, spec)
    return jax.jit(
        lambda frozen, images: integer_forward(operations, frozen, images, outputs, input_bits=8)
    )


def our_codes(graph, frozen, image_codes, name, spec=None):
    """Codes of a tensor from the codes of the image."""
    images = real(image_codes, frozen["tensors"][INPUT])
    found = compiled(graph, spec or QuantSpec(), (name,))(frozen, images)[name]
    scale, zero = (np.asarray(v) for v in frozen["tensors"][name])
    return np.rint(np.asarray(found) / scale) + zero


def parts(parameters):
    scale, zero = parameters
    return f32(scale), np.uint8(int(zero))


def nchw(x):
    return np.moveaxis(x, -1, 1)


def random_codes(rng, *shape):
    return rng.integers(0, 256, shape).astype(np.uint8)


# --- the operators -------------------------------------------------------------------------------


def image_graph():
    net = GraphBuilder("image", input_shape=(16, 16, 3))
    net.dense(net.global_pool(net.image), 2, name="classifier")
    return net.build()


def test_quantize_linear():
    """Pixels of any value, and on and beside the edges between codes."""
    rng = np.random.default_rng(0)
    graph = image_graph()
    for _ in range(12):
        parameters = tensor(scale_of(rng), rng.integers(256))
        scale, zero = parts(parameters)
        edges = (rng.integers(-300, 300, (4, 16, 16, 3)).astype(f32) + f32(0.5)) * scale
        shift = rng.integers(-1, 2, edges.shape)
        edges = np.where(
            shift, np.nextafter(edges, np.where(shift > 0, f32(9e9), f32(-9e9))), edges
        )
        images = np.concatenate([edges, rng.normal(size=edges.shape).astype(f32) * 50 * scale])
        frozen = {
            "tensors": {INPUT: parameters, "pool0": tensor(1, 0)},
            "weights": {"classifier": dense_weights(rng, 3, 2)},
        }
        ours = compiled(graph, QuantSpec(), (INPUT,))(frozen, jnp.asarray(images))[INPUT]
        theirs = run_node("QuantizeLinear", [images, scale, zero])
        np.testing.assert_array_equal(np.rint(np.asarray(ours) / scale) + zero, theirs)


CONVOLUTIONS = {
    "3x3": {"features": 12, "kernel_size": 3, "use_bias": True},
    "strided, uneven padding": {
        "features": 12, "kernel_size": (3, 2), "strides": (2, 1), "padding": ((1, 2), (0, 1)),
    },
    "1x1": {"features": 12, "kernel_size": 1, "use_bias": True},
    "depthwise": {"features": 8, "kernel_size": 3, "groups": 8, "strides": 2},
    "grouped, dilated": {"features": 12, "kernel_size": 3, "groups": 4, "dilation": 2},
}  # fmt: skip


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("case", list(CONVOLUTIONS))
def test_qlinear_conv(case, relu):
    rng = np.random.default_rng(1)
    net = GraphBuilder(case, input_shape=(12, 12, 8))
    x = net.conv(net.image, name="conv", **CONVOLUTIONS[case])
    name = net.relu(x, name="relu") if relu else x
    net.dense(net.global_pool(name, name="pool"), 2, name="classifier")
    graph = net.build()
    layer = graph.by_name["conv"]
    kernel_shape = graph.variable_shapes()["params"]["conv"]["kernel"]
    act_bits = 4 if relu else 8
    spec = QuantSpec(weight_bits=7, act_bits=4)
    for _ in range(4):
        zeros = rng.integers(0, 128, layer.features)
        codes = rng.integers(0, 128, kernel_shape)
        codes = np.clip(codes, zeros - 64, zeros + 63)  # int8, and no saturation without VNNI
        scales = np.array([scale_of(rng) for _ in range(layer.features)], f32)
        bias = rng.integers(-4000, 4000, layer.features)
        image = tensor(scale_of(rng), rng.integers(256))
        spread = (
            float(image.scale) * np.median(scales) * 60 * 40 * np.sqrt(np.prod(kernel_shape[:3]))
        )
        output = tensor(spread / (2**act_bits), 0 if relu else rng.integers(256))
        frozen = {
            "tensors": {INPUT: image, name: output, "pool": tensor(1, 0)},
            "weights": {
                "conv": QuantizedWeights(
                    jnp.asarray(codes, jnp.float32), jnp.asarray(zeros, jnp.float32),
                    jnp.asarray(scales), jnp.asarray(bias, jnp.float32),
                ),
                "classifier": dense_weights(rng, layer.features, 2),
            },
        }  # fmt: skip
        x = random_codes(rng, 4, 12, 12, 8)
        ours = our_codes(graph, frozen, x, name, spec)
        centred = np.transpose((codes - zeros).astype(np.int8), (3, 2, 0, 1))
        (top, bottom), (left, right) = layer.padding
        theirs = run_node(
            "QLinearConv",
            [
                nchw(x), *parts(image), centred, scales,
                np.zeros(layer.features, np.int8), *parts(output), bias.astype(np.int32),
            ],
            strides=layer.strides,
            pads=(top, left, bottom, right),
            dilations=layer.dilation,
            group=layer.groups,
        )  # fmt: skip
        theirs = np.minimum(np.moveaxis(theirs, 1, -1), 2**act_bits - 1)
        assert len(np.unique(theirs)) > 4, "the scales leave nothing to compare"
        np.testing.assert_array_equal(ours, theirs)


def copies(parameters, image):
    """Weights of a 1x1 convolution that gives each of two outputs one channel's own codes."""
    weights = {}
    for channel, (name, target) in enumerate(parameters.items()):
        codes = np.zeros((1, 1, 2, 1))
        codes[:, :, channel] = 1
        bias = image.zero_point - target.zero_point
        weights[name] = QuantizedWeights(
            jnp.asarray(codes, jnp.float32),
            jnp.zeros(1),
            jnp.asarray([target.scale / image.scale], jnp.float32),
            jnp.asarray([bias], jnp.float32),
        )
    return weights


def add_graph(*, relu):
    net = GraphBuilder("add", input_shape=(256, 256, 2))
    a = net.conv(net.image, 1, 1, use_bias=True, name="a")
    b = net.conv(net.image, 1, 1, use_bias=True, name="b")
    name = net.add(a, b, name="add")
    name = net.relu(name, name="relu") if relu else name
    net.dense(net.global_pool(name, name="pool"), 2, name="classifier")
    return net.build(), name


@pytest.mark.parametrize("relu", [False, True])
def test_qlinear_add(relu):
    """All 65,536 pairs of codes, for many scales and zero points."""
    rng = np.random.default_rng(2)
    graph, name = add_graph(relu=relu)
    spec = QuantSpec(act_bits=8)
    grid = np.stack(np.meshgrid(np.arange(256), np.arange(256)), -1)[None].astype(np.uint8)
    for _ in range(25):
        image = tensor(1, 128)
        sums = {n: tensor(scale_of(rng), rng.integers(256)) for n in ("a", "b")}
        largest = max(float(p.scale) for p in sums.values())
        output = tensor(largest * rng.uniform(0.5, 2), 0 if relu else rng.integers(256))
        frozen = {
            "tensors": {INPUT: image, **sums, name: output, "pool": tensor(1, 0)},
            "weights": {**copies(sums, image), "classifier": dense_weights(rng, 1, 2)},
        }
        np.testing.assert_array_equal(our_codes(graph, frozen, grid, "a", spec), grid[..., :1])
        ours = our_codes(graph, frozen, grid, name, spec)
        a, b = grid[..., :1], grid[..., 1:]
        theirs = run_node(
            "QLinearAdd",
            [a, *parts(sums["a"]), b, *parts(sums["b"]), *parts(output)],
            live=(0, 3),
            domain=MS,
        )
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("channels_last", [0, 1])
@pytest.mark.parametrize("size", [1, 4, 7, 8])
def test_qlinear_global_average_pool(size, channels_last):
    rng = np.random.default_rng(3)
    net = GraphBuilder("pool", input_shape=(size, size, 40))
    net.dense(net.global_pool(net.image, name="pool"), 2, name="classifier")
    graph = net.build()
    for _ in range(15):
        image = tensor(scale_of(rng), rng.integers(256))
        spread = float(image.scale) / size * rng.uniform(0.5, 4)
        output = tensor(rng.choice([spread, float(image.scale)]), rng.integers(256))
        frozen = {
            "tensors": {INPUT: image, "pool": output},
            "weights": {"classifier": dense_weights(rng, 40, 2)},
        }
        x = random_codes(rng, 25, size, size, 40)
        ours = our_codes(graph, frozen, x, "pool")
        theirs = run_node(
            "QLinearGlobalAveragePool",
            [x if channels_last else nchw(x), *parts(image), *parts(output)],
            domain=MS,
            channels_last=channels_last,
        )
        np.testing.assert_array_equal(ours, theirs.reshape(ours.shape))


def dense_weights(rng, ins, outs):
    zeros = rng.integers(0, 128, outs)
    codes = np.clip(rng.integers(0, 128, (ins, outs)), zeros - 64, zeros + 63)
    return QuantizedWeights(
        jnp.asarray(codes, jnp.float32),
        jnp.asarray(zeros, jnp.float32),
        jnp.asarray([scale_of(rng) for _ in range(outs)], jnp.float32),
        jnp.asarray(rng.integers(-4000, 4000, outs), jnp.float32),
    )


def dense_graph(*, use_bias):
    net = GraphBuilder("dense", input_shape=(1, 1, 70))
    x = net.dense(net.flatten(net.image), 30, use_bias=use_bias, name="hidden")
    net.dense(x, 12, name="classifier")
    return net.build()


def int8_of(weights):
    return np.asarray(weights.codes - weights.zero_point).astype(np.int8)


def test_dense_layers_equal_gemm_and_matmul():
    """QGemm with codes as output, QGemm with float logits, and QLinearMatMul."""
    rng = np.random.default_rng(4)
    graph = dense_graph(use_bias=True)
    spec = QuantSpec(weight_bits=7)
    for _ in range(10):
        image = tensor(scale_of(rng), rng.integers(256))
        weights = {"hidden": dense_weights(rng, 70, 30), "classifier": dense_weights(rng, 30, 12)}
        spread = float(image.scale) * float(jnp.median(weights["hidden"].scale)) * 60 * 40 * 8
        output = tensor(spread / 256, rng.integers(256))
        frozen = {"tensors": {INPUT: image, "hidden": output}, "weights": weights}
        x = random_codes(rng, 200, 70)
        ours = our_codes(graph, frozen, x[:, None, None], "hidden", spec)
        hidden, last = weights["hidden"], weights["classifier"]

        def gemm(x, parameters, weights, *output, result=np.uint8):
            features = weights.scale.shape[0]
            return run_node(
                "QGemm",
                [
                    x, *parts(parameters), int8_of(weights), np.asarray(weights.scale),
                    np.zeros(features, np.int8), np.asarray(weights.bias).astype(np.int32), *output,
                ],
                domain=MS, result=result, alpha=1.0, transA=0, transB=0,
            )  # fmt: skip

        theirs = gemm(x, image, hidden, *parts(output))
        assert len(np.unique(theirs)) > 50
        np.testing.assert_array_equal(ours, theirs)

        images = real(x[:, None, None], image)
        logits = compiled(graph, spec, ("classifier",))(frozen, images)["classifier"]
        np.testing.assert_array_equal(logits, gemm(theirs, output, last, result=f32))

        weights["hidden"] = hidden._replace(bias=jnp.zeros(30))
        frozen = {"tensors": {INPUT: image, "hidden": output}, "weights": weights}
        product = run_node(
            "QLinearMatMul",
            [
                x, *parts(image), int8_of(hidden), np.asarray(hidden.scale),
                np.zeros(30, np.int8), *parts(output),
            ],
        )  # fmt: skip
        ours = our_codes(graph, frozen, x[:, None, None], "hidden", spec)
        np.testing.assert_array_equal(ours, product)


@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize(("window", "strides", "padding"), [(2, 2, 0), (3, 2, 1), ((3, 2), 1, 1)])
def test_qlinear_average_pool(window, strides, padding, count_include_pad):
    rng = np.random.default_rng(5)
    net = GraphBuilder("average", input_shape=(9, 9, 8))
    x = net.avg_pool(
        net.image, window, strides=strides, padding=padding,
        count_include_pad=count_include_pad, name="average",
    )  # fmt: skip
    net.dense(net.global_pool(x, name="pool"), 2, name="classifier")
    graph = net.build()
    layer = graph.by_name["average"]
    for _ in range(12):
        image = tensor(scale_of(rng), rng.integers(256))
        output = tensor(float(image.scale) * rng.choice([0.3, 0.5, 0.77, 1.0]), rng.integers(256))
        frozen = {
            "tensors": {INPUT: image, "average": output, "pool": tensor(1, 0)},
            "weights": {"classifier": dense_weights(rng, 8, 2)},
        }
        x = random_codes(rng, 20, 9, 9, 8)
        ours = our_codes(graph, frozen, x, "average")
        theirs = run_node(
            "QLinearAveragePool",
            [nchw(x), *parts(image), *parts(output)],
            domain=MS,
            kernel_shape=layer.window,
            strides=layer.strides,
            pads=[padding] * 4,
            count_include_pad=int(count_include_pad),
        )
        np.testing.assert_array_equal(ours, np.moveaxis(theirs, 1, -1))


def test_qlinear_concat():
    rng = np.random.default_rng(6)
    net = GraphBuilder("concat", input_shape=(16, 16, 2))
    a = net.conv(net.image, 1, 1, use_bias=True, name="a")
    b = net.conv(net.image, 1, 1, use_bias=True, name="b")
    net.dense(net.global_pool(net.concat(a, b, name="concat"), name="pool"), 2, name="classifier")
    graph = net.build()
    grid = np.stack([np.arange(256).reshape(16, 16)] * 2, -1)[None].astype(np.uint8)
    for _ in range(40):
        image = tensor(1, 128)
        sources = {n: tensor(scale_of(rng), rng.integers(256)) for n in ("a", "b")}
        output = tensor(scale_of(rng), rng.integers(256))
        frozen = {
            "tensors": {INPUT: image, **sources, "concat": output, "pool": tensor(1, 0)},
            "weights": {**copies(sources, image), "classifier": dense_weights(rng, 2, 2)},
        }
        ours = our_codes(graph, frozen, grid, "concat")
        a, b = grid[..., :1], grid[..., 1:]
        theirs = run_node(
            "QLinearConcat",
            [*parts(output), a, *parts(sources["a"]), b, *parts(sources["b"])],
            live=(2, 5),
            domain=MS,
            axis=3,
        )
        np.testing.assert_array_equal(ours, theirs)


def test_qlinear_leaky_relu():
    rng = np.random.default_rng(7)
    net = GraphBuilder("leaky", input_shape=(16, 16, 1))
    x = net.activation(net.image, "leaky_relu", negative_slope=0.1, name="leaky")
    net.dense(net.global_pool(x, name="pool"), 2, name="classifier")
    graph = net.build()
    codes = np.arange(256).reshape(1, 16, 16, 1).astype(np.uint8)
    for _ in range(60):
        image = tensor(scale_of(rng), rng.integers(256))
        output = tensor(scale_of(rng), rng.integers(256))
        frozen = {
            "tensors": {INPUT: image, "leaky": output, "pool": tensor(1, 0)},
            "weights": {"classifier": dense_weights(rng, 1, 2)},
        }
        ours = our_codes(graph, frozen, codes, "leaky", QuantSpec(act_bits=8))
        theirs = run_node(
            "QLinearLeakyRelu", [codes, *parts(image), *parts(output)], domain=MS, alpha=0.1
        )
        np.testing.assert_array_equal(ours, theirs)
