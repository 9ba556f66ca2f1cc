"""What ends a run early."""


class TrainingDiverged(RuntimeError):
    """Something stopped being finite; the message names step, terms and last good checkpoint."""
