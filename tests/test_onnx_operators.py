"""Every ONNX operator that is read, against onnxruntime, in models of a few nodes."""

import jax.numpy as jnp
import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="reads ONNX: pip install '.[dev]'")
pytest.importorskip("onnxruntime", reason="reads ONNX: pip install '.[dev]'")

from onnx_models import Model, run  # noqa: E402

from lrq_jax.graph import layers as L  # noqa: E402
from lrq_jax.passes import float_logits  # noqa: E402
from lrq_jax.readers.onnx_graph import read_onnx  # noqa: E402
from lrq_jax.readers.onnx_operators import OPERATORS  # noqa: E402

TOLERANCE = 1e-5


def compare(path, *, batch=2, layout="NCHW", assume_bn="unit"):
    """Our logits against onnxruntime's on random images; the network read."""
    network = read_onnx(path, assume_bn=assume_bn)
    rng = np.random.default_rng(1)
    images = rng.normal(size=(batch, *network.graph.input_shape)).astype(np.float32)
    fed = np.moveaxis(images, -1, 1) if layout == "NCHW" else images
    expected = run(path, np.ascontiguousarray(fed)).reshape(batch, -1)
    if network.scale is not None:
        images = np.float32(images * network.scale + network.shift)
    found = np.asarray(float_logits(network.graph, network.variables, jnp.asarray(images)))
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * abs(expected).max(), rtol=0)
    return network


def kinds(network):
    """Layer types and the kinds of activations, in order, but for Flatten."""
    return [
        layer.kind if isinstance(layer, L.Activation) else type(layer).__name__
        for layer in network.graph.layers
        if not isinstance(layer, L.Flatten)
    ]


# Each makes something of an image [N, 8, 8, 8] (NCHW): (output, its features, layers expected).


def conv_plain(m, x):
    return m.conv(x, 4, 8, bias=True), 256, ["Conv"]


def conv_strided_uneven(m, x):
    y = m.conv(x, 4, 8, 3, pads=[0, 1, 1, 2], strides=[2, 1])
    return y, 4 * 4 * 9, ["Conv"]


def conv_dilated(m, x):
    return m.conv(x, 4, 8, pads=[2, 2, 2, 2], dilations=[2, 2]), 256, ["Conv"]


def conv_grouped(m, x):
    return m.conv(x, 6, 4, group=2), 384, ["Conv"]


def conv_depthwise(m, x):
    return m.conv(x, 8, 1, group=8), 512, ["Conv"]


def conv_same_upper(m, x):
    y = m.op("Conv", x, m.weights(4, 8, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2])
    return y, 64, ["Conv"]


def conv_same_lower(m, x):
    y = m.op("Conv", x, m.weights(4, 8, 3, 3), auto_pad="SAME_LOWER", strides=[2, 2])
    return y, 64, ["Conv"]


def conv_valid(m, x):
    return m.op("Conv", x, m.weights(4, 8, 3, 3), auto_pad="VALID"), 144, ["Conv"]


def conv_and_added_bias(m, x):
    return m.op("Add", m.conv(x, 4, 8), m.weights(4, 1, 1)), 256, ["Conv"]


def conv_bias_read_twice(m, x):
    y = m.op("Sub", m.op("Mul", m.conv(x, 8, 8), m.weights(1, 8, 1, 1)), m.weights(8, 1, 1))
    return m.op("Add", m.op("Relu", y), y), 512, ["Conv", "relu", "Add"]


def conv_raw_and_scaled(m, x):
    y = m.conv(x, 8, 8)
    return m.op("Add", m.op("Mul", y, m.weights(8, 1, 1)), y), 512, ["Conv", "Conv", "Add"]


def batch_norm(m, x):
    return m.batch_norm(m.conv(x, 4, 8), 4, epsilon=1e-3), 256, ["Conv", "BatchNorm"]


def batch_norm_scaled(m, x):
    y = m.op("Mul", m.batch_norm(m.conv(x, 4, 8), 4), m.weights(4, 1, 1))
    return m.op("Add", y, 0.5), 256, ["Conv", "BatchNorm"]


def batch_norm_alone(m, x):
    return m.op("Relu", m.batch_norm(x, 8)), 512, ["BatchNorm", "relu"]


def batch_norm_of_a_vector(m, x):
    return m.batch_norm(m.op("Flatten", x), 512), 512, ["BatchNorm"]


def relu(m, x):
    return m.op("Relu", x), 512, ["relu"]


def clip_6(m, x):
    return m.op("Clip", m.op("Mul", x, 4.0), 0.0, 6.0), 512, ["Conv", "relu6"]


