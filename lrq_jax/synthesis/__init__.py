"""Images without data: the conditional generator, and images optimised from noise."""
