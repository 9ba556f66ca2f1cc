"""Several processes, one training: joining them, and what only one of them does.

`jax.distributed` finds the others by itself on TPU pods, Slurm, Open MPI and Kubernetes; elsewhere
each process is told by three environment variables. Batches are split over the devices of all
processes, every process computes the same states, and the first one alone writes files.
"""

from __future__ import annotations

import os
from typing import Any

import jax

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_START_SECONDS = 300
_FINISH_SECONDS = 24 * 3600
"""Processes that are done wait so long for the first one to evaluate and to write the report."""


def join_processes(*, heartbeat_seconds: int = 100) -> None:
    """Connects this process to the others of its job; call before anything is computed.

    Args:
      heartbeat_seconds: a process not heard of for so long counts as dead, and jax ends the others
        itself. Longer than the 30 s after which collectives on CPU fail, which is told in our words.

    Raises:
      ValueError: settings of the job that are incomplete or contradict each other.
      ConnectionError: the others could not be reached.
    """
    given = {name: os.environ.get(name, "") for name in (ADDRESS, COUNT, NUMBER)}
    missing = [name for name, value in given.items() if not value]
    if 0 < len(missing) < len(given):
        raise ValueError(
            f"distributed: found environment variables without {missing}, expected all of "
            f"{list(given)} (or none on TPU pods, Slurm, Open MPI and Kubernetes)"
        )
    arguments: dict[str, Any] = {}
    if not missing:
        try:
            count, number = int(given[COUNT]), int(given[NUMBER])
        except ValueError as error:
            raise ValueError(
                f"distributed: found {COUNT}={given[COUNT]!r} and {NUMBER}={given[NUMBER]!r}, "
                "expected whole numbers"
            ) from error
        if not 0 <= number < count:
            raise ValueError(
                f"distributed: found {NUMBER}={number}, expected 0 to {count - 1} of {COUNT}={count}"
            )
        arguments = {
            "coordinator_address": given[ADDRESS], "num_processes": count, "process_id": number
        }  # fmt: skip
    # Its preemption service would catch SIGTERM and go on: nothing here asks it for its notices.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=_FINISH_SECONDS,
        )
    except ValueError as error:
        raise ValueError(
            f"distributed: found no cluster ({error}), expected a TPU pod, Slurm, Open MPI, "
            f"Kubernetes, or {ADDRESS}=HOST:PORT, {COUNT} and {NUMBER} set for every process"
        ) from error
    except RuntimeError as error:
        raise ConnectionError(
            f"distributed: found no answer ({str(error).splitlines()[0]}), expected all "
            f"{given[COUNT]} processes to start within {_START_SECONDS} s and to reach "
            f"{given[ADDRESS] or 'the first one'}"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes and speaks; true for a process alone."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has come here; at once for a process alone."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
