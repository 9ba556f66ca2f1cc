"""An exported ONNX file in OpenVINO: close, not exact, since it drops quantizers before additions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from lrq_jax.runtimes.batches import in_batches
from lrq_jax.runtimes.onnx_runtime import nchw
from lrq_jax.writers.extras import require


class OpenVinoRunner:
    """Runs a model of `writers.onnx_model` on the CPU, in float32 where it computes in float.

    Raises:
      ImportError: openvino is missing; names the extra.
      ValueError: it cannot load the file.
    """

    name: ClassVar[str] = "openvino"
    exact: ClassVar[bool] = False

    def __init__(self, model: str | Path, *, threads: int = 0) -> None:
        openvino = require("openvino", extra="openvino")
        self.version = openvino.__version__
        settings = {"INFERENCE_PRECISION_HINT": "f32"}  # it would take bfloat16 by itself
        if threads:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        try:
            self._compiled = openvino.Core().compile_model(str(model), "CPU", settings)
        except RuntimeError as error:
            raise ValueError(
                f"{model}: OpenVINO {self.version} cannot load it ({' '.join(str(error).split())}), "
                "expected a model written by lrq_jax.export"
            ) from error
        image = self._compiled.input(0)
        size = image.get_partial_shape()[0]
        self.fixed_batch = size.get_length() if size.is_static else None
        element = str(image.get_element_type())
        self.input_kind = "uint8" if "u8" in element or "uint8" in element else "float"

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits `[B, K]` of images `[B, H, W, C]`, normalised or raw as `input_kind` says."""
        return in_batches(self._run, images, self.fixed_batch)

    def _run(self, images: np.ndarray) -> np.ndarray:
        fed = images if self.input_kind == "uint8" else nchw(images)
        return np.asarray(self._compiled(fed)[0])

    def codes(self, images: np.ndarray, tensors: Sequence[str]) -> dict[str, np.ndarray]:
        """None: its fused graph keeps no codes."""
        return {}
