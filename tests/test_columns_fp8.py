"""Large blocks in fp8: each operator against its plain PyTorch reference, the FFN against the masked one that rounds
alike. On a GPU as compiled, elsewhere in Triton's interpreter.
"""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ROOT, losses
from test_columns import SHAPES, operands, outputs, outputs_in_order, permutation
from torch.testing import assert_close

from configs.errors import ConfigError
from configs.loader import load_config
from kernels import MASKED, FeedForwardSparsity, Groups, Preceding, Shape, Venom, choose, columns, sparse_feed_forward
from kernels.columns import fp8
from kernels.columns.ffn_fp8 import LARGE_BLOCKS_FP8
from kernels.float8 import E4M3, LARGEST, rounded, rounded_by_block, scale_of
from recipes.check import check_config
from scripts.benchmark_kernels import CONTENDERS
from scripts.check_kernels import DENSE_FLOAT8, check, prepared_weights, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("poisoned")]


def whole(*shape, low=-7, high=8):
    """Whole numbers that e4m3 holds: Triton's interpreter cuts others off where a GPU rounds them."""
    return torch.randint(low, high, shape, device=DEVICE)


def as_fp8(*shape):
    return whole(*shape).float().to(E4M3)


# ---- rounding


def test_rounding_is_near_and_keeps_what_cannot_be_rounded():
    x = torch.randn(64, 32, dtype=torch.float64)
    scale = scale_of(x.abs().amax())
    error = (rounded(x, scale) - x).abs()
    assert (error <= (x.abs() / 16).clamp(min=float(scale) * 2**-10) * 1.0001).all()
    assert rounded(x, scale).abs().amax() == pytest.approx(float(x.abs().amax()))
    assert torch.equal(rounded(torch.zeros(3), scale_of(torch.zeros(()))), torch.zeros(3))
    x[5, 3] = torch.nan
    by_block = rounded_by_block(x, 4)
    assert by_block[4:8].isnan().all() and by_block[:4].isfinite().all() and by_block[8:].isfinite().all()


def test_a_block_has_its_own_scale():
    x = torch.ones(7, 2)
    x[4:] *= 2**-30  # far below what one scale for all could hold
    assert torch.equal(rounded_by_block(x, 4), x)


@pytest.mark.parametrize("pattern", [Groups(16, 1, 1.0), None])  # a choice could hang on the last digit of a scale
def test_where_rounding_changes_nothing_the_reference_is_the_one_without_it(pattern):
    # Powers of two, so that all products of what is kept are, and each row of W2 sees one neuron.
    x, w1 = (2.0 ** whole(48, 16, low=-1, high=2)).double(), torch.eye(16, device=DEVICE).double().repeat(3, 1)
    w2 = torch.eye(48, device=DEVICE)[:16].double() * 2
    dy = (2.0 ** whole(48, 16, low=-1, high=2)).double()
    results = []
    for flag in (False, True):
        feed_forward = partial(sparse_feed_forward, sparsity=FeedForwardSparsity(pattern, fp8=flag), family=MASKED)
        results.append(outputs(feed_forward, x, w1, w2, dy))
    for exact, other in zip(*results, strict=True):
        assert_close(other, exact, rtol=1e-6, atol=0)
        assert exact.abs().sum() > 0


# ---- operators


