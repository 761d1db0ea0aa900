"""Does an FFN compute what it should? Who does not pass here is not timed by `scripts/benchmark_kernels.py`.

    choice    With a W2 of zeros and ones y adds up the h that was kept: its sum must be that of the reference's mask
              within 1 / 1000 (1 / 50 in fp8): that leaves room for ties that rounding decides and for no other choice.
    values    y, dx, dW1, dW2 against float64, written out from the definition. x and W1 are small integers here, so
              that h and its sums are exact in any precision and everybody must choose alike; W2 and dy are random. The
              relative error (Frobenius) stays below 1 / 100 and below twice that of the dense FFN in bf16 + 0.001; in
              fp8 below twice that of the dense FFN by torchao's float8, whose scales are tensor-wise as well.
    NaN       What eager code allocates reads NaN until it is written; NaN in a token comes out of it, and of no other;
              in fp8 of its block's tokens, which share a scale.

The number of tokens leaves a last block of 77. Inputs are fresh at every call, from torch's global seed.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from kernels import (
    FeedForwardSparsity,
    Pattern,
    Venom,
    balanced_clusters,
    hidden_activations,
    route_tokens,
    soft_threshold_2_4,
    soft_threshold_scale,
)
from kernels.float8 import rounded, rounded_by_block, scale_of
from kernels.venom import token_mask
from models.feed_forward import FeedForward

TOKENS = 2048 + 77
CLUSTER = 128  # neurons of a cluster
OUTPUTS = ("y", "dx", "dW1", "dW2")
ERROR, KEPT = 1e-2, 1e-3
# Of a chain of three products whose operands are off by 2%. And Hopper's fp8 tensor cores cut their sums off: y1 comes
# out 0.2 to 0.5% too small, torchao's as ours.
ERROR_FP8, KEPT_FP8 = 0.2, 2e-2
DENSE_FLOAT8 = FeedForwardSparsity(fp8=True)  # torchao's float8 with tensor-wise scaling, the peer


class Weights(NamedTuple):
    """What a FeedForward is filled with: W1 `[f, d]`, W2 `[d, f]`, and a sparse phase's buffers."""

    w1: nn.Parameter
    w2: nn.Parameter
    centroids: Tensor
    w1_scale: Tensor
    w2_scale: Tensor


def prepared_weights(dim: int, hidden_dim: int, device: torch.device) -> Weights:
    """Random bf16 weights, clustered and with fitted scales, as a sparse phase starts."""
    w1 = torch.randn(hidden_dim, dim, device=device).div_(dim**0.5).bfloat16()
    w2 = torch.randn(dim, hidden_dim, device=device).div_(hidden_dim**0.5).bfloat16()
    order, centroids = balanced_clusters(w1, CLUSTER)
    w1, w2 = w1[order], w2[:, order].contiguous()
    return Weights(nn.Parameter(w1), nn.Parameter(w2), centroids, soft_threshold_scale(w1), soft_threshold_scale(w2.T))


def planted_inputs(dim: int, hidden_dim: int, tokens: int, device: torch.device) -> tuple[Tensor, Weights]:
    """bf16 tokens `[T, d]` and weights for which rounding decides nothing.

    x has a few -1 and 1 a token, W1 is -1, 0 or 1, so y1 is an integer of rarely more than 16 and h exact in bf16. In
    the first columns, one a cluster, a token names its cluster by a 4, which that cluster's neurons read.
    """
    clusters = hidden_dim // CLUSTER
    x = torch.randint(0, 2, (tokens, dim), device=device) * 2 - 1
    x *= torch.rand(tokens, dim, device=device) < 4.5 / dim
    x[:, :clusters] = 0
    x[torch.arange(tokens), torch.randint(0, clusters, (tokens,))] = 4
    w1 = torch.randint(-1, 2, (hidden_dim, dim), device=device)
    w1[:, :clusters] = torch.eye(clusters, device=device).repeat_interleave(CLUSTER, 0)
    w2 = torch.randn(dim, hidden_dim, device=device).bfloat16()
    # A power of two leaves W1 and h exact.
    scales = torch.tensor(0.5, device=device), torch.tensor(1.25, device=device)
    weights = Weights(nn.Parameter(w1.bfloat16()), nn.Parameter(w2), torch.eye(clusters, dim, device=device), *scales)
    return x.bfloat16().requires_grad_(), weights


