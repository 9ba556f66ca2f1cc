"""Where two .tflite files of one student differ, to the last bit of a constant."""

from __future__ import annotations

from typing import Any

import numpy as np

from lrq_jax.writers.tflite_builder import schema


def first_difference(found: bytes, expected: bytes) -> str | None:
    """A sentence on the first difference of two files of `writers.tflite_model`, None if there is
    none."""
    if found == expected:
        return None
    try:
        models = [schema().ModelT.InitFromPackedBuf(content) for content in (found, expected)]
        graphs = [model.subgraphs[0] for model in models]
        operators = [[_operator(m, op) for op in m.subgraphs[0].operators] for m in models]
        tensors = [[_tensor(m, t) for t in m.subgraphs[0].tensors] for m in models]
    except Exception as error:  # flatbuffers raise struct.error, IndexError, ...
        return f"not a readable .tflite file: {error}"
    for ends in ("inputs", "outputs"):
        if list(getattr(graphs[0], ends)) != list(getattr(graphs[1], ends)):
            return f"the file's {ends} are not those expected"
    for ours, theirs in zip(*tensors, strict=False):
        for part, value in theirs.items():
            if ours[part] != value:
                return f"tensor {theirs['name']!r}: {part} {_values(part, ours, theirs)}"
    if len(tensors[0]) != len(tensors[1]):
        return f"found {len(tensors[0])} tensors, expected {len(tensors[1])}"
    for index, (ours, theirs) in enumerate(zip(*operators, strict=False)):
        if ours != theirs:
            changed = {key: value for key, value in ours.items() if value != theirs[key]}
            wanted = {key: theirs[key] for key in changed}
            made = tensors[1][theirs["outputs"][0]]["name"]
            return f"operator {index}, of {made!r}: found {changed}, expected {wanted}"
    if len(operators[0]) != len(operators[1]):
        return f"found {len(operators[0])} operators, expected {len(operators[1])}"
    return "not the bytes expected, around the same tensors and operators"


def _operator(model: Any, operator: Any) -> dict[str, Any]:
    options = operator.builtinOptions
    return {
        "kind": model.operatorCodes[operator.opcodeIndex].builtinCode,
        "inputs": list(operator.inputs),
        "outputs": list(operator.outputs),
        "options": {name: np.asarray(value).tolist() for name, value in vars(options).items()}
        if options
        else {},
    }


def _tensor(model: Any, tensor: Any) -> dict[str, Any]:
    meaning, data = tensor.quantization, model.buffers[tensor.buffer].data
    return {
        "name": tensor.name.decode(),
        "shape": tuple(tensor.shape),
        "type": tensor.type,
        "scale": b"" if meaning is None or meaning.scale is None else meaning.scale.tobytes(),
        "zero point": []
        if meaning is None or meaning.zeroPoint is None
        else list(meaning.zeroPoint),
        "data": b"" if data is None else np.asarray(data).tobytes(),
    }


def _values(part: str, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """The first entry that differs."""
    if part not in ("scale", "data"):
        return f"found {ours[part]}, expected {theirs[part]}"
    dtype = np.float32 if part == "scale" else np.uint8
    values = [np.frombuffer(side[part], dtype) for side in (ours, theirs)]
    if values[0].size != values[1].size:
        return f"has {values[0].size} values, expected {values[1].size}"
    index = int((values[0] != values[1]).argmax())
    what = "entry" if part == "scale" else "byte"
    return f"differs: {what} {index} is {values[0][index]} and not {values[1][index]}"
