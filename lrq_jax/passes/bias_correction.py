"""Takes the mean error that weight quantization makes out of a student's biases."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lrq_jax.graph import layers as L
from lrq_jax.passes.float_forward import Variables
from lrq_jax.passes.kernels import coarse_kernel
from lrq_jax.passes.moments import tensor_moments
from lrq_jax.passes.student import Student


def bias_corrected(student: Student, variables: Variables, teacher: Variables) -> Variables:
    """The variables with biases less the expected error of their layer's quantized kernel.

    `E[y_q - y] = sum over taps and input channels of (w_q - w) E[x]`, with `E[x]` from the batch
    norms' statistics (Nagel et al., arXiv 1906.04721, section 4.2); borders count as if images
    went on. A layer with a batch norm behind it takes the correction in the running mean, another
    in its bias. Layers whose input's mean the statistics do not tell stay as they are, and so do
    those without either place.

    Args:
      student: of the `integer` placement.
      variables: the student's, weights rounded.
      teacher: of the float network it must agree with; kernels of the same meaning.
    """
    moments = tensor_moments(student.graph, teacher)
    params, stats = dict(variables["params"]), dict(variables["batch_stats"])
    for operation in student.operations:
        layer: Any = operation.layer  # with weights, where it has a moment
        moment = moments.get(layer.inputs[0]) if operation.weight_bits else None
        if moment is None:
            continue
        wrong = coarse_kernel(student.spec, variables, operation)
        wrong -= teacher["params"][layer.name]["kernel"]
        error = expected_output(layer, wrong, moment.mean)
        if operation.batch_norm is not None:
            name = operation.batch_norm.name
            stats[name] = {**stats[name], "mean": stats[name]["mean"] + error}
        elif layer.use_bias:
            entry = params[layer.name]
            params[layer.name] = {**entry, "bias": entry["bias"] - error}
    return {**variables, "params": params, "batch_stats": stats}


def expected_output(layer: L.Conv | L.Dense, kernel: jax.Array, mean: jax.Array) -> jax.Array:
    """Mean `[C_out]` of a layer's output without its bias, for an input of mean `[C_in]`."""
    taps = kernel.reshape(-1, *kernel.shape[-2:]).sum(0)  # C_in / groups, C_out
    groups = layer.groups if isinstance(layer, L.Conv) else 1
    mean = mean.reshape(groups, -1)
    taps = taps.reshape(taps.shape[0], groups, -1)
    return jnp.einsum("gi,igo->go", mean, taps).reshape(-1)
