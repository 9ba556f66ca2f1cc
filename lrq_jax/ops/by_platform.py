"""One function, a form of its own for each platform, chosen when a program is lowered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

Function = Callable[..., Any]

GPUS = ("cuda", "rocm")
"""jax's names for them."""


def platform_form(*arrays: jax.Array, cpu: Function, default: Function,
                  gpu: Function | None = None) -> Any:  # fmt: skip
    """What the form for the platform computes of the arrays; gradients go through that form, but
    keep what either form wants kept (`by_platform` does not)."""
    on_gpus = {} if gpu is None else dict.fromkeys(GPUS, gpu)
    return lax.platform_dependent(*arrays, cpu=cpu, default=default, **on_gpus)


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
