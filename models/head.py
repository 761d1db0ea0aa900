"""The output head, which can compute the loss itself and never holds the logits of all tokens at once.

The logits of T tokens over a vocabulary of V are T x V numbers, and their gradient as many: 2.1 GB in bf16 at T = 16384
and V = 32768, more than the activations of any layer. The loss of a token needs its own row alone, and the loss is what
the backward pass starts from, so its gradient is known as soon as the loss is. For a chunk of tokens at a time,

    logits = x W^T,    loss = sum of (log sum exp(logits) - logits[label]),    G = softmax(logits) - onehot(label)
    dx = G W,          dW += G^T x

all in the forward pass; G takes the place of the logits. The backward pass multiplies dx and dW by the gradient of the
loss. `torch.nn.functional.linear_cross_entropy` does the same from PyTorch 2.13 on, but returns the sum in the dtype of
x and W: in bf16, as under FSDP2, that rounds the loss of a batch to eight bits. Here the loss is float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from configs.titan import IGNORE_INDEX


def losses_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the losses of some tokens, and its gradient by their logits.

    Args:
        logits: `[T, V]`, any floating dtype; computed in float32.
        labels: `[T]` int64; a token whose label is IGNORE_INDEX counts for nothing.

    Returns:
        float32 scalar; `[T, V]` in the logits' dtype.
    """
    values, counts = logits.float(), labels != IGNORE_INDEX
    log_sum = values.logsumexp(1)
    of_label = values.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    loss = torch.where(counts, log_sum - of_label, 0.0).sum()
    is_label = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    gradient = torch.where(counts[:, None], (values - log_sum[:, None]).exp() - is_label.float(), 0.0)
    return loss, gradient.to(logits.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor, chunk: int, dtype, compute: Callable, trains: bool):
        w, total = weight.to(dtype), x.new_zeros((), dtype=torch.float32)
        dx = torch.empty_like(x, dtype=dtype) if trains else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if trains else None
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            part = x[rows].to(dtype)
            loss, gradient = compute(part @ w.mT, labels[rows])
            total += loss
            if dx is not None and dw is not None:
                torch.mm(gradient, w, out=dx[rows])
                dw += gradient.mT @ part  # rounded as one product's result would be, added up in float32
            del gradient  # else it is there beside the next chunk's
        ctx.gradients, ctx.dtypes = (dx, dw), (x.dtype, weight.dtype)
        return total

    @staticmethod
    def backward(ctx, *of_loss: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss have been used: the backward pass runs once")
        (dx, dw), ctx.gradients = ctx.gradients, None
        gradients = (each.mul_(of_loss[0]).to(dtype) for each, dtype in zip((dx, dw), ctx.dtypes, strict=True))
        return *gradients, None, None, None, None, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, chunk: int, compute: Callable = losses_and_gradient
) -> Tensor:
    """The sum of the tokens' cross-entropies, of logits x W^T, without all logits at once; see the head of this file.

    The backward pass runs once, and has no gradient of its own.

    Args:
        x: `[..., d]`.
        weight: `[V, d]`. Products are in autocast's dtype where that is on, else in x's.
        labels: `[...]` int64; IGNORE_INDEX counts for nothing.
        chunk: tokens whose logits are there at once.
        compute: `losses_and_gradient`, or the same compiled.

    Returns:
        float32 scalar.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    trains = torch.is_grad_enabled()  # not known inside the function
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(x.flatten(0, -2), weight, labels.flatten(), chunk, dtype, compute, trains)


class Head(nn.Linear):
    """The output layer: `[B, S, d]` to logits `[B, S, V]`, or to the sum of the tokens' losses while it has labels.

    The loss is computed in here because FSDP2 gathers a module's weight for its forward pass alone.

    Attributes:
        labels: `[B, S]` of the batch at hand; None: forward gives logits.
        chunk: tokens whose logits are there at once while it has labels.
        compute: what a chunk's loss is computed by.
    """

    labels: Tensor | None = None
    chunk: int = 0

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__(dim, vocab_size, bias=False)
        self.compute: Callable = losses_and_gradient

    def forward(self, x: Tensor) -> Tensor:
        if self.labels is None:
            return super().forward(x)
        return linear_cross_entropy(x, self.weight, self.labels, self.chunk, self.compute)
