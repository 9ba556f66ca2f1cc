"""States, pure steps, and the host loop that runs them."""
