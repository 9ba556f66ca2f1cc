"""Small fixtures shared by the tests, and eight simulated devices for all of them."""

import os

# Before jax starts: the same programs run on one device and on eight.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import numpy as np
import pytest


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
