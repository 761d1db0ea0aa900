"""From SwiGLU to squared ReLU: weights of an ungated FFN that follows the gated one, to be trained further.

A SwiGLU neuron gives silu(g) u with g = w1 x and u = w3 x. Two squared-ReLU neurons follow it where |g| is large:

    silu(g) u  ~  s (relu(g + c u)^2 - relu(g - c u)^2) / (4 c)

The right side is s g u, exactly, where g > c |u|, and 0 where g < -c |u|; between them it bends as silu does. So

    W1' = [W1 + c W3; W1 - c W3]        W2' = [W2 s/(4c), -W2 s/(4c)]

has 2 f' neurons for f' of the SwiGLU, 4 d f' parameters for 3 d f'. A small c comes closest and a large one keeps the
two neurons of a pair from cancelling each other's large values, which a pattern that drops one of them would lay bare;
c = 0.25 std(g) / std(u) costs little accuracy. s is the least-squares scale. Both are chosen neuron by neuron, with g
and u taken as independent Gaussians of the standard deviations that the weights give to a normalised input, so no data
is needed. Where gates are small and negative, as in a published model, little is left of the model until it has been
trained further (docs/use.md has losses). To swap the activation and continue is the ReLU-fication of
Mirzadeh et al. 2023 (arXiv 2310.04564); theirs keeps the gate.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.llama import LlamaArgs

RELATIVE_C = 0.25  # c std(u) / std(g)


def relufy(state: dict[str, Tensor], args: LlamaArgs) -> tuple[dict[str, Tensor], LlamaArgs]:
    """The model with squared-ReLU FFNs in place of its SwiGLU.

    Args:
        state: parameters of a SwiGLU model by the trainer's names, float32.
        args: of that model.

    Returns:
        Parameters of a squared-ReLU model of twice as many neurons, and its arguments. What is not FFN is shared.
    """
    result = {name: value for name, value in state.items() if ".feed_forward." not in name}
    neurons = 0
    for layer in range(args.n_layers):
        prefix = f"layers.{layer}.feed_forward"
        w1, w2, w3 = (state[f"{prefix}.w{index}.weight"] for index in (1, 2, 3))
        # The entries of a normalised x have a mean square of 1; the norm's weight scales them.
        scale = state[f"layers.{layer}.ffn_norm.weight"]
        gate, up = ((weight * scale).norm(dim=1).clamp_min(1e-6) for weight in (w1, w3))
        c = RELATIVE_C * gate / up
        out = w2 * (_least_squares_scale(gate) / (4 * c))
        result[f"{prefix}.w1.weight"] = torch.cat((w1 + c[:, None] * w3, w1 - c[:, None] * w3))
        result[f"{prefix}.w2.weight"] = torch.cat((out, -out), dim=1)
        neurons = 2 * w1.shape[0]
    return result, replace(args, swiglu=False, hidden_dim=neurons)


def _least_squares_scale(gate: Tensor) -> Tensor:
    """The s of the least mean square error, for `gate [f']`, the standard deviations of g."""
    points = torch.linspace(-5, 5, 201, dtype=torch.float64)
    z, v = torch.meshgrid(points, points, indexing="ij")  # g / std(g), u / std(u)
    density = torch.exp(-(z**2 + v**2) / 2)
    pair = ((z + RELATIVE_C * v).relu() ** 2 - (z - RELATIVE_C * v).relu() ** 2) / (4 * RELATIVE_C)
    # Per unit of std(g) std(u); interpolated, since there may be tens of thousands of neurons.
    known = torch.logspace(-3, 3, 121, dtype=torch.float64)
    target = torch.stack([(density * pair * F.silu(std * z) / std * v).sum() for std in known])
    fitted = target / (density * pair**2).sum()
    position = ((gate.double().log10().clamp(-3, 3) + 3) * 20).clamp_max(119.999)
    lower = position.long()
    return torch.lerp(fitted[lower], fitted[lower + 1], position - lower).to(gate.dtype)
