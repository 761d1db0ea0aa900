"""The sparse FFN's references against brute force written from their definitions.

Masks and soft-thresholding are recomputed entry by entry in Python, at shapes with a short last block, a block
longer than the batch, one window, one group; on inputs with ties, with whole rows and blocks of zeros, and with
sums that differ only in their last bits. The FFN is held against dense autograd through a constant mask where
its gradients are exact, and against the six products written out where an option approximates them. Clustering
is checked by what defines it: equal sizes, stability, a fixed point of k-means.
"""

import math
import shutil
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal

import pytest
import torch
from conftest import sparse_feed_forward
from torch.nn.functional import normalize
from torch.testing import assert_close

import kernels.weights
from kernels import (
    MASKED,
    FeedForwardSparsity,
    Groups,
    Preceding,
    Shape,
    Venom,
    activation_clusters,
    balanced_clusters,
    choose,
    explain,
    group_mask,
    hidden_activations,
    permute_rows,
    route_tokens,
    soft_threshold_2_4,
    soft_threshold_scale,
    token_clusters,
    venom_mask,
)
from kernels.clustering import _balanced_assignment
from kernels.groups.pattern import balanced
from kernels.venom import token_mask

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
PATTERNS = (
    None,
    Venom(1, 2, 4),
    Venom(3, 2, 8),
    Venom(5, 4, 8),
    Venom(64, 2, 20),
    Groups(3, 4, 0.4),
    Groups(4, 1, 0.3),
    Groups(3, 4, 0.4, balance=0.5),
)
TOKENS, WIDTH, HIDDEN = 13, 12, 40


# ---- brute force, from the definitions


