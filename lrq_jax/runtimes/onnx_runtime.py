"""An exported ONNX file in ONNX Runtime."""

from __future__ import annotations

import collections
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lrq_jax.graph import INPUT
from lrq_jax.runtimes.batches import in_batches
from lrq_jax.writers.extras import require
from lrq_jax.writers.onnx_writer import LOGITS, codes_name

WIDE_PAIRS = ("session.x64quantprecision", "1")
"""The runtime's session option for products wider than int16 where there is no VNNI."""


class OnnxRunner:
    """Runs a model of `writers.onnx_model` on the CPU.

    Args:
      model: a path, or the serialized file.
      threads: of the runtime; 0 takes what it likes.
      wide_pairs: on x86 CPUs without VNNI, kernels that add no products in int16, where they
        saturate; slower there, and the default elsewhere.

    Raises:
      ImportError: onnxruntime is missing; names the extra.
      ValueError: the runtime cannot load the file.
    """

    name: ClassVar[str] = "onnxruntime"
    exact: ClassVar[bool] = True

    def __init__(self, model: str | Path | bytes, *, threads: int = 0,
                 wide_pairs: bool = False) -> None:  # fmt: skip
        self._ort = require("onnxruntime", extra="onnx")
        self._wide_pairs = wide_pairs
        self.version = self._ort.__version__
        self._place = "the ONNX file" if isinstance(model, bytes) else model
        self._model = model if isinstance(model, bytes) else Path(model).read_bytes()
        self._threads = threads
        self._session = self._load(self._model)
        (image,) = self._session.get_inputs()
        self.input_kind = "uint8" if "uint8" in image.type else "float"
        self.fixed_batch = image.shape[0] if isinstance(image.shape[0], int) else None

    def _load(self, model: bytes, optimized: str = "") -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        if self._wide_pairs:
            options.add_session_config_entry(*WIDE_PAIRS)
        if optimized:
            options.optimized_model_filepath = optimized
        try:
            return self._ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class
            raise ValueError(
                f"{self._place}: ONNX Runtime {self.version} cannot load it ({error}), expected a "
                "model written by lrq_jax.export"
            ) from error

    def _feed(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {INPUT: images if self.input_kind == "uint8" else nchw(images)}

    def _run(self, session: Any, outputs: list[str], images: np.ndarray) -> list[np.ndarray]:
        return in_batches(
            lambda some: session.run(outputs, self._feed(some)), images, self.fixed_batch
        )

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits `[B, K]` of images `[B, H, W, C]`, normalised or raw as `input_kind` says."""
        return self._run(self._session, [LOGITS], images)[0]

    def codes(self, images: np.ndarray, tensors: Sequence[str]) -> dict[str, np.ndarray]:
        """uint8 codes of tensors, channels last; those the file does not hold are left out."""
        onnx = require("onnx", extra="onnx")
        model = onnx.load_from_string(self._model)
        held = {name for node in model.graph.node for name in node.output}
        tensors = [name for name in tensors if codes_name(name) in held]
        for name in tensors:
            value = onnx.helper.make_tensor_value_info(
                codes_name(name), onnx.TensorProto.UINT8, None
            )
            model.graph.output.append(value)
        session = self._load(model.SerializeToString())
        found = self._run(session, [codes_name(name) for name in tensors], images)
        return {
            name: np.moveaxis(codes, 1, -1) if codes.ndim == 4 else codes
            for name, codes in zip(tensors, found, strict=True)
        }

    def census(self) -> dict[str, int]:
        """Kinds of operators in what the runtime made of the file, and how many of each."""
        onnx = require("onnx", extra="onnx")
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "optimized.onnx")
            self._load(self._model, optimized=path)
            nodes = onnx.load(path).graph.node
        return dict(collections.Counter(node.op_type for node in nodes).most_common())


def nchw(images: np.ndarray) -> np.ndarray:
    """`[B, H, W, C]` as contiguous `[B, C, H, W]`."""
    return np.ascontiguousarray(np.moveaxis(images, -1, 1))
