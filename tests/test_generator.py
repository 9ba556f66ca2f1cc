"""lrq_jax.synthesis: the generator and its attention against numpy, and the crop against Pillow."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lrq_jax.synthesis.attention import LongRangeAttention, attention_block, large_kernel_attention
from lrq_jax.synthesis.augmentation import (
    mixup,
    random_resized_crop_flip,
    random_shift_flip,
    swing,
)
from lrq_jax.synthesis.generator import (
    ATTENTION_PLACES,
    CONDITIONINGS,
    Generator,
    GeneratorSpec,
    generate,
    init_generator,
)
from lrq_jax.synthesis.initializers import affine_init, embedding_init, scale_and_bias_init

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = GeneratorSpec(
    image_shape=(8, 12, 3), num_classes=4, attention="none", latent_dim=5, width=6
)
FAST = {"xla_backend_optimization_level": 0}  # these programs run once: compiling them is the cost
_generate = jax.jit(generate, static_argnames="spec", compiler_options=FAST)
_init = jax.jit(init_generator, static_argnames="spec", compiler_options=FAST)


def _count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _key(seed):
    """A key whose numbers take little time to compile."""
    return jax.random.key(seed, impl="rbg")


def _latents(spec, batch=6):
    rng = np.random.default_rng(batch)
    noise = rng.standard_normal((batch, spec.latent_dim)).astype(np.float32)
    return jnp.asarray(noise), jnp.asarray(rng.integers(0, spec.num_classes, batch), jnp.int32)


def _params(spec):
    """Parameters with nothing left at a value that hides it (scale 1, bias 0)."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(init_generator, spec), _key(0))

    def draw(path, leaf):
        center = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        spread = 1 / math.sqrt(math.prod(leaf.shape[:-1])) if leaf.ndim == 4 else 0.4
        return jnp.asarray(center + spread * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


# ---- sizes and initial values ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "size", "conditioning", "parameters"),
    [
        (10, 32, "embedding", 1_052_139),
        (100, 32, "embedding", 1_061_139),
        (1000, 224, "batch_norm", 41_405_315),
    ],
)
def test_parameter_counts_of_the_method(classes, size, conditioning, parameters):
    spec = GeneratorSpec(
        image_shape=(size, size, 3),
        num_classes=classes,
        conditioning=conditioning,
        attention="none",
    )
    init = functools.partial(init_generator, spec)
    assert _count(jax.eval_shape(init, _key(0))) == parameters
    for place in ("before_block1", "after_block1"):
        wider = functools.partial(init_generator, dataclasses.replace(spec, attention=place))
        assert _count(jax.eval_shape(wider, _key(0))) == parameters + 59_264


def test_attention_has_59264_parameters_at_128_channels():
    shapes = jax.eval_shape(
        lambda key: LongRangeAttention().init(key, jnp.zeros((1, 4, 4, 128)))["params"],
        _key(0),
    )
    assert _count(shapes) == 59_264
    assert {name: leaf["kernel"].shape for name, leaf in shapes.items()} == {
        "expand": (1, 1, 128, 128),
        "local": (5, 5, 1, 128),
        "dilated": (7, 7, 1, 128),
        "mix": (1, 1, 128, 128),
        "project": (1, 1, 128, 128),
    }


@pytest.mark.parametrize("shape", [(100, 400), (3, 3, 16, 32), (7, 7, 1, 90)])
def test_initial_values_are_uniform_to_one_over_root_fan_in(shape):
    made = jax.jit(affine_init, static_argnums=1, compiler_options=FAST)(_key(1), shape)
    fan_in = {2: 100, 4: shape[0] * shape[1] * shape[2] if len(shape) == 4 else 0}[len(shape)]
    bound = 1 / math.sqrt(fan_in)
    assert made["bias"].shape == shape[-1:]
    for values in made.values():
        assert np.abs(values).max() <= bound
        assert values.max() > 0.85 * bound
        assert values.min() < -0.85 * bound
        np.testing.assert_allclose(values.std(), bound / math.sqrt(3), rtol=0.2)
        assert abs(values.mean()) < bound / 4
    if len(shape) == 2:
        assert not np.isin(made["bias"], made["kernel"]).all(), "bias and kernel are drawn apart"