def largest(values, count):
    """Indices of the `count` largest values; among equal ones the lower index wins."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def row_blocks(tokens, v):
    return [range(start, min(start + v, tokens)) for start in range(0, tokens, v)]


def brute_venom(h, v, n, m):
    value, mask = h.double().tolist(), torch.zeros(h.shape, dtype=torch.bool)
    for rows in row_blocks(h.shape[0], v):
        for start in range(0, h.shape[1], m):
            sums = [math.fsum(value[r][start + c] for r in rows) for c in range(m)]
            columns = sorted(start + c for c in largest(sums, 4))
            for r in rows:
                for i in largest([value[r][c] for c in columns], n):
                    mask[r, columns[i]] = value[r][columns[i]] != 0
    return mask


def brute_groups(h, v, g, keep, balance=0.0):
    value, mask = h.double().tolist(), torch.zeros(h.shape, dtype=torch.bool)
    groups, blocks = h.shape[1] // g, row_blocks(h.shape[0], v)
    count = max(1, int((Decimal(str(keep)) * groups).quantize(Decimal(1), ROUND_HALF_EVEN)))
    sums = [[math.fsum(value[r][j * g + c] for r in rows for c in range(g)) for j in range(groups)] for rows in blocks]
    if balance:
        means = [math.fsum(own[j] for own in sums) / len(blocks) for j in range(groups)]
        sums = [[one / mean**balance if mean else 0.0 for one, mean in zip(own, means, strict=True)] for own in sums]
    for b, j in [(b, j) for b, own in enumerate(sums) for j in largest(own, count)]:
        for r in blocks[b]:
            for c in range(j * g, j * g + g):
                mask[r, c] = value[r][c] != 0
    return mask


def brute_mask(h, pattern):
    if pattern is None:
        return torch.ones(h.shape, dtype=torch.bool)
    if isinstance(pattern, Venom):
        return brute_venom(h, pattern.v, pattern.n, pattern.m)
    return brute_groups(h, pattern.v, pattern.g, pattern.keep, pattern.balance)


def brute_token_mask(h, pattern):
    tokens, neurons = h.shape
    value, mask = h.double().tolist(), torch.zeros(h.shape, dtype=torch.bool)
    firing = [sum(value[t][j] != 0 for t in range(tokens)) for j in range(neurons)]
    whole = largest(firing, round(0.05 * neurons))
    for j in range(neurons):
        for t in range(tokens // 4):
            four = [t + k * (tokens // 4) for k in range(4)]
            for k in range(4) if j in whole else largest([value[r][j] for r in four], pattern.n):
                mask[four[k], j] = value[four[k]][j] != 0
    return mask


def brute_soft_threshold(weight):
    flat, out = weight.detach().double().flatten().tolist(), []
    for i in range(0, len(flat), 4):
        t = sorted(abs(w) for w in flat[i : i + 4])[1]
        out += [math.copysign(abs(w) - t, w) if abs(w) > t else 0.0 for w in flat[i : i + 4]]
    return torch.tensor(out, dtype=torch.float64).view(weight.shape).to(weight.dtype)


def brute_scale(weight):
    w = weight.detach().double().flatten().tolist()
    s = brute_soft_threshold(weight.detach().double()).flatten().tolist()
    energy = math.fsum(b * b for b in s)
    return math.fsum(a * b for a, b in zip(w, s, strict=True)) / energy if energy else 1.0


# ---- inputs


def activations(kind, tokens, hidden, dtype, seed=0):
    """Non-negative `[T, f]` on which float32 sums decide as exact ones do."""
    rand = torch.Generator().manual_seed(seed)
    if kind == "floats":
        h = torch.randn(tokens, hidden, generator=rand, dtype=torch.float64).relu().square()
    elif kind == "ties":
        h = torch.randint(0, 3, (tokens, hidden), generator=rand).double()
    elif kind == "sparse":
        h = torch.randint(1, 5, (tokens, hidden), generator=rand).double()
        h *= torch.rand(tokens, hidden, generator=rand) < 0.15
        h[tokens // 2] = 0
        h[: max(1, tokens // 3), : hidden // 2] = 0
    elif dtype == torch.float64:  # "close": sums that are equal in float32
        h = 1 + torch.randint(0, 50, (tokens, hidden), generator=rand).double() * 2.0**-40
    else:  # "close": sums that are equal when rounded to bfloat16
        h = torch.randint(230, 256, (tokens, hidden), generator=rand).double()
    return h.to(dtype)


def ffn_inputs(seed=0, tokens=TOKENS, width=WIDTH, hidden=HIDDEN, dtype=torch.float64, device="cpu"):
    """x, w1, w2 that require gradients, and dy."""
    rand = torch.Generator().manual_seed(seed)
    shapes = (tokens, width), (hidden, width), (width, hidden), (tokens, width)
    x, w1, w2, dy = (torch.randn(s, generator=rand, dtype=torch.float64).to(device, dtype) for s in shapes)
    return x.requires_grad_(), w1.requires_grad_(), w2.requires_grad_(), dy


def run(function, inputs, *args, **kwargs):
    """y and the three gradients of `function(x, w1, w2, ...)`."""
    x, w1, w2, dy = inputs
    y = function(x, w1, w2, *args, **kwargs)
    return y.detach(), *torch.autograd.grad(y, (x, w1, w2), dy)


def close(actual, expected):
    for name, a, e in zip(("y", "dx", "dW1", "dW2"), actual, expected, strict=True):
        assert_close(a, e, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


# ---- masks

KINDS = pytest.mark.parametrize("kind", ["floats", "ties", "sparse", "close"])
BLOCKS = pytest.mark.parametrize(
    "v, tokens", [(1, 1), (1, 7), (4, 1), (4, 3), (4, 4), (4, 5), (5, 13), (16, 11), (8, 32)]
)


@KINDS
@BLOCKS
def test_venom_mask_is_brute_force(kind, v, tokens):
    for seed, (m, windows) in enumerate([(4, 1), (4, 5), (8, 1), (8, 3), (16, 2), (20, 1), (20, 2)]):
        for n in (2, 4):
            for dtype in DTYPES:
                h = activations(kind, tokens, m * windows, dtype, seed)
                mask = venom_mask(h, v, n, m)
                assert mask.dtype == torch.bool
                assert torch.equal(mask, brute_venom(h, v, n, m)), (n, m, windows, dtype)
                assert torch.equal(mask, Venom(v, n, m).mask(h))


@KINDS
@BLOCKS
def test_group_mask_is_brute_force(kind, v, tokens):
    # keep 0.5 of 5, 3 and 1 groups and 0.25 of 10 and 6 round a half, up and down.
    for seed, (g, groups) in enumerate([(1, 10), (1, 1), (4, 5), (3, 3), (8, 6), (12, 1), (2, 8)]):
        for keep in (0.001, 0.1, 0.25, 0.3, 0.5, 0.75, 1, 1.0):
            for dtype in DTYPES:
                h = activations(kind, tokens, g * groups, dtype, seed)
                mask = group_mask(h, v, g, keep)
                assert mask.dtype == torch.bool
                assert torch.equal(mask, brute_groups(h, v, g, keep)), (g, groups, keep, dtype)
                assert torch.equal(mask, Groups(v, g, keep).mask(h))


@BLOCKS
def test_balanced_mask_is_brute_force(v, tokens):
    for seed, (g, groups) in enumerate([(1, 10), (4, 5), (3, 3), (8, 6), (12, 1)]):
        for balance in (0.25, 0.5, 0.9):
            for kind in ("floats", "sparse"):
                h = activations(kind, tokens, g * groups, torch.float64, seed)
                h[:, :g] = 0
                pattern = Groups(v, g, 0.3, balance=balance)
                assert torch.equal(pattern.mask(h), brute_mask(h, pattern)), (g, groups, balance, kind)


def test_a_block_without_others_keeps_its_strongest_neurons_whatever_the_balance():
    rand = torch.Generator().manual_seed(0)
    h = torch.rand(6, 40, generator=rand)
    assert torch.equal(group_mask(h, 8, 1, 0.25, balance=1.0), group_mask(h, 8, 1, 0.25))
    sums, kind = torch.rand(3, 40, generator=rand), torch.tensor([0, 1, 1])
    balanced_sums = balanced(sums, 1.0, kind, 2)
    assert torch.equal(balanced_sums[0], sums[0])  # the only block of its kind
    assert_close(balanced_sums[1:], sums[1:] / sums[1:].mean(0))


def test_balance_lets_a_weak_neuron_have_its_turn():
    h = torch.tensor([[8.0, 1.0], [8.0, 0.0], [8.0, 0.0]])
    chosen = {balance: Groups(1, 1, 0.5, balance=balance).mask(h)[:, 1].tolist() for balance in (0.0, 0.5, 1.0)}
    assert chosen == {0.0: [False] * 3, 0.5: [False] * 3, 1.0: [True, False, False]}
    h[0, 1] = 4.0
    assert Groups(1, 1, 0.5, balance=0.5).mask(h)[:, 1].tolist() == [True, False, False]
    assert not Groups(1, 1, 0.5).mask(h)[:, 1].any()


@KINDS
@pytest.mark.parametrize("pattern", [Venom(1, 2, 4), Venom(7, 2, 4)])
def test_token_mask_is_brute_force(kind, pattern):
    for seed, hidden in enumerate([16, 48, 80]):  # 5% of them: one, two, four neurons stay whole
        h = activations(kind, 2 * pattern.m, hidden, torch.float64, seed)
        h *= brute_mask(h, pattern)
        assert torch.equal(token_mask(h, pattern), brute_token_mask(h, pattern)), hidden


def test_density_is_what_a_mask_of_positive_entries_keeps():
    h = torch.rand(16, 80) + 1
    for pattern in (
        Venom(4, 2, 8),
        Venom(8, 4, 16),
        Venom(1, 2, 4),
        Venom(16, 2, 20),
        Groups(4, 8, 0.3),
        Groups(8, 1, 0.25),
    ):
        assert pattern.mask(h).double().mean().item() == pytest.approx(pattern.density(h.shape[1]))


@pytest.mark.parametrize("pattern", [Venom(4, 2, 8), Groups(4, 4, 0.5)])
def test_masks_do_not_depend_on_strides(pattern):
    for tokens in (12, 13):  # with a multiple of v no padding makes a contiguous copy
        h = activations("floats", tokens, 16, torch.float32)
        every_other, columns = torch.stack((h, h), 2)[..., 0], torch.cat((h, h), 1)[:, :16]
        for strided in (h.T.contiguous().T, every_other, columns, h[:1].expand(tokens, 16)):
            assert torch.equal(pattern.mask(strided), brute_mask(strided, pattern))


# ---- soft threshold


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4,), (3, 8), (2, 3, 12), (31, 40)])
def test_soft_threshold_is_brute_force(shape, dtype):
    for seed in range(3):
        rand = torch.Generator().manual_seed(seed)
        dense = torch.randn(shape, generator=rand)
        integers = torch.randint(-2, 3, shape, generator=rand)  # equal magnitudes, zeros
        for weight in (dense.to(dtype), integers.to(dtype), (dense * (dense > 0.5)).to(dtype)):
            sparse = soft_threshold_2_4(weight)
            assert sparse.dtype == dtype
            assert torch.equal(sparse, brute_soft_threshold(weight))
            assert (sparse.view(-1, 4) != 0).sum(1).max() <= 2
            scale = soft_threshold_scale(weight)
            assert scale.shape == () and scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert scale.item() == pytest.approx(brute_scale(weight), rel=1e-5 if dtype != torch.float64 else 1e-12)


def test_soft_threshold_gradient_passes_straight_through():
    weight, grad = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)
    soft_threshold_2_4(weight).backward(grad)
    assert torch.equal(weight.grad, grad)


def test_scale_is_the_least_squares_fit_and_one_where_nothing_is_left():
    weight = torch.randn(8, 16, dtype=torch.float64)
    sparse, scale = soft_threshold_2_4(weight), soft_threshold_scale(weight.requires_grad_())
    fit = torch.linalg.lstsq(sparse.view(-1, 1), weight.detach().view(-1, 1)).solution
    assert_close(scale, fit.squeeze())
    assert not scale.requires_grad
    for constant in (torch.zeros(2, 4), torch.full((2, 4), -3.0)):
        assert soft_threshold_scale(constant).item() == 1


# ---- the feed-forward network


def dense_feed_forward(x, w1, w2, mask):
    return (torch.relu(x @ w1.T) ** 2 * mask) @ w2.T


def brute_hidden(x, w1):
    return torch.relu(x.detach() @ w1.detach().T) ** 2


def six_products(inputs, mask, w1_used, w2_back, kept_along_tokens):
    """y, dx, dW1, dW2 as documented, every operand a given one."""
    x, _, w2, dy = (t.detach() for t in inputs)
    y1 = torch.einsum("td,fd->tf", x, w1_used)
    h = torch.where(y1 > 0, y1, 0) ** 2 * mask
    dy1 = 2 * torch.where(y1 > 0, y1, 0) * mask * torch.einsum("td,df->tf", dy, w2_back)
    return (
        torch.einsum("tf,df->td", h, w2),
        torch.einsum("tf,fd->td", dy1, w1_used),
        torch.einsum("tf,td->fd", dy1 * kept_along_tokens, x),
        torch.einsum("td,tf->df", dy, h * kept_along_tokens),
    )


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 4, 13])
def test_exact_gradients_are_those_of_dense_autograd(pattern, tokens):
    for seed in range(3):
        inputs = ffn_inputs(seed, tokens)
        mask = brute_mask(brute_hidden(*inputs[:2]), pattern)
        close(run(sparse_feed_forward, inputs, pattern), run(dense_feed_forward, inputs, mask))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gradcheck(pattern):
    inputs = ffn_inputs(1, tokens=5, width=4)
    assert torch.autograd.gradcheck(lambda x, w1, w2: sparse_feed_forward(x, w1, w2, pattern), inputs[:3])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_w1_scale_reads_the_sparse_w1_and_passes_its_gradient_straight_through(pattern):
    x, w1, w2, dy = inputs = ffn_inputs(2)
    scale = torch.tensor(1.7, dtype=torch.float64)
    w1_used = (1.7 * brute_soft_threshold(w1)).requires_grad_()
    mask = brute_mask(brute_hidden(x, w1_used), pattern)
    # The gradient with respect to W1' is, unscaled, the one that the dense W1 gets.
    expected = run(dense_feed_forward, (x, w1_used, w2, dy), mask)
    close(run(sparse_feed_forward, inputs, pattern, w1_scale=scale), expected)
    assert_close(hidden_activations(x, w1, scale), brute_hidden(x, w1_used))
    assert_close(hidden_activations(x, w1), brute_hidden(x, w1))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_w2_scale_changes_product_3_alone(pattern):
    inputs = ffn_inputs(3)
    w1, w2 = inputs[1].detach(), inputs[2].detach()
    mask = brute_mask(brute_hidden(*inputs[:2]), pattern)
    w2_back = 0.6 * brute_soft_threshold(w2.T.contiguous()).T  # groups of four along d
    actual = run(sparse_feed_forward, inputs, pattern, w2_scale=torch.tensor(0.6, dtype=torch.float64))
    close(actual, six_products(inputs, mask, w1, w2_back, 1))
    plain = run(sparse_feed_forward, inputs, pattern)
    assert torch.equal(actual[0], plain[0]) and torch.equal(actual[3], plain[3])
    assert not torch.allclose(actual[1], plain[1]) and not torch.allclose(actual[2], plain[2])


@pytest.mark.parametrize("pattern", [Venom(1, 2, 4), Venom(7, 2, 4)])
@pytest.mark.parametrize("scaled", [False, True])
def test_cut_along_tokens_changes_products_4_and_6_alone(pattern, scaled):
    inputs = ffn_inputs(4, tokens=2 * pattern.m)
    w1, w2 = inputs[1].detach(), inputs[2].detach()
    scale = torch.tensor(1.3, dtype=torch.float64) if scaled else None
    w1_used = 1.3 * brute_soft_threshold(w1) if scaled else w1
    w2_back = 1.3 * brute_soft_threshold(w2.T.contiguous()).T if scaled else w2
    h = brute_hidden(inputs[0], w1_used)
    mask = brute_mask(h, pattern)
    second = brute_token_mask(h * mask, pattern)
    options = {"w1_scale": scale, "w2_scale": scale}
    actual = run(sparse_feed_forward, inputs, pattern, **options, cut_along_tokens=True)
    close(actual, six_products(inputs, mask, w1_used, w2_back, second))
    uncut = run(sparse_feed_forward, inputs, pattern, **options)
    assert torch.equal(actual[0], uncut[0]) and torch.equal(actual[1], uncut[1])
    assert not torch.allclose(actual[2], uncut[2]) and not torch.allclose(actual[3], uncut[3])


def test_backward_keeps_one_tensor_of_the_hidden_shape():
    saved = []
    x, w1, w2, _ = ffn_inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape), lambda _: None):
        sparse_feed_forward(x, w1, w2, Venom(4, 2, 8))
    assert saved.count((TOKENS, HIDDEN)) == 1


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_nan_is_not_hidden(pattern):
    x, w1, w2, dy = inputs = ffn_inputs(5)
    with torch.no_grad():
        x[7] = math.nan
    y, dx, dw1, dw2 = run(sparse_feed_forward, inputs, pattern)
    assert y[7].isnan().all() and dx[7].isnan().all()
    assert dw1.isnan().any() and dw2.isnan().any()
    assert not y[torch.arange(TOKENS) != 7].isnan().any()  # its neighbours may change, but stay numbers

    x, w1, w2, dy = inputs = ffn_inputs(5)
    with torch.no_grad():
        w1[9, 3] = math.nan
    for scale in (None, torch.tensor(1.0, dtype=torch.float64)):
        y, dx, dw1, dw2 = run(sparse_feed_forward, inputs, pattern, w1_scale=scale)
        assert y.isnan().all() and dx.isnan().all() and dw1[9].isnan().all() and dw2[:, 9].isnan().all()

    x, w1, w2, dy = inputs = ffn_inputs(5)
    kept = brute_mask(brute_hidden(x, w1), pattern) & (brute_hidden(x, w1) > 0)
    neuron = kept.sum(0).argmax()
    with torch.no_grad():
        w2[3, neuron] = math.nan
    for scale in (None, torch.tensor(1.0, dtype=torch.float64)):
        y, dx, dw1, dw2 = run(sparse_feed_forward, inputs, pattern, w2_scale=scale)
        assert y[kept[:, neuron], 3].isnan().all() and dx[kept[:, neuron]].isnan().all() and dw1[neuron].isnan().all()

    x, w1, w2, dy = inputs = ffn_inputs(5)
    dy[7, 2] = math.nan
    y, dx, dw1, dw2 = run(sparse_feed_forward, inputs, pattern)
    assert dx[7].isnan().all() and dw1.isnan().any() and dw2[2].isnan().any() and not dx[6].isnan().any()


def test_nan_is_kept_by_masks_and_thresholds():
    for row, column in ((0, 0), (2, 5), (12, 15)):
        h = activations("ties", 13, 16, torch.float32)
        h[row, column] = math.nan
        for pattern in (Venom(1, 2, 4), Venom(4, 2, 8), Venom(4, 4, 16), Groups(4, 4, 0.25), Groups(16, 16, 0.1)):
            assert pattern.mask(h)[row, column]
    for i in range(4):
        weight = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
        weight[0, i] = math.nan
        assert soft_threshold_2_4(weight)[0, i].isnan() and soft_threshold_scale(weight).isnan()


def compiled_equals_eager(backend, pattern, **options):
    torch._dynamo.reset()
    inputs = ffn_inputs(6, tokens=16, dtype=torch.float32)

    def forward(x, w1, w2):
        return sparse_feed_forward(x, w1, w2, pattern, **options)

    eager = run(forward, inputs)
    compiled = run(torch.compile(forward, backend=backend, fullgraph=True), inputs)
    for a, e in zip(compiled, eager, strict=True):
        assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", [None, Venom(3, 2, 4), Venom(3, 2, 8), Groups(3, 4, 0.4)])
def test_compiles_without_a_graph_break(pattern):
    scales = {"w1_scale": torch.tensor(1.5), "w2_scale": torch.tensor(1.5)}
    compiled_equals_eager("aot_eager", pattern, **scales, cut_along_tokens=pattern == Venom(3, 2, 4))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_compiles_with_inductor():
    compiled_equals_eager("inductor", Venom(3, 2, 8), w1_scale=torch.tensor(1.5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pattern", [None, Venom(3, 2, 8), Groups(3, 4, 0.4)])
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_weights(pattern, device):
    x, w1, w2, dy = ffn_inputs(7, tokens=16, dtype=torch.float32, device=device)
    scales = {"w1_scale": torch.tensor(1.5, device=device), "w2_scale": torch.tensor(1.5, device=device)}
    with torch.autocast(device, dtype=torch.bfloat16):
        y = sparse_feed_forward(x, w1, w2, pattern, **scales)
    grads = torch.autograd.grad(y, (x, w1, w2), dy.bfloat16())
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads)
    low = tuple(t.detach().bfloat16().requires_grad_() for t in (x, w1, w2))
    expected = run(sparse_feed_forward, (*low, dy.bfloat16()), pattern, **scales)
    for a, e in zip((y, *grads), expected, strict=True):
        assert torch.equal(a, e.to(a.dtype))


# ---- which family runs

HOPPER = Shape(192, 512), torch.device("cuda"), torch.bfloat16


@dataclass(frozen=True)
class EveryOther:
    """A pattern of nobody's: every other neuron."""

    v: int = 1
    sample: int = 1

    def check(self, hidden_dim):
        pass

    def density(self, hidden_dim):
        return 0.5

    def mask(self, h, sums=None):
        return (torch.arange(h.shape[1]) % 2 == 0) & (h != 0)

    def causal(self):
        return self

    def of_one_token(self):
        return self


