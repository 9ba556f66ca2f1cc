"""One function, a form of its own for each platform, chosen when a program is lowered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

Function = Callable[..., Any]


def by_platform(*, cpu: Function, default: Function) -> Function:
    """The function of arrays that both forms compute; its gradient is that of the form chosen.

    `lax.platform_dependent` alone would keep, for the gradient, what either form wants kept.
    """

    @jax.custom_vjp
    def function(*arrays: jax.Array) -> Any:
        return lax.platform_dependent(*arrays, cpu=cpu, default=default)

    def forward(*arrays: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
        return function(*arrays), arrays

    def backward(arrays: tuple[jax.Array, ...], grad: Any) -> Any:
        def of(form: Function) -> Function:
            return lambda grad, *arrays: jax.vjp(form, *arrays)[1](grad)

        return lax.platform_dependent(grad, *arrays, cpu=of(cpu), default=of(default))

    function.defvjp(forward, backward)
    return function
