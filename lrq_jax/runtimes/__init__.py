"""Runtimes that execute the files written by `lrq_jax.writers`."""
