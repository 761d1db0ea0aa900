"""The interface of a family of sparse FFNs, so that no other module depends on a particular family.

A *pattern* says which entries of h a sparse phase keeps (`Groups`, `Venom`): a mask, a density, bounds. A *family* is
code that computes the six products of `kernels.feed_forward` for some patterns. A pattern can have several families
(column groups have one for tiles of 128 and one for large blocks) or none; then the masked reference computes it.

A family is one object with these members:

    handles, refuses    which patterns it supports; which shapes, devices and dtypes it does not run, and why
    forward, backward   the six products, in numbered lines; `forward` returns the tensors that `backward` needs
    infer               products (1) and (2) for a pattern chosen in advance (`kernels.causal.Preceding`)
    cost                FLOPs and memory, for run.json, scripts/estimate.py, MFU and the benchmarks
    operators           which product each of its operators computes, for the profiler's tables
    patterns            the names in `activations.pattern` that it supports, and the keys that they take

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
        """Tokens in a block, which share a pattern."""
        ...

    @property
    def sample(self) -> int:
        """A block chooses its neurons from every `sample`-th of its tokens."""
        ...

    def check(self, hidden_dim: int) -> None:
        """Raise ValueError, naming the parameter, if the pattern does not fit an FFN of width `hidden_dim`."""

    def density(self, hidden_dim: int) -> float:
        """Largest share of h that is kept in an FFN of width `hidden_dim`."""
        ...

    def mask(self, h: Tensor, sums: Tensor | None = None) -> Tensor:
        """The specification: which entries of `h [T, f]` are kept, bool `[T, f]`.

        Args:
            h: `[T, f]`, not negative.
            sums: `[B, f]` float32: sums that each block chooses by, instead of the sums of h over its own tokens.
        """
        ...

    def causal(self) -> "Pattern":
        """The same pattern without options by which a block depends on other blocks' tokens, for inference."""
        ...

    def of_one_token(self) -> "Pattern":
        """The same pattern with every token choosing for itself."""
        ...


@dataclass(frozen=True)
class FeedForwardSparsity:
    """What a sparse phase does to an FFN: the one specification that products, costs and inference read."""

    pattern: "Pattern | Preceding | None" = None
    """The pattern of h; None: h stays dense."""

    weight_products: tuple[int, ...] = ()
    """Products that read a 2:4 weight: 1 (W1, and with it product (5)), 3 (W2 for the gradient of h)."""

    cut_along_tokens: bool = False
    """Products (4) and (6) read operands with a second 2:4 pattern, along the tokens; for 2:4 activations."""

    clusters: int = 0
    """Clusters that the router sorts tokens by; 0: no router."""

    fp8: bool = False
    """The products read x, W1, W2, h and their gradients rounded to fp8 (`kernels.float8`)."""

    by_cluster: bool = False
    """For inference: a token keeps what its cluster's centroid would keep, so nothing depends on its block (v = 1)."""

    def flops_share(self, hidden_dim: int) -> float:
        """Share of the six products' FLOPs that remains without multiplications by dropped entries.

        A family can execute more (`Family.cost`): one that gathers four columns of m executes 4 / m for any n.
        """
        density = self.pattern.density(hidden_dim) if self.pattern is not None else 1.0
        first = 1.0
        if 1 in self.weight_products:
            first = 0.5
        elif isinstance(self.pattern, Pattern) and self.pattern.sample > 1:
            first = min(1.0, 1 / self.pattern.sample + density)
        # (3) is needed only where h is kept, or can read a 2:4 weight: the smaller share counts.
        third = min(density, 0.5) if 3 in self.weight_products else density
        return (first + third + 4 * density) / 6


class Shape(NamedTuple):
    """Shape of an FFN: d, f and, if needed, the tokens T of a micro-batch, or those of all experts of a layer."""

    width: int
    hidden_dim: int
    tokens: int = 0
    experts: int = 1


