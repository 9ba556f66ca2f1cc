"""One function, a form of its own for each platform.

Chosen when a program is lowered, so that one trace serves all; or, where the platform is known
before (`tracing_for`), while it is traced, which saves tracing the others.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import lax

Function = Callable[..., Any]

GPUS = ("cuda", "rocm")
"""jax's names for them."""

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """Within it only the forms for one platform are traced: for programs that run nowhere else.

    Args:
      platform: `cpu`, `gpu` or `tpu`, as a `jax.Device` has it.
    """
    token = _PLATFORM.set(platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def traced_once(**options: Any) -> Callable[[Function], Function]:
    """Decorator: `jax.jit` for a function that networks call many times. It is traced once a shape,
    and once for each platform that `tracing_for` names, whose forms a trace holds.

    Args:
      **options: of `jax.jit`: `static_argnames`, `static_argnums`.
    """

    def decorate(function: Function) -> Function:
        @functools.cache
        def traced_for(platform: str | None) -> Function:
            @functools.wraps(function)
            def own(*arguments: Any, **named: Any) -> Any:  # traces are kept by function
                return function(*arguments, **named)

            return jax.jit(own, **options)

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            return traced_for(_PLATFORM.get())(*arguments, **named)

        return call

    return decorate


def platform_form(*arrays: Any, cpu: Function, default: Function,
                  gpu: Function | None = None, tpu: Function | None = None) -> Any:  # fmt: skip
    """What the form for the platform computes of the arrays (or pytrees of them); gradients go through that form, but
    keep what either form wants kept (`by_platform` does not)."""
    forms = {"cpu": cpu, "gpu": gpu or default, "tpu": tpu or default}
    if (platform := _PLATFORM.get()) is not None:
        return forms.get(platform, default)(*arrays)
    others = {} if gpu is None else dict.fromkeys(GPUS, gpu)
    if tpu is not None:
        others["tpu"] = tpu
    return lax.platform_dependent(*arrays, cpu=cpu, default=default, **others)


def by_platform(*, cpu: Function, default: Function, gpu: Function | None = None) -> Function:
    """The function of arrays that all forms compute; its gradient is that of the form chosen."""

    @jax.custom_vjp
    def function(*arrays: jax.Array) -> Any:
        return platform_form(*arrays, cpu=cpu, default=default, gpu=gpu)

    def forward(*arrays: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
        return function(*arrays), arrays

    def backward(arrays: tuple[jax.Array, ...], grad: Any) -> Any:
        def of(form: Function) -> Function:
            return lambda grad, *arrays: jax.vjp(form, *arrays)[1](grad)

        on_gpus = None if gpu is None else of(gpu)
        return platform_form(grad, *arrays, cpu=of(cpu), default=of(default), gpu=on_gpus)

    function.defvjp(forward, backward)
    return function
