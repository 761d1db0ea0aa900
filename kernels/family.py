"""What a family of sparse FFNs says about itself, so that nothing else has to know it.

A *pattern* says which entries of h a sparse phase keeps (`Groups`, `Venom`): a mask, a density, bounds. A *family* is
code that computes the six products of `kernels.feed_forward` for some patterns. A pattern can have several families
(column groups have one for tiles of 128 and one for large blocks) or none; then the masked reference computes it.

A family answers, in one object:

    handles, refuses    which patterns it is for; which shapes, devices and dtypes it does not run
    forward, backward   the six products, in numbered lines; what is kept between them is explicit
    infer               products (1) and (2) for a pattern whose choice is made before (`kernels.causal.Preceding`)
    cost                what it executes and keeps: run.json, scripts/estimate.py, MFU and the benchmarks read this
    operators           which product each of its operators computes, for the profiler's tables
    patterns            which recipes (`activations.pattern`) it makes patterns of, and from which keys

To add one: docs/extending.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.causal import Preceding


@runtime_checkable
class Pattern(Protocol):
    """Which entries of h a block of tokens keeps; a frozen dataclass, since the compiler takes it as a constant."""

    @property
    def v(self) -> int:
        """Tokens in a block, which share what they keep."""
        ...

    @property
    def sample(self) -> int:
        """A block chooses by every `sample`-th of its tokens."""
        ...

    def check(self, hidden_dim: int) -> None:
        """Raise ValueError, naming the parameter, where the pattern does not fit an FFN of width `hidden_dim`."""

    def density(self, hidden_dim: int) -> float:
        """Share of h that is kept at most in an FFN of width `hidden_dim`."""
        ...

    def mask(self, h: Tensor, sums: Tensor | None = None) -> Tensor:
        """The specification: which entries of `h [T, f]` are kept, bool `[T, f]`.

        Args:
            h: `[T, f]`, not negative.
            sums: `[B, f]` float32: what each block chooses by, instead of its own sums over its tokens.
        """
        ...

    def causal(self) -> "Pattern":
        """The same pattern without what would tell a block of other blocks' tokens, for inference."""
        ...

    def of_one_token(self) -> "Pattern":
        """The same pattern with every token choosing for itself."""
        ...


@dataclass(frozen=True)
class FeedForwardSparsity:
    """What a sparse phase does to an FFN: the one specification that products, costs and inference read."""

    pattern: "Pattern | Preceding | None" = None
    """What h is cut to; None leaves it whole."""

    weight_products: tuple[int, ...] = ()
    """Products that read a 2:4 weight: 1 (W1, and with it product (5)), 3 (W2 for the gradient of h)."""

    cut_along_tokens: bool = False
    """Products (4) and (6) read operands that are cut along the tokens as well; for 2:4 activations."""

    clusters: int = 0
    """Clusters that the router sorts tokens by; 0: no router."""

    fp8: bool = False
    """The products read x, W1, W2, h and their gradients rounded to fp8 (`kernels.float8`)."""

    by_cluster: bool = False
    """For inference: a token keeps what its cluster's centroid would keep, so nothing depends on its block (v = 1)."""

    def flops_share(self, hidden_dim: int) -> float:
        """FLOPs left of the six products', forward and backward, without those that multiply by a dropped entry.

        What a family executes can be more (`Family.cost`): one that gathers four columns of m executes 4 / m for any n.
        """
        density = self.pattern.density(hidden_dim) if self.pattern is not None else 1.0
        first = 1.0
        if 1 in self.weight_products:
            first = 0.5
        elif isinstance(self.pattern, Pattern) and self.pattern.sample > 1:
            first = min(1.0, 1 / self.pattern.sample + density)
        # (3) is needed where h is not zero, and reads a 2:4 weight: the better of both counts.
        third = min(density, 0.5) if 3 in self.weight_products else density
        return (first + third + 4 * density) / 6


class Shape(NamedTuple):
    """Of an FFN: d, f and, where it matters, the tokens T of a micro-batch."""

    width: int
    hidden_dim: int
    tokens: int = 0


@dataclass(frozen=True)
class Cost:
    """What a family executes and keeps, relative to the dense FFN."""

    products: tuple[float, float, float, float, float, float] = (1.0,) * 6
    """Multiplications in products (1) to (6); one with a 2:4 operand counts as the dense one."""

    halved: tuple[int, ...] = ()
    """Products on the sparse tensor cores, which take half of the FLOPs for the same multiplications."""

    beside: float = 0.0
    """FLOPs beside the six products, over those of one dense product: to choose by, or of rows that stay whole."""

    kept_h: float = 1.0
    """Numbers that are kept of h for the backward pass, over T f."""

    kept_weights: float = 0.0
    """Numbers that are kept of copies of the two weights, over d f."""

    gradients: float = 1.0
    """Numbers of dh, and of dy1, over T f."""

    copied_rows: float = 0.0
    """Rows of a weight that a product copies, over f."""

    chosen_by: float = 1.0
    """Numbers of the y1 by which blocks choose, over T f."""

    @property
    def executed_share(self) -> float:
        """FLOPs executed of the six products'."""
        products = (share / 2 if n in self.halved else share for n, share in enumerate(self.products, start=1))
        return (sum(products) + self.beside) / 6


