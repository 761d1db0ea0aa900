"""CUDA C++ for Hopper from Python: compiled at first use, launched on PyTorch's stream.

Triton does not support TMA multicast over a cluster and a dedicated producer warp, which these kernels use, and an
extension module would need a compiler on the user's machine. So the source is compiled by NVRTC, which is part of every
CUDA build of PyTorch, and launched through the CUDA driver's API (`cuda.bindings`, a dependency of PyTorch).
"""

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch

# Known when imported: the compiler traces through `missing`.
BINDINGS = importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None


def missing(device: torch.device) -> str:
    """Why a CUDA device does not run these kernels; empty if it does."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) != (9, 0):
        return "not a Hopper GPU"
    return "" if BINDINGS else "cuda-bindings is not installed"


def _check(result: tuple) -> Any:
    """The value of a call to `cuda.bindings`, which returns (error, value...)."""
    error, *values = result
    if error.value:
        raise RuntimeError(f"CUDA: {error!r}")
    return values[0] if values else None


@functools.cache
def _module(source: Path, device: int) -> Any:
    """A CUDA source file, compiled for sm_90a and loaded into a device's primary context."""
    from cuda.bindings import driver

    context = _check(driver.cuDevicePrimaryCtxRetain(device))
    _check(driver.cuCtxSetCurrent(context))
    return context, _check(driver.cuModuleLoadData(compile_source(source)))


def compile_source(source: Path) -> bytes:
    """Compile a CUDA source file to machine code for sm_90a.

    Raises:
        RuntimeError: with the compiler's messages.
    """
    from cuda.bindings import nvrtc

    program = _check(nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], []))
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if error.value:
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{source}: {log.decode()}")
    code = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
    _check(nvrtc.nvrtcGetCUBIN(program, code))
    return code


class Kernel:
    """A `__global__` function of a CUDA source file.

    Args:
        source: the file; its functions are `extern "C"`.
        name: the function.
        shared_bytes: dynamic shared memory of a block.
    """

    def __init__(self, source: Path, name: str, shared_bytes: int) -> None:
        self.source, self.name, self.shared_bytes = source, name, shared_bytes

    @functools.cache  # noqa: B019  kernels are module constants
    def load(self, device: int) -> tuple[Any, Any]:
        """The context and the function on a device."""
        from cuda.bindings import driver

        context, module = _module(self.source, device)
        _check(driver.cuCtxSetCurrent(context))  # this thread may have none
        function = _check(driver.cuModuleGetFunction(module, self.name.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(function, attribute, self.shared_bytes))
        return context, function


class Launch:
    """A kernel with its arguments: all of a launch but the stream, so that what comes again is prepared once.

    Args:
        kernel: the function.
        device: index of the device.
        grid: blocks.
        block: threads of a block.
        arguments: by value, in order: tensor maps (see `tensor_map`) and ctypes structures.
    """

    def __init__(self, kernel: Kernel, device: int, grid: int, block: int, *arguments: Any) -> None:
        from cuda.bindings import driver

        self._driver, self._device = driver, device
        self._context, function = kernel.load(device)
        addresses = [a.getPtr() if hasattr(a, "getPtr") else ctypes.addressof(a) for a in arguments]
        self._pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        self._arguments = arguments  # kept alive for the pointers
        self._configuration = function, grid, 1, 1, block, 1, 1, kernel.shared_bytes

    def __call__(self) -> None:
        """Launch on the current stream of the device, which must be the current device."""
        driver, stream = self._driver, torch._C._cuda_getCurrentRawStream(self._device)
        arguments = *self._configuration, stream, ctypes.addressof(self._pointers), 0
        result = driver.cuLaunchKernel(*arguments)
        # The thread, such as that of the backward pass, may not have used the GPU before.
        if result[0] and not int(_check(driver.cuCtxGetCurrent())):
            _check(driver.cuCtxSetCurrent(self._context))
            result = driver.cuLaunchKernel(*arguments)
        _check(result)


@functools.lru_cache(maxsize=4096)  # the allocator returns the same addresses at every step
def tensor_map(address: int, height: int, width: int, rows: int, chunks: int = 0) -> Any:
    """A tensor map for the tensor memory accelerator: it describes a matrix and the box that one load reads.

    A box is `rows` rows of 64 columns, addressed (column, row); or, with `chunks`, `rows` rows of that many
    neighbouring runs of 64 columns, stored one run after the other in shared memory, addressed (0, row, run). Boxes are
    swizzled by 128 bytes, with zeros outside of the matrix.

    Args:
        address: of a contiguous bf16 matrix `[height, width]`, a multiple of 16; width a multiple of 8, with `chunks`
            of 64.
        rows: at most 256.
    """
    from cuda.bindings import driver

    shape, strides, box = [width, height], [2 * width], [64, rows]
    if chunks:
        shape, strides, box = [64, height, width // 64], [2 * width, 128], [64, rows, chunks]
    return _check(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            len(shape),
            address,
            [driver.cuuint64_t(n) for n in shape],
            [driver.cuuint64_t(n) for n in strides],
            [driver.cuuint32_t(n) for n in box],
            [driver.cuuint32_t(1)] * len(shape),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
