"""Rounds a student's weights once, before training or instead of it."""

from __future__ import annotations

import jax

from lrq_jax.ops.by_platform import traced_once
from lrq_jax.passes.float_forward import Variables
from lrq_jax.passes.kernels import weight_ranges
from lrq_jax.passes.student import Student
from lrq_jax.quantizers.affine import weight_parameters
from lrq_jax.quantizers.ranges import Range, stretched
from lrq_jax.quantizers.rounding import ROUNDINGS, weight_at_codes


def rounded_weights(student: Student, variables: Variables, rounding: str) -> Variables:
    """The variables with every kernel moved to the codes a rounding chooses.

    Kernels move, so that their nearest codes are those chosen ones: forwards, training and export
    need not know. Their ranges, which an observer finds in the kernels, are held from now on.

    Args:
      student: of the `integer` placement; its weight observer and bits are those of the codes.
      variables: of `Student.initial_variables`.
      rounding: a name in `quantizers.rounding.ROUNDINGS`.

    Raises:
      ValueError: another rounding than `nearest` for a student of the `paper` placement.
    """
    if rounding == "nearest":
        return variables
    if not student.is_integer:
        raise ValueError(
            f"method.rounding: found {rounding!r} for placement {student.spec.placement!r}, "
            "expected 'nearest' there: the others round to the codes of the integer placement"
        )
    variables = with_held_ranges(student, variables)
    quant, params = variables["quant"], dict(variables["params"])
    for operation in student.operations:
        name, bits = operation.layer.name, operation.weight_bits
        if bits:
            limits = stretched(quant["weights"][name], quant["stretch"]["weights"][name])
            kernel = _rounded(params[name]["kernel"], limits, bits=bits, rounding=rounding)
            params[name] = {**params[name], "kernel": kernel}
    return {**variables, "params": params}


def with_held_ranges(student: Student, variables: Variables) -> Variables:
    """The variables with the ranges of all kernels held as they are found in them now, if they
    are not held already: kernels can then move, and their steps do not."""
    quant = variables["quant"]
    held = quant["weights"] or weight_ranges(student.spec, student.operations, variables["params"])
    return {**variables, "quant": {**quant, "weights": held}}


@traced_once(static_argnames=("bits", "rounding"))
def _rounded(kernel: jax.Array, limits: Range, *, bits: int, rounding: str) -> jax.Array:
    parameters = weight_parameters(**limits, bits=bits)
    codes = ROUNDINGS[rounding](kernel, parameters, bits)
    return weight_at_codes(kernel, codes, parameters, bits)
