"""lrq_jax.ops: every fast form against the plain operation, and integers against int64."""

import contextlib
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lrq_jax
from lrq_jax.ops import convolution, depthwise, kernel_gradient, upsample
from lrq_jax.ops.by_platform import by_platform, platform_form, traced_once, tracing_for
from lrq_jax.ops.computed_once import computed_once
from lrq_jax.ops.convolution import conv2d, integer_conv2d, integer_dense
from lrq_jax.ops.depthwise import depthwise_conv
from lrq_jax.ops.division import divide
from lrq_jax.ops.divisors import shares_of
from lrq_jax.ops.pointwise import pointwise_product
from lrq_jax.ops.products import product_of_windows
from lrq_jax.ops.straight_through import clip_inclusive, round_through, straight_through
from lrq_jax.ops.upsample import upsample_conv3x3, upsample_nearest
from lrq_jax.sharding import data_mesh, split_batch

NO_PADDING = ((0, 0), (0, 0))
FAST = {"xla_backend_optimization_level": 0}  # these programs run once: compiling them is the cost


def _normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def _plain(x, kernel, strides=(1, 1), padding=NO_PADDING, dilation=(1, 1), groups=1):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, rhs_dilation=dilation, feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def _assert_same(ours, plain, x, kernel, weights):
    """Asserts equal values and equal gradients of `sum(weights * value)`; returns the value."""

    def value_and_gradients(function, x, kernel):
        value, pullback = jax.vjp(function, x, kernel)
        return value, *pullback(jnp.broadcast_to(weights, value.shape).astype(value.dtype))

    @functools.partial(jax.jit, compiler_options=FAST)
    def both(x, kernel):  # made anew each time: no trace of another platform's form is reused
        return [value_and_gradients(function, x, kernel) for function in (ours, plain)]

    found, expected = both(x, kernel)
    _assert_close(found, expected)
    return found[0]


def _assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-4)