class Operands(NamedTuple):
    """The weights of an FFN as a sparse phase reads them.

    Attributes:
        w1: `[f, d]`. w2: `[d, f]`, same dtype.
        w1_scale, w2_scale: `[]`, beta of a 2:4 W1 and of a W2 that is 2:4 along d (`kernels.weights`); None: whole.
    """

    w1: Tensor
    w2: Tensor
    w1_scale: Tensor | None
    w2_scale: Tensor | None


Saved: TypeAlias = Sequence[Tensor | None]
# Stages of an operator's calls in the forward pass and in the backward pass; two where its calls there take turns.
Stages: TypeAlias = tuple[tuple[str, ...], tuple[str, ...]]


class FromRecipe(NamedTuple):
    """How a recipe's [activations] become a pattern. A key that is neither of these and set all the same is refused."""

    keys: tuple[str, ...]
    """The keys that `make` takes by name."""

    make: Callable[..., Pattern]

    options: tuple[str, ...] = ()
    """Keys that the family reads elsewhere, of `FeedForwardSparsity`."""


class Family:
    """The base of all families, see the module's docstring. A family has no state: one object each, a constant.

    Attributes:
        name: in run.json, logs and tables.
        takes_order: whether `forward` and `backward` put tokens into order and back themselves; else that is done
            around them.
        fp8: whether its products read fp8, see `FeedForwardSparsity.fp8`.
        operators: stages of the family's operators, by name.
        patterns: by the name in `activations.pattern`.
    """

    name: str
    takes_order: bool = False
    fp8: bool = False
    operators: ClassVar[Mapping[str, Stages]] = {}
    patterns: ClassVar[Mapping[str, FromRecipe]] = {}

    def handles(self, sparsity: FeedForwardSparsity) -> bool:
        """Whether the family is for this kind of pattern, whatever its numbers."""
        raise NotImplementedError

    def refuses(
        self, sparsity: FeedForwardSparsity, shape: Shape, device: torch.device, dtype: torch.dtype, here: bool = True
    ) -> str:
        """Why it does not run what it handles; empty where it does.

        Args:
            sparsity: that it handles.
            shape: d and f.
            device, dtype: that the products run in.
            here: whether the device is of this machine; else it is taken for a Hopper GPU with cuSPARSELt.
        """
        raise NotImplementedError

    def describe(self, sparsity: FeedForwardSparsity, device: torch.device, here: bool = True) -> str:
        """What computes the products, for the log."""
        raise NotImplementedError

    def cost(self, sparsity: FeedForwardSparsity, shape: Shape) -> Cost:
        """What it executes and keeps, over the dense FFN of the same d and f.

        Args:
            sparsity: that it handles.
            shape: d and f; the tokens of a micro-batch where copies a block are to be counted, else 0.
        """
        raise NotImplementedError

    def arrange(self, x: Tensor, sparsity: FeedForwardSparsity) -> Tensor:
        """x `[T, d]` in the shape that `forward` takes: padded, or in blocks. Differentiable."""
        return x

    def restore(self, y: Tensor, sparsity: FeedForwardSparsity, tokens: int) -> Tensor:
        """The reverse of `arrange` for `forward`'s result: y `[T, d]`. Differentiable."""
        return y

    def forward(
        self, x: Tensor, weights: Operands, sparsity: FeedForwardSparsity, order: Tensor | None
    ) -> tuple[Tensor, Saved]:
        """Products (1) and (2).

        Args:
            x: as `arrange` gives it.
            weights: W1, W2 and their scales, in the dtype of x.
            sparsity: that it does not refuse.
            order: `[T]` int64, where `takes_order`: the tokens in the order in which neighbours share a block.

        Returns:
            y, in the shape and order of x, and what `backward` needs beside the weights.
        """
        raise NotImplementedError

    def backward(
        self, dy: Tensor, saved: Saved, weights: Operands, sparsity: FeedForwardSparsity
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Products (3) to (6): dx, dW1, dW2, for dy in the shape and order of y."""
        raise NotImplementedError

    def infer(self, x: Tensor, weights: Operands, pattern: "Preceding") -> Tensor:
        """Products (1) and (2) for a choice made before, without gradients: x and y `[T, d]`, whole weights."""
        raise NotImplementedError


def refuses_device(device: torch.device, dtype: torch.dtype) -> str:
    """Why kernels that read bf16 on a GPU do not run; empty where they do."""
    if device.type != "cuda":
        return f"no kernels for the device {device.type}"
    if dtype != torch.bfloat16:
        return f"kernels compute in bfloat16, not {str(dtype).removeprefix('torch.')}"
    return ""
