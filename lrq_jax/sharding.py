"""One mesh axis, `data`: batches are split over devices, states are copies on each."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"


def data_mesh(num_devices: int | None = None) -> Mesh:
    """Mesh over all devices (or the first `num_devices`), one axis named `data`.

    Axis type Auto: jax's default, Explicit, refuses the generator's embedding lookup.
    """
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((len(devices),), (DATA_AXIS,), (AxisType.Auto,), devices=devices)


def local_mesh() -> Mesh:
    """Mesh over the devices of this process alone: for what it does without the others."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), (DATA_AXIS,), (AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of states: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays `[B, ...]`: the leading axis over `data`."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def constrain_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Splits an array made inside a step over `data`.

    Noise and labels are drawn inside the step: without this constraint every device computes
    the whole batch, silently.
    """
    return x if mesh is None else jax.lax.with_sharding_constraint(x, split_batch(mesh))
