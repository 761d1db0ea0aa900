"""cuSPARSELt's matrix product, planned once for a shape.

`torch._cslt_sparse_mm` describes its operands and plans anew at every call, which takes the host longer than many a
product takes the GPU. A plan depends on nothing but shapes, layouts and the kernel that it names, so here it is kept,
and a product is one call of the library.

Source: the public header of cuSPARSELt 0.8.0, of whose names and numbers those used here are the same in 0.7.1.
"""

import ctypes
import functools
from ctypes import c_int, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any

import torch
from torch import Tensor

OPAQUE_BYTES = 4096  # at least those of any structure: 512 in 0.8.0, 1024 in 0.7.1
ALIGNMENT = 16  # bytes, of operands and result
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
    # PyTorch has loaded the library. PyDLL keeps the interpreter's lock, so that threads take turns with a plan.
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
    """A structure of the library's; malloc aligns it to the 16 bytes that 0.8.0 asks for."""
    return ctypes.create_string_buffer(OPAQUE_BYTES)


@functools.cache
def _handle(device: int) -> Any:
    """The library's handle for a device, which must be the current one."""
    handle = _opaque()
    _call("Init", handle)
    return handle


class Product:
    """The product of a packed `[R, K]` and a dense `[K, N]` bf16 matrix, by a given kernel of the library.

    Args:
        device: index of the device, which must be the current one here and in calls.
        rows, inner, columns: R, K, N.
        by_rows: rows of the dense operand are contiguous, else its columns.
        transposed: write the transpose, `[N, R]`.
        algorithm: the kernel's number.
        split_k, split_k_mode: parts into which it cuts the reduction, and how it adds them up; 1 or less: it does not.

    Raises:
        RuntimeError: with the library's words.
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
        # A plan may refer to the others, so all live as long.
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
        """Write the product into `out` on the current stream.

        The workspace is PyTorch's, which knows in what order a stream, or a graph's replay, uses it.
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
