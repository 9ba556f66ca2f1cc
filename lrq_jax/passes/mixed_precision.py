"""Mixed precision: which layer's weights get how many bits, under a budget for all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lrq_jax.graph import Graph
from lrq_jax.graph import layers as L
from lrq_jax.passes.float_forward import Variables, float_logits
from lrq_jax.passes.student import Student
from lrq_jax.quantizers.affine import dequantize, quantize_weight, weight_parameters
from lrq_jax.quantizers.ranges import OBSERVERS

CANDIDATES = (2, 3, 4, 5, 6, 8)
"""Bits a layer's weights may get."""

BUDGETS = ("size", "bit_operations")
"""What the bits of all layers together may not exceed."""

Table = dict[str, dict[int, float]]
"""`{layer: {bits: value}}`."""


def sensitivities(student: Student, variables: Variables, images: jax.Array,
                  candidates: Sequence[int] = CANDIDATES) -> Table:  # fmt: skip
    """Harm that each layer's weights do alone, at each number of bits.

    Mean over images of `KL(float network || float network with this one kernel quantized)`, in
    nats (ZeroQ, arXiv 2001.00281, equation 4). Rounding to nearest in the ranges of the student's
    weight observer.

    Args:
      student: whose graph and weight observer are taken; its bits are not.
      variables: `params`, `batch_stats` of the float network.
      images: `[N, H, W, C]` in the network's normalised input space.
      candidates: bits to try.
    """
    logits = jax.jit(
        lambda params: float_logits(student.graph, {**variables, "params": params}, images)
    )
    params, observe = variables["params"], OBSERVERS[student.spec.weight_observer]
    exact = jax.nn.log_softmax(logits(params))
    table: Table = {}
    for layer in student.graph.weighted:
        entry, table[layer.name] = params[layer.name], {}
        for bits in candidates:
            kernel = entry["kernel"]
            limits = observe(kernel, tuple(range(kernel.ndim - 1)), bits)
            parameters = weight_parameters(**limits, bits=bits)
            coarse = dequantize(quantize_weight(kernel, parameters, bits), parameters)
            changed = jax.nn.log_softmax(
                logits({**params, layer.name: {**entry, "kernel": coarse}})
            )
            harm = jnp.mean(jnp.sum(jnp.exp(exact) * (exact - changed), -1))
            table[layer.name][bits] = max(float(harm), 0.0)
    return table


def costs(student: Student, budget: str, candidates: Sequence[int] = CANDIDATES) -> Table:
    """What each layer's weights take of a budget, at each number of bits.

    `size`: weights times bits, in bits. `bit_operations`: multiply-accumulates of an image times
    bits of the weights times bits of the codes they multiply.

    Raises:
      ValueError: an unknown budget.
    """
    if budget not in BUDGETS:
        raise ValueError(f"budget: found {budget!r}, expected one of {BUDGETS}")
    graph, shapes = student.graph, student.graph.variable_shapes()["params"]
    table: Table = {}
    for layer in graph.weighted:
        share = math.prod(shapes[layer.name]["kernel"])
        if budget == "bit_operations":
            share *= _pixels(graph, layer) * student.code_bits[student.origins[layer.inputs[0]]]
        table[layer.name] = {bits: float(share * bits) for bits in candidates}
    return table


def allocate(harm: Table, cost: Table, limit: float) -> dict[str, int]:
    """The bits of each layer with the smallest total harm among those whose cost fits.

    A multiple-choice knapsack, solved exactly as an integer programme (HiGHS, by scipy).

    Args:
      harm: of `sensitivities`.
      cost: of `costs`; the same layers and bits.
      limit: largest total cost.

    Returns:
      `{layer: bits}`.

    Raises:
      ValueError: not even the fewest bits fit.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    least = sum(min(by_bits.values()) for by_bits in cost.values())
    if least > limit:
        raise ValueError(
            f"budget: found a limit of {limit:.6g}, expected at least {least:.6g}, what the fewest "
            "bits everywhere take; raise it or allow fewer bits"
        )
    choices = [(layer, bits) for layer, by_bits in harm.items() for bits in by_bits]
    one_each = np.array([[layer == name for layer, _ in choices] for name in harm], float)
    prices = np.array([cost[layer][bits] for layer, bits in choices])
    found = milp(
        np.array([harm[layer][bits] for layer, bits in choices]),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(prices[None] / limit, -np.inf, 1 + 1e-9),
        ],
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise RuntimeError(f"allocation of bits: {found.message}")
    return {layer: bits for (layer, bits), x in zip(choices, found.x, strict=True) if x > 0.5}


def overrides(bits: Mapping[str, int]) -> tuple[str, ...]:
    """A choice of bits as `QuantSpec.overrides`: `layer=w5`."""
    return tuple(f"{layer}=w{count}" for layer, count in bits.items())


def _pixels(graph: Graph, layer: L.Conv | L.Dense) -> int:
    """Places a kernel is applied at."""
    return math.prod(graph.shapes[layer.name][:-1])
