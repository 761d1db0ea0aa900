"""Packing and products of 2:4 matrices against the format written out bit by bit, and against dense products.

The kernels are held against their plain PyTorch versions, on a GPU as compiled, elsewhere in Triton's interpreter.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conftest import ROOT

from kernels import Venom, venom_mask
from kernels.feed_forward import token_mask
from kernels.two_four import (
    keep_largest_pack,
    pack_like,
    pack_reference,
    soft_threshold_2_4,
    soft_threshold_pack,
    sparse_linear,
    sparse_matmul,
    token_groups,
    unpack,
)
from kernels.two_four import pack as kernels
from kernels.two_four.reference import join_packed, split_packed

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
SHAPES = [(64, 64), (128, 192)]  # one tile; a last program that is not full


# ---- inputs


def matrix(kind, rows, columns, seed=0):
    """`[R, K]` bf16: random; with ties and zeros; mostly zeros; or with NaN, infinities and the smallest numbers."""
    rand = torch.Generator().manual_seed(seed)
    if kind == "ties":
        return torch.randint(-2, 3, (rows, columns), generator=rand).bfloat16()
    dense = torch.randn(rows, columns, generator=rand).bfloat16()
    if kind == "zeros":
        dense *= torch.rand(rows, columns, generator=rand) < 0.2
    if kind == "tiny":
        dense *= torch.rand(rows, columns, generator=rand).mul(-90).exp2()
    return dense


KINDS = pytest.mark.parametrize("kind", ["floats", "ties", "zeros", "tiny"])


def layouts(dense):
    """The same matrix in memory as it is, transposed, as part of a wider one, and with gaps between entries."""
    wider = torch.cat((dense, dense), 1)
    return (
        dense,
        dense.T.contiguous().T,
        wider[:, : dense.shape[1]],
        torch.stack((dense, dense), 2)[..., 0],
        torch.cat((dense[:, :1], dense), 1)[:, 1:],
    )


def nibble_place(r, g, columns):
    """Where the nibble of row r and group g is, bit by bit."""
    inner = [r >> 3, g >> 2, g, g >> 1, r, r >> 1, r >> 2, r >> 4, r >> 5]
    return (r // 64 * (columns // 32) + g // 8) * 512 + sum((bit & 1) << i for i, bit in enumerate(inner))


# ---- the format


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_packed_format_is_the_one_written_out(rows, columns):
    dense = torch.arange(1, rows * columns + 1, dtype=torch.int16).view(torch.bfloat16).view(rows, columns // 4, 4)
    rand = torch.Generator().manual_seed(0)
    index = torch.rand(rows, columns // 4, 4, generator=rand).sort().indices[..., :2].sort().values
    packed = join_packed(dense.gather(-1, index), index)
    assert packed.shape == (rows, columns * 9 // 16) and packed.is_contiguous()
    halves, data = packed.flatten().view(torch.int16).tolist(), packed.flatten().view(torch.uint8).tolist()
    for r in range(rows):
        for g in range(columns // 4):
            i, j = index[r, g].tolist()
            start = r * columns + 4 * g + 1
            assert halves[(r * columns // 2 + 2 * g) :][:2] == [start + i, start + j]
            place = nibble_place(r, g, columns)
            assert data[rows * columns + place // 2] >> 4 * (place % 2) & 15 == i + 4 * j
    again, where = split_packed(packed)
    assert torch.equal(join_packed(again, where).view(torch.int16), packed.view(torch.int16))
    assert torch.equal(where, index)


@KINDS
def test_unpack_undoes_pack(kind):
    sparse = soft_threshold_2_4(matrix(kind, 128, 192))
    assert torch.equal(unpack(pack_reference(sparse)), sparse)


# ---- kernels against their references


@pytest.fixture
def exact_rounding(monkeypatch):
    """Triton's interpreter truncates float32 to bf16; a GPU, like PyTorch, rounds to nearest."""
    if INTERPRETED:
        from triton.runtime import interpreter

        convert = interpreter._convert_float

        def rounding(data, source, target, mode):
            if (source, target) != (tl.float32, tl.bfloat16):
                return convert(data, source, target, mode)
            floats = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
            return floats.bfloat16().view(torch.int16).numpy().view(np.uint16)

        monkeypatch.setattr(interpreter, "_convert_float", rounding)


def check_kernel(dense, mode, scale=None, like=None):
    """The kernel writes the reference's values and metadata; zeros may differ in their sign."""
    groups = dense if dense.dim() == 3 else dense.unflatten(-1, (-1, 4))
    packed, expected = kernels._launch(groups, mode, scale, like), kernels._reference(groups, mode, scale, like)
    assert packed.shape == expected.shape and packed.dtype == expected.dtype
    for actual, wanted in zip(split_packed(packed), split_packed(expected), strict=True):
        assert torch.equal(actual, wanted)
    return packed


