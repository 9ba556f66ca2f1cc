"""Which programs jax compiles, as its own events say."""

import contextlib

import jax


@contextlib.contextmanager
def compiled_programs():
    """The names of the programs that are compiled, or taken from a cache on disk, while it lasts;
    the list grows as they come."""
    names = []

    def listen(event, _, **details):
        if event.endswith("backend_compile_duration"):
            names.append(details["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
