"""torchtitan's attention with its rotary embedding in real numbers.

RoPE turns each pair of neighbouring entries of a head, (2i, 2i + 1), by an angle that grows with the position:

    (a, b) -> (a cos - b sin, a sin + b cos)

torchtitan writes this as a product of complex numbers, which the compiler cannot fuse: three passes over queries and
keys, and three back. Written out it is one.
"""

import torch
from torch import Tensor

from configs.titan import Attention as TitanAttention


def rotate(x: Tensor, freqs_cis: Tensor, positions: Tensor | None = None) -> Tensor:
    """Rotary embedding of queries or keys.

    Args:
        x: `[B, S, heads, D]`, any floating dtype; computed in float32.
        freqs_cis: `[at least S, D/2]` complex64, the angles as points of the unit circle. Complex because FSDP casts
            floating-point arguments to the parameters' dtype, and bf16 angles would not tell positions apart.
        positions: `[B, S]` int, which angles the tokens have; None: the first S.

    Returns:
        shape and dtype of x.
    """
    points = torch.view_as_real(freqs_cis)  # gathered as real numbers: the compiler fuses no complex ones
    points = points[: x.shape[1]] if positions is None else points[positions]
    cos, sin = points.unsqueeze(-3).unbind(-1)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)


class Attention(TitanAttention):
    """Grouped-query attention, causal, `x [B, S, d]` to the same; parameters and initialisation are torchtitan's.

    Under context parallelism x is this rank's share of the sequences, and `positions [B, S]` int says where in them its
    tokens are. torchtitan then replaces `inner_attention` by ring attention, which sees the whole sequences.
    """

    def forward(self, x: Tensor, freqs_cis: Tensor, attention_masks=None, positions: Tensor | None = None) -> Tensor:
        if attention_masks is not None:
            raise ValueError("attention is causal over whole sequences: it takes no masks")
        # As many heads as there are here: tensor parallelism shares them out.
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.wq, self.wk, self.wv))
        q, k = rotate(q, freqs_cis, positions), rotate(k, freqs_cis, positions)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return self.wo(self.inner_attention(q, k, v, enable_gqa=self.enable_gqa).transpose(1, 2).flatten(2))
