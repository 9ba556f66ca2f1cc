"""What was found out about a finished student, and the page that shows it."""

from lrq_jax.report.layers import layer_rows
from lrq_jax.report.measure import Measured, measure
from lrq_jax.report.page import write_page

__all__ = ["Measured", "layer_rows", "measure", "write_page"]