def test_embeddings_are_normal_and_norms_start_at_identity():
    table = embedding_init(_key(0), (100, 100))
    np.testing.assert_allclose([table.mean(), table.std()], [0, 1], atol=0.03)
    assert np.abs(table).max() > 3
    norm = scale_and_bias_init(_key(0), (4, 7))
    np.testing.assert_array_equal(norm["scale"], np.ones((4, 7)))
    np.testing.assert_array_equal(norm["bias"], np.zeros((4, 7)))


def _flax_init(spec, key):
    """What a user of Flax would write."""
    noise, labels = jnp.zeros((1, spec.latent_dim)), jnp.zeros((1,), jnp.int32)
    return jax.jit(Generator(spec).init, compiler_options=FAST)(key, noise, labels)["params"]


@pytest.mark.parametrize("init", [_init, _flax_init], ids=["in one draw", "Flax"])
def test_every_layer_of_the_generator_is_initialised_so_and_drawn_apart(init):
    spec = dataclasses.replace(SMALL, attention="after_block1")
    params = init(spec, _key(0))
    again = init(spec, _key(0))
    other = init(spec, _key(1))
    flat = {"dense": params["dense"], **params["attention"]}
    flat |= {name: params[name]["conv"] for name in ("block1", "block2", "to_image")}
    for name, leaf in flat.items():
        bound = 1 / math.sqrt(math.prod(leaf["kernel"].shape[:-1]))
        for values in leaf.values():
            assert np.abs(values).max() <= bound, name
        assert np.abs(leaf["kernel"]).max() > 0.8 * bound, name
    firsts = [float(leaf["kernel"].ravel()[0] * math.sqrt(leaf["kernel"][..., 0].size)) for leaf in flat.values()]  # fmt: skip
    assert len(set(firsts)) == len(firsts)
    assert params["embedding"].shape == (4, 5)
    for name in ("norm0", "norm1", "norm2"):
        assert set(np.unique(params[name]["affine"]["scale"])) == {1}
    by_norm = init(dataclasses.replace(SMALL, conditioning="batch_norm"), _key(0))
    assert "embedding" not in by_norm
    assert by_norm["norm1"]["affine"]["scale"].shape == (4, 6)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert not np.array_equal(params["dense"]["kernel"], other["dense"]["kernel"])


# ---- refusals ----------------------------------------------------------------------------------


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match=r"attention: found 'after_block2', expected .*'none'"):
        dataclasses.replace(SMALL, attention="after_block2")
    with pytest.raises(ValueError, match=r"conditioning: found 'concat', expected .*'embedding'"):
        dataclasses.replace(SMALL, conditioning="concat")
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.width = 3
    assert {SMALL: 1}[dataclasses.replace(SMALL)] == 1


# ---- a second version in numpy -----------------------------------------------------------------

SAME = ((1, 1), (1, 1))


def _affine(convolve, x, leaf, **window):
    return convolve(x, np.float64(leaf["kernel"]), **window) + np.float64(leaf["bias"])


def _naive_lka(convolve, params, x):
    """attn = dw5x5(pad 2) -> dw7x7(dilation 3, pad 9) -> 1x1; out = x * attn."""
    channels = x.shape[-1]
    y = _affine(convolve, x, params["local"], padding=((2, 2), (2, 2)), groups=channels)
    y = _affine(convolve, y, params["dilated"], padding=((9, 9), (9, 9)), dilation=(3, 3), groups=channels)  # fmt: skip
    return x * _affine(convolve, y, params["mix"])


def _naive_attention(convolve, params, x):
    """out = x + conv1x1(LKA(gelu(conv1x1(x)))), exact GELU."""
    y = _affine(convolve, x, params["expand"])
    y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    return x + _affine(convolve, _naive_lka(convolve, params, y), params["project"])


def _naive_norm(x, eps, affine, labels):
    rows = x.reshape(-1, x.shape[-1])
    x = (x - rows.mean(0)) / np.sqrt(rows.var(0) + eps)
    if affine is None:
        return x
    scale, bias = np.float64(affine["scale"]), np.float64(affine["bias"])
    if scale.ndim == 2:
        scale, bias = (table[labels][:, None, None] for table in (scale, bias))
    return x * scale + bias


