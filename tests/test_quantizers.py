"""lrq_jax.quantizers: codes and ranges against numpy versions written from the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrq_jax.quantizers.affine import (
    SMALLEST_RANGE,
    AffineParameters,
    affine_parameters,
    bias_codes,
    dequantize,
    lineage_fake_quant,
    quantize,
    quantize_weight,
    top_code,
    weight_parameters,
)
from lrq_jax.quantizers.ranges import (
    OBSERVERS,
    initial_ranges,
    min_max,
    percentile,
    smallest_error,
    stretched,
    track,
)

BITS = range(2, 9)
_parameters = jax.jit(affine_parameters, static_argnames="bits")
_quantize = jax.jit(quantize, static_argnames="bits")
_bias_codes = jax.jit(bias_codes)
_fake_quant = jax.jit(lineage_fake_quant, static_argnames=("bits", "clip_mask"))


def _ranges(rng, count=300):
    """Random ranges of many sizes and places, and the ones that go wrong."""
    ends = np.sort(
        rng.standard_normal((count, 2)) * 10.0 ** rng.integers(-4, 4, (count, 1)), axis=1
    )
    special = [(0, 0), (0, 1), (-1, 0), (1, 1), (-2, -2), (3, 5), (-5, -3), (1e-12, 2e-12),
               (-1e-12, 0), (0, 1e-8), (-1e-9, 1e-9), (-1, 1e-9), (-1e6, 1e-3), (0, 6)]  # fmt: skip
    low, high = np.concatenate([ends, special]).astype(np.float32).T
    return jnp.asarray(low), jnp.asarray(high)


# ---- affine ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_parameters_of_any_range(bits, rng):
    low, high = _ranges(rng)
    scale, zero_point = (np.float64(p) for p in _parameters(low, high, bits))
    assert top_code(bits) == 2**bits - 1
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    assert ((zero_point >= 0) & (zero_point <= 2**bits - 1)).all()
    np.testing.assert_array_equal(zero_point, np.rint(zero_point))
    np.testing.assert_array_equal(zero_point[np.asarray(low) >= 0], 0)
    negative = (np.asarray(high) <= 0) & (np.asarray(low) <= -SMALLEST_RANGE)
    np.testing.assert_array_equal(zero_point[negative], 2**bits - 1)
    widened = np.maximum(np.maximum(high, 0) - np.minimum(low, 0), SMALLEST_RANGE)
    np.testing.assert_allclose(scale * (2**bits - 1), widened, rtol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_zero_is_exact_and_the_error_inside_the_range_is_half_a_step(bits, rng):
    low, high = _ranges(rng)
    parameters = _parameters(low, high, bits)
    inside = np.linspace(np.minimum(low, 0), np.maximum(high, 0), 203, dtype=np.float32)
    x = jnp.asarray(np.concatenate([inside, 0 * inside[:1]]))
    codes = _quantize(x, parameters, bits)
    values = np.float64(dequantize(codes, parameters))
    scale = np.float64(parameters.scale)
    assert (np.abs(values - np.float64(x)) <= scale * 0.5001).all()
    np.testing.assert_array_equal(values[-1], 0)
    np.testing.assert_array_equal(codes[-1], parameters.zero_point)
    np.testing.assert_array_equal(codes, np.rint(codes))
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    again = _quantize(dequantize(codes, parameters), parameters, bits)
    np.testing.assert_array_equal(again, codes, "quantizing twice must change nothing")


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_codes_saturate_outside_the_range(bits):
    parameters = _parameters(jnp.float32(-1), jnp.float32(3), bits)
    x = jnp.float32([-1e9, -1.6, 5.1, 1e9, -jnp.inf, jnp.inf])
    top = 2**bits - 1
    np.testing.assert_array_equal(_quantize(x, parameters, bits), [0, 0, top, top, 0, top])
    relu = _parameters(jnp.float32(0.5), jnp.float32(3), bits)
    assert _quantize(jnp.float32(-7), relu, bits) == 0, "saturation at zero point 0 is ReLU"


def test_degenerate_ranges_give_finite_codes_and_zero():
    for low, high in ((0, 0), (1e-20, 1e-20), (-1e-20, 0)):
        parameters = _parameters(jnp.float32(low), jnp.float32(high), 4)
        np.testing.assert_allclose(parameters.scale, SMALLEST_RANGE / 15, rtol=1e-6)
        x = jnp.float32([0, 1, -1])
        assert np.isfinite(_quantize(x, parameters, 4)).all()
        assert dequantize(_quantize(x, parameters, 4), parameters)[0] == 0


def test_rounding_is_half_to_even():
    parameters = _parameters(jnp.float32(0), jnp.float32(15), 4)
    x = jnp.float32([0.5, 1.5, 2.5, 3.5, 13.5, 14.5])
    np.testing.assert_array_equal(_quantize(x, parameters, 4), [0, 2, 2, 4, 14, 14])
    # The zero point is added after rounding, as ONNX QuantizeLinear does: evenness is of x/scale.
    shifted = _parameters(jnp.float32(-1), jnp.float32(14), 4)
    np.testing.assert_array_equal(_quantize(x - 1, shifted, 4), [1, 1, 3, 3, 13, 15])
    half = _parameters(jnp.float32(-2.5), jnp.float32(12.5), 4)
    assert half.zero_point == 2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_parameters_and_codes_per_channel_equal_each_channel_alone(bits, rng):
    x = jnp.asarray(rng.standard_normal((7, 5)) * [0.1, 1, 10, 100, 1e-10], jnp.float32)
    together = _quantize(x, _parameters(x.min(0), x.max(0), bits), bits)
    for c in range(5):
        alone = _parameters(x[:, c].min(), x[:, c].max(), bits)
        np.testing.assert_array_equal(together[:, c], _quantize(x[:, c], alone, bits))


def test_gradient_passes_straight_through(rng):
    x = jnp.asarray(rng.standard_normal(50) * 2, jnp.float32)  # some beyond the range
    weights = jnp.asarray(rng.standard_normal(50), jnp.float32)
    parameters = _parameters(jnp.float32(-1), jnp.float32(1.5), 3)
    codes = jax.grad(lambda x: jnp.sum(weights * _quantize(x, parameters, 3)))(x)
    np.testing.assert_allclose(codes, weights / parameters.scale, rtol=1e-6)
    both = jax.jit(
        jax.grad(lambda x: jnp.sum(weights * dequantize(_quantize(x, parameters, 3), parameters)))
    )
    np.testing.assert_allclose(both(x), weights, rtol=1e-6)


# ---- the lineage's fake quantization -----------------------------------------------------------


def _naive_lineage(x, low, high, k, kind):
    """docs/method.md, section 1, in numpy at a chosen precision."""
    x, low, high = (np.asarray(value, kind) for value in (x, low, high))
    n = kind(2**k - 1)
    scale = n / np.maximum(high - low, kind(1e-8))
    zero = np.round(scale * low) + kind(2 ** (k - 1))  # numpy rounds half to even
    codes = np.clip(np.round(scale * x - zero), -(2 ** (k - 1)), 2 ** (k - 1) - 1)
    return (codes + zero) / scale, scale * x - zero


@pytest.mark.parametrize("bits", BITS)
def test_lineage_fake_quant_is_the_formula(bits, rng):
    x = rng.standard_normal((6, 4, 31)).astype(np.float32) * np.float32(
        [[[1]], [[9]], [[1e-3]]] * 2
    )
    low, high = x.min((0, 1)), x.max((0, 1)) * np.float32(0.8)
    low[0], high[1], high[2] = 0.3, -0.2, low[2]  # not containing 0, and empty
    found = lineage_fake_quant(jnp.asarray(x), jnp.asarray(low), jnp.asarray(high), bits)
    same_precision, _ = _naive_lineage(x, low, high, bits, np.float32)
    np.testing.assert_allclose(found, same_precision, rtol=1e-6, atol=1e-12)
    exact, unrounded = _naive_lineage(x, low, high, bits, np.float64)
    # Where float32 can tell which code is nearest; an empty range has a scale of 1e9 codes a unit.
    clear = np.abs(unrounded - np.floor(unrounded) - 0.5) > 1e-3
    clear[..., 2] = False
    assert clear.mean() > 0.9
    np.testing.assert_allclose(np.asarray(found)[clear], exact[clear], rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lineage_fake_quant_takes_at_most_2_to_the_k_values_and_rounds_half_to_even(bits, rng):
    x = jnp.asarray(rng.standard_normal(5000), jnp.float32)
    found = _fake_quant(x, x.min(), x.max(), bits)
    assert len(np.unique(found)) <= 2**bits
    assert np.abs(found - x).max() <= (x.max() - x.min()) / (2**bits - 1) * 1.0001
    top = jnp.float32(2**bits - 1)
    halves = jnp.arange(0.5, float(top), dtype=jnp.float32)
    even = _fake_quant(halves, jnp.float32(0), top, bits)
    np.testing.assert_allclose(even, np.round(np.asarray(halves)), rtol=1e-6)


@pytest.mark.parametrize("clip_mask", [False, True])
def test_lineage_gradient_is_the_identity_or_masked_and_that_of_a_learned_step(clip_mask, rng):
    x = jnp.float32([-3, -1.0001, -1, -0.3, 0, 1.7, 2, 2.0001, 9])
    weights = jnp.asarray(rng.standard_normal(9), jnp.float32)
    low, high = jnp.float32(-1), jnp.float32(2)

    def total(x, low, high):
        return jnp.sum(weights * _fake_quant(x, low, high, 4, clip_mask=clip_mask))

    found, by_low, by_high = jax.grad(total, (0, 1, 2))(x, low, high)
    inside = np.array([0, 0, 1, 1, 1, 1, 1, 0, 0]) if clip_mask else np.ones(9)
    np.testing.assert_allclose(found, weights * inside, rtol=1e-6)
    # y = (code + Z)/S: with the rounding taken as the identity, dy/dS = (x - y)/S, and -y/S
    # where a mask holds the code; S = n/(high - low).
    y = np.asarray(_fake_quant(x, low, high, 4, clip_mask=clip_mask))
    by_width = (np.asarray(y) - np.asarray(x) * inside) / 3.0
    expected = float(np.sum(weights * by_width))
    np.testing.assert_allclose([by_low, by_high], [-expected, expected], rtol=1e-4)
    plain = _fake_quant(x, low, high, 4)
    np.testing.assert_array_equal(plain, y)


def test_affine_gradient_is_that_of_a_learned_step(rng):
    """LSQ, arXiv 1902.08153, equation 3: inside round(v) - v, outside the end; and its mask."""
    x = jnp.asarray(rng.uniform(-4, 8, 40), jnp.float32)
    weights = jnp.asarray(rng.standard_normal(40), jnp.float32)
    scale, zero = 0.37, 3.0

    def total(x, scale):
        parameters = AffineParameters(scale, jnp.float32(zero))
        return jnp.sum(weights * dequantize(quantize(x, parameters, 4, clip_mask=True), parameters))

    by_x, by_scale = jax.grad(total, (0, 1))(x, jnp.float32(scale))
    v = np.asarray(x) / np.float32(scale)
    inside = (v > -zero) & (v < 15 - zero)
    assert 5 < inside.sum() < 35
    np.testing.assert_allclose(by_x, weights * inside, rtol=1e-5)
    expected = np.where(inside, np.rint(v) - v, np.clip(v, -zero, 15 - zero))
    np.testing.assert_allclose(by_scale, np.sum(weights * expected), rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_stretched_range_keeps_its_zero_point(bits, rng):
    for low, high in rng.uniform(-3, 5, (50, 2)):
        limits = {"low": jnp.float32(min(low, high)), "high": jnp.float32(max(low, high))}
        before = affine_parameters(**limits, bits=bits)
        after = affine_parameters(**stretched(limits, jnp.float32(-0.2)), bits=bits)
        assert after.zero_point == before.zero_point
        np.testing.assert_allclose(after.scale, before.scale * np.exp(-0.2), rtol=1e-5)
        same = stretched(limits, jnp.float32(0))
        assert (same["low"], same["high"]) == (limits["low"], limits["high"])


# ---- biases ------------------------------------------------------------------------------------


def test_bias_codes_round_to_even_saturate_and_pass_gradients(rng):
    bias = jnp.float32([0.5, 1.5, 2.5, -0.5, -1.5, 7.49, 1e30, -1e30, 2.0**31])
    expected = np.float32([0, 2, 2, 0, -2, 7, 2**30, -(2**30), 2**30])
    np.testing.assert_array_equal(_bias_codes(bias, jnp.float32(1)), expected)
    gradient = jax.grad(lambda b: jnp.sum(_bias_codes(b, jnp.float32(0.25))))(bias)
    np.testing.assert_array_equal(gradient, [4, 4, 4, 4, 4, 4, 0, 0, 0])
    bias = jnp.asarray(rng.standard_normal(64), jnp.float32)
    scale = jnp.asarray(10.0 ** rng.uniform(-6, -2, 64), jnp.float32)
    codes = _bias_codes(bias, scale)
    np.testing.assert_array_equal(codes, np.rint(np.asarray(bias) / np.asarray(scale)))
    np.testing.assert_array_equal(np.asarray(codes, np.int32).astype(np.float32), codes)


def test_saturated_bias_leaves_room_for_the_accumulator():
    """int32 runtimes wrap around: the largest bias plus a long 8-bit sum must not."""
    largest = int(np.abs(_bias_codes(jnp.float32([3e38, -3e38]), jnp.float32(1e-3))).max())
    longest_sum = 9 * 512 * 255 * 255  # ResNet's last stage at 8 bits
    assert largest + longest_sum < 2**31
    assert largest >= 2**30


# ---- ranges ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_reduce_the_axes_they_are_given(name, rng):
    x = jnp.asarray(rng.standard_normal((3, 4, 5, 6)), jnp.float32)
    observe = OBSERVERS[name]
    for axes, shape in (((0, 1, 2, 3), ()), ((0, 1, 2), (6,)), ((0,), (4, 5, 6))):
        observed = observe(x, axes, 4)
        assert set(observed) == {"low", "high"}
        assert observed["low"].shape == observed["high"].shape == shape
        assert (observed["low"] <= observed["high"]).all()
    per_channel = observe(x, (0, 1, 2), 4)
    for c in range(6):
        alone = observe(x[..., c], (0, 1, 2), 4)
        np.testing.assert_allclose(per_channel["low"][c], alone["low"], rtol=1e-6)
        np.testing.assert_allclose(per_channel["high"][c], alone["high"], rtol=1e-6)


def test_min_max_and_percentile_equal_numpy(rng):
    x = rng.standard_normal((40, 50, 3)).astype(np.float32) ** 3
    found = min_max(jnp.asarray(x), (0, 1), 4)
    np.testing.assert_array_equal(found["low"], x.min((0, 1)))
    np.testing.assert_array_equal(found["high"], x.max((0, 1)))
    for tail in (1e-3, 0.05, 0.0):
        found = percentile(jnp.asarray(x), (0, 1), 4, tail=tail)
        np.testing.assert_allclose(found["low"], np.quantile(x, tail, (0, 1)), rtol=1e-3)
        np.testing.assert_allclose(found["high"], np.quantile(x, 1 - tail, (0, 1)), rtol=1e-3)
    x = jnp.asarray(rng.permutation(100_000), jnp.float32)
    found = percentile(x, (0,), 4)
    assert (x < found["low"]).sum() == (x > found["high"]).sum() == 100


@pytest.mark.parametrize(
    ("bits", "symmetric"), [(2, False), (4, False), (8, False), (7, True), (8, True)]
)
def test_smallest_error_is_the_best_share_of_the_whole_range(bits, symmetric, rng):
    x = rng.standard_normal((3000, 4)).astype(np.float32) ** 3
    x[:, 1] = np.maximum(x[:, 1], 0)
    x[:, 2] = rng.uniform(-1, 2, 3000)
    found = smallest_error(jnp.asarray(x), (0,), bits, symmetric=symmetric)
    for c in range(4):
        errors = {}
        for ratio in np.linspace(1, 0.02, 50, dtype=np.float32):
            low, high = min(ratio * x[:, c].min(), 0), ratio * x[:, c].max()
            step = (high - low) / (2**bits - 1)
            zero = np.rint(-low / step)
            if symmetric:
                step, zero = max(-low, high) / (2 ** (bits - 1) - 1), 2 ** (bits - 1)
            codes = np.clip(np.rint(x[:, c] / step) + zero, int(symmetric), 2**bits - 1)
            errors[ratio] = np.mean(np.abs((codes - zero) * step - x[:, c]) ** 2.4)
        low, high = float(found["low"][c]), float(found["high"][c])
        ratio = min(errors, key=lambda r, high=high, c=c: abs(r * x[:, c].max() - high))
        np.testing.assert_allclose(
            [low, high], ratio * np.array([x[:, c].min(), x[:, c].max()]), rtol=1e-5
        )
        np.testing.assert_allclose(errors[ratio], min(errors.values()), rtol=1e-3)
    # At few bits a heavy tail loses its end.
    assert bits > 4 or found["high"][0] < 0.9 * x[:, 0].max()


def test_initial_ranges_hold_what_is_known():
    state = initial_ranges(("a", "image"), {"image": (-2.5, 2.25), "extra": (0.0, 1.0)})
    assert set(state) == {"activations", "updates"}
    assert {name: (float(r["low"]), float(r["high"])) for name, r in state["activations"].items()} == {
        "a": (0, 0), "image": (-2.5, 2.25), "extra": (0, 1),
    }  # fmt: skip
    assert state["updates"].dtype == jnp.int32
    assert int(state["updates"]) == 0
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state["activations"])} == {"float32"}


@pytest.mark.parametrize("decay", [0.9, 0.5, 0.0])
def test_tracker_is_a_plain_average_started_from_the_first_batch(decay, rng):
    observed = rng.standard_normal((40, 2)).astype(np.float32) * 5 + 20
    # Whatever the state held before, the first batch replaces it: here something absurd.
    state = {"low": jnp.float32(1e6), "high": jnp.float32(jnp.nan)}
    step = jax.jit(track, static_argnames="decay")
    expected = np.float64(observed[0])
    for updates, (low, high) in enumerate(observed):
        batch = {"low": jnp.float32(low), "high": jnp.float32(high)}
        state = step(state, batch, jnp.int32(updates), decay=decay)
        if updates:
            expected = decay * expected + (1 - decay) * np.float64([low, high])
        np.testing.assert_allclose([state["low"], state["high"]], expected, rtol=1e-5)
        seen = observed[: updates + 1]
        # No overshoot: an average never leaves what it averages (the lineage's did, 4,000 times).
        assert seen[:, 0].min() * 0.99999 <= state["low"] <= seen[:, 0].max() * 1.00001
        assert seen[:, 1].min() * 0.99999 <= state["high"] <= seen[:, 1].max() * 1.00001


def test_tracker_at_rest_stays():
    state = {"low": jnp.zeros(3), "high": jnp.zeros(3)}
    batch = {"low": jnp.float32([-1, 0, 0.1]), "high": jnp.float32([6, 0.7, 3e4])}
    for updates in range(200):
        state = track(state, batch, jnp.int32(updates), 0.9)
    np.testing.assert_allclose(state["low"], batch["low"], rtol=1e-5)
    np.testing.assert_allclose(state["high"], batch["high"], rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 6, 7, 8])
def test_weights_ship_as_int8_whatever_their_sign(bits, rng):
    """Centred codes fit int8, also reflected by a negative gamma; outliers saturate."""
    x = jnp.asarray(rng.standard_normal((500, 3)) * [1, 5, 0.01] + [0, 3, 0], jnp.float32)
    low, high = 0.7 * x.min(0), 0.7 * x.max(0)
    parameters = weight_parameters(low, high, bits)
    codes = quantize_weight(x, parameters, bits)
    centred = np.asarray(codes - parameters.zero_point)
    assert np.abs(centred).max() <= 127
    assert (np.asarray(codes) >= 0).all()
    assert (np.asarray(codes) <= top_code(bits)).all()
    inside = np.asarray((x >= low) & (x <= high))
    wrong = np.abs(np.asarray(dequantize(codes, parameters)) - np.asarray(x))
    assert (wrong <= 1.001 * np.asarray(parameters.scale))[inside].all()
    if bits >= 7:
        assert np.abs(centred).max() == 2 ** (bits - 1) - 1
        assert (np.asarray(parameters.zero_point) == 2 ** (bits - 1)).all()
    if bits == 7:
        assert 2 * 255 * np.abs(centred).max() <= 32767, "pairs saturate without VNNI"
    if bits < 7:
        plain = affine_parameters(low, high, bits)
        np.testing.assert_array_equal(plain.scale, parameters.scale)
        np.testing.assert_array_equal(codes, quantize(x, plain, bits))
    flat = weight_parameters(jnp.zeros(1), jnp.zeros(1), bits)
    assert (quantize_weight(jnp.zeros((4, 1)), flat, bits) == flat.zero_point).all()


def test_the_search_for_a_range_looks_at_every_channel(rng):
    """Large tensors are thinned out; a channel with other values must not be missed."""
    x = rng.standard_normal((40, 64, 64, 8)).astype(np.float32)
    x[..., 5] *= 50
    found = smallest_error(jnp.asarray(x), (0, 1, 2, 3), 4)
    every = smallest_error(jnp.asarray(x[:4].reshape(-1)[: 2**16]), (0,), 4)
    assert found["high"] > 50
    np.testing.assert_allclose(found["high"] / x.max(), every["high"] / x[:4].max(), atol=0.15)
