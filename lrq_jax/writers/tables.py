"""What an integer student holds, layer by layer and tensor by tensor; and where it runs alike."""

from __future__ import annotations

from typing import Any

import numpy as np

from lrq_jax.passes import Student
from lrq_jax.quantizers.affine import top_code

LARGEST_PAIR = 2**15 - 1
"""x86 CPUs without VNNI add two products of a uint8 and an int8 in int16, and saturate here."""


def layer_table(student: Student, codes: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per layer with weights: bits, numbers of weights and codes, largest product pair."""
    rows = []
    for operation in student.operations:
        if operation.weight_bits is None:
            continue
        stored = codes["weights"][operation.layer.name]
        centred = stored["codes"].astype(np.int32) - stored["zero_point"]
        input_bits = student.code_bits[student.origins[operation.inputs[0]]]
        rows.append(
            {
                "layer": operation.layer.name,
                "kind": type(operation.layer).__name__,
                "shape": list(stored["codes"].shape),
                "weight_bits": operation.weight_bits,
                "input_bits": input_bits,
                "codes_used": int(np.unique(stored["codes"]).size),
                "smallest_weight": int(centred.min()),
                "largest_weight": int(centred.max()),
                "largest_pair": int(2 * top_code(input_bits) * np.abs(centred).max()),
            }
        )
    return rows


def tensor_table(student: Student, codes: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per tensor with codes of its own: bits, scale and zero point."""
    return [
        {
            "tensor": name,
            "bits": bits,
            "scale": float(codes["tensors"][name]["scale"]),
            "zero_point": int(codes["tensors"][name]["zero_point"]),
        }
        for name, bits in student.code_bits.items()
    ]


def float32_bytes(student: Student, codes: dict[str, Any]) -> int:
    """Bytes of the same weights and biases in float32, batch norms folded."""
    stored = codes["weights"].values()
    return 4 * sum(weights["codes"].size + weights["bias"].size for weights in stored)


def is_portable(student: Student, codes: dict[str, Any]) -> bool:
    """Whether x86 CPUs without VNNI give the same integers too: no pair of products saturates,
    whatever the images. So by construction while a layer's weights have up to 7 bits (2*255*63 fits
    int16), or its input does (2*127*127)."""
    return all(row["largest_pair"] <= LARGEST_PAIR for row in layer_table(student, codes))