def _lowered(function, platform, *shapes, known=False):
    """The program a platform would run, as text; needs no such device."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    name = "gpu" if platform == "cuda" else platform
    with tracing_for(name) if known else contextlib.nullcontext():
        traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


# ---- depthwise ---------------------------------------------------------------------------------

WINDOWS = {
    "3x3": ((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    "5x5": ((5, 5), (1, 1), ((2, 2), (2, 2)), (1, 1)),
    "7x7 dilation 3": ((7, 7), (1, 1), ((9, 9), (9, 9)), (3, 3)),
    "3x3 stride 2": ((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1)),
    "5x5 stride 2, rest left over": ((5, 5), (2, 2), NO_PADDING, (1, 1)),
    "3x5 dilation 2x4": ((3, 5), (1, 1), ((2, 2), (8, 8)), (2, 4)),
    "TensorFlow's padding": ((3, 3), (2, 2), ((0, 1), (1, 0)), (1, 1)),
    "nothing symmetric": ((2, 4), (3, 1), ((0, 2), (5, 1)), (2, 1)),
    "padding beyond the reach": ((2, 3), (1, 2), ((4, 3), (0, 6)), (1, 1)),
    "one tap": ((1, 1), (2, 3), ((1, 0), (0, 0)), (1, 1)),
}


@pytest.fixture(params=["cpu", "gpu", "tpu"])
def platform(request):
    """All forms of whatever is chosen per platform, run on this machine."""
    with tracing_for(request.param):
        yield request.param


@pytest.mark.parametrize("window", WINDOWS)
def test_depthwise_is_the_grouped_convolution_in_value_and_both_gradients(
    window, platform, rng, naive_conv2d
):
    size, *settings = WINDOWS[window]
    x, kernel = _normal(rng, 2, 13, 12, 5), _normal(rng, *size, 1, 5)
    weights = _normal(rng, 1, 1, 1, 5) + _normal(rng, 2, 1, 1, 1)
    value = _assert_same(
        lambda x, k: depthwise_conv(x, k, *settings),
        lambda x, k: _plain(x, k, *settings, 5),
        x, kernel, weights,
    )  # fmt: skip
    expected = naive_conv2d(np.float64(x), np.float64(kernel), *settings, 5)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-4)


def test_readers_of_a_depthwise_convolution_do_not_compute_it_again_on_a_cpu():
    """Neither of its value nor of its gradient to the images."""
    cpu = jax.devices("cpu")[0]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 8, 8, 16), (3, 3, 1, 16))]
    window = ((1, 1), ((1, 1), (1, 1)), (1, 1))

    def products(readers):
        def function(x, kernel):
            y, pullback = jax.vjp(lambda x: depthwise_conv(x, kernel, *window), x)
            (back,) = pullback(jnp.cos(x))
            return [reader(z) for z in (y, back) for reader in readers]

        with tracing_for("cpu"), jax.default_device(cpu):
            return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]

    one = lambda y: jnp.clip(y, 0.0, 4.0)  # noqa: E731
    other = lambda y: jnp.flip(jnp.where(y > 2.0, y, 1.0), 1)  # noqa: E731
    assert products([one, other]) < 1.3 * products([one])


@pytest.mark.parametrize("window", ["7x7 dilation 3", "nothing symmetric"])
def test_depthwise_forms_of_the_cpu_on_any_machine(window, rng):
    size, *settings = WINDOWS[window]
    x, kernel = _normal(rng, 2, 13, 12, 3), _normal(rng, *size, 1, 3)

    @functools.partial(jax.jit, compiler_options=FAST)
    def both(x, kernel):
        value, pullback = jax.vjp(lambda x, k: depthwise._grouped(x, k, *settings), x, kernel)
        grad = jnp.cos(value) + 1
        by_hand = (
            depthwise.shifted_products(x, kernel, *settings),
            depthwise._input_gradient(x.shape, kernel, grad, *settings),
            depthwise._kernel_gradient(x, kernel.shape, grad, *settings),
        )
        return by_hand, (value, *pullback(grad))

    _assert_close(*both(x, kernel))


@pytest.mark.parametrize("cached", [1, 60, 1000, 10**6], ids=["row", "rows", "images", "whole"])
def test_the_kernel_gradient_adds_up_its_parts(cached, rng, monkeypatch):
    monkeypatch.setattr(depthwise, "CACHED_VALUES", cached)
    settings = ((2, 1), ((1, 2), (0, 1)), (1, 2))
    x, kernel = _normal(rng, 6, 9, 8, 4), _normal(rng, 3, 3, 1, 4)
    value, pullback = jax.vjp(lambda k: _plain(x, k, *settings, 4), kernel)
    grad = np.asarray(jnp.cos(value))
    found = depthwise._kernel_gradient(jnp.asarray(x), kernel.shape, grad, *settings)
    _assert_close([found], pullback(grad))


def test_depthwise_under_jit_and_vmap(rng):
    settings = ((2, 1), ((1, 2), (0, 1)), (1, 2))
    x, kernel = _normal(rng, 3, 2, 9, 8, 4), _normal(rng, 3, 3, 1, 4)
    function = jax.jit(jax.grad(lambda x, k: jnp.sum(depthwise_conv(x, k, *settings) ** 2), (0, 1)))
    plain = jax.grad(lambda x, k: jnp.sum(_plain(x, k, *settings, 4) ** 2), (0, 1))
    many = jax.vmap(function, (0, None))(x, kernel)
    for i in range(3):
        _assert_close([g[i] for g in many], plain(x[i], kernel))


def test_where_the_platform_is_known_its_form_alone_is_traced():
    traced = []

    def form(name, factor):
        def function(x):
            traced.append(name)
            return factor * x

        return function

    forms = {"cpu": form("cpu", 1.0), "gpu": form("gpu", 2.0), "default": form("default", 3.0)}

    @traced_once()
    def chosen(x):
        return by_platform(**forms)(x) + platform_form(x, **forms, tpu=form("tpu", 4.0))

    for platform, names, value in (
        ("cpu", {"cpu"}, 2.0),
        ("gpu", {"gpu"}, 4.0),
        ("tpu", {"default", "tpu"}, 7.0),
        ("another", {"default"}, 6.0),
    ):
        traced.clear()
        with tracing_for(platform):
            assert jax.grad(chosen)(1.0) == chosen(1.0) == value
        assert set(traced) == names
    traced.clear()  # and none of those traces serves where the platform is not known
    assert "multiply" in _lowered(chosen, "cuda", ())
    assert set(traced) == {"cpu", "gpu", "default", "tpu"}


@pytest.mark.parametrize("known", [True, False], ids=["traced for it alone", "traced for all"])
@pytest.mark.parametrize("target", ["cpu", "cuda", "tpu"])
def test_each_platform_is_lowered_to_its_own_form(target, known, monkeypatch):
    """All grouped convolutions are left on TPUs alone, dilated ones nowhere else, loops on CPUs."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # which takes a batch in parts sooner
    window = ((1, 1), ((2, 2), (2, 2)), (1, 1))

    def depthwise_gradients(x, k):
        return jax.grad(lambda x, k: jnp.sum(depthwise_conv(x, k, *window) ** 2), (0, 1))(x, k)

    def upsample_gradients(x, k):
        return jax.grad(lambda x, k: jnp.sum(upsample_conv3x3(x, k) ** 2), (0, 1))(x, k)

    text = _lowered(depthwise_gradients, target, (2, 6, 6, 4), (5, 5, 1, 4), known=known)
    expected = {"cpu": 0, "cuda": 1, "tpu": 3}[target]  # of a GPU the kernel's gradient
    assert text.count("stablehlo.convolution") == expected
    assert ("stablehlo.while" in text) == (target == "cpu")
    window = ((1, 1), ((9, 9), (9, 9)), (3, 3))
    text = _lowered(depthwise_gradients, target, (2, 6, 6, 4), (7, 7, 1, 4), known=known)
    expected = {"cpu": 0, "cuda": 2, "tpu": 3}[target]  # of a GPU all but the kernel's gradient
    assert text.count("stablehlo.convolution") == expected
    assert (target == "tpu") == (
        "rhs_dilation = array<i64: 3, 3>" in text or "rhs_dilate = [3, 3]" in text
    )

    def convolution_gradients(x, k):
        return jax.grad(lambda x, k: jnp.sum(conv2d(x, k) ** 2), (0, 1))(x, k)

    text = _lowered(convolution_gradients, target, (16, 64, 64, 16), (3, 3, 16, 16), known=known)
    assert text.count("stablehlo.convolution") == (10 if target == "cpu" else 3)
    text = _lowered(upsample_gradients, target, (2, 6, 6, 4), (3, 3, 4, 4), known=known)
    assert text.count("stablehlo.convolution") == (0 if target == "cpu" else 3)
    with jax.default_matmul_precision("highest"):
        text = _lowered(upsample_gradients, target, (2, 6, 6, 4), (3, 3, 4, 4), known=known)
    assert text.count("stablehlo.convolution") == (3 if target == "tpu" else 0)
    text = _lowered(convolution_gradients, target, (2, 6, 6, 27), (3, 3, 27, 3), known=known)
    assert text.count("stablehlo.convolution") == (0 if target == "cuda" else 3)