def clip_0(m, x):
    return m.op("Clip", x, 0.0), 512, ["relu"]


def leaky_relu(m, x):
    return m.op("LeakyRelu", x, alpha=0.2), 512, ["leaky_relu"]


def prelu(m, x):
    return m.op("PRelu", x, np.full((8, 1, 1), 0.3)), 512, ["leaky_relu"]


def sigmoid(m, x):
    return m.op("Sigmoid", x), 512, ["sigmoid"]


def silu(m, x):
    return m.op("Mul", m.op("Sigmoid", x), x), 512, ["silu"]


def hard_sigmoid(m, x):
    return m.op("HardSigmoid", x, alpha=1 / 6, beta=0.5), 512, ["hard_sigmoid"]


def hard_sigmoid_by_hand(m, x):
    y = m.op("Clip", m.op("Add", x, 3.0), 0.0, 6.0)
    return m.op("Div", y, 6.0), 512, ["hard_sigmoid"]


def hard_sigmoid_to_one(m, x):
    y = m.op("Add", m.op("Mul", x, 1 / 6), 0.5)
    return m.op("Clip", y, 0.0, 1.0), 512, ["hard_sigmoid"]


def hard_swish(m, x):
    return m.op("HardSwish", x), 512, ["hard_swish"]


def hard_swish_by_hand(m, x):
    y = m.op("Clip", m.op("Add", x, 3.0), 0.0, 6.0)
    return m.op("Div", m.op("Mul", x, y), 6.0), 512, ["hard_swish"]


def hard_swish_of_tensorflow(m, x):
    y = m.op("Clip", m.op("Add", x, 3.0), 0.0, 6.0)
    return m.op("Mul", m.op("Mul", y, 0.166666672), x), 512, ["hard_swish"]


def swish(m, x):
    """An operator since opset 24."""
    return m.op("Swish", x), 512, ["silu"]


def add_and_identity(m, x):
    y = m.op("Identity", m.op("Dropout", m.conv(x, 8, 8)))
    return m.op("Add", y, x), 512, ["Conv", "Add"]


def negative(m, x):
    return m.op("Neg", m.op("Relu", x)), 512, ["relu", "Conv"]


def constant_minus(m, x):
    return m.op("Sub", 1.0, m.op("Relu", x)), 512, ["relu", "Conv"]


def scaled_vector(m, x):
    y = m.op("Flatten", m.op("GlobalAveragePool", m.op("Relu", x)))
    return m.op("Mul", y, m.weights(8)), 8, ["relu", "GlobalPool", "Unflatten", "Conv"]


def gated(m, x):
    """Squeeze and excitation: 1x1 convolutions on pooled features."""
    y = m.op("GlobalAveragePool", x)
    y = m.op("Relu", m.conv(y, 4, 8, 1, bias=True))
    y = m.op("Sigmoid", m.conv(y, 8, 4, 1, bias=True))
    return m.op("Mul", y, x), 512, [
        "GlobalPool", "Dense", "relu", "Dense", "sigmoid", "Unflatten", "Multiply",
    ]  # fmt: skip


def gated_by_dense_layers(m, x):
    y = m.op("Gemm", m.op("Flatten", m.op("GlobalAveragePool", x)), m.weights(8, 8))
    y = m.op("Reshape", m.op("Sigmoid", y), np.array([-1, 8, 1, 1]))
    return m.op("Mul", x, y), 512, ["GlobalPool", "Dense", "sigmoid", "Unflatten", "Multiply"]


def product(m, x):
    return m.op("Mul", m.conv(x, 8, 8), x), 512, ["Conv", "Multiply"]


def concat(m, x):
    return m.op("Concat", m.conv(x, 4, 8), x, axis=1), 768, ["Conv", "Concat"]


def concat_with_zeros(m, x):
    """Zeros for each image of the batch, as the option-A shortcut is exported."""
    batch = m.op("Slice", m.op("Shape", x), np.array([0]), np.array([1]))
    y = [
        m.op("ConstantOfShape", m.op("Concat", batch, np.array([n, 8, 8]), axis=0)) for n in (2, 1)
    ]
    return m.op("Concat", y[0], x, y[1], axis=-3), 704, ["Pad"]


def concat_of_vectors(m, x):
    pooled = m.op("Flatten", m.op("GlobalAveragePool", x))
    other = m.op("Flatten", m.op("GlobalMaxPool", x))
    return m.op("Concat", pooled, other, axis=-1), 16, [
        "GlobalPool", "MaxPool", "Concat",
    ]  # fmt: skip


def max_pool(m, x):
    y = m.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    return y, 128, ["MaxPool"]


def max_pool_ceil(m, x):
    y = m.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    return y, 128, ["MaxPool"]