def _naive_generator(convolve, spec, params, noise, labels):
    """docs/method.md, section 2."""
    noise, labels = np.float64(noise), np.asarray(labels)

    def norm(name, x, eps):
        return _naive_norm(x, eps, params[name]["affine"], labels)

    def block(number, x):
        x = _affine(convolve, x, params[f"block{number}"]["conv"], padding=SAME)
        x = norm(f"norm{number}", x, 0.8)
        return np.where(x > 0, x, 0.2 * x)

    def up(x):
        return x.repeat(2, axis=1).repeat(2, axis=2)

    h = noise
    if spec.conditioning == "embedding":
        h = np.float64(params["embedding"])[labels] * noise
    x = h @ np.float64(params["dense"]["kernel"]) + np.float64(params["dense"]["bias"])
    x = x.reshape(len(x), spec.image_shape[0] // 4, spec.image_shape[1] // 4, spec.width)
    x = up(norm("norm0", x, 1e-5))
    if spec.attention in ("before_block1", "replace_block1"):
        x = _naive_attention(convolve, params["attention"], x)
    if spec.attention != "replace_block1":
        x = block(1, x)
    if spec.attention == "after_block1":
        x = _naive_attention(convolve, params["attention"], x)
    x = block(2, up(x))
    x = _affine(convolve, x, params["to_image"]["conv"], padding=SAME)
    return _naive_norm(np.tanh(x), 1e-5, None, labels)


@pytest.mark.parametrize(
    ("attention", "conditioning"),
    [*((place, "embedding") for place in ATTENTION_PLACES), ("after_block1", "batch_norm")],
)
def test_generator_is_the_method_in_every_placement(attention, conditioning, naive_conv2d):
    spec = dataclasses.replace(SMALL, attention=attention, conditioning=conditioning)
    params = _params(spec)
    noise, labels = _latents(spec)
    images = _generate(spec, params, noise, labels)
    assert images.shape == (6, 8, 12, 3)
    assert images.dtype == jnp.float32
    expected = _naive_generator(naive_conv2d, spec, params, noise, labels)
    np.testing.assert_allclose(images, expected, atol=2e-3)
    names = {"dense", "norm0", "block1", "norm1", "block2", "norm2", "to_image"}
    names |= {"embedding"} if conditioning == "embedding" else set()
    if attention != "none":
        names |= {"attention"}
    if attention == "replace_block1":
        names -= {"block1", "norm1"}
    assert set(params) == names


def _attention_params(rng, channels):
    shapes = jax.eval_shape(LongRangeAttention().init, _key(0), jnp.zeros((1, 4, 4, channels)))
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 5, jnp.float32), shapes["params"]
    )


def test_attention_block_is_its_formula(rng, naive_conv2d):
    x = rng.standard_normal((2, 9, 11, 4)).astype(np.float32)
    params = _attention_params(rng, 4)
    expected = _naive_attention(naive_conv2d, params, np.float64(x))
    np.testing.assert_allclose(jax.jit(attention_block)(params, x), expected, atol=1e-5)
    inner = _naive_lka(naive_conv2d, params, np.float64(x))
    np.testing.assert_allclose(jax.jit(large_kernel_attention)(params, x), inner, atol=1e-5)


def test_attention_sees_11_pixels_each_way_without_holes(rng):
    """2 of the 5x5 and 9 of the dilated 7x7: with dilation 3 after a 5x5 nothing is left out."""
    x = jnp.asarray(rng.standard_normal((1, 41, 41, 3)), jnp.float32)
    params = _attention_params(rng, 3)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(attention_block(params, x)[0, 20, 20])))(x)
    touched = np.abs(gradient[0]).sum(-1) > 0
    rows, columns = np.where(touched)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (9, 31, 9, 31)
    assert touched[9:32, 9:32].all()


# ---- properties of the images ------------------------------------------------------------------


