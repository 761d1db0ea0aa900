"""The Venom kernels against their specification: on a GPU as compiled, elsewhere in Triton's interpreter.

Selections must match the masks bit for bit, so sums are made exact: entries of y1 are small multiples of a power of
two. Products are held against float64. Outputs start as NaN, or as -1, so that an entry that no program writes shows.
"""

import functools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, sparse_feed_forward
from torch import library
from torch.testing import assert_close
from triton.runtime import interpreter

from kernels import Venom, venom
from kernels.venom import compact, expand, products, reference, select, tile_width, venom_mask
from kernels.venom.ffn import COMPACT_VENOM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRODUCT_DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # the interpreter multiplies bf16's bit patterns


pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("poisoned")]


@pytest.fixture(autouse=True)
def whole_slices(monkeypatch):
    """The interpreter reduces entry by entry with a function that it does not know: here a slice at a time."""

    def reduce(self, inputs):
        (value,) = inputs
        slices = np.moveaxis(value.handle.data, self.axis, 0)
        return [functools.reduce(self.combine_fn.fn, (self.to_tensor(each, value.dtype) for each in slices))]

    monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", reduce)


def pre_activations(kind, tokens, hidden, seed=0):
    """y1 `[T, f]` bf16: squares and their sums over any rows or columns are exact in float32."""
    rand = torch.Generator().manual_seed(seed)
    if kind == "zeros":
        y1 = -torch.ones(tokens, hidden)
    elif kind == "ties":
        y1 = torch.randint(-1, 3, (tokens, hidden), generator=rand).float()
    else:
        y1 = torch.randint(-12, 13, (tokens, hidden), generator=rand).float() / 4
    if kind == "sparse":
        y1 *= torch.rand(tokens, hidden, generator=rand) < 0.1
        y1[: max(1, tokens // 2), : hidden // 2] = 0
        y1[tokens // 2] = 0
    return y1.bfloat16().to(DEVICE)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(DEVICE)


def squares(y1):
    h = y1.relu()
    return h * h


KINDS = pytest.mark.parametrize("kind", ["floats", "ties", "sparse", "zeros"])


# ---- the cut


@KINDS
@pytest.mark.parametrize(
    "tokens, hidden, v, m",
    [
        (32, 64, 16, 16),
        (37, 80, 16, 16),  # short last block, tiles of 4 columns
        (5, 512, 16, 8),  # block longer than the batch, two tiles
        (64, 96, 64, 4),  # every column is kept
        (33, 60, 16, 20),  # windows that are no power of two
        (16, 12, 16, 12),  # one window
    ],
)
def test_select_columns_is_venom_mask(kind, tokens, hidden, v, m):
    for n in (2, 4):
        y1 = pre_activations(kind, tokens, hidden)
        h = squares(y1)
        tiles, columns = select.select_columns(y1, v, n, m)
        assert tiles.shape[2] == tile_width(4 * hidden // m)
        assert torch.equal(expand(tiles, columns, tokens, hidden), torch.where(venom_mask(h, v, n, m), h, 0))
        for actual, expected in zip((tiles, columns), reference.select_columns(y1, v, n, m), strict=True):
            assert actual.dtype == expected.dtype and torch.equal(actual, expected)
        assert (columns.view(-(-tokens // v), -1).diff(dim=1) > 0).all()


def test_select_columns_reads_y1_of_any_strides():
    y1 = pre_activations("floats", 32, 64)
    tiles, _ = select.select_columns(y1.T.contiguous().T, 16, 4, 16)
    assert torch.equal(tiles, reference.select_columns(y1, 16, 4, 16)[0])


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_select_columns_keeps_what_is_not_finite(value, n):
    y1 = pre_activations("floats", 32, 64)
    y1[3, 5] = y1[9, 5] = y1[20, 60] = value
    tiles, columns = select.select_columns(y1, 16, n, 16)
    expected, expected_columns = reference.select_columns(y1, 16, n, 16)
    assert torch.equal(columns, expected_columns)
    assert_close(tiles, expected, rtol=0, atol=0, equal_nan=True)
    assert (~tiles.isfinite()).sum() == 3


# ---- products


def close(actual, expected):
    """Sums in float32, rounded once."""
    assert actual.dtype == PRODUCT_DTYPE
    rounding = torch.finfo(PRODUCT_DTYPE).eps / 2
    assert_close(actual.double(), expected, rtol=rounding + 1e-6, atol=1e-6 * expected.abs().max().item())


SHAPES = pytest.mark.parametrize(
    "tokens, hidden, d, v, m",
    [
        (32, 64, 64, 16, 16),
        (56, 96, 72, 16, 8),  # T no multiple of V, d none of a tile
        (48, 512, 40, 32, 16),  # two steps along the columns
        (16, 1088, 264, 64, 16),  # tiles of 16 columns, the steps' remainder masked; two slabs
    ],
)


def operands(tokens, hidden, d, v, n, m):
    """Compact h, dense h in float64, dy or x `[T, d]`, a weight `[f, d]`."""
    tiles, columns = reference.select_columns(normal(tokens, hidden), v, n, m)
    tiles, x, weight = (value.to(PRODUCT_DTYPE) for value in (tiles, normal(tokens, d), normal(hidden, d, seed=1)))
    return tiles, columns, expand(tiles, columns, tokens, hidden).double(), x, weight


@SHAPES
def test_reduce_neurons(tokens, hidden, d, v, m):
    tiles, columns, h, _, weight = operands(tokens, hidden, d, v, 2, m)
    expected = h @ weight.double()
    close(products.reduce_neurons(tiles, columns, weight, tokens), expected)
    order = torch.randperm(tokens).to(DEVICE)
    close(products.reduce_neurons(tiles, columns, weight, tokens, order)[order], expected)


@SHAPES
def test_sample_dy1(tokens, hidden, d, v, m):
    tiles, columns, h, dy, weight = operands(tokens, hidden, d, v, 4, m)
    dy1_tiles = products.sample_dy1(dy, weight, tiles, columns)
    close(expand(dy1_tiles, columns, tokens, hidden), 2 * h.sqrt() * (dy.double() @ weight.double().T))
    assert torch.equal(dy1_tiles == 0, tiles == 0)


def test_products_show_nan():
    tiles, columns, _, dy, weight = operands(32, 64, 32, 16, 4, 16)
    weight[columns[0, 0].long(), 7] = torch.nan
    assert products.reduce_neurons(tiles, columns, weight, 32)[:, 7].isnan().any()
    assert products.sample_dy1(dy, weight, tiles, columns)[0, :, 0].isnan().all()


# ---- operators


def test_compact_and_expand_are_inverse():
    h = torch.rand(21, 24, dtype=torch.float64)
    columns = torch.stack([torch.randperm(24)[:12].sort().values for _ in range(3)])
    tiles = compact(h, columns, 8)
    assert tiles.shape == (9, 8, 4)  # 12 columns are three tiles of four
    kept = torch.zeros(3, 24, dtype=torch.bool).scatter(1, columns, True).repeat_interleave(8, 0)[:21]
    assert torch.equal(expand(tiles, columns.view(9, 4), 21, 24), torch.where(kept, h, 0))
    assert (tiles.view(3, 3, 8, 4)[2, :, 5:] == 0).all()


def operator_arguments():
    """Arguments for every operator, by name."""
    tokens, hidden, d, v, n, m = 48, 96, 40, 32, 2, 8
    y1, dy, weight = normal(tokens, hidden), normal(tokens, d), normal(hidden, d)
    tiles, columns = reference.select_columns(y1, v, n, m)
    return {
        "select_columns": (y1, v, n, m),
        "reduce_neurons": (tiles, columns, weight, tokens, torch.randperm(tokens).to(DEVICE)),
        "sample_dy1": (dy, weight, tiles, columns),
    }


@pytest.mark.parametrize("name", ["select_columns", "reduce_neurons", "sample_dy1"])
def test_operators(name):
    operator = getattr(venom, name)
    args = operator_arguments()[name]
    library.opcheck(operator, args)
    compiled = torch.compile(lambda *args: operator(*args), fullgraph=True, backend="aot_eager")(*args)
    expected = getattr(reference, name)(*args)
    assert_close(compiled, expected, rtol=2**-7, atol=2**-6)
    assert_close(operator(*args), expected, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("n", [2, 4])
def test_operators_compose_to_the_feed_forward(n, scaled, ordered):
    """Against the masked reference, in float64 on the CPU: outputs and all gradients."""
    rand, pattern = torch.Generator().manual_seed(0), Venom(16, n, 8)
    inputs = [torch.randn(*s, generator=rand, dtype=torch.float64) for s in ((72, 24), (64, 24), (24, 64))]
    x, w1, w2 = (value.requires_grad_() for value in inputs)
    dy = torch.randn(72, 24, generator=rand, dtype=torch.float64)
    order = torch.randperm(72, generator=rand) if ordered else None
    scales = [torch.tensor(1.3, dtype=torch.float64)] * 2 if scaled else [None, None]
    expected = sparse_feed_forward(x, w1, w2, pattern, *scales, order=order)
    # On the CPU nothing is packed; the rest is what runs on a GPU.
    actual = sparse_feed_forward(x, w1, w2, pattern, *scales, order=order, family=COMPACT_VENOM)
    assert_close(actual, expected)
    grads = [torch.autograd.grad(y, (x, w1, w2), dy) for y in (actual, expected)]
    for a, e in zip(*grads, strict=True):
        assert_close(a, e)


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("select_columns", (64, 24, 4, 16), "v = 24"),
        ("select_columns", (64, 8, 4, 16), "v = 8"),
        ("select_columns", (72, 16, 4, 16), "m = 16"),
        ("select_columns", (64, 16, 3, 16), "n = 3"),
    ],
)
def test_select_columns_refuses(name, args, message):
    hidden, *pattern = args
    with pytest.raises(ValueError, match=message):
        getattr(venom, name)(normal(32, hidden), *pattern)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from kernels.venom import products, select

def build(kernel, arch, constants, num_warps=4, num_stages=3):
    names = kernel.arg_names
    types = dict.fromkeys(("columns", "index"), "*i32")
    types |= dict.fromkeys(("tokens", "hidden_dim", "rows"), "i32")
    signature = {name: "constexpr" if name in constants else types.get(name, "*bf16") for name in names}
    source = triton.compiler.ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

for arch in (80, 90):
    for n in (2, 4):
        build(select._select_columns, arch, dict(V=64, N=n, M=16, PADDED_M=16, WINDOWS=8, WIDTH=128))
    for v in (64, 128):
        tile = products._tile(v)
        options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
        constants = dict(KEPT=512, D=512, V=v, WIDTH=128, **tile)
        sampled = build(products._sample_dy1, arch, constants, **options)
        reduced = build(products._gather_reduce, arch, constants | dict(order=None), **options)
        for kernel in (sampled, reduced):
            assert "cp.async" in kernel.asm["ptx"], "loads are not pipelined"
            assert ("wgmma" if arch == 90 else "mma.sync") in kernel.asm["ptx"]
            assert kernel.metadata.shared <= 163 * 1024, kernel.metadata.shared  # an A100's
"""


def test_kernels_compile_for_ampere_and_hopper():
    subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, check=True)
