"""The column-group kernels against their specification, and that against `group_mask`.

On a GPU the kernels run as compiled (on Hopper both the CUDA C++ and the Triton products), elsewhere the Triton ones in
Triton's interpreter. Selections must match bit for bit, so sums are made exact; products are held against float64.
Outputs start as NaN, or as -1, so that an entry that no program writes shows.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, sparse_feed_forward
from torch import library
from torch.testing import assert_close

from kernels import Groups, group_mask, groups
from kernels.groups import TILE, TileLists, portable, products, reference, select
from kernels.groups.ffn import TILE_GROUPS
from kernels.groups.tiles import COUNTERS

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32  # the interpreter multiplies bf16's bit patterns
HOPPER = GPU and torch.cuda.get_device_capability() == (9, 0)
PRODUCTS = pytest.mark.parametrize(
    "product",
    [
        portable,
        pytest.param(products, marks=[pytest.mark.gpu, pytest.mark.skipif(GPU and not HOPPER, reason="needs Hopper")]),
    ],
    ids=["triton", "hopper"],
)
# Tokens, width, hidden_dim, groups kept: a short last block, one token, width no multiple of a tile, all groups kept.
SHAPES = [(300, 192, 384, 2), (1, 64, 128, 1), (128, 320, 256, 2), (520, 64, 640, 1)]


pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("poisoned")]


def pre_activations(kind, tokens, hidden, seed=0):
    """y1 `[T, f]`: squares and their sums over a tile are exact in float32."""
    rand = torch.Generator().manual_seed(seed)
    if kind == "zeros":
        y1 = -torch.ones(tokens, hidden)
    elif kind == "ties":
        y1 = torch.ones(tokens, hidden)
    else:
        y1 = torch.randint(-12, 13, (tokens, hidden), generator=rand).float() / 4
    if kind == "sparse":
        y1[: max(1, tokens // 2), : hidden // 2] = 0
        y1[tokens // 2] = 0
    if kind == "favourite":  # every block keeps the last group, and one other
        y1[:, -TILE:] = 3
    return y1.to(DEVICE, DTYPE)


def normal(*shape, seed=0, dtype=DTYPE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def dense(tiles, lists):
    return reference._matrix(tiles, lists)


# ---- selection


@pytest.mark.parametrize("kind", ["floats", "ties", "sparse", "zeros", "favourite"])
@pytest.mark.parametrize("tokens, hidden, kept", [(300, 384, 2), (1, 128, 1), (256, 640, 5), (129, 768, 1)])
@pytest.mark.parametrize("balance", [0.0, 0.5])
def test_selection_is_group_mask(kind, tokens, hidden, kept, balance):
    y1 = pre_activations(kind, tokens, hidden)
    h = y1.relu() * y1.relu()
    mask = group_mask(h, TILE, TILE, kept / (hidden // TILE), balance=balance)
    for selection in (reference, select):
        tiles, lists = selection.select_tiles(y1, kept, balance=balance)
        assert torch.equal(dense(tiles, lists)[:tokens], torch.where(mask, h, 0))
        assert not dense(tiles, lists)[tokens:].any()
        check_lists(lists, kept)
    expected = reference.select_tiles(y1, kept, balance=balance)[1]
    for name in ("start", "tile_group", "tile_block", "group_count", "group_order"):
        assert torch.equal(getattr(lists, name), getattr(expected, name)), name


def test_selection_by_another_matrix():
    """The choice is that of the longer one's blocks, the tiles are those of y1."""
    y1, by = pre_activations("floats", 300, 384), pre_activations("sparse", 400, 384)
    h = y1.relu() * y1.relu()
    # Of `by` whole blocks count, though the last one of y1 is cut.
    sums = by.relu().float().square().to(DTYPE).float()[:384].view(3, TILE, 384).sum(1)
    mask = group_mask(h, TILE, TILE, 1 / 3, sums)
    assert not torch.equal(mask, group_mask(h, TILE, TILE, 1 / 3))
    for selection in (reference, select):
        tiles, lists = selection.select_tiles(y1, 1, by)
        assert torch.equal(dense(tiles, lists)[:300], torch.where(mask, h, 0))
        check_lists(lists, 1)


