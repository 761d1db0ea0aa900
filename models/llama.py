"""Llama with a squared-ReLU FFN or a mixture of such FFNs, and with SwiGLU as the baseline people know.

The block is torchtitan's Llama block (RMSNorm, RoPE, grouped-query attention, no biases; RoPE in one pass instead of
three, `models/attention.py`), so that a comparison with it differs in the FFN alone:

    llama_relu2       y = W2 relu(W1 x)^2              2 d f parameters
    llama_swiglu      y = W2 (silu(W1 x) * W3 x)       3 d f' parameters, f' = 2/3 f rounded up to a multiple of 64
    llama_moe_relu2   top_k of E such FFNs a token     2 d f E parameters, of which a token uses top_k / E

Products (2) to (6) of the ungated ones can be sparse: `models/feed_forward.py`, `models/experts.py`.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from configs.titan import MoEArgs, RoPEScalingArgs, SwiGLU, Transformer, TransformerModelArgs
from kernels import FeedForwardSparsity
from models.attention import Attention
from models.experts import ExpertBlock, Experts, MixtureOfExperts
from models.feed_forward import FeedForward
from models.head import Head


@dataclass
class LlamaArgs(TransformerModelArgs):
    """torchtitan's arguments and the FFN's: its width f, its kind, and what a sparse phase does to it.

    num_experts: 0: no experts; else hidden_dim is the width of one.
    top_k: experts that a token goes to.
    shared_expert: whether every token goes to one more, dense expert.
    load_balance_coeff: step of the experts' biases; 0: no biases.
    dense_layers: so many first layers stay dense in a sparse phase.
    max_position_embeddings: positions that an export says the model takes; None: max_seq_len, the length in training.
    """

    hidden_dim: int = 768
    swiglu: bool = False
    num_experts: int = 0
    top_k: int = 2
    shared_expert: bool = False
    load_balance_coeff: float = 1e-3
    sparsity: FeedForwardSparsity = field(default_factory=FeedForwardSparsity)
    dense_layers: int = 0
    multiple_of: int = 64
    max_position_embeddings: int | None = None
    rope_theta: float = 500000
    # torchtitan scales RoPE by default, as Llama 3.1 does; a factor of 1 leaves it unscaled.
    rope_scaling_args: RoPEScalingArgs = field(default_factory=lambda: RoPEScalingArgs(scaling_factor=1.0))

    @property
    def inactive_parameters(self) -> int:
        """Parameters that a token does not use: those of the experts that it is not sent to."""
        unused = max(0, self.num_experts - self.top_k) if self.num_experts else 0
        return self.n_layers * unused * 2 * self.dim * self.hidden_dim

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """All parameters, and the FLOPs a token, forward and backward, of those that a token uses."""
        parameters, flops = super().get_nparams_and_flops(model, seq_len)
        return parameters, flops - 6 * self.inactive_parameters


# Widths f = 4 d for 7b, as in Llama's own ratio of parameters, and 6 d below: the wider the FFN, the more of a
# small model's time it takes. Parameter counts are without embeddings.
FLAVORS = {
    "debug": LlamaArgs(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=768),  # 0.9 M
    "160m": LlamaArgs(dim=768, n_layers=12, n_heads=12, n_kv_heads=4, hidden_dim=4608),  # 104 M
    "400m": LlamaArgs(dim=1024, n_layers=24, n_heads=16, n_kv_heads=4, hidden_dim=6144),  # 365 M
    "1b": LlamaArgs(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, hidden_dim=12288),  # 0.97 B
    "7b": LlamaArgs(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, hidden_dim=16384),  # 5.6 B
    "7b-slice": LlamaArgs(dim=4096, n_layers=6, n_heads=32, n_kv_heads=8, hidden_dim=16384),  # 1.06 B
    # A token goes to two experts, each half as wide as the FFN of the dense flavor: it uses as many parameters.
    "moe_debug": LlamaArgs(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=384, num_experts=4),  # 1.8 M
    "moe_160m": LlamaArgs(dim=768, n_layers=12, n_heads=12, n_kv_heads=4, hidden_dim=2304, num_experts=8),  # 359 M
    "moe_1b": LlamaArgs(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, hidden_dim=6144, num_experts=8),  # 3.4 B
}


def llama_args(flavor: str, **changes: Any) -> LlamaArgs:
    """The arguments of a flavor with some of them changed; a change to None is none."""
    return replace(FLAVORS[flavor], **{name: value for name, value in changes.items() if value is not None})


# What torch.compile and activation checkpointing put into a module's name.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


class Llama(Transformer):
    """torchtitan's Llama with the FFN that `model_args` names: tokens `[B, S]` int64 to logits `[B, S, vocabulary]`.

    A stage of pipeline parallelism is a copy without the modules of the other stages. Its modules keep their names, so
    its parameters are in a checkpoint under the names that they have in the whole model.

    Attributes:
        init_seed: of a stage: what the whole model is drawn from, the same for all stages. None in a whole model.
    """

    init_seed: int | None = None

    def __init__(self, model_args: LlamaArgs) -> None:
        super().__init__(model_args)
        for index, (name, block) in enumerate(self.layers.items()):
            if model_args.num_experts:
                self.layers[name] = ExpertBlock(index, model_args, _mixture(model_args, index))
                continue
            block.attention = Attention(model_args)
            block.feed_forward = _feed_forward(model_args, index)
        self.output = Head(model_args.dim, model_args.vocab_size)

    def forward(
        self,
        tokens: Tensor,
        attention_masks: None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Logits `[B, S, vocabulary]`; with labels `[B, S]` the sum of the tokens' losses, by `Head`, instead.

        A stage of a pipeline that has not the head takes labels and ignores them.
        """
        if self.output is None:
            return super().forward(tokens, attention_masks, positions)
        self.output.labels = labels
        try:
            return super().forward(tokens, attention_masks, positions)
        finally:
            self.output.labels = None

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Initialise parameters and buffers as torchtitan does, to the same values on any number of ranks.

        What DTensor draws depends on how a tensor is sharded: on GPUs every shard has random numbers of its own, on
        CPU ranks all shards have the same. So each rank draws the whole model, for a moment all of it in float32, and
        keeps its own shards. A stage does the same and keeps its own layers.
        """
        parameters = {_plain_name(name): parameter for name, parameter in self.named_parameters()}
        if self.init_seed is None and not any(isinstance(each, DTensor) for each in parameters.values()):
            super().init_weights(buffer_device)
            return
        if self.init_seed is not None:
            torch.manual_seed(self.init_seed)
        with torch.device("meta"):
            whole = Llama(self.model_args)
        whole.to_empty(device=next(iter(parameters.values())).device).init_weights()
        for name, mine in parameters.items():
            theirs = whole.get_parameter(name)
            if isinstance(mine, DTensor):
                mine.copy_(distribute_tensor(theirs, mine.device_mesh, mine.placements, src_data_rank=None))
            else:
                mine.copy_(theirs)
        for name, buffer in self.named_buffers():
            buffer.copy_(whole.get_buffer(_plain_name(name)))

    def feed_forwards(self) -> dict[str, FeedForward | Experts]:
        """What a sparse phase makes sparse, in order of depth, by name.

        "layers.0.feed_forward", or of a mixture of experts "layers.0.moe.experts"; none in a SwiGLU model.
        """
        kind = Experts if self.model_args.num_experts else FeedForward
        return {_plain_name(name): module for name, module in self.named_modules() if isinstance(module, kind)}

    def mixtures(self) -> list[MixtureOfExperts]:
        """The mixtures of experts in order of depth."""
        return [module for module in self.modules() if isinstance(module, MixtureOfExperts)]


def count_parameters(args: LlamaArgs) -> int:
    """Parameters of a model, all stages together."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Llama(args).parameters())


