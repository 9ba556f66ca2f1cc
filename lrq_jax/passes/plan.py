"""Where quantizers sit: the graph regrouped into the operations an integer runtime executes.

A convolution or dense layer takes the batch norm and the ReLU behind it along, an addition its
ReLU; each group makes one tensor of codes. What is left out of the codes is only the logits.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re

from lrq_jax.graph import INPUT, Graph
from lrq_jax.graph import layers as L

LEARNED_STEPS = {
    "none": (),
    "activations": ("activations",),
    "weights": ("weights",),
    "both": ("activations", "weights"),
}
"""Which quantizers' steps are trained, by the name a config gives them."""

PLACEMENTS = ("integer", "paper")
POLICIES = ("U", "R")
_KEEPS_CODES = (L.MaxPool, L.Pad, L.Slice, L.Flatten, L.Unflatten, L.ChannelShuffle)
"""Layers that move codes without changing their meaning: these very types, not their subclasses
(an average pool is a kind of MaxPool and makes new codes)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How a student is quantized; static, hashable.

    Attributes:
      weight_bits, act_bits: bits of weights and of activations after a ReLU, 2 to 8.
      policy: `U`, every layer at those bits; `R`, first and last layer at `edge_bits` weights
        and the last layer's input at 8 bits (BRECQ's convention). Figures of U and R never
        share a column.
      placement: `integer`, exactly the arithmetic integer runtimes execute, or `paper`, fake
        quantization of weights and ReLU outputs as in LRQ's line of work, float elsewhere.
      edge_bits: weight bits of first and last layer under policy R; 7 keeps pairs of products
        inside int16, so that the network runs on x86 CPUs without VNNI.
      boundary_bits: bits of the tensors only an integer network quantizes: the image,
        convolution outputs before an addition, linear bottlenecks, gates, pooled features.
      overrides: per-layer exceptions such as `stage1_*=w6a8` (shell patterns; the last match
        wins; `a` is the bits of the tensor the layer makes).
      weight_observer, act_observer: names in `quantizers.ranges.OBSERVERS`.
      range_decay: of the running average of activation ranges.
      clip_mask: no gradient through saturated activations (LSQ); the lineage has none.
      learned_steps: step sizes trained with the weights (LSQ, arXiv 1902.08153): `none`,
        `activations` (one a tensor), `weights` (one an output channel) or `both`.
    """

    weight_bits: int = 4
    act_bits: int = 4
    policy: str = "U"
    placement: str = "integer"
    edge_bits: int = 7
    boundary_bits: int = 8
    overrides: tuple[str, ...] = ()
    weight_observer: str = "min_max"
    act_observer: str = "min_max"
    range_decay: float = 0.9
    clip_mask: bool = False
    learned_steps: str = "none"

    def __post_init__(self) -> None:
        for name in ("weight_bits", "act_bits", "edge_bits", "boundary_bits"):
            bits = getattr(self, name)
            if bits not in range(2, 9):
                raise ValueError(f"{name}: found {bits}, expected 2 to 8")
        for name, allowed in (
            ("policy", POLICIES),
            ("placement", PLACEMENTS),
            ("learned_steps", tuple(LEARNED_STEPS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: found {getattr(self, name)!r}, expected one of {allowed}"
                )
        for entry in self.overrides:
            _parse_override(entry)

    @property
    def learns_weight_steps(self) -> bool:
        """Whether the weights' step sizes are trained: their ranges then are found once, in the
        teacher's weights, and only gradients change them, as in LSQ."""
        return "weights" in LEARNED_STEPS[self.learned_steps]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """One fused group: `layer`, then `batch_norm`, then `activation`, making tensor `output`.

    `weight_bits` is None without weights; `output_bits` is None for float logits and for
    layers that keep their input's codes.
    """

    layer: L.Layer
    batch_norm: L.BatchNorm | None
    activation: L.Activation | None
    output: str
    weight_bits: int | None
    output_bits: int | None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Tensors the group reads."""
        return self.layer.inputs

    @property
    def has_weights(self) -> bool:
        """True for convolutions, dense layers and batch norms on their own (which run as a
        depthwise convolution of one exact tap)."""
        return isinstance(self.layer, L.Conv | L.Dense | L.BatchNorm)


def plan_quantization(graph: Graph, spec: QuantSpec) -> tuple[Operation, ...]:
    """The operations of the quantized network, in order.

    Raises:
      ValueError: an override that matches no layer.
    """
    operations: list[Operation] = []
    absorbed: set[str] = set()
    first, last = graph.weighted[0].name, graph.weighted[-1].name
    last_input = _origin_of_codes(graph, graph.by_name[last].inputs[0])
    matched: set[str] = set()
    for layer in graph.layers:
        if layer.name in absorbed:
            continue
        batch_norm, activation = _followers(graph, layer)
        absorbed.update(follower.name for follower in (batch_norm, activation) if follower)
        output = (activation or batch_norm or layer).name
        weight_bits = output_bits = None
        if isinstance(layer, L.Conv | L.Dense):
            edge = spec.policy == "R" and layer.name in (first, last)
            weight_bits = spec.edge_bits if edge else spec.weight_bits
        if output != graph.output and type(layer) not in _KEEPS_CODES:
            output_bits = (
                spec.act_bits if _is_activation(activation or layer) else spec.boundary_bits
            )
            if spec.policy == "R" and output == last_input:
                output_bits = spec.boundary_bits
        for entry in spec.overrides:
            pattern, weights, outputs = _parse_override(entry)
            names = {layer.name, output}
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                if (weights and weight_bits) or (outputs and output_bits):
                    matched.add(entry)
                weight_bits = weights if weight_bits and weights else weight_bits
                output_bits = outputs if output_bits and outputs else output_bits
        operations.append(
            Operation(
                layer=layer,
                batch_norm=batch_norm,
                activation=activation,
                output=output,
                weight_bits=weight_bits,
                output_bits=output_bits,
            )
        )
    unmatched = [entry for entry in spec.overrides if entry not in matched]
    if unmatched:
        raise ValueError(
            f"overrides: found {unmatched}, which change nothing in {graph.name!r}: no such layer, "
            "or one without weights (w) or without codes of its own (a); expected patterns over "
            f"{[operation.layer.name for operation in operations]}"
        )
    return tuple(operations)


def origins_of_codes(operations: tuple[Operation, ...]) -> dict[str, str]:
    """Every tensor of codes -> the tensor whose scale and zero point they have: its own name,
    unless its layer only moves codes."""
    origins = {INPUT: INPUT}
    for operation in operations:
        moved = type(operation.layer) in _KEEPS_CODES
        origins[operation.output] = origins[operation.inputs[0]] if moved else operation.output
    return origins


def tracked_tensors(graph: Graph, spec: QuantSpec) -> tuple[str, ...]:
    """Tensors whose range is learned from images, in order; the image's own is known."""
    if spec.placement == "paper":
        return tuple(layer.name for layer in graph.layers if isinstance(layer, L.Activation))
    return tuple(op.output for op in plan_quantization(graph, spec) if op.output_bits is not None)


def fixed_tensors(spec: QuantSpec) -> tuple[str, ...]:
    """Tensors whose range must be known beforehand."""
    return (INPUT,) if spec.placement == "integer" else ()


def _is_activation(layer: L.Layer) -> bool:
    """Whether the layer makes what the method calls an activation, and not a boundary tensor."""
    if isinstance(layer, L.Activation):
        return layer.kind not in L.GATES
    return isinstance(layer, L.Multiply)


def _followers(graph: Graph, layer: L.Layer) -> tuple[L.BatchNorm | None, L.Activation | None]:
    """The batch norm and the ReLU that run inside the layer's operation."""
    tail, batch_norm = layer, None
    if isinstance(layer, L.Conv | L.Dense):
        follower = _only_reader(graph, tail)
        if isinstance(follower, L.BatchNorm):
            tail = batch_norm = follower
    if not isinstance(layer, L.Conv | L.Dense | L.BatchNorm | L.Add):
        return None, None
    follower = _only_reader(graph, tail)
    if isinstance(follower, L.Activation) and follower.kind in L.RECTIFIERS:
        return batch_norm, follower
    return batch_norm, None


def _only_reader(graph: Graph, layer: L.Layer) -> L.Layer | None:
    readers = graph.consumers[layer.name]
    return readers[0] if len(readers) == 1 else None


def _origin_of_codes(graph: Graph, tensor: str) -> str:
    """The tensor whose codes these are, before the layers that only move them."""
    while (layer := graph.by_name.get(tensor)) is not None and type(layer) in _KEEPS_CODES:
        (tensor,) = layer.inputs
    return tensor


def _parse_override(entry: str) -> tuple[str, int | None, int | None]:
    """`pattern=w6a8`, `pattern=w6` or `pattern=a8` as (pattern, weight bits, output bits)."""
    match = re.fullmatch(r"([^=]+)=(?:w([2-8]))?(?:a([2-8]))?", entry)
    if not match or not (match[2] or match[3]):
        raise ValueError(
            f"overrides: found {entry!r}, expected PATTERN=wNaM, PATTERN=wN or PATTERN=aM "
            "with bits 2 to 8, such as 'stage1_*=w6a8'"
        )
    weight_bits, output_bits = (int(bits) if bits else None for bits in match.group(2, 3))
    return match[1], weight_bits, output_bits
