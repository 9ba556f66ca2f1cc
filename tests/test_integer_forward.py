"""The integer network against a second one in numpy int64, and the properties it must have."""

import functools
import types
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import (
    GRAPHS,
    calibrated,
    concat_like,
    leaky_like,
    mobilenet_like,
    random_images,
    random_variables,
    resnet_like,
    vgg_like,
)

from lrq_jax.graph import INPUT, GraphBuilder
from lrq_jax.graph import layers as L
from lrq_jax.passes import (
    QuantSpec,
    Student,
    calibrate,
    float_logits,
    freeze,
    student_forward,
)
from lrq_jax.passes.integer_forward import (
    QuantizedWeights,
    _surrogate,
    fused_multiply_add,
    integer_forward,
)
from lrq_jax.passes.student import activation_tables, frozen_logits, quantize_weights
from lrq_jax.quantizers.affine import AffineParameters

f32 = np.float32


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


def naive_activation(layer, real):
    """float32 activations of a tensor that stands alone."""
    hard_sigmoid = np.clip(real + f32(3), f32(0), f32(6)) / f32(6)
    sigmoid = (1 / (1 + np.exp(-real.astype(np.float64)))).astype(f32)
    return {
        "relu": np.where(real < 0, f32(0), real),
        "leaky_relu": np.where(real < 0, real * f32(layer.negative_slope), real),
        "hard_sigmoid": hard_sigmoid,
        "hard_swish": real * hard_sigmoid,
        "sigmoid": sigmoid,
        "silu": real * sigmoid,
    }[layer.kind]


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
    if isinstance(layer, L.Unflatten):
        return x._replace(codes=x.codes.reshape(len(x.codes), 1, 1, -1))
    if isinstance(layer, L.ChannelShuffle):
        parts = np.split(x.codes, layer.groups, axis=-1)
        return x._replace(codes=np.stack(parts, axis=-1).reshape(x.codes.shape))

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
        total = f32(0)
        windows = naive_windows(x.real, *window, 0)
        for i, j in np.ndindex(*layer.window):
            total = total + windows[:, :, :, i, j]
        ones = np.ones_like(x.codes[:1, :, :, :1])
        inside = naive_windows(ones, *window, 1 if layer.count_include_pad else 0)
        value = total / inside.sum((3, 4)).astype(f32) / scale + f32(zero)
        assert value.dtype == f32
        codes = np.clip(np.rint(value), 0, 2**bits - 1).astype(np.int64)
        return Codes(codes, scale, zero, bits)
    if isinstance(layer, L.Activation):
        return requantized(naive_activation(layer, x.real) / scale)
    if isinstance(layer, L.Multiply):
        return requantized(x.real * inputs[1].real / scale)
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
    images = random_images(3)
    assert_same(
        student, all_tensors(student, frozen, images), naive_network(student, frozen, images)
    )


def with_other_scales(student, frozen, seed):
    """The same integers with scales of few decimal digits, under which sums fall on ties and
    codes saturate at both ends, and random zero points where they are not 0."""
    rng = np.random.default_rng(seed)
    digits = np.array([0.01, 0.02, 0.03, 0.05, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5], f32)
    bits = {op.output: op.output_bits for op in student.operations} | {INPUT: 8}
    tensors = {
        name: parameters._replace(
            scale=jnp.float32(rng.choice(digits)),
            zero_point=jnp.float32(
                rng.integers(2 ** bits[name]) if float(parameters.zero_point) else 0
            ),
        )
        for name, parameters in frozen["tensors"].items()
    }
    weights = {
        name: value._replace(
            scale=jnp.asarray(rng.choice(digits, value.scale.shape)),
            bias=jnp.asarray(rng.integers(-60, 60, value.bias.shape), jnp.float32),
        )
        for name, value in frozen["weights"].items()
    }
    tables = activation_tables(student, tensors)
    return {"weights": weights, "tensors": tensors, "tables": tables}


def tied_images(frozen, seed, batch=8):
    """Pixels on, and one unit in the last place beside, the edges between image codes."""
    rng = np.random.default_rng(seed)
    scale, zero = (f32(value) for value in frozen["tensors"][INPUT])
    shape = (batch, 8, 8, 3)
    codes = rng.integers(-3, 258, shape).astype(f32) + f32(0.5) - zero
    edges = codes * scale
    step = rng.integers(-1, 2, shape)
    edges = np.where(step, np.nextafter(edges, np.where(step > 0, f32(9e9), f32(-9e9))), edges)
    return jnp.asarray(edges, jnp.float32)


