"""How images become the input of a network read from an ONNX file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lrq_jax.data import Preprocessing
from lrq_jax.readers.errors import ReaderError
from lrq_jax.readers.onnx_graph import OnnxNetwork


def onnx_preprocessing(network: OnnxNetwork, mean: Sequence[float] | None,
                       std: Sequence[float] | None) -> tuple[Preprocessing, str]:  # fmt: skip
    """Preprocessing of the network behind the file's normalisation, and where it comes from.

    Args:
      network: of `read_onnx`.
      mean, std: how images enter the FILE, in units of pixels scaled to [0, 1]; a normalisation
        inside the file comes after it. None where the file carries all of it.

    Raises:
      ReaderError: no normalisation anywhere, only one of mean and std, or values that cannot be.
    """
    if (mean is None) != (std is None):
        raise ReaderError("found only one of mean and std, expected both or none")
    height, width, channels = network.graph.input_shape
    if height != width:
        raise ReaderError(f"found images of {height} x {width} pixels, expected square ones")
    inside = network.scale is not None
    if mean is None and not inside:
        raise ReaderError(
            "found no normalisation in the file, expected --mean R,G,B --std R,G,B (pixels scaled "
            "to [0, 1]) as the network was trained with; 0,0,0 and 1,1,1 where it takes such pixels"
        )
    scale, shift = np.ones(channels), np.zeros(channels)
    if inside:
        scale, shift = np.asarray(network.scale), np.asarray(network.shift)
    if mean is not None and std is not None:
        first_mean, first_std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
        if max(*mean, *std) > 1 or len(mean) != channels or len(std) != channels:
            raise ReaderError(
                f"found mean {tuple(mean)} and std {tuple(std)}, expected one value for each of "
                f"{channels} channels, in units of pixels scaled to [0, 1]"
            )
        origin = "normalisation: as given"
        if inside:
            origin += ", and then the file's own"
    else:
        # The file reads pixels themselves, of 0 to 1 or of 0 to 255.
        first_mean = np.zeros(channels)
        first_std = np.full(channels, 1 / 255 if network.pixels_255 else 1.0)
        unit = "0 to 255" if network.pixels_255 else "0 to 1"
        origin = f"normalisation: inside the file, for pixels of {unit}"
    # scale * (x - m) / s + shift = (x - mean) / std
    if np.any(scale <= 0):
        raise ReaderError(f"found an image scaled by {scale} in the file, expected positive scales")
    made_std = first_std / scale
    made_mean = first_mean - shift * made_std
    return (
        Preprocessing(mean=tuple(made_mean), std=tuple(made_std), size=height),
        origin,
    )