@dataclass(frozen=True)
class Cost:
    """FLOPs and memory of a family, relative to the dense FFN."""

    products: tuple[float, float, float, float, float, float] = (1.0,) * 6
    """Multiplications in products (1) to (6); one with a 2:4 operand counts as the dense one."""

    halved: tuple[int, ...] = ()
    """Products on the sparse tensor cores, which take half of the FLOPs for the same multiplications."""

    beside: float = 0.0
    """FLOPs besides the six products, relative to one dense product: for choosing, or for rows that stay dense."""

    kept_h: float = 1.0
    """Elements of h kept for the backward pass, relative to T f."""

    kept_weights: float = 0.0
    """Elements kept of copies of the two weights, relative to d f."""

    gradients: float = 1.0
    """Elements of dh, and of dy1, relative to T f."""

    copied_rows: float = 0.0
    """Rows of a weight that a product copies, relative to f."""

    chosen_by: float = 1.0
    """Elements of the y1 that blocks choose from, relative to T f."""

    @property
    def executed_share(self) -> float:
        """FLOPs executed, as a share of those of the six dense products."""
        products = (share / 2 if n in self.halved else share for n, share in enumerate(self.products, start=1))
        return (sum(products) + self.beside) / 6


class Operands(NamedTuple):
    """The weights of an FFN as a sparse phase reads them.

    Attributes:
        w1: `[f, d]`. w2: `[d, f]`, same dtype.
        w1_scale, w2_scale: `[]`, beta of a 2:4 W1 and of a W2 that is 2:4 along d (`kernels.weights`); None: dense.
    """

    w1: Tensor
    w2: Tensor
    w1_scale: Tensor | None
    w2_scale: Tensor | None


Saved: TypeAlias = Sequence[Tensor | None]
# Stages of an operator's calls in the forward pass and in the backward pass. Two stages: its calls alternate.
Stages: TypeAlias = tuple[tuple[str, ...], tuple[str, ...]]


class FromRecipe(NamedTuple):
    """How a recipe's [activations] become a pattern. Keys in neither `keys` nor `options` are refused."""

    keys: tuple[str, ...]
    """The keys that `make` takes by name."""

    make: Callable[..., Pattern]

    options: tuple[str, ...] = ()
    """Further keys that the family supports, which it reads from `FeedForwardSparsity`."""


class Family:
    """Base class of all families, see the module docstring. A family is a constant without state.

    Attributes:
        name: in run.json, logs and tables.
        takes_order: whether `forward` and `backward` permute the tokens themselves; otherwise the caller does.
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
        """Whether the family supports this kind of pattern, regardless of its parameters."""
        raise NotImplementedError

    def refuses(
        self, sparsity: FeedForwardSparsity, shape: Shape, device: torch.device, dtype: torch.dtype, here: bool = True
    ) -> str:
        """Why the family does not run a sparsity that it handles; empty if it does.

        Args:
            sparsity: one that it handles.
            shape: d and f.
            device, dtype: of the products.
            here: whether the device is in this machine; if not, a Hopper GPU with cuSPARSELt is assumed.
        """
        raise NotImplementedError

    def describe(self, sparsity: FeedForwardSparsity, device: torch.device, here: bool = True) -> str:
        """The name of the kernels that compute the products, for the log."""
        raise NotImplementedError

    def cost(self, sparsity: FeedForwardSparsity, shape: Shape) -> Cost:
        """FLOPs and memory, relative to the dense FFN of the same d and f.

        Args:
            sparsity: one that it handles.
            shape: d and f; and the tokens of a micro-batch to count the copies of each block, else 0.
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
            x: as returned by `arrange`.
            weights: W1, W2 and their scales, in the dtype of x.
            sparsity: one that it does not refuse.
            order: `[T]` int64, only if `takes_order`: the order of the tokens in which neighbours share a block.

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
        """Products (1) and (2) for a pattern chosen in advance, without gradients: x and y `[T, d]`, dense weights."""
        raise NotImplementedError


def refuses_device(device: torch.device, dtype: torch.dtype) -> str:
    """Why kernels that read bf16 on a GPU do not run; empty if they do."""
    if device.type != "cuda":
        return f"no kernels for the device {device.type}"
    if dtype != torch.bfloat16:
        return f"kernels compute in bfloat16, not {str(dtype).removeprefix('torch.')}"
    return ""