def check_lists(lists: TileLists, kept: int | None):
    """`kept`: of every block; None: they differ."""
    block, group = lists.tile_block.tolist(), lists.tile_group.tolist()
    assert lists.start.tolist() == [sum(mine < b for mine in block) for b in range(lists.blocks + 1)]
    if kept is not None:
        assert lists.start.tolist() == [b * kept for b in range(lists.blocks + 1)]
    assert list(zip(block, group, strict=True)) == sorted(zip(block, group, strict=True))
    counts = lists.group_count.tolist()
    for j in range(lists.groups):
        assert lists.group_tiles[j, : counts[j]].tolist() == [p for p, g in enumerate(group) if g == j]
    assert lists.counters.tolist() == [0] * COUNTERS
    order = lists.group_order.tolist()
    assert order == sorted(range(lists.groups), key=lambda j: (-counts[j], j))


def test_selection_keeps_nan():
    y1 = pre_activations("floats", 200, 512)
    y1[150, 300] = torch.nan
    for selection in (reference, select):
        tiles, lists = selection.select_tiles(y1, 1)
        assert tiles.isnan().sum() == 1 and dense(tiles, lists)[150, 300].isnan()


def test_selection_prefers_nan_to_infinity():
    y1 = pre_activations("zeros", 2, 256)
    y1[0, 0], y1[0, 130] = torch.inf, torch.nan
    for selection in (reference, select):
        assert selection.select_tiles(y1, 1)[1].tile_group.tolist() == [1]


# ---- products


def operands(tokens, width, hidden, kept, kind="floats"):
    tiles, lists = select.select_tiles(pre_activations(kind, tokens, hidden), kept)
    x, dy = normal(tokens, width, seed=1), normal(tokens, width, seed=2)
    w1, w2 = normal(hidden, width, seed=3), normal(width, hidden, seed=4)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(5)).int().to(DEVICE)
    return tiles, lists, x, dy, w1, w2, order


def close(actual, expected):
    """Relative error as a bf16 product's own: rounding its result once."""
    error = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert actual.isfinite().all() and error < 4e-3, error.item()


@PRODUCTS
@pytest.mark.parametrize("kind", ["floats", "sparse", "favourite"])
@pytest.mark.parametrize("tokens, width, hidden, kept", SHAPES)
def test_products(product, kind, tokens, width, hidden, kept):
    tiles, lists, x, dy, w1, w2, order = operands(tokens, width, hidden, kept, kind)
    h = tiles.double()
    for o in (order, None):
        expected = reference.reduce_neurons(h, lists, w2.double().T, o, tokens)
        close(product.reduce_neurons(tiles, lists, w2.T, o, tokens), expected)
        expected = reference.reduce_neurons(h, lists, w1.double(), o, tokens)
        close(product.reduce_neurons(tiles, lists, w1, o, tokens), expected)
    close(product.sample_dy1(dy, w2.T, tiles, lists), reference.sample_dy1(dy.double(), w2.double().T, h, lists))
    for transposed in (False, True):  # groups that no block keeps get zeros
        expected = reference.reduce_tokens(h, lists, x.double(), transposed)
        close(product.reduce_tokens(tiles, lists, x, transposed), expected)


def test_a_launch_points_at_the_lists_and_each_product_at_its_counter(monkeypatch):
    tiles, lists, x, dy, w1, w2, order = operands(300, 192, 384, 2)
    monkeypatch.setattr(products, "Launch", lambda *arguments: lambda: launched.append((arguments[0], arguments[-1])))
    monkeypatch.setattr(products, "tensor_map", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=7))
    for prepare in (products._reduce_neurons, products._sample, products._reduce_tokens):
        monkeypatch.setattr(products, prepare.__name__, prepare.__wrapped__)
    launched: list = []
    outputs = [
        products.reduce_neurons(tiles, lists, w1, order, 300),
        products.reduce_neurons(tiles, lists, w2.T, None, 300),
        products.sample_dy1(dy, w2.T, tiles, lists),
        products.reduce_tokens(tiles, lists, x, False),
        products.reduce_tokens(tiles, lists, x, True),
    ]
    assert [kernel.name for kernel, _ in launched] == list(products.KERNELS)
    for (_, arguments), out, counter in zip(launched, outputs, lists.counters, strict=True):
        assert (arguments.out, arguments.counter) == (out.data_ptr(), counter.data_ptr())
        for name in products.LISTS:
            assert getattr(arguments, name) == getattr(lists, name).data_ptr(), name
    assert [arguments.row_order for _, arguments in launched] == [order.data_ptr(), *[None] * 4]
    assert [arguments.leading for _, arguments in launched] == [192, 192, 0, 192, 384]


