"""Training checkpoints: orbax, the latest and the best by training loss."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lrq_jax.console import quiet_logging
from lrq_jax.sharding import replicated

LOSS = "loss"
_NO_LOSS = float("inf")


def local_checkpointer() -> ocp.StandardCheckpointer:
    """Orbax' for what one process reads or writes, whatever the others of its job do: its default
    waits for all of them."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


def file_hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file under a directory, by relative path."""
    return {
        file.relative_to(directory).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def check_files(directory: Path, hashes: dict[str, str]) -> None:
    """Checks what orbax wrote before orbax reads it: a damaged file leaves exceptions behind in its
    threads, which are printed long after the error.

    Args:
      directory: of the arrays.
      hashes: what `file_hashes` gave when they were written.

    Raises:
      ValueError: a file is missing or another; names it.
    """
    found = file_hashes(directory)
    damaged = [name for name, digest in hashes.items() if found.get(name) != digest]
    if damaged:
        raise ValueError(f"missing or changed files under {str(directory)!r}: {damaged[:6]}")


class TrainingCheckpoints:
    """Keeps two checkpoints under `directory`: the latest, and the one of lowest training loss.

    Accuracy on test images plays no part. Use as a context manager: leaving waits for a save
    under way, which would be lost otherwise.
    """

    def __init__(self, directory: Path) -> None:
        # max_to_keep=1 with best_fn would delete the latest, so both are kept by policy.
        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(1),
                preservation_policy.BestN(
                    # BestN keeps the end of the ascending order.
                    get_metric_fn=lambda metrics: -metrics[LOSS],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        with quiet_logging():
            self._manager = ocp.CheckpointManager(
                directory.resolve(),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policy,
                    # Without a best_fn orbax writes no metrics, and a resumed run would not know
                    # which checkpoint is the best; the policy decides what is kept.
                    best_fn=lambda metrics: metrics[LOSS],
                    best_mode="min",
                    create=True,
                ),
            )

    def __enter__(self) -> TrainingCheckpoints:
        return self

    def __exit__(self, *_: object) -> None:
        with quiet_logging():
            self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the latest checkpoint, None if there is none."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint of lowest student loss, None before the first student step."""
        self._manager.wait_until_finished()  # a save under way has no metrics yet
        losses = {
            step: metrics[LOSS]
            for step in self._manager.all_steps()
            if (metrics := self._manager.metrics(step)) and metrics[LOSS] < _NO_LOSS
        }
        return min(losses, key=lambda step: losses[step]) if losses else None

    def save(self, step: int, state: Any, loss: float | None) -> None:
        """Saves in the background; a checkpoint of the same step is kept as it is.

        Args:
          step: steps done.
          state: pytree of arrays.
          loss: recent mean student loss, None before there is one.
        """
        if step == self.latest_step:
            return
        metrics = {LOSS: _NO_LOSS if loss is None else float(loss)}
        with quiet_logging():
            saved = self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics)
        if not saved:
            raise RuntimeError(
                f"checkpoint of step {step}: orbax did not save it; checkpoints there: "
                f"{self._manager.all_steps()}"
            )

    def restore(self, step: int, like: Any, mesh: Mesh) -> Any:
        """State of a step, replicated over the mesh, whatever devices it was saved from.

        Args:
          step: of a checkpoint.
          like: pytree of arrays of the wanted structure, shapes and dtypes.
          mesh: devices.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), like
        )
        with quiet_logging():
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