# ---- upsampling --------------------------------------------------------------------------------


def test_upsample_nearest_repeats_each_pixel(rng):
    x = _normal(rng, 2, 3, 5, 4)
    expected = np.empty((2, 6, 10, 4), np.float32)
    for i in range(6):
        for j in range(10):
            expected[:, i, j] = x[:, i // 2, j // 2]
    np.testing.assert_array_equal(upsample_nearest(jnp.asarray(x)), expected)


@pytest.mark.parametrize("shape", [(2, 4, 6, 3, 5), (1, 1, 1, 2, 1), (3, 5, 2, 1, 4)])
def test_merged_upsampling_is_upsampling_then_convolution(shape, platform, rng, naive_conv2d):
    batch, height, width, channels, features = shape
    x, kernel = _normal(rng, batch, height, width, channels), _normal(rng, 3, 3, channels, features)
    weights = _normal(rng, 1, 2 * height, 2 * width, features)
    same = ((1, 1), (1, 1))
    value = _assert_same(
        upsample_conv3x3,
        lambda x, k: _plain(upsample_nearest(x), k, padding=same),
        x, kernel, weights,
    )  # fmt: skip
    upsampled = np.float64(x).repeat(2, axis=1).repeat(2, axis=2)
    expected = naive_conv2d(upsampled, np.float64(kernel), padding=same)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "fewer"), [(upsample._by_phases, 36 / 16), (upsample._by_differences, 36 / 9)]
)
def test_merged_upsampling_does_fewer_products(form, fewer):
    def products(function):
        program = jax.jit(function).lower(jnp.ones((1, 24, 24, 64)), jnp.ones((3, 3, 64, 64)))
        return program.cost_analysis()["flops"]

    plain = products(lambda x, k: _plain(upsample_nearest(x), k, padding=((1, 1), (1, 1))))
    assert products(form) < plain / fewer * 1.15  # the border and the additions