def build(sparsity: FeedForwardSparsity, weights: Weights, compiled: bool = True) -> Any:
    """The FFN: sparse if anything in it is, with a router if tokens share a pattern."""
    hidden_dim, dim = weights.w1.shape
    float8, sparsity = sparsity == DENSE_FLOAT8, FeedForwardSparsity() if sparsity == DENSE_FLOAT8 else sparsity
    routed = isinstance(sparsity.pattern, Pattern) and sparsity.pattern.v > 1
    sparsity = replace(sparsity, clusters=hidden_dim // CLUSTER if routed else 0)
    with torch.device(weights.w1.device):
        module = FeedForward(dim, hidden_dim, sparsity)
    module.w1.weight, module.w2.weight = weights.w1, weights.w2
    module.w1_scale, module.w2_scale = weights.w1_scale, weights.w2_scale
    module.centroids = weights.centroids if routed else module.centroids
    module.sparse = sparsity != FeedForwardSparsity()
    if float8:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        # Without a GPU the products are of the rounded numbers in bf16: PyTorch's fp8 ones take minutes there.
        convert_to_float8_training(module, config=Float8LinearConfig(emulate=not weights.w1.is_cuda))
    return torch.compile(module, fullgraph=True, dynamic=False) if compiled else module


def step(module: Any, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y, dx, dW1, dW2."""
    y = module(x)
    return y.detach(), *torch.autograd.grad(y, (x, module.w1.weight, module.w2.weight), dy)


def definition(x: Tensor, dy: Tensor, weights: Weights, sparsity: FeedForwardSparsity) -> tuple[Tensor, ...]:
    """y, dx, dW1, dW2 in float64, from the head of kernels/feed_forward.py; the pattern chooses from h in x's dtype."""
    dtype = x.dtype
    x, dy, w1, w2, centroids, w1_scale, w2_scale = (tensor.detach().double() for tensor in (x, dy, *weights))
    order = torch.arange(len(x), device=x.device)
    if sparsity.clusters:
        order = route_tokens(x, centroids)[1]
    x, dy, w2_thresholded = x[order], dy[order], w2
    if 1 in sparsity.weight_products:
        w1 = w1_scale * soft_threshold_2_4(w1)
    if 3 in sparsity.weight_products:
        w2_thresholded = w2_scale * soft_threshold_2_4(w2.T).T
    active = (x @ w1.T).relu()
    if sparsity.pattern is not None:
        active *= sparsity.pattern.mask(active.square().to(dtype))
    h = active.square()
    dy1 = 2 * active * (dy @ w2_thresholded)
    along_tokens = torch.ones_like(h, dtype=torch.bool)
    if sparsity.cut_along_tokens:
        assert isinstance(sparsity.pattern, Venom)
        along_tokens = token_mask(h.to(dtype), sparsity.pattern)
    y, dx = torch.empty_like(x), torch.empty_like(x)
    y[order], dx[order] = h @ w2.T, dy1 @ w1
    return y, dx, (dy1 * along_tokens).T @ x, dy.T @ (h * along_tokens)


def adding(dim: int, hidden_dim: int) -> Tensor:
    """A W2 `[d, f]` with which the sum of y is that of h: 1 where neuron n has n mod d = the row, else 0.

    Not all ones: fp8 tensor cores add up with so few digits that a long sum of positive numbers comes out too small.
    """
    return torch.eye(dim).repeat(1, -(-hidden_dim // dim))[:, :hidden_dim]


def kept_share(module: Any, weights: Weights, x: Tensor) -> float:
    """Sum of the h that the module keeps over that which the reference's mask keeps; W2 as of `adding`."""
    sparsity = module.sparsity
    with torch.no_grad():
        kept = module(x).double().sum()
        ordered = x[route_tokens(x, weights.centroids)[1]] if sparsity.clusters else x
        h = hidden_activations(ordered, weights.w1, weights.w1_scale if 1 in sparsity.weight_products else None)
        if isinstance(sparsity.pattern, Pattern):
            if sparsity.fp8:
                ordered = rounded_by_block(ordered, sparsity.pattern.v)
                h = hidden_activations(ordered, rounded(weights.w1, scale_of(weights.w1.abs().amax())))
            h = h * sparsity.pattern.mask(h)
        return float(kept / h.double().sum())


@contextmanager
def poisoned() -> Iterator[None]:
    """Let floating-point tensors that eager code allocates without a value hold NaN."""

    def filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poison(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return poison

    names = ("empty", "empty_like", "empty_strided"), ("new_empty", "new_empty_strided")
    with ExitStack() as patches:
        for owner, functions in zip((torch, Tensor), names, strict=True):
            for function in functions:
                patches.enter_context(patch.object(owner, function, filled(getattr(owner, function))))
        yield


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected."""
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def check(
    sparsity: FeedForwardSparsity, prepared: Weights, peer: dict[str, Any] | None, compiled: bool
) -> dict[str, Any]:
    """Whether the FFN computes what it should at the weights' shape.

    Args:
        sparsity: of the FFN.
        prepared: of `prepared_weights`.
        peer: this function's result for the dense FFN, in fp8 for what is in fp8; None where that is asked for.
        compiled: under torch.compile.

    Returns:
        errors: relative error of each output. kept: `kept_share`. failed: in words, what is not right; empty if all is.
    """
    (hidden_dim, dim), device = prepared.w1.shape, prepared.w1.device
    # A second cut needs fours of tokens, torchao's float8 sixteens.
    window = 16 if sparsity == DENSE_FLOAT8 else 4 if sparsity.cut_along_tokens else 1
    tokens = TOKENS - TOKENS % window
    x, weights = planted_inputs(dim, hidden_dim, tokens, device)
    dy = torch.randn(tokens, dim, device=device).bfloat16()
    module = build(sparsity, weights, compiled)
    step(module, x, dy)  # compiles, before allocation is patched
    with poisoned():
        outputs = step(module, x, dy)
    expected = definition(x, dy, weights, module.sparsity)  # of whole numbers, in fp8 too
    errors = {key: relative_error(*pair) for key, *pair in zip(OUTPUTS, outputs, expected, strict=True)}
    most, slack = (ERROR_FP8, 0.0) if sparsity.fp8 else (ERROR, ERROR / 10)
    allowed = {key: min(most, 2 * peer["errors"][key] + slack) if peer else most for key in OUTPUTS}
    # Not `>`: an error of NaN fails.
    failed = [
        f"{key} off by {errors[key]:.1e}, not {allowed[key]:.1e}" for key in OUTPUTS if not errors[key] < allowed[key]
    ]

    row = tokens // 2
    with torch.no_grad():
        x[row, 0] = torch.nan
    y, dx, dw1, dw2 = step(module, x, dy)
    if not (y[row].isnan().all() and dx[row].isnan().all() and dw1.isnan().any() and dw2.isnan().any()):
        failed.append("NaN in x is lost")
    together = tokens if sparsity == DENSE_FLOAT8 else module.sparsity.pattern.v if sparsity.fp8 else 1
    if y.isnan().any(1).sum() > together or dx.isnan().any(1).sum() > together:
        failed.append("NaN in x reaches other tokens")

    # Compiled code multiplies by beta before it rounds it to bf16, eager code after: a beta for which that is the same.
    ones = prepared._replace(
        w2=nn.Parameter(adding(dim, hidden_dim).to(prepared.w2)), w1_scale=prepared.w1_scale.bfloat16().float()
    )
    kept = kept_share(build(sparsity, ones, compiled=False), ones, torch.randn(tokens, dim, device=device).bfloat16())
    if not abs(kept - 1) < (KEPT_FP8 if sparsity.fp8 else KEPT):
        failed.append(f"keeps {kept:.4f} of what the reference's choice keeps")
    return {"tokens": tokens, "errors": errors, "kept": kept, "failed": failed}
