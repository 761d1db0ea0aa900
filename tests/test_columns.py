"""Large blocks as dense FFNs of what they keep, against the specification: on a GPU as compiled, elsewhere in Triton's
interpreter.
"""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, sparse_feed_forward
from torch.testing import assert_close

from kernels import (
    MASKED,
    FeedForwardSparsity,
    Groups,
    Preceding,
    Shape,
    Venom,
    choose,
    columns,
    groups,
)
from kernels.columns.ffn import LARGE_BLOCKS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("poisoned")]

# tokens, v, g, keep, sample, balance, window: whole blocks, a shorter last block, fewer tokens than v, groups of
# several neurons, sample = 1, windows. tests/test_columns_fp8.py uses them too.
SHAPES = [
    (64, 16, 1, 0.25, 4, 0.0, 0),
    (75, 16, 1, 0.25, 4, 0.5, 0),
    (75, 16, 1, 0.125, 8, 0.0, 0),
    (7, 16, 1, 0.25, 3, 0.0, 0),
    (70, 32, 4, 0.3, 5, 0.25, 0),
    (40, 20, 8, 0.25, 1, 0.0, 0),
    (33, 16, 1, 1.0, 16, 0.5, 0),
    (75, 16, 1, 0.25, 4, 0.5, 16),
    (64, 16, 1, 0.125, 1, 0.0, 8),
    (40, 20, 2, 0.5, 8, 0.0, 12),
    (33, 16, 1, 0.25, 16, 0.0, 48),
]