def parameters_in_words(args: LlamaArgs) -> str:
    """ "1.2 M parameters", and of a mixture of experts how many of them a token uses."""
    parameters = count_parameters(args)
    active = parameters - args.inactive_parameters
    used = f" ({active / 1e6:,.1f} M active)" if active < parameters else ""
    return f"{parameters / 1e6:,.1f} M parameters{used}"


def _plain_name(name: str) -> str:
    """The name of a module or parameter without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _mixture(args: LlamaArgs, layer: int) -> MixtureOfExperts:
    moe = MoEArgs(
        num_experts=args.num_experts,
        num_shared_experts=0,
        top_k=args.top_k,
        score_func="sigmoid",
        route_norm=True,
        # A squared ReLU of scaled tokens would scale its result by the score's square.
        score_before_experts=False,
        load_balance_coeff=args.load_balance_coeff or None,
    )
    always_dense = layer < args.dense_layers
    return MixtureOfExperts(moe, args.dim, args.hidden_dim, args.sparsity, always_dense, args.shared_expert)


def _feed_forward(args: LlamaArgs, layer: int) -> nn.Module:
    if args.swiglu:
        # Takes two thirds of the width itself.
        return SwiGLU(args.dim, args.hidden_dim, args.multiple_of, ffn_dim_multiplier=None)
    return FeedForward(args.dim, args.hidden_dim, args.sparsity, always_dense=layer < args.dense_layers)