@pytest.mark.parametrize("build", GRAPHS)
def test_ties_and_saturation_equal_the_naive_network(build):
    student, _, frozen = calibrated(build, 4)
    for seed in range(4):
        other = with_other_scales(student, frozen, seed)
        images = tied_images(other, seed)
        found = all_tensors(student, other, images)
        assert_same(student, found, naive_network(student, other, images))


@pytest.mark.parametrize("build", [mobilenet_like, concat_like])
def test_a_compiler_changes_nothing(build):
    """The integers as arguments of a jitted function, and as constants that it may fold."""
    student, _, frozen = calibrated(build, 8)
    run = jax.jit(functools.partial(all_tensors, student))
    for seed in range(3):
        other = with_other_scales(student, frozen, seed)
        images = tied_images(other, seed)
        expected = naive_network(student, other, images)
        assert_same(student, run(other, images), expected)
    constants = jax.jit(lambda images: all_tensors(student, other, images))
    assert_same(student, constants(images), expected)


def test_sums_beyond_float32_are_exact():
    """Sums of 576 (grouped) and 640 products of 8-bit codes, all near the top: beyond 2^24."""
    net = GraphBuilder("long_sums", input_shape=(4, 4, 128))
    x = net.relu(net.conv(net.image, 40, 3, groups=2, name="conv"), name="relu")
    net.dense(net.flatten(x), 5, name="classifier")
    spec = QuantSpec(weight_bits=8, act_bits=8)
    student = Student(graph=net.build(), spec=spec, input_range=(0.0, 2.55))
    rng = np.random.default_rng(0)

    def weights(*shape):
        codes = jnp.asarray(rng.integers(150, 256, shape), jnp.float32)
        scale = jnp.asarray(rng.uniform(0.009, 0.011, shape[-1]), jnp.float32)
        bias = jnp.asarray(rng.integers(-(2**20), 2**20, shape[-1]), jnp.float32)
        return QuantizedWeights(codes, jnp.zeros(shape[-1]), scale, bias)

    def tensor(scale):
        return AffineParameters(jnp.float32(scale), jnp.float32(0))

    frozen = {
        "weights": {"conv": weights(3, 3, 64, 40), "classifier": weights(640, 5)},
        "tensors": {INPUT: tensor(0.01), "relu": tensor(11.0)},
    }
    images = jnp.asarray(rng.uniform(1.5, 2.55, (3, 4, 4, 128)), jnp.float32)
    expected = naive_network(student, frozen, images)
    for name, source in (("conv", INPUT), ("classifier", "flatten0")):
        kernel = np.asarray(frozen["weights"][name].codes).astype(np.int64)
        sums = naive_sums(student.graph.by_name[name], expected[source].centred, kernel)
        assert sums.max() > 2**24, "the test must reach beyond exact float32 sums"
        assert (sums % 2 == 1).any()
    assert_same(student, all_tensors(student, frozen, images), expected)


def test_fused_multiply_add_rounds_once():
    rng = np.random.default_rng(0)
    n = 250_000

    def signed(low, high):
        return (rng.choice([-1, 1], n) * np.exp(rng.uniform(low, high, n))).astype(f32)

    def odd_mantissas():
        return (rng.integers(2**22, 2**23, n) * 2 + 1).astype(f32)

    code = rng.integers(-256, 257, n).astype(f32)
    ratio = np.abs(signed(-9, 9))
    product = code * ratio
    tied = odd_mantissas() * f32(2**-20)
    cases = {
        "any": (code, ratio, signed(-12, 12)),
        "sums of two codes": (np.abs(code), ratio, np.abs(code[::-1]) * ratio[::-1]),
        "cancellation": (code, ratio, -product),
        # Not of a product of 0: its neighbours are subnormal, which XLA takes for 0.
        "near cancellation": (
            code,
            ratio,
            -np.where(code == 0, 0, np.nextafter(product, signed(80, 81))),
        ),
        "tiny addend decides a tie": (np.full(n, 128 + 1, f32), tied, signed(-60, -20)),
        "tiny addend, any code": (np.abs(code), tied, signed(-40, -10)),
        "tiny product": (code, ratio * f32(2**-30), odd_mantissas()),
        "zero": (np.zeros(n, f32), ratio, signed(-3, 3)),
    }
    compiled = fused_multiply_add
    for name, values in cases.items():
        expected = correct_fma(*values)
        for run in (
            compiled,
            fused_multiply_add.__wrapped__,
        ):  # the other one operation by operation
            wrong = np.count_nonzero(np.asarray(run(*values)) != expected)
            assert wrong == 0, f"{name}: {wrong} of {n} differ"
        for i in range(60):  # the reference itself, against exact fractions
            a, b, c = (Fraction(float(value[i])) for value in values)
            assert nearest_float32(a * b + c) == expected[i], (name, i)


