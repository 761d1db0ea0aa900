"""2:4 sparsity on sparse tensor cores: two of every four entries along the reduction are zero, which halves the work.

A 2:4 product is only faster if packing its operand is cheap. The family has two parts, connected by the packed
format of cuSPARSELt, 9/16 of the dense bytes:

    reference   the soft threshold of weights (S-STE), and the packed format
    pack        dense to packed in one pass, with soft threshold or selection of the two largest; and back
    products    products with a packed matrix; `cusparselt` has the calls of that library
"""

from kernels.two_four.pack import (
    keep_largest_pack,
    pack_like,
    soft_threshold_pack,
    token_groups,
    token_rows,
    unpack,
)
from kernels.two_four.products import reduce_tokens, sparse_linear, sparse_matmul
from kernels.two_four.reference import pack_reference, soft_threshold_2_4, soft_threshold_scale

__all__ = [
    "keep_largest_pack",
    "pack_like",
    "pack_reference",
    "reduce_tokens",
    "soft_threshold_2_4",
    "soft_threshold_pack",
    "soft_threshold_scale",
    "sparse_linear",
    "sparse_matmul",
    "token_groups",
    "token_rows",
    "unpack",
]