@pytest.mark.parametrize(
    "pattern, products, cut, width, hidden, dtype, expected",
    [
        (Groups(128, 128, 0.25), (), False, 192, 512, torch.bfloat16, "groups"),
        (Groups(128, 128, 0.25), (1, 3), False, 192, 512, torch.bfloat16, "groups"),
        (Groups(128, 64, 0.25), (), False, 192, 512, torch.bfloat16, "reference"),
        (Groups(64, 128, 0.25), (), False, 192, 512, torch.bfloat16, "reference"),
        (Groups(128, 128, 0.25), (), False, 96, 512, torch.bfloat16, "reference"),
        (Groups(128, 128, 0.25), (), False, 192, 512, torch.float32, "reference"),
        (Venom(128, 2, 16), (1,), False, 192, 512, torch.bfloat16, "venom"),
        (Venom(16, 4, 4), (), False, 100, 512, torch.bfloat16, "venom"),
        (Venom(512, 4, 16), (), False, 192, 512, torch.bfloat16, "reference"),
        (Venom(64, 4, 512), (), False, 192, 512, torch.bfloat16, "reference"),
        (Venom(96, 4, 16), (), False, 192, 512, torch.bfloat16, "reference"),
        (Venom(1, 2, 4), (), True, 192, 512, torch.bfloat16, "two_four"),
        (Venom(1, 2, 4), (1, 3), False, 192, 512, torch.bfloat16, "two_four"),
        (Venom(1, 2, 4), (), True, 192, 96, torch.bfloat16, "reference"),
        (None, (1, 3), False, 192, 512, torch.bfloat16, "two_four"),
        (None, (1,), False, 96, 512, torch.bfloat16, "reference"),
        (None, (), False, 192, 512, torch.bfloat16, "reference"),
    ],
)
def test_the_first_family_that_does_not_refuse_is_chosen(
    monkeypatch, pattern, products, cut, width, hidden, dtype, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    sparsity, shape, cuda = FeedForwardSparsity(pattern, products, cut), Shape(width, hidden), torch.device("cuda")
    monkeypatch.setattr(kernels.weights, "CUSPARSELT", True)
    family, reason = explain(sparsity, shape, cuda, dtype)
    assert family.name == expected and reason
    assert choose(sparsity, shape, cuda, dtype, here=False)[0] is family
    assert choose(sparsity, shape, torch.device("cpu"), dtype)[0] is MASKED
    monkeypatch.setattr(kernels.weights, "CUSPARSELT", False)
    without = choose(sparsity, shape, cuda, dtype)[0].name
    assert without == ("reference" if products or expected == "two_four" else expected)


def test_a_pattern_that_no_family_knows_runs_on_the_reference_on_any_device():
    @dataclass(frozen=True)
    class Every(Groups):  # a subclass is known; what is not is a pattern of its own
        pass

    assert choose(FeedForwardSparsity(Every(128, 128, 0.25)), *HOPPER, here=False)[0].name == "groups"
    unknown = FeedForwardSparsity(EveryOther())
    family, reason = choose(unknown, *HOPPER, here=False)
    assert family is MASKED and reason == "no family has kernels for this pattern"
    inputs = ffn_inputs(8, tokens=10)
    expected = run(dense_feed_forward, inputs, torch.arange(HIDDEN).expand(10, -1) % 2 == 0)
    close(run(sparse_feed_forward, inputs, EveryOther()), expected)


# ---- what is refused


@pytest.mark.parametrize(
    "pattern, message",
    [
        (Venom(0, 2, 8), "v = 0"),
        (Venom(4, 3, 8), "n = 3"),
        (Venom(4, 0, 8), "n = 0"),
        (Venom(4, 2, 6), "m = 6"),
        (Venom(4, 2, 0), "m = 0"),
        (Venom(4, 2, 12), "m = 12 .* hidden_dim = 16"),
        (Groups(0, 4, 0.5), "v = 0"),
        (Groups(4, 0, 0.5), "g = 0"),
        (Groups(4, 3, 0.5), "g = 3 .* hidden_dim = 16"),
        (Groups(4, 32, 0.5), "g = 32 .* hidden_dim = 16"),
        (Groups(4, 4, 0.0), "keep = 0.0"),
        (Groups(4, 4, -0.5), "keep = -0.5"),
        (Groups(4, 4, 1.5), "keep = 1.5"),
        (Groups(4, 4, math.nan), "keep = nan"),
        (Groups(4, 4, 0.5, balance=1.5), "balance = 1.5"),
        (Groups(4, 4, 0.5, balance=-0.5), "balance = -0.5"),
        (Preceding(Groups(4, 4, 0.5, balance=0.5), 8), "balance=0.5.* later tokens"),
    ],
    ids=str,
)
def test_impossible_patterns_are_refused(pattern, message):
    x, w1, w2 = torch.ones(10, 4), torch.ones(16, 4), torch.ones(4, 16)
    refusals = (
        lambda: pattern.check(16),
        lambda: pattern.mask(torch.ones(10, 16)),
        lambda: sparse_feed_forward(x, w1, w2, pattern),
    )
    for refusal in refusals:
        with pytest.raises(ValueError, match=message):
            refusal()


@pytest.mark.parametrize(
    "pattern, message",
    [
        (None, "needs 2:4 activations, not None"),
        (Groups(4, 4, 0.5), "needs 2:4 activations"),
        (Venom(4, 2, 8), "needs 2:4 activations"),
        (Venom(1, 2, 4), "divisible by 4, got 10"),
    ],
    ids=str,
)
def test_impossible_cuts_along_tokens_are_refused(pattern, message):
    with pytest.raises(ValueError, match=f"cut_along_tokens .*{message}"):
        sparse_feed_forward(torch.ones(10, 4), torch.ones(16, 4), torch.ones(4, 16), pattern, cut_along_tokens=True)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="divisible by 4"):
        soft_threshold_2_4(torch.ones(4, 6))
    with pytest.raises(ValueError, match="divisible by 4"):
        soft_threshold_scale(torch.ones(8, 2))
    with pytest.raises(ValueError, match="divisible by 4"):
        sparse_feed_forward(torch.ones(3, 6), torch.ones(8, 6), torch.ones(6, 8), w1_scale=torch.tensor(1.0))
    with pytest.raises(ValueError, match="divisible by 4"):  # in the forward pass, not at the first backward pass
        sparse_feed_forward(torch.ones(3, 6), torch.ones(8, 6), torch.ones(6, 8), w2_scale=torch.tensor(1.0))
    for size in (0, 3, 16):
        with pytest.raises(ValueError, match=rf"{size}\b.* hidden_dim = 8"):
            balanced_clusters(torch.ones(8, 4), size)