# --- what the frozen integers are ----------------------------------------------------------------


def is_integer(values, low, high):
    values = np.asarray(values)
    return (values == np.rint(values)).all() and (values >= low).all() and (values <= high).all()


@pytest.mark.parametrize("policy", ["U", "R"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("build", GRAPHS)
def test_frozen_numbers_are_integers_of_their_bits(build, bits, policy):
    student, _, frozen = calibrated(build, bits, policy)
    for operation in student.operations:
        if operation.has_weights:
            weights = frozen["weights"][operation.layer.name]
            top = 2 ** (operation.weight_bits or 1) - 1
            assert is_integer(weights.codes, 0, top)
            assert is_integer(weights.zero_point, 0, top)
            assert is_integer(weights.bias, -(2**31), 2**31 - 1)
            assert (np.asarray(weights.scale) > 0).all()
        if operation.output_bits is not None:
            scale, zero = frozen["tensors"][operation.output]
            assert is_integer(zero, 0, 2**operation.output_bits - 1)
            assert float(scale) > 0
            kind = getattr(operation.activation or operation.layer, "kind", None)
            if kind in (*L.RECTIFIERS, *L.GATES):
                assert float(zero) == 0, "what is never negative saturates at 0"
    assert set(frozen["weights"]) == {op.layer.name for op in student.operations if op.has_weights}


def one_convolution(*, use_bias=True, relu=False):
    net = GraphBuilder("one", input_shape=(8, 8, 3))
    x = net.batch_norm(net.conv(net.image, 6, 3, use_bias=use_bias, name="conv"), name="bn")
    x = net.relu(x) if relu else x
    net.dense(net.global_pool(x, name="pool"), 5, name="classifier")
    return net.build()


def folded(gamma, seed=0, *, bits=4, input_scale=0.02):
    """QuantizedWeights of a convolution behind which a batch norm has these gammas."""
    graph = one_convolution()
    spec = QuantSpec(weight_bits=bits, act_bits=bits)
    variables = random_variables(graph, seed)
    variables["params"]["bn"]["scale"] = jnp.asarray(gamma, jnp.float32)
    student = Student(graph=graph, spec=spec, input_range=(-1.0, 1.0))
    variables = student.initial_variables(variables)
    operation = student.operations[0]
    return variables, quantize_weights(operation, variables, spec, jnp.float32(input_scale))


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_a_negative_gamma_reflects_the_code_book(bits):
    gamma = np.linspace(0.3, 1.3, 6)
    signs = np.array([1, -1, 1, -1, -1, 1])
    _, plain = folded(gamma, bits=bits)
    _, mixed = folded(gamma * signs, bits=bits)
    centred = [np.asarray(w.codes - w.zero_point) for w in (plain, mixed)]
    np.testing.assert_array_equal(centred[1], centred[0] * signs)
    np.testing.assert_array_equal(plain.scale, mixed.scale)
    top = 2**bits - 1
    reflected = np.where(signs < 0, top - np.asarray(plain.codes), plain.codes)
    np.testing.assert_array_equal(mixed.codes, reflected)
    reflected = np.where(signs < 0, top - np.asarray(plain.zero_point), plain.zero_point)
    np.testing.assert_array_equal(mixed.zero_point, reflected)


def test_folding_is_exact_arithmetic():
    """The real numbers behind the integers are the float network's, to half a code."""
    variables, weights = folded([0.7, -1.2, 0.4, -0.3, 1.1, 0.9], bits=6)
    bn, stats = variables["params"]["bn"], variables["batch_stats"]["bn"]
    gain, mean = (
        np.asarray(v, np.float64)
        for v in (bn["scale"] / np.sqrt(np.float64(stats["var"]) + 1e-5), stats["mean"])
    )
    kernel = np.asarray(variables["params"]["conv"]["kernel"], np.float64)
    bias = np.asarray(variables["params"]["conv"]["bias"], np.float64)
    scale = np.asarray(weights.scale, np.float64)
    real = np.asarray(weights.codes - weights.zero_point, np.float64) * scale
    span = np.maximum(kernel.max((0, 1, 2)), 0) - np.minimum(kernel.min((0, 1, 2)), 0)
    np.testing.assert_allclose(scale, span / 63 * np.abs(gain), rtol=1e-5)
    inside = np.abs(real - kernel * gain) / scale
    assert inside.max() < 1.001  # the zero point is rounded too, so an end may be a code away
    assert np.mean(inside < 0.5001) > 0.9
    bias = np.asarray(bn["bias"], np.float64) + (bias - mean) * gain
    units = f32(0.02) * scale
    assert np.abs(np.asarray(weights.bias) - bias / units).max() < 0.51


@pytest.mark.parametrize("gamma", [0.0, 1e-12, -1e-12, 1e-30, 1e-42])
def test_a_dead_channel_is_a_constant(gamma):
    """Also where int32 could not hold the bias: it saturated, and the constant was lost."""
    gammas = [0.7, gamma, 1.2, -0.5, gamma, 0.4]
    variables, weights = folded(gammas)
    dead = np.array([1, 4])
    np.testing.assert_array_equal(
        np.asarray(weights.codes)[..., dead],
        np.broadcast_to(np.asarray(weights.zero_point)[dead], (3, 3, 3, 2)),
    )
    assert (np.asarray(weights.scale)[dead] == 1).all()
    constant = np.asarray(variables["params"]["bn"]["bias"])[dead]
    np.testing.assert_array_equal(
        np.asarray(weights.bias)[dead], np.rint(constant / f32(0.02)).astype(f32)
    )
    alive = np.setdiff1d(np.arange(6), dead)
    assert (np.asarray(weights.codes - weights.zero_point)[..., alive] != 0).any((0, 1, 2)).all()


def test_a_kernel_of_zeros_keeps_its_bias():
    graph = vgg_like()
    student = Student(graph=graph, spec=QuantSpec(), input_range=(-2.0, 2.5))
    variables = random_variables(graph)
    first = graph.weighted[0].name
    layer = variables["params"][first]
    layer["kernel"] = layer["kernel"].at[..., 2].set(0)
    layer["bias"] = layer["bias"].at[2].set(0.75)
    variables = student.initial_variables(variables)
    _, variables = calibrate(student, variables, random_images(1))
    output = student.operations[0].output
    real = student_forward(student, variables, random_images(2), (output,))[output]
    step = float(freeze(student, variables)["tensors"][output].scale)
    assert np.abs(np.asarray(real)[..., 2] - 0.75).max() < 0.51 * step + 0.02


# --- properties of the whole ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "bits"), [(resnet_like, 4), (mobilenet_like, 8), (leaky_like, 2), (vgg_like, 4)]
)
def test_the_trained_forward_is_the_frozen_network(build, bits):
    """Jitted training form against integers frozen outside of any jit."""
    student, variables, frozen = calibrated(build, bits)
    output = student.graph.output

    @jax.jit
    def compiled(variables, images):
        logits = student_forward(student, variables, images, (output,))[output]
        return logits, freeze(student, variables)

    images = random_images(5)
    logits, same = compiled(variables, images)
    biases = []
    for name, tensor in frozen["tensors"].items():
        np.testing.assert_array_equal(tensor, same["tensors"][name], err_msg=name)
    for name, weights in frozen["weights"].items():
        other = same["weights"][name]
        np.testing.assert_array_equal(weights.codes, other.codes, err_msg=name)
        np.testing.assert_array_equal(weights.zero_point, other.zero_point, err_msg=name)
        np.testing.assert_array_equal(weights.scale, other.scale, err_msg=name)
        biases.append(np.abs(np.asarray(weights.bias - other.bias)).max())
    # Of `beta - mean*gain` a compiler may make one rounding, and a bias code on an edge then
    # moves by one. Nothing else may differ.
    assert max(biases) <= 1
    expected = np.asarray(frozen_logits(student, frozen, images))
    if max(biases) == 0:
        np.testing.assert_array_equal(logits, expected)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.25, 0.4, 0.5, 0.7])