@pytest.mark.gpu
@pytest.mark.skipif(GPU and not HOPPER, reason="needs Hopper")
@pytest.mark.parametrize("tokens, width, hidden, kept", [*SHAPES, (16384, 1024, 2048, 3)])
def test_a_product_can_be_repeated_on_the_same_lists(tokens, width, hidden, kept):
    """Each leaves its counter as it was."""
    tiles, lists, x, dy, w1, w2, order = operands(tokens, width, hidden, kept)
    calls = (
        lambda: products.reduce_neurons(tiles, lists, w1, order, tokens),
        lambda: products.reduce_neurons(tiles, lists, w2.T, order, tokens),
        lambda: products.sample_dy1(dy, w2.T, tiles, lists),
        lambda: products.reduce_tokens(tiles, lists, x, False),
        lambda: products.reduce_tokens(tiles, lists, x, True),
    )
    expected = [call() for call in calls]
    for call, wanted in zip(calls, expected, strict=True):
        for _ in range(20):
            assert torch.equal(call(), wanted)
        assert not lists.counters.any()


@pytest.mark.gpu
@pytest.mark.skipif(GPU and not HOPPER, reason="needs Hopper")
def test_a_launch_may_be_a_threads_first_use_of_the_gpu():
    tiles, lists, x, *_ = operands(300, 192, 384, 2)
    expected = products.reduce_tokens(tiles, lists, x, False)
    out = torch.empty_like(expected)
    launch = products._reduce_tokens(
        products._lists(lists), tiles.data_ptr(), x.data_ptr(), out.data_ptr(), *x.shape, False
    )
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(launch).result()
    assert torch.equal(out, expected)


@PRODUCTS
def test_products_show_nan(product):
    tiles, lists, x, dy, w1, w2, _ = operands(300, 192, 384, 2)
    tiles[0, 3, 5] = torch.nan
    neuron = lists.tile_group[0].item() * TILE + 5
    y = product.reduce_neurons(tiles, lists, w1, None, 300)
    assert y[3].isnan().all() and y.isnan().sum() == 192
    assert product.sample_dy1(dy, w2.T, tiles, lists).isnan().sum() == 1
    dw1 = product.reduce_tokens(tiles, lists, x, False)
    assert dw1[neuron].isnan().all() and dw1.isnan().sum() == 192


# ---- operators and the feed-forward network