@pytest.mark.kernels
@KINDS
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_soft_threshold_kernel(kind, rows, columns, exact_rounding):
    dense, scale = matrix(kind, rows, columns).to(DEVICE), torch.tensor(1.2345, device=DEVICE)
    for weight in layouts(dense):
        packed = check_kernel(weight, "soft_threshold", scale)
        assert torch.equal(unpack(packed), scale.bfloat16() * soft_threshold_2_4(weight))
    check_kernel(dense, "soft_threshold", -scale)


@pytest.mark.kernels
@KINDS
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_keep_largest_kernel(kind, rows, columns, exact_rounding):
    for y1 in layouts(matrix(kind, rows, columns).to(DEVICE)):
        h = y1.relu() * y1.relu()
        packed = check_kernel(y1, "keep_largest_relu_squared")
        assert torch.equal(unpack(packed), torch.where(venom_mask(h, 1, 2, 4), h, 0))
    for h in layouts(matrix(kind, rows, columns).relu().to(DEVICE)):
        packed = check_kernel(h, "keep_largest")
        assert torch.equal(unpack(packed), torch.where(venom_mask(h, 1, 2, 4), h, 0))


@pytest.mark.kernels
@KINDS
@pytest.mark.parametrize("tokens, neurons", [(64, 64), (320, 128)])
def test_kernels_along_tokens(kind, tokens, neurons, exact_rounding):
    h, dh = matrix(kind, tokens, neurons).relu().to(DEVICE), matrix("floats", tokens, neurons, seed=1).to(DEVICE)
    packed = check_kernel(token_groups(h), "keep_largest")
    check_kernel(token_groups(dh), "like", like=packed)
    check_kernel(token_groups(dh), "relu_squared_grad", like=packed)


@pytest.mark.kernels
@KINDS
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_kernels_under_the_pattern_of_another(kind, rows, columns, exact_rounding):
    groups = matrix(kind, rows, columns).to(DEVICE).unflatten(-1, (-1, 4))
    packed = kernels._reference(groups, "keep_largest_relu_squared", None, None)
    for dh in layouts(matrix("floats", rows, columns, seed=1).to(DEVICE)):
        check_kernel(dh, "like", like=packed)
        grad = check_kernel(dh, "relu_squared_grad", like=packed)
        assert torch.equal(unpack(grad), 2 * unpack(packed).sqrt() * dh)


@pytest.mark.kernels
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["soft_threshold", "keep_largest", "keep_largest_relu_squared"])
def test_nan_does_not_vanish_in_a_kernel(mode, count, exact_rounding):
    weight = matrix("floats", 64, 64).to(DEVICE).unflatten(-1, (-1, 4))
    scale = torch.tensor(1.5, device=DEVICE) if mode == "soft_threshold" else None
    for nan in (torch.tensor(torch.nan), -torch.tensor(torch.nan)):
        for place in range(5 - count):
            spoilt = weight.clone()
            spoilt[7, 5, place : place + count] = nan
            dense = unpack(kernels._launch(spoilt, mode, scale, None)).unflatten(-1, (-1, 4))
            assert dense[7, 5].isnan().sum() == dense.isnan().sum() == min(count, 2)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from kernels.two_four.pack import TILES, _pack_kernel

POINTERS = dict(values="*i32", metadata="*i16", scale="*fp32", like_values="*i32", like_metadata="*i16")
MODES = "soft_threshold", "keep_largest", "keep_largest_relu_squared", "like", "relu_squared_grad"
names = _pack_kernel.arg_names
for arch in (80, 90):
    for layout in ("rows", "columns"):
        for mode in MODES:
            given = dict(mode=mode, tiles=TILES)
            given |= dict(stride_group=1, stride_entry=1) if layout == "rows" else dict(stride_row=1)
            if mode != "soft_threshold":
                given["scale"] = None
            if mode not in ("like", "relu_squared_grad"):
                given |= dict(like_values=None, like_metadata=None)
            types = POINTERS | dict(dense="*i64" if layout == "rows" else "*i16")
            signature = {name: "constexpr" if name in given else types.get(name, "i32") for name in names}
            aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in given}
            constants = {(names.index(name),): value for name, value in given.items()}
            source = triton.compiler.ASTSource(_pack_kernel, signature, constants, aligned)
            built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=TILES))
            assert "st.global.v4.b32" in built.asm["ptx"]
            assert ("ld.global.v2.b64" if layout == "rows" else "ld.global.v2.b32") in built.asm["ptx"]