def test_attention_changes_the_images_differently_in_every_place():
    made = []
    for place in ATTENTION_PLACES:
        spec = dataclasses.replace(SMALL, attention=place)
        made.append(np.asarray(_generate(spec, _params(spec), *_latents(spec))))
    for i, one in enumerate(made):
        for other in made[i + 1 :]:
            assert np.abs(one - other).max() > 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_shape": (4, 4, 1)},
        {"image_shape": (28, 20, 4), "conditioning": "batch_norm"},
        {"image_shape": (27, 13, 3)},  # cut out of 28 x 16
        {"image_shape": (1, 2, 1), "conditioning": "batch_norm", "attention": "before_block1"},
    ],
)
def test_images_have_mean_0_and_variance_1_per_channel_at_any_size(changes):
    spec = dataclasses.replace(SMALL, **changes)
    images = _generate(spec, _params(spec), *_latents(spec, batch=8))
    assert images.shape == (8, *spec.image_shape)
    np.testing.assert_allclose(images.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(images.std((0, 1, 2)), 1, atol=2e-3)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_class_and_the_noise_matter_and_every_parameter_learns(conditioning):
    place = "after_block1" if conditioning == "embedding" else "none"
    spec = dataclasses.replace(SMALL, conditioning=conditioning, attention=place)
    params = _params(spec)
    noise, labels = _latents(spec)
    images = _generate(spec, params, noise, labels)
    assert np.abs(images - _generate(spec, params, noise, (labels + 1) % 4)).max() > 0.1
    assert np.abs(images - _generate(spec, params, noise[::-1], labels)).max() > 0.1
    np.testing.assert_array_equal(images, _generate(spec, params, noise, labels))
    # At initialisation only the embedding tells classes apart: the norms' tables start equal.
    equal = {
        name: {"affine": scale_and_bias_init(_key(0), leaf["affine"]["scale"].shape)}
        if name.startswith("norm")
        else leaf
        for name, leaf in params.items()
    }
    moved = _generate(spec, equal, noise, labels) - _generate(spec, equal, noise, (labels + 1) % 4)
    assert (np.abs(moved).max() > 0.1) == (conditioning == "embedding")

    weights = jnp.asarray(np.random.default_rng(0).standard_normal(images.shape), jnp.float32)
    gradients = jax.jit(
        jax.grad(lambda p: jnp.sum(weights * generate(spec, p, noise, labels))),
        compiler_options=FAST,
    )(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        # A bias before a norm is taken off again by the norm's mean.
        cancelled = any(part in name for part in ("block", "dense")) and "bias" in name
        assert cancelled or np.abs(leaf).max() > 1e-4, name


def test_a_permuted_batch_gives_permuted_images():
    """Norms use the batch's statistics and nothing else ties images together."""
    noise, labels = _latents(SMALL)
    params, order = _params(SMALL), np.array([3, 1, 5, 0, 2, 4])
    images = _generate(SMALL, params, noise, labels)
    permuted = _generate(SMALL, params, noise[order], labels[order])
    np.testing.assert_allclose(permuted, images[order], atol=1e-4)
    fewer = _generate(SMALL, params, noise[:3], labels[:3])
    assert np.abs(fewer - images[:3]).max() > 1e-3, "always batch statistics, never running ones"


def test_the_generator_owns_parameters_and_no_running_statistics():
    made = jax.eval_shape(Generator(SMALL).init, _key(0), *_latents(SMALL))
    assert set(made) == {"params"}
    alone = jax.eval_shape(functools.partial(init_generator, SMALL), _key(0))
    assert jax.tree.structure(made["params"]) == jax.tree.structure(alone)


# ---- mixup ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_mixed_images_are_weighted_means_of_pairs(probability, rng):
    images, others = rng.standard_normal((2, 2000, 2, 3, 1)).astype(np.float32)
    mixed, share = map(np.asarray, mixup(_key(0), images, others, probability=probability))
    for image, other, part, found in zip(images, others, share, mixed, strict=True):
        np.testing.assert_allclose(found, part * image + (1 - part) * other, atol=1e-6)
    assert abs(np.mean(share < 1) - probability) < 0.05
    if probability:
        assert abs(np.mean(share[share < 1]) - 1 / 2) < 0.05
        assert abs(np.var(share[share < 1]) - 1 / 12) < 0.01  # of U(0, 1)


# ---- crop and flip -----------------------------------------------------------------------------

_crop = jax.jit(random_resized_crop_flip, static_argnames="smallest_area")


def _ramps(rng, batch, height, width):
    """Images of (row number, column number, texture): the first two tell where pixels came from."""
    images = rng.standard_normal((batch, height, width, 3)).astype(np.float32)
    images[..., 0] = np.arange(height)[:, None]
    images[..., 1] = np.arange(width)
    return images


def _box(image):
    """(top, left, bottom, right, flipped) of the part an output of `_ramps` shows."""
    height, width = image.shape[:2]
    row, column = height // 2, width // 2
    rows, columns = np.float64(image[:, column, 0]), np.float64(image[row, :, 1])
    flipped = columns[column + 1] < columns[column]
    columns = columns[::-1] if flipped else columns
    ends = []
    for ramp, at in ((rows, row), (columns, column)):
        # Output pixel o shows place (o + 1/2) * fraction + corner - 1/2 of the input.
        fraction = (ramp[at + 2] - ramp[at - 2]) / 4
        corner = ramp[at] + 0.5 - (at + 0.5) * fraction
        ends.append((corner, corner + fraction * len(ramp)))
    (top, bottom), (left, right) = ends
    return top, left, bottom, right, flipped


def _naive_crop(image, box):
    """Bilinear resize of the box back to the image's size; pixels repeat beyond the border."""
    height, width = image.shape[:2]
    top, left, bottom, right, flipped = box
    out = np.empty_like(image, np.float64)
    for i in range(height):
        for j in range(width):
            y = top + (i + 0.5) * (bottom - top) / height - 0.5
            x = left + (j + 0.5) * (right - left) / width - 0.5
            value = 0.0
            for row in (math.floor(y), math.floor(y) + 1):
                for column in (math.floor(x), math.floor(x) + 1):
                    weight = (1 - abs(y - row)) * (1 - abs(x - column))
                    inside = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
                    value = value + weight * np.float64(image[inside])
            out[i, j] = value
    return out[:, ::-1] if flipped else out


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 20)])
def test_crops_are_bilinear_crops_as_by_hand_and_as_pillow_makes_them(height, width, rng):
    images = _ramps(rng, 12, height, width)
    out = np.asarray(_crop(_key(0), jnp.asarray(images)))
    assert out.shape == images.shape
    assert out.dtype == np.float32
    for before, after in zip(images, out, strict=True):
        box = top, left, bottom, right, flipped = _box(after)
        np.testing.assert_allclose(after, _naive_crop(before, box), atol=2e-3)
        texture = Image.fromarray(before[..., 2]).resize(
            (width, height), Image.Resampling.BILINEAR,
            box=(max(left, 0), max(top, 0), min(right, width), min(bottom, height)),
        )  # fmt: skip
        pillow = np.asarray(texture)[:, ::-1] if flipped else np.asarray(texture)
        np.testing.assert_allclose(after[..., 2], pillow, atol=5e-3)


