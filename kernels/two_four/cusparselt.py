"""cuSPARSELt's matrix product with a plan for each shape that is made once and reused.

`torch._cslt_sparse_mm` creates its descriptors and its plan at every call, which can take the host longer than the
product takes the GPU. A plan depends only on the shapes, the layouts and the kernel. So `Product` keeps its plan, and a
product is one call of the library.

Source: the public header of cuSPARSELt 0.8.0. The names and constants used in this module are the same in 0.7.1.
"""

import ctypes
import functools
from ctypes import c_int, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any

import torch
from torch import Tensor

OPAQUE_BYTES = 4096  # enough for any structure of the library: they have 512 bytes in 0.8.0, 1024 in 0.7.1
ALIGNMENT = 16  # of operands and result, in bytes
SPARSITY_50_PERCENT, ALG_DEFAULT = 0, 0
NON_TRANSPOSE, TRANSPOSE = 0, 1
ORDER_COL, ORDER_ROW = 1, 2
CUDA_R_16BF, COMPUTE_32F = 14, 2
ALG_CONFIG_ID, SPLIT_K, SPLIT_K_MODE = 0, 3, 4

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "Init": (c_void_p,),
    "GetErrorString": (c_int,),
    "StructuredDescriptorInit": (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_uint32, c_int, c_int, c_int),
    "DenseDescriptorInit": (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_uint32, c_int, c_int),
    "MatmulDescriptorInit": (c_void_p, c_void_p, c_int, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int),
    "MatmulAlgSelectionInit": (c_void_p, c_void_p, c_void_p, c_int),
    "MatmulAlgSetAttribute": (c_void_p, c_void_p, c_int, c_void_p, c_size_t),
    "MatmulPlanInit": (c_void_p, c_void_p, c_void_p, c_void_p),
    "MatmulGetWorkspace": (c_void_p, c_void_p, c_void_p),
    "Matmul": (*[c_void_p] * 10, c_int),
}
_ONE, _ZERO = ctypes.c_float(1), ctypes.c_float(0)


@functools.cache
def _function(name: str) -> Any:
    # PyTorch has loaded the library. PyDLL holds the GIL during a call, so threads do not use a plan at the same time.
    function = getattr(ctypes.PyDLL("libcusparseLt.so.0"), f"cusparseLt{name}")
    function.argtypes = _SIGNATURES[name]
    if name == "GetErrorString":
        function.restype = ctypes.c_char_p
    return function


def _check(name: str, status: int) -> None:
    if status:
        raise RuntimeError(f"cusparseLt{name}: {_function('GetErrorString')(status).decode()}")


def _call(name: str, *arguments: Any) -> None:
    _check(name, _function(name)(*arguments))


def _opaque() -> Any:
    """Memory for a structure of the library; malloc aligns it to 16 bytes, which 0.8.0 requires."""
    return ctypes.create_string_buffer(OPAQUE_BYTES)


@functools.cache
def _handle(device: int) -> Any:
    """The library's handle for a device, which must be the current device."""
    handle = _opaque()
    _call("Init", handle)
    return handle


class Product:
    """The product of a packed `[R, K]` and a dense `[K, N]` bf16 matrix, by a given kernel of the library.

    Args:
        device: index of the device, which must be the current device for the constructor and for calls.
        rows, inner, columns: R, K, N.
        by_rows: whether the rows of the dense operand are contiguous; otherwise its columns are.
        transposed: write the transpose, `[N, R]`.
        algorithm: number of the kernel.
        split_k, split_k_mode: number of parts of the reduction, and how their sums are added; 1 or less: no split.

    Raises:
        RuntimeError: a call of the library failed; with the library's message.
    """

    def __init__(
        self,
        device: int,
        rows: int,
        inner: int,
        columns: int,
        by_rows: bool,
        transposed: bool,
        algorithm: int,
        split_k: int,
        split_k_mode: int,
    ) -> None:
        self._device, self._handle = device, _handle(device)
        # A plan may refer to the other structures, so they must live as long as it does.
        self._structures = [_opaque() for _ in range(6)]
        sparse, dense, result, matmul, selection, plan = self._structures
        self._plan = plan
        form = ALIGNMENT, CUDA_R_16BF
        packed = rows, inner, inner, *form, ORDER_ROW, SPARSITY_50_PERCENT
        _call("StructuredDescriptorInit", self._handle, sparse, *packed)
        height, width = (inner, columns) if by_rows else (columns, inner)
        _call("DenseDescriptorInit", self._handle, dense, height, width, width, *form, ORDER_ROW)
        pitch, order = (rows, ORDER_COL) if transposed else (columns, ORDER_ROW)
        _call("DenseDescriptorInit", self._handle, result, rows, columns, pitch, *form, order)
        operation = NON_TRANSPOSE if by_rows else TRANSPOSE
        operands = sparse, dense, result, result
        _call("MatmulDescriptorInit", self._handle, matmul, NON_TRANSPOSE, operation, *operands, COMPUTE_32F)
        _call("MatmulAlgSelectionInit", self._handle, selection, matmul, ALG_DEFAULT)
        attributes = {ALG_CONFIG_ID: algorithm}
        if split_k > 1:
            attributes |= {SPLIT_K: split_k, SPLIT_K_MODE: split_k_mode}
        for attribute, value in attributes.items():
            number = c_int(value)
            _call("MatmulAlgSetAttribute", self._handle, selection, attribute, ctypes.byref(number), 4)
        _call("MatmulPlanInit", self._handle, plan, matmul, selection)
        workspace = c_size_t()
        _call("MatmulGetWorkspace", self._handle, plan, ctypes.byref(workspace))
        self._workspace_bytes = workspace.value
        self._matmul = _function("Matmul")

    def __call__(self, packed: Tensor, dense: Tensor, out: Tensor) -> None:
        """Write the product to `out`, `[R, N]` or `[N, R]` bf16, on the current stream.

        PyTorch's allocator provides the workspace, so streams and CUDA graphs do not share it wrongly.

        Raises:
            RuntimeError: the library refused the call; with its message.
        """
        workspace = packed.new_empty(self._workspace_bytes, dtype=torch.uint8) if self._workspace_bytes else None
        status = self._matmul(
            self._handle,
            self._plan,
            ctypes.byref(_ONE),
            packed.data_ptr(),
            dense.data_ptr(),
            ctypes.byref(_ZERO),
            out.data_ptr(),
            out.data_ptr(),
            None if workspace is None else workspace.data_ptr(),
            ctypes.byref(c_void_p(torch._C._cuda_getCurrentRawStream(self._device))),
            1,
        )
        if status:
            _check("Matmul", status)