# ---- clusters


def brute_assignment(scores, size):
    """Gale-Shapley one row at a time; with distinct scores the row-optimal stable assignment is unique."""
    scores, members = scores.tolist(), [[] for _ in range(scores.shape[1])]
    wishes = [largest(row, len(row)) for row in scores]
    free = list(range(len(scores)))
    while free:
        row = free.pop()
        column = wishes[row].pop(0)
        members[column].append(row)
        if len(members[column]) > size:
            worst = min(members[column], key=lambda r: scores[r][column])
            members[column].remove(worst)
            free.append(worst)
    return torch.tensor([next(c for c, rows in enumerate(members) if r in rows) for r in range(len(scores))])


def assign(scores, size, rounds=8000):  # to the end
    return _balanced_assignment(scores[None], size, rounds)[0]


@pytest.mark.parametrize("columns, size", [(1, 5), (5, 1), (4, 6), (7, 3), (8, 16)])
@pytest.mark.parametrize("seed", range(3))
def test_balanced_assignment_is_stable(columns, size, seed):
    rand = torch.Generator().manual_seed(seed)
    distinct = torch.randn(columns * size, columns, generator=rand)
    tied = torch.randint(0, 3, distinct.shape, generator=rand).float()
    skewed = distinct + 5 * torch.arange(columns)  # everybody's favourite is the same
    for scores in (distinct, tied, skewed):
        before = scores.clone()
        assignment = assign(scores, size)
        assert torch.equal(scores, before)
        assert assignment.bincount(minlength=columns).tolist() == [size] * columns
        mine = scores.gather(1, assignment[:, None]).squeeze(1)
        for column in range(columns):
            worst_member = mine[assignment == column].min()
            assert not ((scores[:, column] > mine) & (scores[:, column] > worst_member)).any()
    assert torch.equal(assign(distinct, size), brute_assignment(distinct, size))
    assert torch.equal(assign(skewed, size), brute_assignment(skewed, size))
    together = _balanced_assignment(torch.stack([skewed, tied, distinct]), size, rounds=8000)
    assert torch.equal(together, torch.stack([assign(scores, size) for scores in (skewed, tied, distinct)]))