@pytest.mark.parametrize("shape", [(16, 16), (14, 18)])
def test_crops_have_the_promised_areas_ratios_places_and_flips(shape, rng):
    count = 600
    images = _ramps(rng, count, *shape)
    out = np.asarray(_crop(_key(7), jnp.asarray(images)))
    top, left, bottom, right, flipped = np.array([_box(image) for image in out]).T
    for low, high, side in ((top, bottom, shape[0]), (left, right, shape[1])):
        assert low.min() > -1e-3
        assert high.max() < side + 1e-3
    height, width = (bottom - top) / shape[0], (right - left) / shape[1]
    area, ratio = height * width, (right - left) / (bottom - top)
    clipped = np.maximum(height, width) > 1 - 1e-4
    # A whole side limits the other: where it does not, the area and the ratio are as drawn.
    area, ratio = (np.where(clipped, middle, drawn) for middle, drawn in ((0.7, area), (1, ratio)))
    assert area.min() > 0.5 - 1e-3
    assert ratio.min() > 3 / 4 - 1e-3
    assert ratio.max() < 4 / 3 + 1e-3
    np.testing.assert_allclose([area.min(), area.max(), ratio.min(), ratio.max()],
                               [0.5, 1, 3 / 4, 4 / 3], atol=0.06)  # fmt: skip
    if shape[0] == shape[1]:  # else one shape of crop is clipped more often than the other
        assert abs(np.log(ratio).mean()) < 0.03
    assert 0 < clipped.mean() < 0.5
    assert abs(flipped.mean() - 0.5) < 0.07
    room = (~clipped) & (height < 0.9) & (width < 0.9)
    for low, extent, side in ((top, height, shape[0]), (left, width, shape[1])):
        place = low[room] / (side * (1 - extent[room]))
        np.testing.assert_allclose([place.min(), place.mean(), place.max()], [0, 0.5, 1], atol=0.06)
    assert (
        len({tuple(np.round(box, 3)) for box in zip(top, left, bottom, right, strict=True)}) > 590
    )
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.15
    assert abs(np.corrcoef(area, flipped)[0, 1]) < 0.15