def max_pool_ceil_drops_a_window(m, x):
    y = m.op("MaxPool", x, kernel_shape=[2, 2], strides=[3, 3], pads=[1, 1, 1, 1], ceil_mode=1)
    return m.op("GlobalAveragePool", y), 8, ["MaxPool", "GlobalPool"]


def avg_pool(m, x):
    return m.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]), 128, ["AvgPool"]


def avg_pool_uncounted(m, x):
    y = m.op("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    return y, 512, ["AvgPool"]


def avg_pool_counted(m, x):
    y = m.op("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)
    return y, 512, ["AvgPool"]


def avg_pool_ceil(m, x):
    y = m.op("AveragePool", x, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, count_include_pad=1)  # fmt: skip
    return y, 128, ["AvgPool"]


def avg_pool_same(m, x):
    y = m.op("AveragePool", x, kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")
    return y, 128, ["AvgPool"]


def avg_pool_of_one(m, x):
    return m.op("AveragePool", x, kernel_shape=[1, 1]), 512, []


def avg_pool_of_all(m, x):
    return m.op("AveragePool", x, kernel_shape=[8, 8]), 8, ["GlobalPool"]


def global_max_pool(m, x):
    return m.op("GlobalMaxPool", x), 8, ["MaxPool"]


def reduce_mean(m, x):
    return m.op("ReduceMean", x, axes=[2, 3], keepdims=0), 8, ["GlobalPool"]


def reduce_mean_of_merged_axes(m, x):
    y = m.op("Reshape", x, np.array([0, 0, -1]))
    return m.op("ReduceMean", y, axes=[-1], keepdims=1), 8, ["GlobalPool"]


def pad(m, x):
    y = m.op("Pad", x, np.array([0, 1, 1, 2, 0, 0, 3, 0]))
    return y, 9 * 12 * 10, ["Pad"]


def pad_that_cuts(m, x):
    y = m.op("Pad", x, np.array([0, 0, -1, 2, 0, 0, -2, 0]))
    return y, 8 * 5 * 10, ["Slice", "Pad"]


def pad_before_conv(m, x):
    y = m.op("Pad", x, np.array([0, 0, 0, 0, 0, 0, 1, 1]))
    y = m.op("Conv", y, m.weights(4, 8, 3, 3), strides=[2, 2])
    return y, 64, ["Conv"]


def slices(m, x):
    big = np.iinfo(np.int64).max
    y = m.op("Slice", x, np.array([1, 0, -6]), np.array([7, big, big]), np.array([1, 2, 3]),
             np.array([2, 2, 1]))  # fmt: skip
    return y, 3 * 4 * 6, ["Slice", "Slice", "Slice"]


def split(m, x):
    a, b = m.op("Split", x, np.array([2, 6]), outputs=2, axis=1)
    return m.op("Concat", b, a, axis=1), 512, ["Slice", "Slice", "Concat"]


def split_evenly(m, x):
    a, b = m.op("Split", x, outputs=2, axis=1)
    return m.op("Concat", m.op("Relu", b), a, axis=1), 512, ["Slice", "Slice", "relu", "Concat"]


def chunks_as_a_sequence(m, x):
    """torch's newer exporter, unoptimised."""
    parts = m.op("SplitToSequence", x, np.array(4), axis=1)
    a, b = (m.op("SequenceAt", parts, np.array(i)) for i in (0, 1))
    return m.op("Concat", m.op("Relu", b), a, axis=1), 512, ["Slice", "Slice", "relu", "Concat"]


def sequence_of_given_lengths(m, x):
    parts = m.op("SplitToSequence", x, np.array([5, 1, 2]), axis=1)
    return m.op("SequenceAt", parts, np.array(-1)), 128, ["Slice"]


def conv_with_a_bias_of_zeros(m, x):
    y = m.op("Conv", x, m.weights(4, 8, 1, 1), np.zeros(4))
    return m.batch_norm(y, 4), 256, ["Conv", "BatchNorm"]


def gather(m, x):
    y = m.op("Unsqueeze", m.op("Gather", x, np.array(-3), axis=1), np.array([1]))
    return m.op("Concat", y, x, axis=1), 576, ["Slice", "Concat"]


def channel_shuffle(m, x):
    y = m.op("Reshape", x, np.array([0, 2, 4, 8, 8]))
    y = m.op("Reshape", m.op("Transpose", y, perm=[0, 2, 1, 3, 4]), np.array([0, -1, 8, 8]))
    return m.conv(y, 4, 8), 256, ["ChannelShuffle", "Conv"]


def channel_shuffle_then_halves(m, x):
    """ShuffleNetV2, the shuffle still a view where it is split."""
    y = m.op("Reshape", x, np.array([0, 2, 4, 8, 8]))
    y = m.op("Reshape", m.op("Transpose", y, perm=[0, 2, 1, 3, 4]), np.array([0, -1, 8, 8]))
    a, b = m.op("Split", y, outputs=2, axis=1)
    return m.op("Concat", m.op("Relu", b), a, axis=1), 512, [
        "ChannelShuffle", "Slice", "Slice", "relu", "Concat",
    ]  # fmt: skip


def halves_as_an_axis(m, x):
    y = m.op("Reshape", x, np.array([0, 2, 4, 8, 8]))
    y = m.op("Gather", y, np.array(1), axis=1)
    return m.op("Relu", y), 256, ["Slice", "relu"]


def transposed_to_nhwc(m, x):
    y = m.op("Relu", m.op("Transpose", x, perm=[0, 2, 3, 1]))
    y = m.op("Concat", y, m.op("Pad", y, np.array([0, 0, 0, 0, 0, 0, 0, 1])), axis=3)
    return m.op("Add", y, m.weights(17)), 17 * 64, ["relu", "Pad", "Concat", "Conv"]


def there_and_back(m, x):
    y = m.op("Relu", m.op("Transpose", x, perm=[0, 2, 3, 1]))
    return m.conv(m.op("Transpose", y, perm=[0, 3, 1, 2]), 4, 8), 256, ["relu", "Conv"]


def squeezed(m, x):
    y = m.op("Squeeze", m.op("GlobalAveragePool", x), np.array([2, 3]))
    return m.op("Unsqueeze", y, np.array([-1])), 8, ["GlobalPool"]


def expanded(m, x):
    return m.op("Expand", m.op("Relu", x), np.array([1, 8, 8, 8])), 512, ["relu"]


def matmul_and_bias(m, x):
    y = m.op("MatMul", m.op("Flatten", x), m.weights(512, 8))
    return m.op("Add", y, m.weights(8)), 8, ["Dense"]


def gemm_alpha_beta(m, x):
    y = m.op("Gemm", m.op("Flatten", x), m.weights(8, 512), m.weights(8), alpha=0.5, beta=2.0,
             transB=1)  # fmt: skip
    return y, 8, ["Dense"]


def weight_behind_identity(m, x):
    """Shared by two convolutions, behind a Constant and an Identity."""
    tensor = onnx.numpy_helper.from_array(m.rng.normal(size=(8, 8, 1, 1)).astype(np.float32) / 3)
    weight = m.op("Identity", m.op("Constant", value=tensor))
    y = m.op("Relu", m.op("Conv", x, weight))
    return m.op("Conv", y, weight), 512, ["Conv", "relu", "Conv"]


def shape_arithmetic(m, x):
    """What exporters write for `x.view(x.size(0), -1)`."""
    batch = m.op("Gather", m.op("Shape", x), np.array(0), axis=0)
    shape = m.op("Concat", m.op("Unsqueeze", batch, np.array([0])), np.array([-1]), axis=0)
    return m.op("Reshape", x, shape), 512, []


CASES = [
    case for name, case in list(globals().items())
    if callable(case) and getattr(case, "__code__", None) and case.__code__.co_varnames[:2] == ("m", "x")
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_operator_as_onnxruntime_computes_it(case, tmp_path):
    model = Model(opset=24 if case is swish else 17)
    x = model.op("LeakyRelu", model.conv("image", 8, 3, bias=True), alpha=0.5)
    y, features, expected = case(model, x)
    network = compare(model.save(tmp_path / "model.onnx", model.head(y, features)))
    for layer in network.graph.layers:
        if (
            layer.name in network.variables["params"]
            and "bias" in network.variables["params"][layer.name]
        ):
            assert np.any(network.variables["params"][layer.name]["bias"])
    assert kinds(network)[2:-1] == expected


def test_a_convolution_also_read_unscaled_is_not_computed_twice(tmp_path):
    model = Model()
    y, features, _ = conv_raw_and_scaled(model, model.conv("image", 8, 3))
    network = compare(model.save(tmp_path / "model.onnx", model.head(y, features)))
    assert [layer.groups for layer in network.graph.weighted[:-1]] == [1, 1, 8]


def test_every_operator_has_a_case():
    tested = {kind for case in CASES for kind in kinds_of(case)}
    missing = set(OPERATORS) - tested - {"Conv", "Gemm", "Softmax", "LogSoftmax", "Cast"}
    assert not missing


def kinds_of(case):
    model = Model()
    case(model, "image")
    return {node.op_type for node in model.nodes}
