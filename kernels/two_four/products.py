"""Products with a packed 2:4 operand, by cuSPARSELt.

The sparse operand A' `[R, K]`, packed as `[R, 9K/16]`, is the first factor, and K is the reduction dimension:

    sparse_matmul    A' B        [R, K] x [K, N]      (2): A' the packed h, B = W2^T; (5): that of dy1, B = W1
    sparse_linear    x A'^T      [T, K] x [K, R]      (1): A' the packed W1; (3): that of W2^T, for dy
    reduce_tokens    A' x        [f, T] x [T, d]      (6): A' the packed dy1^T; (4), transposed: that of h^T, for dy

B and x may be row-major or column-major; the result is row-major. cuSPARSELt has some twenty kernels for a product, and
the fastest depends on the shapes. The first call with given shapes times all of them and keeps the plan of the fastest,
see `cusparselt`.

On a CPU the matrix is unpacked and multiplied densely.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.operators import operator, register_fake
from kernels.two_four.cusparselt import Product
from kernels.two_four.pack import keep_largest_pack, token_rows
from kernels.two_four.reference import packed_shape, unpack

ALIGNMENT = 8  # the dimension of the dense operand that is not reduced must be a multiple of it
# Some kernels of cuSPARSELt 0.8.0 read metadata in pieces of 128 columns: if K is an odd multiple of 64, they read half
# a piece past its end (found with compute-sanitizer).
PIECE, HALF_A_PIECE = 128, 256  # columns; entries of 2 bytes

_products: dict[tuple, Product] = {}


@functools.cache
def _check_format(device: torch.device) -> None:
    """Compare `pack` with cuSPARSELt's own compression, once for each device: its format is not documented.

    Raises:
        RuntimeError: they differ on this device with this version of cuSPARSELt.
    """
    dense = torch.randn(128, 256, generator=torch.Generator(device).manual_seed(0), device=device).bfloat16()
    packed = keep_largest_pack(dense)
    theirs = torch._cslt_compress(unpack(packed))
    if theirs.numel() != packed.numel() or not torch.equal(unpack(theirs.view_as(packed)), unpack(packed)):
        version, name = torch.backends.cusparselt.version(), torch.cuda.get_device_name(device)
        raise RuntimeError(
            f"cuSPARSELt {version} on {name} packs 2:4 matrices in a format that kernels/two_four does not support: "
            "set weights.pattern and activations.pattern to another value than 2:4, or use torch 2.11 on an H100"
        )


def _fastest(packed: Tensor, dense: Tensor, transpose_result: bool) -> Product:
    """The product of these operands by cuSPARSELt's fastest kernel, found by timing all of them."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first call of a 2:4 product with these shapes times cuSPARSELt's kernels, which a CUDA graph cannot "
            "capture: call it once before the capture"
        )
    _check_format(packed.device)
    search = torch._C._cusparselt.mm_search  # type: ignore[attr-defined]
    *kernel, _ = search(packed, dense, None, None, None, transpose_result)
    (rows, _), (inner, columns) = packed.shape, dense.shape
    return Product(packed.get_device(), rows, inner, columns, dense.is_contiguous(), transpose_result, *kernel)


def _with_room(packed: Tensor) -> Tensor:
    """The packed matrix, contiguous; a copy with padding if cuSPARSELt would read past its end."""
    if packed_shape(packed)[1] % PIECE == 0:
        return packed.contiguous()
    return F.pad(packed.flatten(), (0, HALF_A_PIECE))[: packed.numel()].view_as(packed)


def _product(packed: Tensor, dense: Tensor, transpose_result: bool) -> Tensor:
    if not packed.is_cuda:
        result = unpack(packed) @ dense
        return result.T.contiguous() if transpose_result else result
    # Row-major and column-major operands are supported, without gaps between rows or columns.
    dense = dense if dense.is_contiguous() or dense.T.is_contiguous() else dense.contiguous()
    packed, rows, columns = _with_room(packed), packed.shape[0], dense.shape[1]
    result = dense.new_empty((columns, rows) if transpose_result else (rows, columns))
    key = packed.device, packed.shape, dense.shape, dense.is_contiguous(), transpose_result
    with torch.cuda.device_of(packed):
        product = _products.get(key) or _products.setdefault(key, _fastest(packed, dense, transpose_result))
        product(packed, dense, result)
    return result


