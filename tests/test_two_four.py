"""Packing and products of 2:4 matrices against the format written out bit by bit, and against dense products.

The kernels are held against their plain PyTorch versions, on a GPU as compiled, elsewhere in Triton's interpreter.
"""

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conftest import ROOT, sparse_feed_forward
from torch import library
from torch.testing import assert_close

from kernels import Venom, venom_mask
from kernels.two_four import (
    cusparselt,
    keep_largest_pack,
    pack,
    pack_like,
    pack_reference,
    products,
    reduce_tokens,
    soft_threshold_2_4,
    soft_threshold_pack,
    sparse_linear,
    sparse_matmul,
    token_groups,
    token_rows,
)
from kernels.two_four.ffn import PACKED_ACTIVATIONS
from kernels.two_four.reference import join_packed, split_packed, unpack
from kernels.venom import token_mask

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
    packed, expected = pack._launch(groups, mode, scale, like), pack._reference(groups, mode, scale, like)
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
    packed = pack._reference(groups, "keep_largest_relu_squared", None, None)
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
            dense = unpack(pack._launch(spoilt, mode, scale, None)).unflatten(-1, (-1, 4))
            assert dense[7, 5].isnan().sum() == dense.isnan().sum() == min(count, 2)


@pytest.mark.kernels
@KINDS
@pytest.mark.parametrize("rows, columns", [*SHAPES, (64, 320)])
def test_unpack_kernel(kind, rows, columns, poisoned):
    packed = pack_reference(matrix(kind, rows, columns)).to(DEVICE)
    assert torch.equal(pack._launch_unpack(packed), unpack(packed))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from kernels.two_four.pack import TILES, _pack_kernel, _unpack_kernel

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
    signature = dict(values="*i32", metadata="*i16", dense="*i64", steps="i32", tiles="constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = triton.compiler.ASTSource(_unpack_kernel, signature, {(4,): TILES}, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=TILES))
    assert "st.global.v2.b64" in built.asm["ptx"]
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


def test_room_behind_a_packed_matrix():
    for columns, room in ((64, 256), (128, 0), (192, 256)):
        packed = pack_reference(matrix("floats", 64, columns))
        roomy = products._with_room(packed)
        assert torch.equal(roomy.view(torch.int16), packed.view(torch.int16)) and roomy.is_contiguous()
        assert roomy.untyped_storage().nbytes() == 2 * (packed.numel() + room)


@pytest.mark.gpu
def test_products_can_be_captured_after_their_first_call():
    weight, x = matrix("floats", 256, 192).cuda(), matrix("floats", 72, 192, seed=1).cuda()
    packed = pack_reference(weight)
    calls = [lambda: sparse_linear(packed, x), lambda: sparse_matmul(packed, x.T.contiguous())]
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="once before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        calls[0]()
    for call in calls:
        call()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    for seed in (2, 3):
        x.copy_(matrix("floats", 72, 192, seed=seed))
        graph.replay()
        for result, call in zip(results, calls, strict=True):
            assert torch.equal(result, call())


def test_a_product_is_planned_once_and_repeats_the_words_of_an_error(monkeypatch):
    """With a library that writes down what it is asked for."""
    asked, failing = [], []

    def function(name):
        def call(*arguments):
            asked.append((name, arguments))
            if name == "GetErrorString":
                return b"no such kernel"
            if name == "MatmulGetWorkspace":
                arguments[2]._obj.value = 64
            return int(name in failing)

        return call

    monkeypatch.setattr(cusparselt, "_function", function)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    cusparselt._handle.cache_clear()
    planned = cusparselt.Product(0, 128, 64, 40, True, True, 5, 1, -1)
    setup = len(asked)
    descriptions = [arguments[2:] for name, arguments in asked if name.endswith("DescriptorInit")][:3]
    row, column, bf16 = 2, 1, 14
    assert descriptions == [
        (128, 64, 64, 16, bf16, row, 0),
        (64, 40, 40, 16, bf16, row),
        (128, 40, 128, 16, bf16, column),
    ]
    packed, dense, result = (torch.zeros(4, dtype=torch.bfloat16) for _ in range(3))
    for _ in range(2):
        planned(packed, dense, result)
    assert [name for name, _ in asked[setup:]] == ["Matmul", "Matmul"]
    arguments = asked[-1][1]
    assert (arguments[3], arguments[4]) == (packed.data_ptr(), dense.data_ptr())
    assert arguments[6] == arguments[7] == result.data_ptr() and arguments[8]
    assert (arguments[9]._obj.value, arguments[10]) == (77, 1)
    failing.append("Matmul")
    with pytest.raises(RuntimeError, match="cusparseLtMatmul: no such kernel"):
        planned(packed, dense, result)
    failing.append("MatmulPlanInit")
    with pytest.raises(RuntimeError, match="cusparseLtMatmulPlanInit: no such kernel"):
        cusparselt.Product(0, 128, 64, 40, False, False, 5, 2, 1)
    cusparselt._handle.cache_clear()


@pytest.mark.parametrize("device", DEVICES)
def test_reduction_over_tokens_with_whole_neurons(device):
    rand = torch.Generator().manual_seed(0)
    h = torch.randint(0, 4, (128, 64), generator=rand).bfloat16().to(device)
    x = torch.randint(-1, 2, (128, 40), generator=rand).bfloat16().to(device)
    packed, whole = keep_largest_pack(token_groups(h)), torch.tensor([3, 50], device=device)
    cut = torch.where(venom_mask(token_groups(h).flatten(1), 1, 2, 4), token_groups(h).flatten(1), 0)
    expected = cut @ token_rows(x)
    expected[whole] = h.T[whole] @ x
    assert torch.equal(token_rows(h).T, token_groups(h).flatten(1))
    assert torch.equal(reduce_tokens(packed, x, whole, h.T[whole]), expected)
    transposed = reduce_tokens(packed, x, whole, h.T[whole], transpose_result=True)
    assert torch.equal(transposed, expected.T) and transposed.is_contiguous()


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


@pytest.mark.parametrize("name", ["two_four_pack", "two_four_unpack", "two_four_matmul", "two_four_reduce_tokens"])
def test_operators_are_registered_well(name):
    dense = matrix("floats", 64, 64)
    packed = pack_reference(dense)
    examples = {
        "two_four_pack": [
            (dense.unflatten(-1, (-1, 4)), "soft_threshold", torch.tensor(1.5)),
            (token_groups(dense.T.contiguous()), "like", None, packed),
        ],
        "two_four_unpack": [(packed,)],
        "two_four_matmul": [(packed, dense.T[:, :8], True), (packed, dense.T, False)],
        "two_four_reduce_tokens": [(packed, dense[:, :8], torch.tensor([7]), dense[:1], t) for t in (True, False)],
    }
    for arguments in examples[name]:
        library.opcheck(getattr(torch.ops.sparsetitan, name).default, arguments)


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
    for refusing in (unpack, pack.unpack):
        with pytest.raises(ValueError):
            refusing(torch.ones(64, 20, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="float16"):
        pack.unpack(packed.half())
    with pytest.raises(ValueError, match="T divisible by 8, got 12"):
        sparse_linear(packed, torch.ones(12, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="64 columns does not fit"):
        sparse_linear(packed, torch.ones(16, 128, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="64 columns does not fit"):
        sparse_matmul(packed, torch.ones(128, 16, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="bf16"):
        sparse_matmul(packed, torch.ones(64, 16))
    with pytest.raises(ValueError, match=r"whole_rows must be .* \[2, 64\], got .* \[1, 64\]"):
        ones = torch.ones(64, 16, dtype=torch.bfloat16)
        reduce_tokens(packed, ones, torch.tensor([0, 1]), torch.ones(1, 64, dtype=torch.bfloat16))


# ---- the FFN


def ffn_inputs(tokens, device, width=64, hidden_dim=128):
    """x, W1, W2, dy, bf16: small integers, for which h, dh and dy1 are exact in bf16 and every sum is in float32."""
    rand = torch.Generator().manual_seed(tokens)

    def ternary(rows, columns, density):
        values = torch.randint(0, 2, (rows, columns), generator=rand) * 2 - 1
        return values * (torch.rand(rows, columns, generator=rand) < density)

    made = ternary(tokens, width, 0.1), ternary(hidden_dim, width, 0.7), ternary(width, hidden_dim, 0.7)
    made[1][5] = made[1][77] = made[1].clamp_min(0)[5]  # neurons that fire often, and alike
    return [value.bfloat16().to(device) for value in (*made, ternary(tokens, width, 0.1))]


def ffn(inputs, scaled, cut, order, compiled=False):
    """y, dx, dW1, dW2."""
    x, w1, w2, dy = (value.detach().clone() for value in inputs)
    leaves = [value.requires_grad_() for value in (x, w1, w2)]
    scales = [torch.tensor(scale, device=x.device) if scaled else None for scale in (0.5, 2.0)]
    function = torch.compile(sparse_feed_forward, fullgraph=True, dynamic=False) if compiled else sparse_feed_forward
    y = function(*leaves, Venom(1, 2, 4), *scales, cut, order=order)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("tokens, cut", [(256, True), (172, True), (256, False), (165, False)])
def test_operators_compose_to_the_feed_forward(tokens, cut, scaled, ordered, device, monkeypatch):
    """Against the masked reference in float64, which keeps the same entries: outputs and all gradients."""
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0)) if ordered else None
    inputs = ffn_inputs(tokens, "cpu")
    expected = ffn([value.double() for value in inputs], scaled, cut, order)
    if device == "cpu":
        packed = partial(sparse_feed_forward, family=PACKED_ACTIVATIONS)
        monkeypatch.setitem(globals(), "sparse_feed_forward", packed)
    inputs, order = [value.to(device) for value in inputs], None if order is None else order.to(device)
    for compiled in (False, True) if device == "cuda" and scaled and ordered else (False,):
        torch._dynamo.reset()
        actual = ffn(inputs, scaled, cut, order, compiled)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a.cpu().double(), e, rtol=2**-7, atol=0)


@pytest.mark.gpu
def test_a_step_of_the_feed_forward_does_not_wait():
    inputs = ffn_inputs(256, "cuda")
    ffn(inputs, True, True, None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        x, w1, w2, dy = (value.requires_grad_() for value in inputs)
        y = sparse_feed_forward(x, w1, w2, Venom(1, 2, 4), cut_along_tokens=True)
        torch.autograd.grad(y, (x, w1, w2), dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_feed_forward_compiles_without_a_graph_break(monkeypatch):
    inputs, packed = ffn_inputs(172, "cpu"), partial(sparse_feed_forward, family=PACKED_ACTIVATIONS)
    function = torch.compile(packed, fullgraph=True, backend="aot_eager")
    monkeypatch.setitem(globals(), "sparse_feed_forward", packed)
    expected = ffn(inputs, True, True, None)
    monkeypatch.setitem(globals(), "sparse_feed_forward", function)
    for actual, wanted in zip(ffn(inputs, True, True, None), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_the_feed_forward_keeps_h_packed():
    saved = []
    x, w1, w2, _ = (value.requires_grad_() for value in ffn_inputs(192, "cpu"))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape), lambda _: None):
        sparse_feed_forward(x, w1, w2, Venom(1, 2, 4), cut_along_tokens=True, family=PACKED_ACTIVATIONS)
    assert (192, 128 * 9 // 16) in saved and (192, 128) not in saved
