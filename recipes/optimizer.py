"""AdamW whose moments are bf16. Imported where a job has it alone: torchao takes seconds and writes to the terminal.

AdamW keeps two moments of each parameter, eight of the sixteen bytes that a parameter takes in training; in bf16 they
take four. The eight bits of a bf16 mantissa are enough for averages over few steps: with beta2 = 0.95 a step changes
the second moment by up to 5%, and rounding by at most 0.4%. DeepSeek-V3 was trained so (arXiv 2412.19437, section 3.3).
The update is computed in float32, by torchao's compiled step, from float32 parameters and gradients.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchao.optim import AdamW8bit

import configs.titan as titan

SMALL = 4096  # numbers


class Bf16AdamW(AdamW8bit):
    """torchao's AdamW with moments in bf16. A parameter of fewer than SMALL numbers has moments of its own dtype.

    Args:
        compiles: whether the step is compiled; otherwise it runs operator by operator.
    """

    def __init__(self, *arguments: Any, compiles: bool, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._compiles = compiles

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        # torchao decides by the size of the rank's shard. Shards differ in size, and a moment needs one dtype on all
        # ranks: the switch to a sparse phase gathers it.
        return torch.zeros_like(p, dtype=p.dtype if p.numel() < SMALL else torch.bfloat16)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        # A learning rate is a number, as schedulers and checkpoints have it, and a tensor in a step alone: compiled
        # code is for one number.
        Optimizer.add_param_group(self, param_group)

    def step(self, closure=None):
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = torch.tensor(rate, dtype=torch.float32)
        try:
            with contextlib.nullcontext() if self._compiles else torch.compiler.set_stance("force_eager"):
                return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # PyTorch has cast the moments to their parameter's dtype.
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][name] = self.state[parameter][name].to(value.dtype)


def build_optimizers(
    model_parts: list[nn.Module],
    optimizer_config: Any,
    parallel_dims: titan.ParallelDims,
    ft_manager: Any = None,
    *,
    compiles: bool,
) -> titan.OptimizersContainer:
    """torchtitan's hook for the optimizers of this rank's parts of the model, from the section [optimizer]."""
    keywords = {
        "lr": optimizer_config.lr,
        "betas": (optimizer_config.beta1, optimizer_config.beta2),
        "eps": optimizer_config.eps,
        "weight_decay": optimizer_config.weight_decay,
        "compiles": compiles,
    }
    return titan.OptimizersContainer(model_parts, Bf16AdamW, keywords)
