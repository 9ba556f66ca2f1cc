"""What losses see of the frozen teacher, and what they compare between it and the student."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lrq_jax import losses
from lrq_jax.graph import Graph
from lrq_jax.passes import float_forward
from lrq_jax.passes.blocks import blocks_of
from lrq_jax.passes.float_forward import Transform, Variables, unchanged
from lrq_jax.resources import DEFAULT_RESOURCES, Resources
from lrq_jax.training.spec import StepSpec


def teacher_values(graph: Graph, teacher: Variables, images: jax.Array, outputs: tuple[str, ...], *,
                   resources: Resources = DEFAULT_RESOURCES,
                   input_transform: Transform = unchanged) -> dict[str, jax.Array]:  # fmt: skip
    """Tensors of the frozen teacher by name, as of `float_forward`; float32 whatever the teacher is
    computed in."""
    cast_teacher, cast_images = resources.cast((teacher, images), smallest_rank=2)
    values = float_forward(
        graph, cast_teacher, cast_images, outputs, input_transform=input_transform
    )
    return {name: value.astype(jnp.float32) for name, value in values.items()}


def teacher_forward(graph: Graph, teacher: Variables, images: jax.Array,
                    outputs: tuple[str, ...] = (), *, resources: Resources = DEFAULT_RESOURCES,
                    statistics: str = "variance",
                    input_transform: Transform = unchanged) -> tuple[dict[str, jax.Array], jax.Array]:  # fmt: skip
    """Logits `[B, K]`, pooled features `[B, D]` and the named tensors of the frozen teacher, by
    name, and the BNS loss, in one of its forms (`losses.STATISTICS`)."""
    taps = tuple(layer.inputs[0] for layer in graph.batch_norms)
    outputs = (graph.output, graph.features, *outputs, *taps)
    values = teacher_values(graph, teacher, images, outputs, resources=resources,
                            input_transform=input_transform)  # fmt: skip
    running = [
        (teacher["batch_stats"][layer.name]["mean"], teacher["batch_stats"][layer.name]["var"])
        for layer in graph.batch_norms
    ]
    bns = losses.STATISTICS[statistics]([values[name] for name in taps], running)
    return values, bns


class Compared(NamedTuple):
    """What the student's loss compares between two networks on the same images.

    Attributes:
      logits: `[B, K]`.
      blocks: outputs `[B, H_l, W_l, C_l]` of blocks, where their channel attention is aligned.
      activation_map: `[B, H, W]`, of the teacher's class, where that is aligned.
    """

    logits: jax.Array
    blocks: tuple[jax.Array, ...] = ()
    activation_map: jax.Array | None = None


def aligned_blocks(spec: StepSpec) -> tuple[str, ...]:
    """Outputs of the network's blocks that are maps, if the method aligns their channels."""
    if not spec.method.channel_alignment:
        return ()
    shapes = spec.graph.shapes
    return tuple(b.output for b in blocks_of(spec.student) if len(shapes[b.output]) == 3)


def compared_tensors(spec: StepSpec) -> tuple[str, ...]:
    """Tensors that `compared` needs."""
    last_map = (spec.graph.last_map,) if spec.method.cam_alignment else ()
    return tuple(dict.fromkeys((spec.graph.output, *aligned_blocks(spec), *last_map)))


def compared(values: dict[str, jax.Array], kernel: Callable[[], jax.Array], classes: jax.Array,
             spec: StepSpec) -> Compared:  # fmt: skip
    """Of a network's tensors what the method compares.

    Args:
      values: `compared_tensors`, by name.
      kernel: thunk of that of the network's classifier, `[D, K]`.
      classes: the teacher's, `[B]`.
    """
    activation_map = None
    if spec.method.cam_alignment:
        last_map = values[spec.graph.last_map]
        activation_map = losses.class_activation_map(last_map, kernel(), classes)
    blocks = tuple(values[name] for name in aligned_blocks(spec))
    return Compared(values[spec.graph.output], blocks, activation_map)


def taught(values: dict[str, jax.Array], teacher: Variables, spec: StepSpec) -> Compared:
    """`compared` of the teacher's own tensors."""
    classes = jnp.argmax(values[spec.graph.output], -1)
    name = spec.graph.classifier.name
    return compared(values, lambda: teacher["params"][name]["kernel"], classes, spec)


def lesson_of(teacher: Variables, images: jax.Array, spec: StepSpec) -> Compared:
    """What the student is to make of images: what the frozen teacher does."""
    tensors = compared_tensors(spec)
    values = teacher_values(spec.graph, teacher, images, tensors, resources=spec.resources)
    return taught(values, teacher, spec)