@pytest.mark.parametrize("size", [32, 224])
def test_merged_upsampling_in_the_generators_blocks(size, platform, rng):
    """Its maps at both image sizes, with few channels: value and gradients."""
    side = size // 4
    same = ((1, 1), (1, 1))
    for scale in (1, 2):
        x = _normal(rng, 1, side * scale, side * scale, 2)
        _assert_same(
            upsample_conv3x3,
            lambda x, k: _plain(upsample_nearest(x), k, padding=same),
            x, 0.3 * _normal(rng, 3, 3, 2, 3), _normal(rng, 1, 1, 1, 3),
        )  # fmt: skip


# ---- conv2d ------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "plain": ((3, 2, 6, 4), {}),
    "everything": (
        (3, 2, 6, 4),
        {"strides": (2, 1), "padding": ((1, 0), (2, 3)), "dilation": (1, 2)},
    ),
    "groups": ((3, 3, 3, 4), {"groups": 2, "padding": ((1, 1), (1, 1))}),
    "depthwise": ((3, 3, 1, 6), {"groups": 6, "strides": (1, 2), "padding": ((0, 1), (1, 1))}),
    "two filters a channel": ((3, 3, 1, 12), {"groups": 6}),
    "few features": ((2, 3, 6, 1), {}),
    "few features padding": ((2, 1, 6, 3), {"padding": ((1, 0), (2, 3))}),
    "few features strides": ((2, 1, 6, 3), {"strides": (1, 2)}),
    "few features dilation": ((2, 1, 6, 3), {"dilation": (2, 1)}),
    "1x1": ((1, 1, 6, 4), {}),
    "1x1 widening": ((1, 1, 6, 9), {}),
    "1x1 strides": ((1, 1, 6, 4), {"strides": (2, 3)}),
    "1x1 padding": ((1, 1, 6, 4), {"padding": ((1, 2), (0, 3))}),
    "1x1 padding of the width": ((1, 1, 6, 4), {"padding": ((0, 0), (2, 0))}),
    "1x1 both": (
        (1, 1, 6, 4),
        {"strides": (3, 2), "padding": ((2, 0), (1, 1)), "dilation": (2, 2)},
    ),
    "1x1 stride beyond the image": ((1, 1, 6, 4), {"strides": (20, 20)}),
    "1x1 groups": ((1, 1, 3, 4), {"groups": 2, "strides": (2, 2)}),
    "1x1 depthwise": ((1, 1, 1, 6), {"groups": 6, "strides": (2, 2)}),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv2d_equals_the_definition_and_its_gradients_the_plain_ones(
    case, platform, rng, naive_conv2d
):
    shape, settings = CONVOLUTIONS[case]
    x, kernel = _normal(rng, 2, 9, 8, 6), _normal(rng, *shape)
    weights = _normal(rng, 2, 1, 1, shape[3])
    value = _assert_same(
        functools.partial(conv2d, **settings),
        functools.partial(_plain, **settings),
        x, kernel, weights,
    )  # fmt: skip
    expected = naive_conv2d(np.float64(x), np.float64(kernel), **settings)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 3, 12])
