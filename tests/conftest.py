"""Small fixtures shared by the tests, and eight simulated devices for all of them."""

import contextlib
import os

# Before jax starts: the same programs run on one device and on eight.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import numpy as np
import pytest


@contextlib.contextmanager
def compiled_quickly():
    """XLA compiles two to four times as fast, to slower programs, here and in child processes.

    For tests of which steps are taken and what is written. Those of the integers that ship, and
    `test_main`, keep what users get.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            yield
        finally:
            jax.config.update("jax_disable_most_optimizations", before)
            jax.clear_caches()  # no later test takes such a program


@pytest.fixture(scope="module")
def quick_compilation():
    """`compiled_quickly`, for a module."""
    with compiled_quickly():
        yield


@contextlib.contextmanager
def on_one_device():
    """Runs in this process take one of the eight devices, for which programs compile sooner."""
    from lrq_jax.sharding import data_mesh

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrq_jax.quantize.data_mesh", lambda: data_mesh(1))
        yield


@pytest.fixture(scope="module")
def one_device():
    """`on_one_device`, for a module."""
    with on_one_device():
        yield


@pytest.fixture
def rng():
    """Random numbers, the same in every run."""
    return np.random.default_rng(20221113)


@pytest.fixture(scope="session")
def naive_conv2d():
    """A convolution by its definition: one tensordot per output pixel, in the arrays' own type."""

    def convolve(x, kernel, strides=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1), groups=1):
        x = np.pad(x, ((0, 0), *padding, (0, 0)))
        rows, columns, depth, features = kernel.shape
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, (rows, columns), strict=True)]
        starts = [
            [at for at in range(0, n, s) if at + r <= n]
            for n, s, r in zip(x.shape[1:3], strides, reach, strict=True)
        ]
        out = np.zeros(
            (len(x), len(starts[0]), len(starts[1]), features), np.result_type(x, kernel)
        )
        share = features // groups
        for i, top in enumerate(starts[0]):
            for j, left in enumerate(starts[1]):
                patch = x[
                    :, top : top + reach[0] : dilation[0], left : left + reach[1] : dilation[1]
                ]
                for g in range(groups):
                    mine = slice(g * share, (g + 1) * share)
                    part = patch[..., g * depth : (g + 1) * depth]
                    out[:, i, j, mine] = np.tensordot(part, kernel[..., mine], 3)
        return out

    return convolve


TINY_FIELDS = {
    "method.preset": "lrq",
    "method.batch_size": 16,
    "method.attention": "none",  # large kernels take long to compile
    "method.warmup_steps": 2,
    "method.calibration_start": 0,
    "method.calibration_steps": 2,
    "method.generator_width": 16,
    "method.latent_dim": 8,
    "log_every": 1,
    "images_every": 1,
}
"""A run of seconds on `test_steps.tiny_teacher()`."""


def tiny_data(count=37):
    """Labelled 8x8 images, the labels mostly the tiny teacher's own classes."""
    from test_steps import tiny_teacher

    from lrq_jax.data import EvalData
    from lrq_jax.data.pixels import normalise
    from lrq_jax.passes import float_logits

    teacher, rng = tiny_teacher(), np.random.default_rng(5)
    pixels = rng.integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
    images = normalise(pixels, teacher.preprocessing)
    labels = np.asarray(float_logits(teacher.graph, teacher.variables, images)).argmax(-1)
    labels[:3] = (labels[:3] + 1) % 10
    source = tuple(zip(pixels, (int(label) for label in labels), strict=True))
    return EvalData(name="noise", num_examples=count, class_names=None, source=source)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A finished run of seconds through the library: (Quantized, EvalData, steps called back)."""
    from test_steps import tiny_teacher

    from lrq_jax import api

    seen = []
    data = tiny_data()
    with compiled_quickly(), on_one_device():
        result = api.quantize(
            tiny_teacher(),
            preset="lrq",
            weight_bits=3,
            act_bits=5,
            steps=2,
            data=data,
            workdir=tmp_path_factory.mktemp("tiny") / "run",
            fields=TINY_FIELDS,
            callback=seen.append,
            verbose=False,
        )
    return result, data, seen