@operator("two_four_matmul")
def _matmul(packed: Tensor, dense: Tensor, transpose_result: bool) -> Tensor:
    return _product(packed, dense, transpose_result)


@register_fake(_matmul)
def _(packed: Tensor, dense: Tensor, transpose_result: bool) -> Tensor:
    rows, columns = packed.shape[0], dense.shape[1]
    return dense.new_empty((columns, rows) if transpose_result else (rows, columns))


@operator("two_four_reduce_tokens")
def _reduce_tokens(packed: Tensor, x: Tensor, whole: Tensor, whole_rows: Tensor, transpose_result: bool) -> Tensor:
    product = _product(packed, token_rows(x), transpose_result)
    rows = product.T if transpose_result else product
    rows.index_copy_(0, whole, whole_rows @ x)
    return product


@register_fake(_reduce_tokens)
def _(packed: Tensor, x: Tensor, whole: Tensor, whole_rows: Tensor, transpose_result: bool) -> Tensor:
    rows, columns = packed.shape[0], x.shape[1]
    return x.new_empty((columns, rows) if transpose_result else (rows, columns))


def _check(packed: Tensor, shape: tuple[int, int], dense: Tensor) -> None:
    """Raise ValueError unless A' can be multiplied by `dense`; as the second factor it has the shape `shape`."""
    _, columns = packed_shape(packed)
    if packed.dtype != torch.bfloat16 or dense.dtype != torch.bfloat16:
        raise ValueError(f"2:4 products need bf16 operands, got {packed.dtype} and {dense.dtype}")
    if shape[0] != columns:
        raise ValueError(f"a packed matrix of {columns} columns does not fit {list(dense.shape)}")
    if shape[1] < 1 or shape[1] % ALIGNMENT:
        raise ValueError(f"2:4 products need a dense operand with N or T divisible by {ALIGNMENT}, got {shape[1]}")


def sparse_matmul(packed: Tensor, dense: Tensor) -> Tensor:
    """A' B for a packed 2:4 matrix A'. Not differentiable.

    Args:
        packed: `[R, 9K/16]`, bf16: A', see `reference`.
        dense: `[K, N]`, bf16, row-major or column-major: B; N a multiple of 8.

    Returns:
        `[R, N]` bf16, contiguous.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: a first call with these shapes inside a CUDA graph capture.
    """
    _check(packed, (dense.shape[0], dense.shape[1]), dense)
    return _matmul(packed, dense, False)


def sparse_linear(packed: Tensor, x: Tensor) -> Tensor:
    """x W'^T for a packed 2:4 weight W'. Not differentiable.

    Args:
        packed: `[R, 9K/16]`, bf16: W', see `reference`.
        x: `[T, K]`, bf16, row-major or column-major; T a multiple of 8.

    Returns:
        y `[T, R]` bf16, contiguous.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: a first call with these shapes inside a CUDA graph capture.
    """
    _check(packed, (x.shape[1], x.shape[0]), x)
    return _matmul(packed, x.T, True)


def reduce_tokens(
    packed: Tensor, x: Tensor, whole: Tensor, whole_rows: Tensor, transpose_result: bool = False
) -> Tensor:
    """A' x, reduced over the tokens, for a packed A' `[f, T]` of which some rows are replaced by dense rows.

    Not differentiable.

    Args:
        packed: `[f, 9T/16]`, bf16: A', packed from `token_groups`.
        x: `[T, d]`, bf16, in the order of the tokens; d a multiple of 8.
        whole: `[W]`, int64, distinct: the neurons whose rows of A' are replaced.
        whole_rows: `[W, T]`, bf16: the dense rows, in the order of the tokens.
        transpose_result: return the transpose.

    Returns:
        `[f, d]`, or its transpose `[d, f]`; bf16, contiguous.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: a first call with these shapes inside a CUDA graph capture.
    """
    _check(packed, (x.shape[0], x.shape[1]), x)
    if whole_rows.shape != (whole.shape[0], x.shape[0]) or whole_rows.dtype != x.dtype:
        given = f"{whole_rows.dtype} {list(whole_rows.shape)}"
        raise ValueError(f"whole_rows must be {x.dtype} [{whole.shape[0]}, {x.shape[0]}], got {given}")
    return _reduce_tokens(packed, x, whole, whole_rows, transpose_result)
