"""Registration of functions as PyTorch operators: torch.compile does not trace into them, and the profiler names them.

PyTorch's `custom_op` is made for operators with gradients, and its wrapper makes a call cost the host four times as
much. The operators of this project are called by an `autograd.Function`, which has the gradients. So the function
itself is registered, and it raises an error if autograd would record the call and lose the gradient.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, library

F = TypeVar("F", bound=Callable)

_library = library.Library("sparsetitan", "FRAGMENT")


def operator(name: str) -> Callable[[F], F]:
    """Register a function as `torch.ops.sparsetitan.NAME`, for all devices, and return the operator.

    The schema of the operator is inferred from the annotations of the function, which must not change its arguments or
    return views of them.

    A call of the operator raises:
        RuntimeError: gradients are enabled and an argument requires one.
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
    """Register the shapes of an operator's results for torch.compile: a function that returns empty tensors."""

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