def test_area_1_keeps_almost_everything(rng):
    """Only the aspect ratio is left to cut: one side whole, the other at least root(3/4)."""
    images = _ramps(rng, 40, 16, 16)
    out = np.asarray(_crop(_key(2), jnp.asarray(images), smallest_area=1.0))
    for before, after in zip(images, out, strict=True):
        top, left, bottom, right, flipped = _box(after)
        sides = sorted([(bottom - top) / 16, (right - left) / 16])
        assert sides[1] > 1 - 1e-4
        assert sides[0] > math.sqrt(3 / 4) - 1e-4
        shown = after[:, ::-1] if flipped else after
        assert np.abs(shown[..., :2] - before[..., :2]).max() <= 16 * (1 - math.sqrt(3 / 4)) + 1e-3
    whole = [i for i in range(40) if min(_box(out[i])[2] - _box(out[i])[0],
                                         _box(out[i])[3] - _box(out[i])[1]) > 15.8]  # fmt: skip
    for i in whole:
        shown = out[i, :, ::-1] if _box(out[i])[4] else out[i]
        np.testing.assert_allclose(shown[..., :2], images[i, ..., :2], atol=0.2)


def test_crops_differ_by_image_and_by_key_and_repeat_with_it(rng):
    image = rng.standard_normal((1, 16, 16, 3)).astype(np.float32)
    images = jnp.asarray(image.repeat(8, 0))
    out = np.asarray(_crop(_key(0), images))
    for i in range(8):
        for j in range(i):
            assert np.abs(out[i] - out[j]).max() > 0.05
    np.testing.assert_array_equal(out, _crop(_key(0), images))
    assert np.abs(out - _crop(_key(1), images)).max() > 0.05
    constant = _crop(_key(0), jnp.full((8, 12, 12, 1), 3.25))
    np.testing.assert_allclose(constant, 3.25, rtol=1e-6)


def test_crops_are_linear_in_the_image_with_its_gradient(rng):
    x, y = (jnp.asarray(rng.standard_normal((3, 10, 12, 2)), jnp.float32) for _ in "xy")
    weights = jnp.asarray(rng.standard_normal((3, 10, 12, 2)), jnp.float32)
    crop = functools.partial(_crop, _key(4))
    np.testing.assert_allclose(crop(2 * x - y), 2 * crop(x) - crop(y), atol=1e-4)
    gradient = jax.grad(lambda x: jnp.sum(weights * crop(x)))(x)
    assert np.isfinite(gradient).all()
    # <weights, A y> = <A^T weights, y>: the gradient is the transpose of the crop.
    np.testing.assert_allclose(jnp.sum(weights * crop(y)), jnp.sum(gradient * y), rtol=1e-3)


# ---- shift and flip ----------------------------------------------------------------------------


def test_shifts_are_of_whole_pixels_reflected_at_the_edges_and_half_are_mirrored(rng):
    images = rng.standard_normal((64, 16, 24, 3)).astype(np.float32)
    out = np.asarray(jax.jit(random_shift_flip)(_key(0), jnp.asarray(images)))
    found = []
    for before, after in zip(images, out, strict=True):
        for flip, down, right in itertools.product((False, True), range(-2, 3), range(-3, 4)):
            rows = _reflected(np.arange(16) + down, 16)
            columns = _reflected(np.arange(24) + right, 24)
            source = before[:, ::-1] if flip else before
            if np.array_equal(source[rows][:, columns], after):
                found.append((flip, down, right))
    assert len(found) == 64
    assert 16 < sum(flip for flip, *_ in found) < 48
    assert {down for _, down, _ in found} == set(range(-2, 3))
    assert {right for *_, right in found} == set(range(-3, 4))


def test_a_swing_moves_a_batch_alike_by_up_to_its_reach_and_reflects_the_edges(rng):
    maps = rng.standard_normal((3, 5, 7, 2)).astype(np.float32)
    found = set()
    for seed in range(40):
        moved = np.asarray(swing(_key(seed), jnp.asarray(maps), reach=1))
        places = [
            (down, right)
            for down, right in itertools.product((-1, 0, 1), repeat=2)
            if np.array_equal(
                maps[:, _reflected(np.arange(5) + down, 5)][
                    :, :, _reflected(np.arange(7) + right, 7)
                ],
                moved,
            )
        ]
        assert len(places) == 1
        found.update(places)
    assert len(found) == 9
    np.testing.assert_array_equal(swing(_key(0), jnp.asarray(maps), reach=0), maps)
    assert swing(_key(0), jnp.ones((1, 1, 1, 1)), reach=1).shape == (1, 1, 1, 1)


def _reflected(places, size):
    """Indices beyond an edge come back, the edge itself not repeated."""
    places = np.abs(places)
    return np.where(places > size - 1, 2 * (size - 1) - places, places)
