"""Functions as PyTorch operators: torch.compile takes them as they are, and the profiler names them.

PyTorch's `custom_op` is made for operators that have gradients, and what it wraps around a function costs the host
four times an operator's own call. Ours are called by `autograd.Function`s, which have the gradients. So the function
itself is registered; where autograd would pass it by, it refuses.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, library

F = TypeVar("F", bound=Callable)

_library = library.Library("sparsetitan", "FRAGMENT")


def operator(name: str) -> Callable[[F], F]:
    """Register a function as `torch.ops.sparsetitan.NAME`, for all devices, and return that operator.

    The function's annotations make the operator's schema. It must not change its arguments or return views of them.

    Raises, when called:
        RuntimeError: a gradient would have to pass through the operator.
    """

    def register(function: F) -> F:
        schema = library.infer_schema(function, mutates_args=())
        _library.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
        _library.impl(name, _refusing_gradients(f"sparsetitan::{name}", function), "CompositeExplicitAutograd")
        _library.impl(name, library.fallthrough_kernel, "Autograd")
        registered = getattr(torch.ops.sparsetitan, name).default
        registered.__doc__ = function.__doc__
        return registered

    return register


def register_fake(registered: Callable) -> Callable[[F], F]:
    """Register what an operator gives while torch.compile traces: a function that returns empty tensors."""

    def register(function: F) -> F:
        name = registered.name()  # type: ignore[attr-defined]
        library.register_fake(name, _refusing_gradients(name, function), lib=_library)
        return function

    return register


def _refusing_gradients(name: str, function: Callable) -> Callable:
    def call(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            raise RuntimeError(f"{name} has no gradient of its own: call it inside an autograd.Function")
        return function(*args)

    return call
