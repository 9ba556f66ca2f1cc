"""What is static about the training steps."""

from __future__ import annotations

import dataclasses
from typing import Any

from lrq_jax.graph import Graph
from lrq_jax.method import Method
from lrq_jax.passes import Student
from lrq_jax.resources import DEFAULT_RESOURCES, Resources
from lrq_jax.synthesis.generator import GeneratorSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSpec:
    """Everything static about a step.

    Attributes:
      student: the student; its graph is the teacher's too.
      generator: the generator.
      method: losses, schedules, optimisers.
      mesh: device mesh with axis `data`, or None for one device.
      resources: precision and memory.
    """

    student: Student
    generator: GeneratorSpec
    method: Method
    mesh: Any = None  # a Mesh, which everything but single steps in tests has
    resources: Resources = DEFAULT_RESOURCES

    @property
    def graph(self) -> Graph:
        """The network."""
        return self.student.graph
