"""One row per layer with weights: what it ships as."""

from __future__ import annotations

from typing import Any

import numpy as np

from lrq_jax.passes import Student
from lrq_jax.quantizers.affine import top_code


def layer_rows(student: Student, codes: dict[str, Any]) -> list[dict[str, Any]]:
    """JSON-ready rows of the layers with quantized weights, in order.

    Args:
      student: static description.
      codes: of `writers.codes`, as stored.

    Returns:
      Rows of `layer`; `kind`; `weight_bits`; `output`, the tensor that leaves the layer's fused
      group; `output_bits`, None for float logits; `low` and `high`, the range that tensor can
      hold, in real units (None as above); `codes_used` of the 2^bits weight codes; `bytes`, the
      codes packed at their bits plus scales, zero points and biases; `float_bytes`, the kernel
      and bias in float32.
    """
    rows = []
    for operation in student.operations:
        if operation.weight_bits is None:
            continue
        stored = codes["weights"][operation.layer.name]
        weights, channels = np.asarray(stored["codes"]), np.asarray(stored["scale"]).size
        low, high = _range(student, codes, operation.output, operation.output_bits)
        others = sum(np.asarray(v).nbytes for name, v in stored.items() if name != "codes")
        rows.append(
            {
                "layer": operation.layer.name,
                "kind": type(operation.layer).__name__,
                "weight_bits": operation.weight_bits,
                "output": operation.output,
                "output_bits": operation.output_bits,
                "low": low,
                "high": high,
                "codes_used": int(np.unique(weights).size),
                "bytes": -(-weights.size * operation.weight_bits // 8) + others,
                "float_bytes": 4 * (weights.size + channels),
            }
        )
    return rows


def _range(student: Student, codes: dict[str, Any], tensor: str, bits: int | None) -> tuple[Any, Any]:  # fmt: skip
    """Smallest and largest real value of a tensor's codes; None twice where it has none."""
    if bits is None:
        return None, None
    if not student.is_integer:
        limits = codes["ranges"].get(tensor)
        return (None, None) if limits is None else (_short(limits["low"]), _short(limits["high"]))
    stored = codes["tensors"][tensor]
    scale, zero = float(stored["scale"]), int(stored["zero_point"])
    return _short(-zero * scale), _short((top_code(bits) - zero) * scale)


def _short(value: Any) -> float:
    """Six significant digits: what a reader and a comparison need."""
    return float(f"{float(value):.6g}")