"""


def test_kernels_compile_for_ampere_and_hopper():
    subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, check=True)


# ---- the public functions


@pytest.mark.parametrize("device", DEVICES)
def test_packing_is_what_the_references_keep(device):
    y1, scale = matrix("floats", 64, 128).to(device), torch.tensor(1.2345, device=device)
    h = y1.relu() * y1.relu()
    kept = torch.where(venom_mask(h, 1, 2, 4), h, 0)
    assert torch.equal(unpack(soft_threshold_pack(y1, scale)), scale.bfloat16() * soft_threshold_2_4(y1))
    assert torch.equal(unpack(keep_largest_pack(h)), kept)
    packed = keep_largest_pack(y1, relu_squared=True)
    assert torch.equal(unpack(packed), kept)
    dh = matrix("floats", 64, 128, seed=1).to(device)
    assert torch.equal(unpack(pack_like(dh, packed)) * (kept != 0), torch.where(kept != 0, dh, 0))
    assert torch.equal(unpack(pack_like(dh, packed, relu_squared_grad=True)), 2 * kept.sqrt() * dh)


@pytest.mark.parametrize("device", DEVICES)
def test_token_groups_are_those_of_the_token_mask(device):
    h = matrix("floats", 64, 64).relu().to(device)
    h[:, :3] = 1  # the neurons that the token mask leaves whole
    kept = torch.where(token_mask(h, Venom(1, 2, 4)), h, 0)
    dense = unpack(keep_largest_pack(token_groups(h))).unflatten(-1, (-1, 4)).permute(2, 1, 0).flatten(0, 1)
    assert torch.equal(dense[:, 3:], kept[:, 3:])


@pytest.mark.parametrize("device", DEVICES)
def test_products_are_dense_products(device):
    # Small integers: every sum is exact in float32 and in bf16.
    rand = torch.Generator().manual_seed(0)
    sparse = soft_threshold_2_4(torch.randint(-3, 4, (128, 64), generator=rand).bfloat16()).to(device)
    x = torch.randint(-1, 2, (40, 64), generator=rand).bfloat16().to(device)
    packed = pack_reference(sparse)
    for layout in layouts(x):
        assert torch.equal(sparse_linear(packed, layout), x @ sparse.T)
        assert torch.equal(sparse_matmul(packed, layout.T), sparse @ x.T)
    assert sparse_linear(packed, x).is_contiguous() and sparse_matmul(packed, x.T).is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
def test_packing_and_products_compile_without_a_graph_break(device):
    weight, x = matrix("floats", 64, 128).to(device), matrix("floats", 24, 128, seed=1).to(device)
    scale = torch.tensor(1.5, device=device)

    def forward(weight, x, scale):
        y1 = sparse_linear(soft_threshold_pack(weight, scale), x)
        h = keep_largest_pack(torch.cat((y1, y1, y1))[:64], relu_squared=True)
        dy1 = pack_like(weight.new_ones(64, 64), h, relu_squared_grad=True)
        tokens = keep_largest_pack(token_groups(weight.T))
        return y1, sparse_matmul(h, weight), sparse_matmul(dy1, weight), tokens

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)(weight, x, scale)
    for actual, expected in zip(compiled, forward(weight, x, scale), strict=True):
        assert torch.equal(actual, expected) and actual.stride() == expected.stride()


@pytest.mark.parametrize("name", ["two_four_pack", "two_four_matmul"])
def test_operators_are_registered_well(name):
    dense = matrix("floats", 64, 64)
    packed = pack_reference(dense)
    examples = {
        "two_four_pack": [
            (dense.unflatten(-1, (-1, 4)), "soft_threshold", torch.tensor(1.5)),
            (token_groups(dense.T.contiguous()), "like", None, packed),
        ],
        "two_four_matmul": [(packed, dense.T[:, :8], True), (packed, dense.T, False)],
    }
    for arguments in examples[name]:
        torch.library.opcheck(getattr(torch.ops.sparsetitan, name).default, arguments)


def test_impossible_operands_are_refused():
    packed = pack_reference(matrix("floats", 64, 64))
    for rows, columns in ((63, 64), (64, 96), (0, 64), (64, 0)):
        for refused in (keep_largest_pack, pack_reference, lambda m: soft_threshold_pack(m, torch.tensor(1.0))):
            with pytest.raises(ValueError, match=rf"divisible by 64 .* divisible by 64, got \[{rows}, {columns}\]"):
                refused(torch.ones(rows, columns, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="float32"):
        keep_largest_pack(torch.ones(64, 64))
    with pytest.raises(ValueError, match="needs bf16"):
        keep_largest_pack(torch.ones(64, 4, 8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="cannot take the pattern"):
        pack_like(torch.ones(64, 128, dtype=torch.bfloat16), packed)
    with pytest.raises(ValueError):
        unpack(torch.ones(64, 20, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="T divisible by 8, got 12"):
        sparse_linear(packed, torch.ones(12, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="64 columns does not fit"):
        sparse_linear(packed, torch.ones(16, 128, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="64 columns does not fit"):
        sparse_matmul(packed, torch.ones(128, 16, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="bf16"):
        sparse_matmul(packed, torch.ones(64, 16))
