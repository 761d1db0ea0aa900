"""Quantisation-aware training (QAT): the last phase trains weights that will be served in int4 or int8.

In the forward pass the weight of a linear layer is rounded to its quantised values and back ("fake quantisation"), in
the backward pass the rounding counts as the identity. The loss is then that of the quantised model, and training moves
the weights to values whose rounding costs little. What is saved and exported are the weights before rounding.

torchao replaces the layers (`FakeQuantizedLinear`) by the scheme of `scripts.evaluate --quantize`: linear layers of the
blocks, not the embedding and the head; int4 with a scale for GROUP weights of a row, int8 with a scale a row. Names of
parameters, and so checkpoints, are those of the plain model. Fake quantisation is off until `set_fake_quantization`
turns it on.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import nn

from configs.errors import ConfigError
from configs.schema import JobConfig
from models.llama import LlamaArgs
from recipes.schedule import Span

GROUP = 32  # weights of a row that share a scale in int4


def check_qat(config: JobConfig, args: LlamaArgs, spans: Sequence[Span]) -> None:
    """Refuse what precision.qat does not go with.

    Args:
        config: the job.
        args: of its model, whose widths are the numbers of a layer's inputs.
        spans: the run's phases in steps; a short run can lack the last of schedule.phases.

    Raises:
        ConfigError: a last phase that is sparse, experts, layers that a converter replaces as well, tensor parallelism,
            or a width that GROUP does not divide.
    """
    qat = f'precision.qat = "{config.precision.qat}"'
    if spans[-1].mode == "sparse":
        raise ConfigError(
            f"{qat} is for the last phase, and that is sparse in {config.recipe} with training.steps = "
            f"{config.training.steps}: end schedule.phases with a dense phase of a step or more, or set precision.qat "
            '= "none"'
        )
    if config.model.name == "llama_moe_relu2":
        raise ConfigError(
            f'{qat} is not supported for experts (model.name = "llama_moe_relu2"), which are no linear layers: use '
            '"none"'
        )
    if config.model.converters:
        raise ConfigError(f"{qat} and model.converters = {config.model.converters} replace the same layers: set one")
    if (degree := config.parallelism.tensor_parallel_degree) > 1:
        raise ConfigError(
            f"{qat} is not supported with parallelism.tensor_parallel_degree = {degree}, whose shards cut the rows "
            "that share a scale: set it to 1"
        )
    widths = {"model.dim": args.dim} | ({} if args.swiglu else {"model.hidden_dim": args.hidden_dim})
    for name, width in widths.items():  # a SwiGLU's own width is a multiple of 64
        if config.precision.qat == "int4" and width % GROUP:
            raise ConfigError(
                f'{qat} has a scale for {GROUP} weights, which do not divide {name} = {width}: change it, or use "int8"'
            )


def prepare_qat(model: nn.Module, kind: str) -> None:
    """Replace the linear layers of the blocks by torchao's, whose fake quantisation is off, in place.

    Args:
        model: a Llama, or a stage of one, before it is sharded and compiled.
        kind: "int4" or "int8".
    """
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    wanted: Any = (
        QATConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP)), step="prepare")  # type: ignore[attr-defined]
        if kind == "int4"
        else QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int8, "per_channel"), step="prepare")
    )
    quantize_(model, wanted, lambda module, name: isinstance(module, nn.Linear) and name.startswith("layers."))
    # The layers keep the scales of their last forward pass as attributes, which nothing reads. Recomputation under
    # activation checkpointing may leave that out; by default the compiler refuses a layer that does it.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    set_fake_quantization([model], False)


def set_fake_quantization(models: Iterable[nn.Module], enabled: bool) -> None:
    """Let the layers that `prepare_qat` replaced round their weights, or not."""
    from torchao.quantization.qat.linear import enable_linear_fake_quant

    for model in models:
        for module in model.modules():
            enable_linear_fake_quant(module, enabled)