def test_a_short_assignment_is_balanced_and_nearly_the_long_one():
    rand = torch.Generator().manual_seed(0)
    scores = torch.randn(2560, 40, generator=rand) + torch.arange(40) / 10  # 40 columns, of which some are liked more
    exact, short = assign(scores, 64), assign(scores, 64, rounds=16)
    assert short.bincount(minlength=40).tolist() == [64] * 40
    assert 0 < (short != exact).float().mean() < 0.2
    assert torch.equal(assign(scores, 64, rounds=1600), exact)
    assert torch.equal(_balanced_assignment(scores[None], 64)[0], short)
    # Beside others that end earlier, or not either.
    others = scores.flip(0), torch.eye(40).repeat(64, 1)
    together = _balanced_assignment(torch.stack([scores, *others]), 64, rounds=16)
    assert torch.equal(together, torch.stack([short, *(assign(other, 64, rounds=16) for other in others)]))


@pytest.mark.parametrize("rows, size", [(24, 4), (30, 5), (16, 16), (12, 1), (64, 8)])
def test_clusters_are_a_fixed_point_of_balanced_k_means(rows, size):
    for seed in range(3):
        weight = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)).mul(3)
        order, centroids = balanced_clusters(weight, size, iterations=100, seed=seed)
        again = balanced_clusters(weight.clone().requires_grad_(), size, iterations=100, seed=seed)
        assert torch.equal(order, again[0]) and torch.equal(centroids, again[1])
        assert order.dtype == torch.int64 and sorted(order.tolist()) == list(range(rows))
        assert centroids.shape == (rows // size, 6) and centroids.dtype == torch.float32
        members = order.view(-1, size)
        assert (members.diff(dim=1) > 0).all()  # inside a cluster rows keep their order
        unit = weight / weight.norm(dim=1, keepdim=True)
        means = torch.stack([unit[m].sum(0) for m in members])
        assert_close(centroids, means / means.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-5)
        expected = brute_assignment(unit @ centroids.T, size)
        assert all((expected[m] == c).all() for c, m in enumerate(members))


def test_clusters_that_are_alike_are_neighbours():
    """Directions on an arc, shuffled: clusters are numbered along it."""
    angle = torch.linspace(0, 2, 48)
    shuffle = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    order, centroids = balanced_clusters(torch.stack([angle.cos(), angle.sin()], 1)[shuffle], 4, iterations=100)
    along = torch.atan2(centroids[:, 1], centroids[:, 0])
    assert (along.diff() > 0).all() or (along.diff() < 0).all()
    assert_close(along, angle[shuffle][order].view(-1, 4).mean(1), rtol=1e-4, atol=1e-4)


def test_clusters_depend_on_the_seed_and_not_on_the_global_generator():
    weight = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    first = balanced_clusters(weight, 5, seed=0)[0]
    torch.manual_seed(2)
    assert torch.equal(first, balanced_clusters(weight, 5, seed=0)[0])
    assert any(not torch.equal(first, balanced_clusters(weight, 5, seed=s)[0]) for s in (1, 2, 3))


@pytest.mark.parametrize("clusters, size", [(2, 8), (6, 10), (8, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planted_clusters_are_recovered(clusters, size, dtype):
    for seed in range(5):
        rand = torch.Generator().manual_seed(seed)
        directions = torch.linalg.qr(torch.randn(16, 16, generator=rand)).Q[:clusters]
        shuffle = torch.randperm(clusters * size, generator=rand)
        label = torch.arange(clusters).repeat_interleave(size)[shuffle]
        # Lengths differ tenfold: under cosine distance they must not matter.
        length = 10 ** torch.rand(clusters * size, 1, generator=rand)
        weight = (directions[label] + 0.03 * torch.randn(clusters * size, 16, generator=rand)) * length
        order, centroids = balanced_clusters(weight.to(dtype), size, iterations=50, seed=seed)
        found = label[order].view(clusters, size)
        assert (found == found[:, :1]).all()
        assert ((centroids * directions[found[:, 0]]).sum(1) > 0.95).all()


def test_duplicate_and_zero_rows_terminate():
    for weight in (torch.ones(12, 4), torch.zeros(12, 4), torch.ones(12, 4) * torch.tensor([[1.0], [-1]]).repeat(6, 1)):
        for size in (1, 4, 12):
            order, _ = balanced_clusters(weight, size)
            assert sorted(order.tolist()) == list(range(12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neurons_that_fire_together_are_clustered(dtype):
    """Rows at right angles to each other, which their directions cannot tell apart."""
    for seed in range(5):
        rand = torch.Generator().manual_seed(seed)
        clusters, size, dim = 4, 6, 32
        label = torch.arange(clusters).repeat_interleave(size)[torch.randperm(clusters * size, generator=rand)]
        weight = torch.linalg.qr(torch.randn(dim, dim, generator=rand)).Q[: clusters * size]
        topic = torch.randint(clusters, (200,), generator=rand)
        # A token has a part along each row of its topic, of random size, and is against all others.
        parts = torch.where(topic[:, None] == label, 1 + torch.rand(200, len(label), generator=rand), -1)
        order, centroids = activation_clusters((parts @ weight).to(dtype), weight.to(dtype), size, 50, seed)
        found = label[order].view(clusters, size)
        assert (found == found[:, :1]).all()
        expected = torch.nn.functional.normalize(weight[order].view(clusters, size, dim).sum(1), dim=1)
        assert_close(centroids, expected, rtol=1e-2, atol=1e-2)
        assert centroids.dtype == torch.float32 and order.dtype == torch.int64
    assert sorted(activation_clusters(torch.zeros(3, dim), weight, size)[0].tolist()) == list(range(24))  # none fires


@pytest.mark.parametrize("size", [4, 6])
def test_layers_clustered_together_are_clustered_each_by_itself(size):
    rand = torch.Generator().manual_seed(size)
    x, weight = torch.randn(3, 50, 8, generator=rand), torch.randn(3, 24, 8, generator=rand)
    seeds = [5, 0, 7]
    together = [balanced_clusters(weight, size, seed=seeds), activation_clusters(x, weight, size, seed=seeds)]
    for layer, seed in enumerate(seeds):
        alone = (
            balanced_clusters(weight[layer], size, seed=seed),
            activation_clusters(x[layer], weight[layer], size, 10, seed),
        )
        for (orders, centroids), (order, centroid) in zip(together, alone, strict=True):
            assert torch.equal(orders[layer], order)
            assert_close(centroids[layer], centroid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_are_alike_are_clustered(dtype):
    for seed in range(5):
        rand = torch.Generator().manual_seed(seed)
        topics = torch.nn.functional.normalize(torch.randn(4, 16, generator=rand), dim=1)
        topic = torch.arange(4).repeat(30)[torch.randperm(120, generator=rand)]
        x = (topics[topic] * (1 + torch.rand(120, 1, generator=rand)) + 0.1 * torch.randn(120, 16, generator=rand)).to(
            dtype
        )
        # Three are left out, so that every cluster has as many.
        left_out = torch.cat([x, -3 * x[:3]])
        centroids = token_clusters(left_out, 4, seed=seed)
        cluster, _ = route_tokens(x, centroids)
        assert len({(int(a), int(b)) for a, b in zip(topic, cluster, strict=True)}) == 4 == len(set(cluster.tolist()))
        assert centroids.dtype == torch.float32
        assert_close(centroids.norm(dim=1), torch.ones(4))
        # The sample of an expert that got few tokens is filled up with zeros, which are no tokens.
        filled = token_clusters(torch.cat([x[:60], x.new_zeros(900, 16), x[60:]]), 4, seed=seed)
        assert sorted(route_tokens(x, filled)[0].bincount(minlength=4).tolist()) == [30] * 4
    assert not token_clusters(torch.zeros(1, 40, 16), 4).any()
    alone = token_clusters(torch.cat([x.new_zeros(7, 16), x[:1]]), 4)
    assert_close(alone, torch.nn.functional.normalize(x[:1].float(), dim=1).expand(4, 16))
    layers = torch.randn(2, 24, 8, generator=rand)
    together = token_clusters(layers, 6, seed=[3, 8])
    assert_close(together, torch.stack([token_clusters(layers[0], 6, seed=3), token_clusters(layers[1], 6, seed=8)]))
    few = token_clusters(layers[0, :2], 5)
    assert few.shape == (5, 8) and torch.isfinite(few).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_route_tokens_is_brute_force(dtype):
    for seed, (tokens, clusters) in enumerate([(1, 1), (1, 4), (13, 3), (40, 8), (7, 1), (60, 256), (60, 257)]):
        rand = torch.Generator().manual_seed(seed)
        x = torch.randint(-2, 3, (tokens, 3), generator=rand).to(dtype).requires_grad_()
        centroids = torch.randint(-2, 3, (clusters, 3), generator=rand).float()
        assigned, order = route_tokens(x, centroids)
        products = [[sum(a * b for a, b in zip(t, c, strict=True)) for c in centroids.tolist()] for t in x.tolist()]
        expected = [
            largest(row, 1) + largest([-math.inf if i in largest(row, 1) else p for i, p in enumerate(row)], 1)
            for row in products
        ]
        assert assigned.tolist() == [best[0] for best in expected]
        assert order.tolist() == sorted(range(tokens), key=lambda t: (*expected[t], t))
        assert assigned.dtype == order.dtype == torch.int64


def test_permuting_neurons_leaves_the_dense_network_unchanged():
    x, w1, w2, dy = ffn_inputs(8)
    order, _ = balanced_clusters(w1, 8)
    permuted = x, w1.detach()[order].requires_grad_(), w2.detach()[:, order].requires_grad_(), dy
    y, dx, dw1, dw2 = run(sparse_feed_forward, (x, w1, w2, dy))
    close(run(sparse_feed_forward, permuted), (y, dx, dw1[order], dw2[:, order]))


def test_sorting_tokens_around_a_network_without_pattern_changes_nothing():
    inputs = ffn_inputs(9)
    _, order = route_tokens(inputs[0], normalize(torch.randn(5, WIDTH, dtype=torch.float64)))
    inverse = order.argsort()

    def sorted_feed_forward(x, w1, w2):
        return permute_rows(sparse_feed_forward(permute_rows(x, order, inverse), w1, w2), inverse, order)

    close(run(sorted_feed_forward, inputs), run(sparse_feed_forward, inputs))


def test_permute_rows_is_indexing():
    x = torch.randn(11, 3, dtype=torch.float64, requires_grad=True)
    order, grad = torch.randperm(11), torch.randn(11, 3, dtype=torch.float64)
    permuted = permute_rows(x, order, order.argsort())
    assert torch.equal(permuted, x[order])
    expected = torch.autograd.grad(x[order], x, grad)
    assert torch.equal(torch.autograd.grad(permuted, x, grad)[0], expected[0])
    assert torch.autograd.gradcheck(lambda x: permute_rows(x, order, order.argsort()), x)
