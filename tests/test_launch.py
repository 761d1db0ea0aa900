"""Launches of Triton kernels: a compiled one is called again where nothing that it depends on differs."""

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import launch
from kernels.columns import fp8
from kernels.float8 import scale_of


class Kernel:
    """A kernel as Triton's `jit` gives it; it notes what it is compiled for, and what is launched."""

    arg_names = ("x", "y", "n", "OTHER", "WIDTH")

    def __init__(self) -> None:
        self.compiled: list = []
        self.launched: list = []

    def __getitem__(self, grid):
        def compile_and_run(*arguments, **keywords):
            self.compiled.append(keywords)
            self.launched.append((grid, arguments, keywords["WIDTH"]))
            return Compiled(self)

        return compile_and_run


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        assert len(grid) == 3
        return lambda *arguments: self.kernel.launched.append((grid, arguments[:-2], arguments[-1]))


def test_a_kernel_is_looked_up_once_for_what_it_depends_on():
    kernel, x = Kernel(), torch.zeros(64)

    def run(x, n=3, width=32, warps=4, y=None) -> None:
        launch.launch(kernel, (7, 2), x, y, n, options={"num_warps": warps}, WIDTH=width, OTHER=True)

    run(x)
    run(torch.ones(64))  # as large, elsewhere
    first, again = kernel.launched
    assert kernel.compiled == [{"WIDTH": 32, "OTHER": True, "num_warps": 4}]
    assert first[0] == (7, 2) and again[0] == (7, 2, 1) and again[2] == 32
    assert torch.equal(again[1][0], torch.ones(64)) and again[1][1:] == (None, 3)
    others = (
        lambda: run(x[1:]),  # not aligned
        lambda: run(x.double()),
        lambda: run(x, n=4),
        lambda: run(x, width=64),
        lambda: run(x, warps=8),
        lambda: run(x, y=x),
        lambda: run(TensorDescriptor.from_tensor(x.view(8, 8), [4, 8])),
        lambda: run(TensorDescriptor.from_tensor(x.view(8, 8), [8, 8])),
    )
    for number, other in enumerate(others, start=2):
        other()
        other()
        assert len(kernel.compiled) == number


@pytest.mark.parametrize("a, b", [(0, 3), (1, 3), (3, 3), (4, 3)])
def test_a_quotient_is_rounded_up(a, b):
    assert launch.cdiv(a, b) == (a + b - 1) // b


@pytest.mark.gpu
def test_launches_read_the_tensors_that_they_are_given():
    """Casts and products of equal sizes, one after another, on the kernels that the first of them has compiled."""
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(2048, 256, device="cuda", generator=generator).bfloat16()
        order = torch.randperm(2048, device="cuda", generator=generator).int()
        scale = scale_of(x[order].view(2, 1024, 256).abs().amax((1, 2)).float())
        cast, transposed = fp8.cast(x, order, 1 / scale, 1024)
        torch.testing.assert_close(
            cast.float(), fp8._reference_cast(x.cpu(), order.cpu(), (1 / scale).cpu(), 1024)[0].float().cuda()
        )
        assert torch.equal(cast.mT.float(), transposed.float())
        kept = torch.arange(512, dtype=torch.int32, device="cuda").view(2, 256)
        weight = cast.view(-1, 256)
        found, _ = fp8.sample(cast, weight, kept, scale, scale, False, torch.bfloat16)
        rows = fp8._reference_copy(weight.cpu(), kept.cpu(), False)
        expected = fp8._reference_products(cast.cpu(), rows, scale.cpu(), scale.cpu(), torch.bfloat16)
        torch.testing.assert_close(found.float().cpu(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    assert launch._compiled