@pytest.mark.parametrize("clip_mask", [False, True])
@pytest.mark.parametrize("kind", [None, "relu", "relu6"])
def test_gradients_are_masked_where_activations_and_codes_end(kind, clip_mask, scale):
    """To values and to the scale, of 4 bits: up to 0 by a rectifier, from 6 on by ReLU6, whose
    ceiling moves with the scale in codes, and beyond the codes, whichever comes first."""
    activation = None if kind is None else L.Activation(name="a", inputs=("x",), kind=kind)
    operation = types.SimpleNamespace(activation=activation, output_bits=4)
    zero_point = 5 if kind is None else 0
    values = jnp.asarray(
        [-40, -5, -4.9, -1, 0, 0.5, 9.9, 10, 10.1, 11.9, 12, 12.1, 14.9, 15, 15.1, 23.9, 24, 90], jnp.float32
    )  # fmt: skip

    def codes(values, scale):
        parameters = AffineParameters(scale, jnp.float32(zero_point))
        return _surrogate(operation, values, parameters, clip_mask)

    found = jax.jit(jax.jacrev(codes, (0, 1)))(values, jnp.float32(scale))
    expected, to_scale = np.ones(values.size), np.zeros(values.size)
    ceiling = 6 / np.float32(scale)
    for i, value in enumerate(np.asarray(values)):
        if kind is not None and value <= 0:
            expected[i] = 0
        if kind == "relu6" and value >= ceiling:
            expected[i] = 0
            to_scale[i] = -ceiling / scale if ceiling <= 15 or not clip_mask else 0
        if clip_mask and not 0 <= value + zero_point <= 15:
            expected[i] = 0
    np.testing.assert_array_equal(np.diag(found[0]), expected)
    np.testing.assert_allclose(found[1], to_scale, rtol=1e-6)