@pytest.mark.parametrize("features", [3, 6])
@pytest.mark.parametrize("case", ["plain", "everything", "everything without strides", "groups"])
def test_the_kernel_gradient_of_the_cpu_is_the_plain_one(case, features, parts, rng, monkeypatch):
    monkeypatch.setattr(kernel_gradient, "_number_of_parts", lambda batch, values: parts)
    settings = {"strides": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": 1}
    settings |= CONVOLUTIONS[case.removesuffix(" without strides")][1]
    if case.endswith("without strides"):
        settings["strides"] = (1, 1)
    if settings["groups"] == 2:
        features *= 2
    x, kernel = _normal(rng, 12, 9, 8, 6), _normal(rng, 3, 2, 6 // settings["groups"], features)
    expected, pullback = jax.vjp(lambda k: _plain(x, k, **settings), kernel)
    values = (x, kernel, np.asarray(jnp.cos(expected) + 1))
    gradient = jax.jit(lambda *v: kernel_gradient._by_parts(*v, **settings))
    assert gradient.lower(*values).as_text().count("stablehlo.convolution") == parts
    _assert_close([gradient(*values)], pullback(values[2]))


@pytest.mark.parametrize(
    ("batch", "values", "parts"),
    [(64, 2**21, 8), (64, 2**19, 1), (200, 200 * 2**15, 10), (60, 60 * 2**15, 6), (127, 2**22, 1),
     (8, 8 * 2**19, 8), (32, 2**24, 16), (0, 0, 1)],
)  # fmt: skip
def test_a_gradient_has_few_parts_whatever_the_batch(batch, values, parts, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert kernel_gradient._number_of_parts(batch, values) == parts


@pytest.mark.parametrize(
    ("batch", "devices", "shares"), [(64, 8, 8), (12, 8, 4), (7, 8, 1), (200, 3, 1), (5, 1, 1)]
)
def test_shares_of_a_batch_lie_on_one_device_each(batch, devices, shares, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert shares_of(batch) == shares


def _gradient_in_parts(x, grad):
    return kernel_gradient._by_parts(
        x, jnp.zeros((3, 3, 6, 6)), grad, (1, 1), ((1, 1), (1, 1)), (1, 1), 1
    )


def _depthwise_gradient_in_parts(x, grad):
    return depthwise._kernel_gradient(x, (3, 3, 1, 6), grad, (1, 1), ((1, 1), (1, 1)), (1, 1))


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("gradient", [_gradient_in_parts, _depthwise_gradient_in_parts])
def test_devices_keep_their_images_when_a_gradient_is_summed_in_parts(
    gradient, devices, rng, monkeypatch
):
    """They add up sums; a part that took images of one device alone would be sent to the others."""
    monkeypatch.setattr(kernel_gradient, "WHOLE_VALUES", 0)
    monkeypatch.setattr(kernel_gradient, "CACHED_VALUES", 64)
    monkeypatch.setattr(depthwise, "CACHED_VALUES", 64)
    arrays = _normal(rng, 16, 4, 4, 6), _normal(rng, 16, 4, 4, 6)
    expected = jax.jit(gradient)(*arrays)
    split = [jax.device_put(array, split_batch(data_mesh(devices))) for array in arrays]
    program = jax.jit(gradient).lower(*split).compile()
    found = set(
        re.findall(r"all-reduce|all-gather|all-to-all|collective-permute", program.as_text())
    )
    assert found == {"all-reduce"}
    np.testing.assert_allclose(program(*split), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["cpu", "cuda", "tpu"])
def test_a_1x1_convolution_is_a_matrix_product_on_the_cpu_alone(target):
    """XLA aborts where it compiles such products of every other pixel for a GPU (jax 0.11.2)."""
    strided = functools.partial(conv2d, strides=(2, 2))

    def gradients(x, kernel):
        return jax.grad(lambda x, k: jnp.sum(strided(x, k) ** 2), (0, 1))(x, kernel)

    for function in (strided, gradients):
        text = _lowered(function, target, (2, 8, 8, 3), (1, 1, 3, 5))
        assert ("stablehlo.dot_general" in text) == (target == "cpu")
        assert ("stablehlo.convolution" in text) == (target != "cpu")


# ---- exact integers ----------------------------------------------------------------------------

LARGEST = 255 * 255
WINDOW = {"strides": (2, 1), "padding": ((1, 0), (0, 2)), "dilation": (1, 2)}
INTEGERS = {
    # name: input shape, kernel shape, settings, smallest |code|
    "short sum": ((2, 5, 5, 8), (3, 3, 8, 4), {}, 0),
    "long sum": ((1, 4, 4, 512), (3, 3, 512, 3), {"padding": ((1, 1), (1, 1))}, 200),
    "long sum, window": ((1, 5, 4, 300), (3, 2, 300, 3), WINDOW, 200),
    "1x1": ((1, 3, 3, 2000), (1, 1, 2000, 3), {"strides": (2, 2)}, 200),
    "groups": ((1, 4, 4, 800), (3, 3, 400, 4), {"groups": 2, **WINDOW}, 200),
    "one filter a group": ((1, 4, 4, 800), (3, 3, 400, 2), {"groups": 2}, 200),
    "short groups": ((1, 4, 4, 6), (3, 3, 2, 6), {"groups": 3}, 200),
    "depthwise": ((1, 7, 7, 6), (5, 5, 1, 6), {"groups": 6}, 200),
    "one channel over 2^24": ((1, 19, 19, 3), (17, 17, 3, 4), {"padding": ((1, 1), (0, 0))}, 240),
    "depthwise over 2^24": ((1, 19, 20, 2), (17, 18, 1, 2), {"groups": 2}, 240),
}


def _codes(rng, smallest, *shape):
    """Integers mostly of one sign, so that sums are as large as they can be."""
    return rng.integers(smallest, 256, shape) * np.where(rng.random(shape) < 0.01, -1, 1)


def _int32_result(total, bias):
    """float32(int32 accumulator + int32 bias), with the accumulator checked to fit."""
    exact = total + bias
    assert np.abs(exact).max() < 2**31
    return exact.astype(np.float32)


@pytest.mark.parametrize("case", INTEGERS)
def test_integer_convolution_is_exact(case, rng, naive_conv2d):
    image, shape, settings, smallest = INTEGERS[case]
    x, kernel = _codes(rng, smallest, *image), _codes(rng, smallest, *shape)
    bias = rng.integers(-(2**30), 2**30, shape[3])
    bias[:2] = 2**24 + 96, 7  # either is lost if sum and bias are rounded apart
    bias = bias.astype(np.float32)  # what a float32 can hold
    expected = _int32_result(naive_conv2d(x, kernel, **settings), bias.astype(np.int64))
    arguments = (jnp.float32(x), jnp.float32(kernel), jnp.asarray(bias))
    exact = functools.partial(integer_conv2d, largest_product=LARGEST, **settings)
    found = jax.jit(exact)(*arguments)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)


def test_integer_convolution_at_the_largest_sums_there_are():
    for sign in (1, -1):
        x, kernel = jnp.full((1, 3, 3, 512), 255.0), jnp.full((3, 3, 512, 2), sign * 255.0)
        bias = jnp.float32([sign * 2**30, 1])
        found = integer_conv2d(x, kernel, bias, largest_product=LARGEST)  # not under jit
        total = sign * 9 * 512 * LARGEST
        expected = np.float32([total + sign * 2**30, total + 1])
        np.testing.assert_array_equal(found[0, 0, 0], expected)


def test_codes_of_few_bits_take_one_convolution():
    """W4A4 sums fit float32: the price of exactness must then be nothing."""
    shapes = ((1, 4, 4, 512), (3, 3, 512, 8), (8,))
    text = _lowered(functools.partial(integer_conv2d, largest_product=225), "cpu", *shapes)
    assert text.count("stablehlo.convolution") == text.count("call @conv2d") == 1
    text = _lowered(functools.partial(integer_conv2d, largest_product=LARGEST), "cpu", *shapes)
    depth = (2**24 - 1) // (9 * LARGEST)
    assert text.count("call @conv2d") >= -(-512 // depth)


@pytest.mark.parametrize("case", INTEGERS)
def test_integer_convolution_on_gpus_is_no_convolution(case, rng, naive_conv2d):
    """XLA has none of integers there, and cuDNN's of floats may go through fractions (Winograd)."""
    image, shape, settings, smallest = INTEGERS[case]
    exact = functools.partial(integer_conv2d, largest_product=LARGEST, **settings)
    assert "stablehlo.convolution" not in _lowered(exact, "cuda", image, shape, shape[3:])
    x, kernel = _codes(rng, smallest, *image), _codes(rng, smallest, *shape)
    small = np.sign(kernel) * (np.abs(kernel) % 8)  # sums of one product fit
    window = {"strides": (1, 1), "padding": NO_PADDING, "dilation": (1, 1), "groups": 1, **settings}
    found = product_of_windows(jnp.float32(x), jnp.float32(small), **window)
    np.testing.assert_array_equal(found, naive_conv2d(x, small, **settings))


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_the_product_of_windows_is_the_convolution(case, rng):
    shape, settings = CONVOLUTIONS[case]
    x, kernel = _normal(rng, 2, 9, 8, 6), _normal(rng, *shape)
    window = {"strides": (1, 1), "padding": NO_PADDING, "dilation": (1, 1), "groups": 1, **settings}
    _assert_close([product_of_windows(x, kernel, **window)], [_plain(x, kernel, **window)])


@pytest.mark.parametrize("case", ["short sum", "long sum, window", "groups", "depthwise over 2^24"])
def test_integer_convolution_has_the_gradient_of_the_plain_one(case, rng):
    image, shape, settings, smallest = INTEGERS[case]
    x = jnp.float32(_codes(rng, smallest, *image))
    kernel = jnp.float32(_codes(rng, smallest, *shape))
    bias = jnp.float32(rng.integers(-100, 100, shape[3]))
    exact = functools.partial(integer_conv2d, largest_product=LARGEST, **settings)
    size = jax.eval_shape(exact, x, kernel, bias).shape
    weights = jnp.float32(_normal(rng, *size))

    def plain(x, kernel, bias):
        return conv2d(x, kernel, **settings) + bias

    @functools.partial(jax.jit, compiler_options=FAST)
    def both(*arguments):
        return [jax.vjp(function, *arguments)[1](weights) for function in (exact, plain)]

    for one, other in zip(*both(x, kernel, bias), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("depth", "smallest"), [(16, 0), (257, 0), (260, 255), (5000, 200)])
def test_integer_dense_is_exact_with_the_plain_gradient(depth, smallest, rng):
    x, kernel = _codes(rng, smallest, 40, depth), _codes(rng, smallest, depth, 4)
    bias = np.float32([2**24 + 96, -(2**30), 2**30, 7])
    expected = _int32_result(x @ kernel, bias.astype(np.int64))
    arguments = (jnp.float32(x), jnp.float32(kernel), jnp.asarray(bias))
    exact = functools.partial(integer_dense, largest_product=LARGEST)
    np.testing.assert_array_equal(jax.jit(exact)(*arguments), expected)
    weights = jnp.float32(_normal(rng, 40, 4))

    @jax.jit
    def both(*arguments):
        plain = lambda x, k, b: jnp.dot(x, k) + b  # noqa: E731
        return [jax.vjp(function, *arguments)[1](weights) for function in (exact, plain)]

    for one, other in zip(*both(*arguments), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_chunk_is_the_largest_that_stays_exact():
    for term in (1, 225, LARGEST, 9 * LARGEST, 2**23, 2**24 - 1):
        count = convolution._chunk(term)
        assert count * term < 2**24 <= (count + 1) * term
    assert convolution._chunk(2**25) == 1


# ---- division ----------------------------------------------------------------------------------


def _operands(rng):
    """Numbers of many sizes, and scales as they are found in networks."""
    a = rng.standard_normal((4000, 5)) * 10.0 ** rng.integers(-12, 12, (4000, 5))
    b = rng.uniform(0.5, 2, 5) * [1e-9, 1e-3, -0.02, 1, 3e5]
    a[0], a[1] = 0, b * 7  # exact quotients
    return a.astype(np.float32), b.astype(np.float32)


def test_division_is_the_one_of_ieee_754_under_jit_and_broadcasting(platform, rng):
    a, b = _operands(rng)
    fresh = lambda a, b: divide(a, b)  # noqa: E731  (no trace shared between platforms)
    for one, other in ((a, b), (a, b[3]), (b, a[5:]), (a[7, 2], a[9:]), (a, 255), (6.0, b)):
        expected = np.float32(one) / np.float32(other)
        np.testing.assert_array_equal(jax.jit(fresh)(one, other), expected)
    for special in (np.inf, -np.inf, np.nan, 0.0):
        np.testing.assert_array_equal(jax.jit(fresh)(np.float32(special), 3.0), special)


def test_divisions_in_a_row_are_not_merged(platform, rng):
    """XLA's algebra would make `a / (b * c)` of `(a / b) / c`: another float32."""
    a, b = _operands(rng)
    c = np.float32([0.3, 7, 1e-3, 11, 0.9])
    found = jax.jit(lambda a, b, c: (divide(divide(a, b), c), divide(a, divide(b, c))))(a, b, c)
    np.testing.assert_array_equal(found[0], a / b / c)
    np.testing.assert_array_equal(found[1], a / (b / c))


def test_division_has_the_ordinary_gradient(rng):
    a, b = (jnp.asarray(operand) for operand in _operands(rng))
    a, weights = a[2:40], jnp.asarray(_normal(rng, 38, 5))
    ours = jax.jit(jax.grad(lambda a, b: jnp.sum(weights * divide(a, b)), (0, 1)))(a, b)
    plain = jax.jit(jax.grad(lambda a, b: jnp.sum(weights * (a / b)), (0, 1)))(a, b)
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


AWKWARD = np.float32([-0.0, 1e-45, 1e30, -3.4e38, 16777217, 0.1, np.inf, np.nan])


def test_computed_once_changes_no_bit():
    for function in (computed_once, jax.jit(computed_once)):
        for values in (AWKWARD, -AWKWARD):
            found = np.asarray(function(jnp.asarray(values)))
            np.testing.assert_array_equal(found.view(np.uint32), values.view(np.uint32))
    last = np.full(1, 0xFFFFFFFF, np.uint32).view(np.float32)  # a NaN that no arithmetic makes
    assert np.isnan(computed_once(jnp.asarray(last)))
    half = jnp.asarray(AWKWARD, jnp.bfloat16)
    assert computed_once(half) is half


def test_a_depthwise_gradient_has_gradients_of_its_own(platform, rng):
    x, kernel = (jnp.asarray(_normal(rng, *shape)) for shape in ((1, 5, 5, 2), (3, 3, 1, 2)))
    window = ((1, 1), ((1, 1), (1, 1)), (1, 1))

    def steepness(function):
        def squares(x, kernel):
            gradient = jax.grad(lambda x: jnp.sum(function(x, kernel) ** 2))(x)
            return jnp.sum(gradient**2)

        return jax.jit(jax.grad(squares, (0, 1)), compiler_options=FAST)(x, kernel)

    found = steepness(lambda x, k: depthwise_conv(x, k, *window))
    expected = steepness(lambda x, k: _plain(x, k, *window, 2))
    _assert_close([f / 100 for f in found], [e / 100 for e in expected])


def test_the_kernel_gradient_of_a_product_of_pixels_moves_no_map_on_a_cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("XLA's other backends transpose as they like")
    x, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 8, 8, 24), (24, 8)))
    loss = lambda x, k: jnp.sum(jnp.cos(pointwise_product(x, k)))  # noqa: E731
    text = jax.jit(jax.grad(loss, 1)).lower(x, kernel).compile().as_text()
    moved = re.findall(r"f32\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
    assert all(np.prod([int(n) for n in shape.split(",")]) <= 24 * 8 for shape in moved), moved


# ---- straight-through --------------------------------------------------------------------------


def test_straight_through_is_bit_exact_and_the_surrogate_is_not_in_the_value():
    for surrogate in (np.float32(AWKWARD * 0.1), np.full_like(AWKWARD, np.nan)):
        for function in (straight_through, jax.jit(straight_through), jax.vmap(straight_through)):
            found = np.asarray(function(jnp.asarray(AWKWARD), jnp.asarray(surrogate)))
            np.testing.assert_array_equal(found.view(np.uint32), AWKWARD.view(np.uint32))


def test_straight_through_differentiates_the_surrogate_alone(rng):
    x, y = jnp.asarray(_normal(rng, 5)), jnp.asarray(_normal(rng, 5))
    weights = jnp.asarray(_normal(rng, 5))

    def loss(x, y):
        return jnp.sum(weights * straight_through(jnp.floor(x) * 7 + y, jnp.sin(x)))

    for gradient in (jax.grad(loss, (0, 1)), jax.jit(jax.grad(loss, (0, 1)))):
        by_x, by_y = gradient(x, y)
        np.testing.assert_allclose(by_x, weights * jnp.cos(x), rtol=1e-6)
        np.testing.assert_array_equal(by_y, 0)
    value, tangent = jax.jvp(straight_through, (x, y), (weights, 2 * weights))
    np.testing.assert_array_equal(value, x)
    np.testing.assert_array_equal(tangent, 2 * weights)


def test_round_through_rounds_half_to_even_with_gradient_one():
    x = jnp.float32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.4999998, 1e9, -0.3])
    np.testing.assert_array_equal(round_through(x), np.float32([-2, -2, 0, 0, 2, 2, 2, 1e9, 0]))
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(round_through(x)))(x), 1)


def test_private_forms_exist_under_the_names_the_tests_take_them_by():
    assert upsample.conv2d is conv2d


@pytest.mark.parametrize("part", ["ops", "quantizers", "passes"])
def test_what_is_traced_once_is_traced_once_a_platform(part):
    """A trace that plain jit keeps would serve a platform that it holds no form for."""
    whole = {"by_platform.py", "mixed_precision.py"}  # the latter jits a whole program of its own
    files = [p for p in (Path(lrq_jax.__file__).parent / part).glob("*.py") if p.name not in whole]
    assert files
    assert not [path for path in files if "jax.jit" in path.read_text(encoding="utf-8")]


def test_clip_inclusive_clips_with_the_whole_gradient_at_both_ends():
    x = jnp.asarray([-3.0, -2.0, -0.5, 0.0, 1.0, 1.5])
    np.testing.assert_array_equal(clip_inclusive(x, -2.0, 1.0), jnp.clip(x, -2.0, 1.0))
    gradient = jax.grad(lambda v: jnp.sum(clip_inclusive(v, -2.0, 1.0)))(x)
    np.testing.assert_array_equal(gradient, [0, 1, 1, 1, 1, 0])
