"""Runs .tflite files with LiteRT's XNNPACK kernels."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lrq_jax.runtimes.batches import in_batches
from lrq_jax.writers.extras import require
from lrq_jax.writers.tflite_builder import packed, schema
from lrq_jax.writers.tflite_codes import codes_name
from lrq_jax.writers.tflite_model import METADATA


class LiteRTModel:
    """A file of `writers.tflite_model`, loaded.

    Attributes:
      metadata: what was written into the file.
      batch: images a call of the runtime; `run` takes any number.
      tensors: names of all tensors in the file.
    """

    def __init__(self, file: str | Path | bytes, *, threads: int = 1, batch: int | None = None,
                 codes: Iterable[str] = ()) -> None:  # fmt: skip
        """Loads a file.

        Args:
          file: its path or its bytes.
          threads: of the runtime.
          batch: images a call; None for the file's own.
          codes: tensors of the network that `run_with_codes` returns.

        Raises:
          ValueError: bytes that are no .tflite file, or a tensor that is not in it.
          ImportError: the package ai-edge-litert is missing.
        """
        content = file if isinstance(file, bytes) else Path(file).read_bytes()
        if content[4:8] != b"TFL3":
            raise ValueError(
                f"found {len(content)} bytes that are no .tflite file, expected the mark TFL3 at "
                "byte 4"
            )
        model = schema().ModelT.InitFromPackedBuf(content)
        self.metadata = _metadata(model)
        self.tensors = {tensor.name.decode() for tensor in model.subgraphs[0].tensors}
        self._names = tuple(codes)
        if self._names:
            content = _with_outputs(model, [codes_name(name) for name in self._names])
        interpreter = require("ai_edge_litert.interpreter", extra="litert").Interpreter
        self._interpreter = interpreter(model_content=content, num_threads=threads)
        (self._input,) = self._interpreter.get_input_details()
        self.batch = batch or int(self._input["shape"][0])
        if self.batch != self._input["shape"][0]:
            shape = (self.batch, *self._input["shape"][1:])
            self._interpreter.resize_tensor_input(self._input["index"], shape)
        self._interpreter.allocate_tensors()
        self._outputs = self._interpreter.get_output_details()

    @property
    def input_kind(self) -> str:
        """`float`, normalised images, or `uint8`, raw pixels."""
        return "uint8" if np.dtype(self._input["dtype"]) == np.uint8 else "float"

    def run(self, images: np.ndarray) -> np.ndarray:
        """Logits `[N, classes]` of images `[N, H, W, C]` in the file's kind of input."""
        return self._run(images)[0]

    def run_with_codes(self, images: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits, and the named tensors' codes, integers `[N, ...]` in `[0, 2^bits - 1]`."""
        logits, *found = self._run(images)
        codes = {}
        for name, int8, detail in zip(self._names, found, self._outputs[1:], strict=True):
            zero_point = self.metadata["tensors"][name]["zero_point"]
            codes[name] = int8.astype(np.int32) - detail["quantization"][1] + zero_point
        return logits, codes

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        images = np.asarray(images)
        shape, dtype = tuple(self._input["shape"][1:]), np.dtype(self._input["dtype"])
        if images.shape[1:] != shape or images.dtype != dtype:
            raise ValueError(
                f"found images {images.shape} of {images.dtype}, expected [N, "
                f"{', '.join(map(str, shape))}] of {dtype}"
            )
        return in_batches(self._call, images, self.batch)

    def _call(self, images: np.ndarray) -> list[np.ndarray]:
        self._interpreter.set_tensor(self._input["index"], images)
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(detail["index"]) for detail in self._outputs]


class LiteRTRunner:
    """The interface of all runtimes over `LiteRTModel`.

    Raises:
      ImportError: ai-edge-litert is missing; names the extra.
      ValueError: it cannot load the file.
    """

    name: ClassVar[str] = "litert"
    exact: ClassVar[bool] = True

    def __init__(self, file: str | Path, *, threads: int = 1, batch: int | None = None) -> None:
        self._file, self._threads = Path(file), threads
        try:
            self._model = LiteRTModel(self._file, threads=threads, batch=batch)
        except ImportError:
            raise
        except Exception as error:  # flatbuffers and the runtime raise classes of their own
            raise ValueError(
                f"{file}: LiteRT cannot load it ({error}), expected a file written by lrq_jax.export"
            ) from error
        self.input_kind = self._model.input_kind
        self.fixed_batch = self._model.metadata.get("options", {}).get("batch")  # as exported
        self.version = importlib.metadata.version("ai-edge-litert")

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits `[B, K]` of images `[B, H, W, C]`, normalised or raw as `input_kind` says."""
        return self._model.run(images)

    def codes(self, images: np.ndarray, tensors: Sequence[str]) -> dict[str, np.ndarray]:
        """uint8 codes of tensors; those the file does not hold are left out."""
        held = self._model.tensors
        wanted = [name for name in tensors if codes_name(name) in held]
        model = LiteRTModel(self._file, threads=self._threads, codes=wanted)
        return {n: c.astype(np.uint8) for n, c in model.run_with_codes(images)[1].items()}


def _metadata(model: Any) -> dict[str, Any]:
    for entry in model.metadata or ():
        if entry.name.decode() == METADATA:
            return json.loads(bytes(model.buffers[entry.buffer].data))
    return {}


def _with_outputs(model: Any, names: list[str]) -> bytes:
    """The file with further outputs: XNNPACK keeps no other tensor for a caller to read."""
    graph = model.subgraphs[0]
    indices = {tensor.name.decode(): i for i, tensor in enumerate(graph.tensors)}
    missing = [name for name in names if name not in indices]
    if missing:
        known = [name for name in indices if name.endswith(codes_name(""))]
        raise ValueError(f"found no tensors {missing} in the file, expected some of {known}")
    graph.outputs = np.asarray([*graph.outputs, *(indices[name] for name in names)], np.int32)
    model.signatureDefs = []  # one names every output
    return packed(model)