@pytest.mark.parametrize("build", GRAPHS)
def test_eight_bits_are_near_the_float_network(build):
    """Guards what both integer networks could get wrong alike."""
    student, variables, frozen = calibrated(build, 8)
    images = random_images(1)
    exact = np.asarray(float_logits(student.graph, variables, images))
    found = np.asarray(frozen_logits(student, frozen, images))
    # A wrong fold or zero point is off by the size of the logits; rounding by a few percent.
    assert np.linalg.norm(found - exact) < 0.05 * np.linalg.norm(exact)


def test_an_image_does_not_depend_on_its_batch():
    student, _, frozen = calibrated(mobilenet_like, 4)
    images, others = random_images(7), random_images(8)
    logits = frozen_logits(student, frozen, images)
    for i in range(3):
        mixed = others.at[i].set(images[i])
        np.testing.assert_array_equal(frozen_logits(student, frozen, mixed)[i], logits[i])


def padded_convolution(separate):
    net = GraphBuilder("padded", input_shape=(8, 8, 3))
    x = net.image
    if separate:
        x = net.pad(x, height=(1, 2), width=(0, 1), name="pad")
    padding = 0 if separate else ((1, 2), (0, 1))
    x = net.conv(x, 4, (3, 2), padding=padding, name="conv")
    net.dense(net.flatten(net.relu(x, name="relu")), 5, name="classifier")
    return net.build()


def test_padding_holds_the_zero_point():
    """A convolution's padding, a Pad layer and zeros in the image itself are one thing."""
    students = [
        Student(graph=padded_convolution(separate), spec=QuantSpec(), input_range=(-2.0, 2.5))
        for separate in (False, True)
    ]
    variables = students[0].initial_variables(random_variables(students[0].graph))
    images = random_images(1)
    _, variables = jax.jit(functools.partial(calibrate, students[0]))(variables, images)

    def run(student, images):
        forward = jax.jit(lambda v, x: frozen_logits(student, freeze(student, v), x))
        return forward(variables, images)

    within, apart = (run(student, images) for student in students)
    assert float(freeze(students[0], variables)["tensors"][INPUT].zero_point) > 100
    np.testing.assert_array_equal(within, apart)

    padded = np.pad(images, ((0, 0), (1, 2), (0, 1), (0, 0)))
    net = GraphBuilder("larger", input_shape=padded.shape[1:])
    x = net.relu(net.conv(net.image, 4, (3, 2), padding=0, name="conv"), name="relu")
    net.dense(net.flatten(x), 5, name="classifier")
    larger = Student(graph=net.build(), spec=QuantSpec(), input_range=(-2.0, 2.5))
    np.testing.assert_array_equal(run(larger, jnp.asarray(padded)), within)


def test_unknown_tensors_are_named():
    student, _, frozen = calibrated(vgg_like, 4)
    conv = student.operations[0].layer.name  # its codes are those of the ReLU behind it
    with pytest.raises(ValueError, match=rf"found no tensor \['{conv}'\]"):
        integer_forward(student.operations, frozen, random_images(1), (conv,), input_bits=8)


def test_only_the_integer_placement_freezes():
    graph = vgg_like()
    student = Student(graph=graph, spec=QuantSpec(placement="paper"), input_range=(-2.0, 2.5))
    variables = student.initial_variables(random_variables(graph))
    with pytest.raises(ValueError, match="found placement 'paper', expected 'integer'"):
        freeze(student, variables)
