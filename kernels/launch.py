"""Launches of Triton kernels at a third of the host's time.

Triton's launcher looks at every argument before each launch, to find the kernel that is compiled for such arguments: 40
to 110 microseconds of the host's time, of which 11 to 40 are the launch itself (seen, 2026-11-28). A training step
launches each kernel with the same sizes again and again. So the compiled kernel that Triton returns is kept for them,
and called directly. It is compiled for dtypes, for pointers that are multiples of 16, and for integers that are 1 or
multiples of 16: the key has the dtypes, whether pointers are aligned, and the integers themselves.
"""

from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_compiled: dict[tuple, tuple[Any, tuple]] = {}


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; `triton.cdiv` is for kernels and takes the host 5 microseconds."""
    return -(-a // b)


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, options: dict[str, int] | None = None, **constants: Any
) -> None:
    """Launch a Triton kernel on the current device and stream, as kernel[grid](*arguments, **constants, **options).

    Args:
        kernel: from `triton.jit`, its compile-time constants after all other parameters.
        grid: one to three sizes.
        arguments: tensors, tensor descriptors, integers and None, in the kernel's order.
        options: num_warps and num_stages.
        constants: the compile-time constants.
    """
    options = options or {}
    # Kernels are constants of their modules, and Triton's hash of one takes longer than the rest.
    key = (id(kernel), *map(_kind, arguments), *constants.items(), *options.items())
    if (known := _compiled.get(key)) is not None:
        compiled, values = known
        compiled[(*grid, 1, 1)[:3]](*arguments, *values)
        return
    compiled = kernel[grid](*arguments, **constants, **options)
    if compiled is not None:  # Triton's interpreter compiles nothing
        _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])


def _kind(argument: Any) -> Any:
    """What a compiled kernel depends on."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.get_device(), argument.data_ptr() % 16 == 0
    if isinstance(argument, TensorDescriptor):
        base = argument.base
        return base.dtype, base.get_device(), tuple(argument.shape), tuple(argument.block_shape)
    return argument