def operands(tokens, width=12, hidden=48, dtype=torch.float64, seed=0):
    rand = torch.Generator().manual_seed(seed)
    x, w1, w2, dy = (
        torch.randn(shape, generator=rand, dtype=torch.float64)
        for shape in ((tokens, width), (hidden, width), (width, hidden), (tokens, width))
    )
    # Neurons that never fire: sums that are equal.
    x[:, : width // 2] = x[:, : width // 2].abs()
    w1[: hidden // 4] = -w1[: hidden // 4].abs()
    w1[: hidden // 4, width // 2 :] = 0
    return tuple(each.to(DEVICE, dtype) for each in (x, w1, w2, dy))


def permutation(tokens, seed):
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def outputs(feed_forward, x, w1, w2, dy):
    """y, dx, dW1 and dW2 of a function of x, W1 and W2."""
    leaves = [each.clone().requires_grad_() for each in (x, w1, w2)]
    y = feed_forward(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


def outputs_in_order(feed_forward, order, x, w1, w2, dy):
    """`outputs` of a function of tokens that are permuted before it, with y and dx in the original order."""
    y, dx, *gradients = outputs(feed_forward, x[order], w1, w2, dy[order])
    inverse = order.argsort()
    return (y[inverse], dx[inverse], *gradients)


by_columns = partial(sparse_feed_forward, family=LARGE_BLOCKS)
by_reference = partial(sparse_feed_forward, family=MASKED)


@pytest.mark.parametrize("tokens, v, g, keep, sample, balance, window", SHAPES)
@pytest.mark.parametrize("ordered, scales", [(False, (None, None)), (True, (None, None)), (True, (1.1, 0.9))])
def test_the_feed_forward_is_the_masked_one(tokens, v, g, keep, sample, balance, window, ordered, scales):
    w1_scale, w2_scale = (None if each is None else torch.tensor(each, device=DEVICE) for each in scales)
    pattern = Groups(v, g, keep, sample=sample, balance=balance, window=window)
    for seed in range(3):
        given, order = operands(tokens, seed=seed), permutation(tokens, seed) if ordered else None
        options = {"pattern": pattern, "w1_scale": w1_scale, "w2_scale": w2_scale}
        found = outputs(partial(by_columns, order=order, **options), *given)
        reference = partial(by_reference, **options)
        expected = outputs_in_order(reference, order, *given) if ordered else outputs(reference, *given)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, rtol=1e-10, atol=1e-10)
            assert one.is_contiguous()


@pytest.mark.parametrize("tokens, v, g, keep, sample, balance, window", SHAPES)
def test_chosen_are_the_mask_s_neurons(tokens, v, g, keep, sample, balance, window):
    pattern = Groups(v, g, keep, sample=sample, balance=balance, window=window)
    x, w1, *_ = operands(tokens)
    place = columns.choose(columns.in_blocks(x, v)[:, ::sample] @ w1.T, pattern)
    assert place.dtype == torch.int32 and place.shape == (-(-tokens // v), 48)
    count = pattern.kept_groups(48) * g
    for row in place:
        assert torch.equal(row[row >= 0], torch.arange(count, device=DEVICE, dtype=torch.int32)) and row.min() >= -1
    h = (x @ w1.T).relu() ** 2
    expected = (place >= 0).repeat_interleave(v, 0)[:tokens] & (h != 0)
    assert torch.equal(pattern.mask(h), expected)


# Whole sequences, a shorter last one, one alone, less than a block.
@pytest.mark.parametrize("tokens", [120, 75, 40, 7])
@pytest.mark.parametrize("v, g, keep, sample", [(16, 1, 0.25, 4), (16, 4, 0.3, 1), (20, 1, 0.1, 20), (64, 1, 0.25, 8)])
def test_the_block_before_chooses(tokens, v, g, keep, sample):
    pattern = Preceding(Groups(v, g, keep, sample=sample), 40)
    x, w1, w2, _ = operands(tokens)
    expected = by_reference(x, w1, w2, pattern)
    torch._dynamo.reset()
    compiled = torch.compile(by_columns, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        for function in (by_columns, compiled):
            assert_close(function(x, w1, w2, pattern), expected, rtol=1e-10, atol=1e-10)


def test_nan_in_a_sample_shows():
    x, w1, w2, _ = operands(64)
    x[16, 3] = torch.nan  # the first token of a block, which is in its sample
    y = by_columns(x, w1, w2, Groups(16, 1, 0.25, sample=4))
    assert y[16].isnan().all() and y[:16].isfinite().all() and y[32:].isfinite().all()


@pytest.mark.parametrize("blocks, kept, hidden, width", [(3, 5, 16, 12), (1, 4, 4, 1030), (6, 1, 40, 8)])
@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_copies_and_sums_are_their_references(blocks, kept, hidden, width, experts, dtype):
    """Of one weight, and of four experts, of which the first has the first block, the second none."""
    rand = torch.Generator().manual_seed(0)
    place = columns._reference_largest(torch.rand(blocks, hidden, generator=rand), kept, hidden).to(DEVICE)
    weight = torch.randn(experts * hidden, width, generator=rand).to(DEVICE, dtype)
    bounds = [0, 1, 1, max(1, blocks - 2), blocks] if experts > 1 else [0, blocks]
    given = torch.tensor(bounds, dtype=torch.int32, device=DEVICE) if experts > 1 else None
    owner = [expert for expert in range(experts) for _ in range(bounds[expert], bounds[expert + 1])]
    for each in (weight, weight.T.contiguous().T):
        found = columns._launch_copy(each, place, kept, given)
        assert torch.equal(found, columns._reference_copy(weight, place, kept, given))
        for block in range(blocks):
            assert torch.equal(found[block], weight.unflatten(0, (experts, -1))[owner[block]][place[block] >= 0])
    parts = torch.randint(-8, 9, (blocks, kept, width), generator=rand).to(DEVICE, dtype)
    expected = torch.zeros(experts, hidden, width, dtype=torch.float64, device=DEVICE)
    for block in range(blocks):
        expected[owner[block], place[block] >= 0] += parts[block].double()
    for transposed in (False, True):
        found = columns._launch_add(parts, place, transposed, given)
        assert torch.equal(found, columns._reference_add(parts, place, transposed, given))
        assert found.dtype == dtype and found.is_contiguous()
        assert torch.equal(found.T if transposed else found, expected.flatten(0, 1).to(dtype))


@pytest.mark.parametrize("groups, window", [(1, 1), (37, 37), (128, 128), (1000, 1000), (96, 16), (60, 12), (4096, 8)])
def test_the_largest_are_a_stable_sort_s(groups, window):
    rand = torch.Generator().manual_seed(groups)
    sums = torch.rand(6, groups, generator=rand)
    sums[1] = 0
    sums[2] = (sums[2] * 4).floor()  # many equals
    sums[3, ::3] = torch.nan
    sums[4, ::5] = torch.inf
    sums[5] *= 1e-40  # denormal
    for kept in {1, -(-window // 3), window}:
        found = columns._launch_largest(sums.to(DEVICE), kept, window)
        assert torch.equal(found.cpu(), columns._reference_largest(sums, kept, window))
        assert ((found >= 0).unflatten(1, (-1, window)).sum(2) == kept).all()


def test_windows_keep_what_venom_keeps_with_all_four_columns():
    h = torch.rand(70, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(Groups(32, 1, 0.25, window=16).mask(h), Venom(32, 4, 16).mask(h))
    assert torch.equal(Groups(32, 1, 0.125, window=32).mask(h), Venom(32, 4, 32).mask(h))


@pytest.mark.parametrize(
    "pattern, problem",
    [
        (Groups(16, 1, 0.25, window=20), "divides the FFN's hidden_dim = 48"),
        (Groups(16, 4, 0.25, window=6), "multiple of g = 4"),
        (Groups(16, 1, 0.25, window=6), "is 1.5, not a whole number"),
        (Groups(16, 1, 0.25, window=-16), "window = -16"),
    ],
)
def test_windows_that_do_not_fit_are_refused(pattern, problem):
    with pytest.raises(ValueError, match=problem):
        pattern.check(48)


def test_which_patterns_run_as_columns():
    def chosen(pattern, *products, dtype=torch.bfloat16):
        sparsity = FeedForwardSparsity(pattern, products)
        return choose(sparsity, Shape(768, 4608), torch.device("cuda"), dtype, here=False)[0].name

    assert chosen(Groups(1024, 1, 0.25, sample=8)) == chosen(Groups(512, 128, 0.25)) == "columns"
    assert chosen(Groups(256, 1, 0.25)) == "reference"
    assert chosen(Preceding(Groups(1024, 1, 0.25, sample=8), 4096)) == "columns"
    assert chosen(Preceding(Groups(256, 1, 0.25), 4096)) == "reference"
    assert chosen(Groups(1024, 1, 0.25), 1) == chosen(Groups(1024, 1, 0.25, sample=8), 1, 3) == "columns"
    assert chosen(Groups(1024, 1, 0.25), dtype=torch.float32) == "reference"
    assert chosen(Groups(groups.TILE, groups.TILE, 0.25)) == "groups"
    assert chosen(Groups(groups.TILE, groups.TILE, 0.25, sample=2)) == "reference"
    assert chosen(Groups(groups.TILE, groups.TILE, 0.25, window=1536)) == "reference"
    assert chosen(Preceding(Groups(groups.TILE, groups.TILE, 0.25, window=1536), 4096)) == "reference"
    assert chosen(Groups(1024, 1, 0.25, window=16)) == "columns"


@pytest.mark.parametrize("ordered", [False, True])
def test_a_compiled_graph_holds_through_it(ordered):
    given, order = operands(40, dtype=torch.float32), permutation(40, 0) if ordered else None
    pattern = Groups(16, 1, 0.25, sample=4)

    def call(x, w1, w2):
        return by_columns(x, w1, w2, pattern, order=order)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for one, other in zip(outputs(call, *given), outputs(compiled, *given), strict=True):
        assert_close(one, other)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.columns import _add_rows, _copy_rows, _keep_largest

SHAPE = "blocks", "hidden_dim", "kept", "D", "neuron_stride", "column_stride"
ROWS = {"place": "*i32", "out": "*bf16"} | dict.fromkeys(SHAPE, "i32")
SIZES = {"NEURONS": 32, "WIDTH": 128}
LARGEST = {"sums": "*fp32", "place": "*i32", "rows": "i32", "windows": "i32", "groups": "i32", "kept": "i32"}
for arch in (80, 90):
    for kernel, signature, constants, warps in (
        (_add_rows, {"parts": "*bf16"} | ROWS, SIZES | {"bounds": None}, 4),
        (_copy_rows, {"weight": "*bf16"} | ROWS, SIZES | {"bounds": None}, 4),
        (_add_rows, {"parts": "*bf16", "bounds": "*i32"} | ROWS, SIZES, 4),
        (_copy_rows, {"weight": "*bf16", "bounds": "*i32"} | ROWS, SIZES, 4),
        (_keep_largest, LARGEST, {"ROWS": 1, "GROUPS": 16384}, 16),
        (_keep_largest, LARGEST, {"ROWS": 64, "GROUPS": 16}, 4),
    ):
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
        assert "ld.global" in compiled.asm["ptx"]
"""


def test_kernels_compile_for_ampere_and_hopper():
    subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, check=True)