def test_operators():
    tiles, buffer = groups.select_tiles(pre_activations("floats", 300, 384), 2)
    x, w1, w2 = normal(300, 64), normal(384, 64), normal(64, 384)
    order = torch.randperm(300).int().to(DEVICE)
    for operator, args in (
        (groups.select_tiles, (pre_activations("floats", 300, 384), 2)),
        (groups.reduce_neurons, (tiles, buffer, w1, order, 300)),
        (groups.reduce_neurons, (tiles, buffer, w2.T, None, 300)),
        (groups.sample_dy1, (x, w2.T, tiles, buffer)),
        (groups.reduce_tokens, (tiles, buffer, x, 384, True)),
        (groups.reduce_tokens, (tiles, buffer, x, 384, False)),
    ):
        library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_an_operator_does_not_swallow_a_gradient():
    tiles, buffer = groups.select_tiles(pre_activations("floats", 300, 384), 2)
    w1 = normal(384, 64).requires_grad_()
    message = r"sparsetitan.*groups_reduce_neurons.* has no gradient"
    with pytest.raises(RuntimeError, match=message):
        groups.reduce_neurons(tiles, buffer, w1, None, 300)
    compiled = torch.compile(lambda w1: groups.reduce_neurons(tiles, buffer, w1, None, 300).sum(), backend="aot_eager")
    with pytest.raises(RuntimeError, match=message):
        compiled(w1)
    with torch.no_grad():
        assert torch.equal(compiled(w1), groups.reduce_neurons(tiles, buffer, w1, None, 300).sum())


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_operators_compose_to_the_feed_forward(ordered, scaled):
    """Against the masked reference, in float64 on the CPU: outputs and all gradients."""
    rand = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*s, generator=rand, dtype=torch.float64) for s in ((300, 64), (384, 64), (64, 384))]
    x, w1, w2 = (t.requires_grad_() for t in inputs)
    order = torch.randperm(300, generator=rand) if ordered else None
    scales = [torch.tensor(1.3, dtype=torch.float64)] * 2 if scaled else [None, None]
    pattern = Groups(TILE, TILE, 2 / 3)
    expected = sparse_feed_forward(x, w1, w2, pattern, *scales, order=order)
    # On the CPU nothing is packed; the rest is what runs on a GPU.
    actual = sparse_feed_forward(x, w1, w2, pattern, *scales, order=order, family=TILE_GROUPS)
    dy = torch.randn(300, 64, generator=rand, dtype=torch.float64)
    for y in (actual, expected):
        y.grads = torch.autograd.grad(y, (x, w1, w2), dy)
    assert_close(actual, expected)
    for a, e in zip(actual.grads, expected.grads, strict=True):
        assert_close(a, e)


# ---- compilation, without a GPU


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_cuda_source_compiles_without_spilling(tmp_path):
    source = ROOT / "kernels" / "groups" / "products.cu"
    command = ["nvcc", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-cubin", "-Xptxas", "-v"]
    result = subprocess.run([*command, "-o", str(tmp_path / "out"), str(source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("0 bytes spill stores, 0 bytes spill loads") == 5, result.stderr
    assert "serialized" not in result.stderr, result.stderr  # wgmma that waits for each other


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from kernels.groups import portable, select
from kernels.groups.tiles import TILE

CONSTANTS = dict(TILE=TILE, BN=portable.BN, BK=portable.BK, ORDERED=True, GROUPS=128, BLOCKS=128)
CONSTANTS |= dict(COUNTERS=5, POOLED=False)
POINTERS = dict(sums="*fp32") | dict.fromkeys(
    ("start", "tile_group", "tile_block", "group_tiles", "group_count", "group_order", "order", "slot"), "*i32")
POINTERS |= dict(counters="*i32", chosen="*i32")
POINTERS |= dict.fromkeys(("tiles", "weight", "out", "dy", "w2", "x", "y1"), "*bf16")

for arch in (80, 90):
    products = portable._reduce_neurons, portable._sample, portable._reduce_tokens
    selection = select._tile_sums, select._choose, select._by_group, select._fullest_first, select._store_tiles
    for kernel in products + selection:
        names = kernel.arg_names
        constants = {(i,): CONSTANTS[name] for i, name in enumerate(names) if name in CONSTANTS}
        signature = {name: "constexpr" if name in CONSTANTS else POINTERS.get(name, "i32") for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in POINTERS}
        source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
        warps = portable.WARPS if kernel in products else 4
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
        assert built.metadata.shared <= 163 * 1024, (kernel, built.metadata.shared)  # an A100's
"""


def test_kernels_compile_for_ampere_and_hopper():
    subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, check=True)


# ---- on a GPU


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu_and_can_be_captured():
    x, w1, w2 = (normal(*s).requires_grad_() for s in ((300, 192), (1024, 192), (192, 1024)))
    order, pattern = torch.randperm(300, device=DEVICE), Groups(TILE, TILE, 0.25)

    def step():
        y = sparse_feed_forward(x, w1, w2, pattern, order=order)
        # Detached: a graph that is kept ties the leaves' gradients to the stream of this step.
        return y.detach(), *torch.autograd.grad(y, (x, w1, w2), torch.ones_like(y))

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        graph.replay()
        for a, e in zip(captured, expected, strict=True):
            assert torch.equal(a, e)