@pytest.mark.parametrize("tokens, v, width", [(64, 32, 48), (75, 32, 144), (9, 16, 16)])
def test_cast_puts_tokens_into_blocks_both_ways(tokens, v, width):
    x, order = whole(tokens, width).bfloat16(), torch.randperm(tokens, device=DEVICE).int()
    inverse = 2.0 ** torch.arange(-(-tokens // v), device=DEVICE)
    out, transposed = fp8._launch_cast(x, order, inverse, v)
    expected, _ = fp8._reference_cast(x.cpu(), order.cpu(), inverse.cpu(), v)
    assert torch.equal(out.cpu().float(), expected.float()) and torch.equal(transposed.float(), out.mT.float())


@pytest.mark.parametrize("blocks, v, kept", [(2, 32, 48), (1, 80, 16), (3, 16, 144)])
def test_squares_and_their_gradients_are_the_references(blocks, v, kept):
    y, inverse = whole(blocks, v, kept, low=-3, high=4).bfloat16(), 2.0 ** -torch.arange(blocks, device=DEVICE).float()
    h, scale_h = 4.0 ** whole(blocks, kept, v, low=-1, high=2), 4.0 ** torch.arange(blocks, device=DEVICE).float()
    h[:, 1] = 0
    for others in ((None, None), (h.to(E4M3), scale_h)):
        out, transposed = fp8._launch_kept(y, inverse, *others)
        expected, _ = fp8._reference_kept(y, inverse, *others)
        assert torch.equal(out.float(), expected.float()) and torch.equal(transposed.float(), out.mT.float())
        assert out.float().abs().sum() > 0


@pytest.mark.parametrize("neurons, width, kept", [(96, 48, 32), (65, 144, 16), (16, 16, 16)])
def test_weights_are_rounded_and_their_rows_copied(neurons, width, kept):
    weight = whole(neurons, width).bfloat16()
    inverse = torch.tensor(0.5, device=DEVICE)
    for each in (weight, weight.T.contiguous().T):
        found = fp8._launch_quantise(each, inverse)
        assert torch.equal(found.float(), fp8._reference_quantise(weight, inverse).float())
    place = columns._reference_largest(torch.rand(3, neurons), kept, neurons).to(DEVICE)
    neurons_kept = fp8.kept_neurons(place, kept)
    for block in range(3):
        assert torch.equal(neurons_kept[block].long(), (place[block] >= 0).nonzero()[:, 0])
    for transposed in (False, True):
        copied = fp8._launch_copy(found, neurons_kept, transposed)
        assert torch.equal(copied.float(), fp8._reference_copy(found, neurons_kept, transposed).float())


@pytest.mark.parametrize("blocks, m, n, k", [(2, 48, 32, 64), (1, 272, 144, 16), (3, 16, 16, 144)])
def test_products_and_their_ends(blocks, m, n, k):
    a, b = as_fp8(blocks, m, k), as_fp8(blocks, n, k)
    scales = torch.rand(2, blocks, device=DEVICE) + 0.5
    expected = fp8._reference_products(a.cpu(), b.cpu(), *scales.cpu(), torch.float64).to(DEVICE)
    tokens = blocks * m - 5
    order = torch.randperm(tokens, device=DEVICE).int()
    for end in (fp8.PLAIN, fp8.PEAK, fp8.POSITIVE_PEAK, fp8.ORDERED):
        peak = torch.zeros(blocks, dtype=torch.int32, device=DEVICE)
        shape = (tokens, n) if end == fp8.ORDERED else (blocks, m, n)
        out = torch.full(shape, torch.nan, device=DEVICE)
        fp8._launch_products(a, b, out, *scales, end, peak, order)
        if end == fp8.ORDERED:
            assert_close(out[order.long()].double(), expected.flatten(0, 1)[:tokens], rtol=1e-3, atol=1e-3)
            continue
        assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
        found = peak.view(torch.float32)
        if end == fp8.PLAIN:
            assert not found.any()
        else:
            assert torch.equal(found, (out.abs() if end == fp8.PEAK else out.relu()).amax((1, 2)))


def test_weights_of_experts_are_rounded_by_scales_of_their_own():
    weight, inverse = whole(3 * 40, 48).bfloat16(), 2.0 ** -torch.arange(3, device=DEVICE).float()
    found = fp8._launch_quantise(weight, inverse).float()
    assert torch.equal(found, fp8._reference_quantise(weight, inverse).float())
    for expert in range(3):
        assert torch.equal(found[40 * expert :][:40], weight[40 * expert :][:40].float() * inverse[expert])


def test_a_product_takes_the_operand_that_it_is_told():
    a, b = as_fp8(4, 48, 64), as_fp8(3, 32, 64)
    which, scales = torch.tensor([0, 2, 2, 1], device=DEVICE).int(), torch.rand(2, 4, device=DEVICE) + 0.5
    out = torch.full((4, 48, 32), torch.nan, device=DEVICE)
    fp8._launch_products(a, b, out, *scales, fp8.PLAIN, which=which)
    expected = a.float() @ b.float()[which.long()].mT * scales.prod(0)[:, None, None]
    assert_close(out, expected, rtol=1e-3, atol=1e-3)
    chosen = fp8.chosen_by(a, b, 8, scales[1], DTYPE, which)
    expected = a.float()[:, ::8] @ b.float()[which.long()].mT * scales[1][:, None, None]
    assert_close(chosen.float(), expected, rtol=1e-2, atol=1e-2)


def test_nan_is_the_peak():
    a, b = as_fp8(2, 16, 16), as_fp8(2, 16, 16)
    peak, ones = torch.zeros(2, dtype=torch.int32, device=DEVICE), torch.ones(2, device=DEVICE)
    scale = torch.tensor([1, torch.nan], device=DEVICE)  # as of a block that holds one
    for end in (fp8.PEAK, fp8.POSITIVE_PEAK):
        fp8._launch_products(a, b, torch.empty(2, 16, 16, device=DEVICE), scale, ones, end, peak.zero_())
        assert peak.view(torch.float32)[1].isnan() and peak.view(torch.float32)[0].isfinite()


# ---- the FFN


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's products round; `test_fp8_on_a_gpu_is_right` measures them")
@pytest.mark.parametrize("tokens, v, g, keep, sample, balance, window", SHAPES)
@pytest.mark.parametrize("ordered", [False, True])
def test_the_feed_forward_is_the_masked_one(tokens, v, g, keep, sample, balance, window, ordered):
    sparsity = FeedForwardSparsity(Groups(v, g, keep, sample, balance, window), fp8=True)
    reference = partial(sparse_feed_forward, sparsity=sparsity, family=MASKED)
    for seed in range(3):
        given, order = operands(tokens, seed=seed), permutation(tokens, seed) if ordered else None
        found = outputs(partial(sparse_feed_forward, sparsity=sparsity, order=order, family=LARGE_BLOCKS_FP8), *given)
        expected = outputs_in_order(reference, order, *given) if ordered else outputs(reference, *given)
        not_rounded = partial(sparse_feed_forward, sparsity=replace(sparsity, fp8=False), order=order, family=MASKED)
        for one, other, exact in zip(found, expected, outputs(not_rounded, *given), strict=True):
            assert relative_error(one, other) < 1e-6  # scales are float32
            assert one.is_contiguous()
            assert not torch.allclose(one, exact, rtol=1e-3)  # it does round


def test_a_compiled_graph_holds_through_it():
    given, order = operands(40, 16, 64, dtype=DTYPE), permutation(40, 0)
    sparsity = FeedForwardSparsity(Groups(16, 1, 0.25, sample=4), fp8=True)

    def call(x, w1, w2):
        return sparse_feed_forward(x, w1, w2, sparsity, order=order, family=LARGE_BLOCKS_FP8)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for one, other in zip(outputs(call, *given), outputs(compiled, *given), strict=True):
        assert_close(one, other)


def test_nan_reaches_its_block_alone():
    x, w1, w2, _ = operands(64, 16, 64, DTYPE)
    x[17, 3] = torch.nan
    y = sparse_feed_forward(x, w1, w2, FeedForwardSparsity(Groups(16, 1, 0.25), fp8=True), family=LARGE_BLOCKS_FP8)
    assert y[17].isnan().all() and y[:16].isfinite().all() and y[32:].isfinite().all()


def test_which_patterns_run_in_fp8():
    def chosen(pattern, *products, width=768, dtype=torch.bfloat16, device="cuda"):
        sparsity = FeedForwardSparsity(pattern, products, fp8=True)
        family, reason = choose(sparsity, Shape(width, 4608), torch.device(device), dtype, here=False)
        return family.name, reason

    assert chosen(Groups(1024, 1, 0.25, sample=8)) == ("columns_fp8", "")
    for arguments, reason in (
        ((Groups(256, 1, 0.25),), "v of at least 512"),
        ((Groups(1000, 1, 0.25),), "divisible by 16"),
        ((Groups(1024, 1, 0.2505),), "the kept neurons (1154)"),
        ((Groups(1024, 1, 0.25), 1), "dense weights"),
        ((Preceding(Groups(1024, 1, 0.25), 4096),), "from the preceding block"),
        ((Venom(128, 4, 16),), "no family has kernels for this pattern in fp8"),
    ):
        name, refusal = chosen(*arguments)
        assert name == "reference" and reason in refusal
    assert chosen(Groups(1024, 1, 0.25), width=760)[0] == "reference"
    assert chosen(Groups(1024, 1, 0.25), dtype=torch.float32)[0] == "reference"
    assert chosen(Groups(1024, 1, 0.25), device="cpu")[0] == "reference"


@pytest.mark.parametrize(
    "words, problem",
    [
        ("--recipe recipes/venom_4of16.toml", 'pattern = "venom"'),
        ("--recipe recipes/columns_half.toml --activations.v 256", "v = 256"),
        ("--recipe recipes/columns_half.toml --weights.pattern 2:4", "needs dense weights"),
        ("--recipe recipes/columns_half.toml --model.hidden_dim 776 --router.cluster_size 8", "the kept neurons = 388"),
        ("--recipe recipes/columns_half.toml --model.dim 72 --model.n_heads 4", "model.dim = 72"),
        ("--recipe recipes/columns_half.toml --activations.v 520", "activations.v = 520"),
    ],
)
def test_a_recipe_that_has_no_fp8_products_is_refused(words, problem):
    command = ["--config", "configs/debug.toml", *words.split(), "--precision.ffn", "fp8"]
    config, _ = load_config([*command, "--training.local_batch_size", "32"])
    with pytest.raises(ConfigError, match=r"precision\.ffn") as refusal:
        check_config(config)
    assert problem in str(refusal.value)


def test_a_run_rounds_in_its_sparse_phase_alone(train, tmp_path):
    words = "--training.local_batch_size", "16", "--activations.v", "512", "--validation.enable", "false"
    runs = {}
    for precision in ("model", "fp8"):
        more = "--precision.ffn", precision, "--training.steps", "9"
        runs[precision] = losses(train(tmp_path / precision, *words, *more, recipe="columns_quarter"))
    same = [step for step in runs["fp8"] if runs["fp8"][step] == runs["model"][step]]
    assert same == [1, 2, 3]  # step 4 is the first sparse one, and its loss is that of rounded products
    assert runs["fp8"][9] == pytest.approx(runs["model"][9], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["columns_half_fp8", "columns_eighth_fp8", "columns_quarter_all_fp8"])
def test_fp8_on_a_gpu_is_right(name):
    prepared = prepared_weights(512, 2048, torch.device("cuda"))
    peer = check(DENSE_FLOAT8, prepared, None, compiled=True)
    assert not check(CONTENDERS[name][1], prepared, peer, compiled=True)["failed"]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.columns import fp8

SHAPES = dict.fromkeys(("tokens", "V", "D", "K", "F", "neuron_stride", "column_stride", "M", "N", "rows"), "i32")
POINTERS = {
    "x": "*bf16", "y": "*bf16", "order": "*i32", "inverse": "*fp32", "scale_h": "*fp32", "h": "*fp8e4nv",
    "kept": "*i32", "scale_a": "*fp32", "scale_b": "*fp32", "peak": "*i32",
}
FP8 = {"out": "*fp8e4nv", "out_t": "*fp8e4nv"}
TILE = {"ROWS": fp8.ROWS, "WIDTH": fp8.WIDTH}
PRODUCT = {"TILE_M": fp8.TILE_M, "TILE_N": fp8.TILE_N, "TILE_K": fp8.TILE_K}
OPERANDS = {"a": "tensordesc<fp8e4nv[1, 256, 128]>", "b": "tensordesc<fp8e4nv[1, 128, 128]>", "out": "*bf16"}
for kernel, types, constants in (
    (fp8._cast, FP8, TILE),
    (fp8._cast_kept, FP8, TILE | {"GRADIENT": False}),
    (fp8._cast_kept, FP8, TILE | {"GRADIENT": True}),
    (fp8._quantise, FP8 | {"weight": "*bf16"}, TILE),
    (fp8._copy, FP8 | {"weight": "*fp8e4nv"}, TILE | {"TRANSPOSED": True}),
    *((fp8._products, OPERANDS, PRODUCT | {"END": end, "which": None}) for end in range(4)),
    (fp8._products, OPERANDS | {"which": "*i32"}, PRODUCT | {"END": fp8.PLAIN}),
):
    known = SHAPES | POINTERS | types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: known[name] for name in kernel.arg_names}, constants)
    options = {"num_warps": 8 if kernel is fp8._products else 4, "num_stages": 4}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    if kernel is fp8._products:
        assert "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3" in compiled.asm["ptx"]
        assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
"""


def test_kernels_compile_for_hopper():
    subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, check=True)


@pytest.mark.gpu
def test_a_gpu_s_casts_refuse_what_triton_transposes_wrongly():
    x, inverse = torch.ones(16, 16, device=DEVICE), torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match="need bfloat16"):
        fp8.cast(x, torch.arange(16, device=DEVICE).int(), inverse, 16)
    for call in (
        lambda: fp8.cast_square(x[None], inverse),
        lambda: fp8.cast_gradient(x[None], inverse, x[None], inverse),
    ):
        with pytest.raises(ValueError, match="need bfloat16"):
            call()


def test_largest_is_e4m3_s():
    assert torch.finfo(E4M3).max == LARGEST
