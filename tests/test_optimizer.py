"""AdamW with moments in bf16: its steps are those of PyTorch's AdamW to bf16's rounding, and runs resume exactly."""

import shutil

import pytest
import torch
from conftest import fork, losses, merge, rows

from configs.errors import ConfigError
from configs.loader import load_config
from recipes.check import check_keys
from recipes.optimizer import Bf16AdamW
from recipes.sparsity import Sparsity

BF16 = ("--optimizer.moments", "bfloat16")


def test_a_step_is_adamws_to_the_rounding_of_its_moments():
    torch.manual_seed(0)
    start = [torch.randn(64, 64), torch.randn(7)]
    mine, theirs = ([torch.nn.Parameter(each.clone()) for each in start] for _ in range(2))
    numbers = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer, reference = Bf16AdamW(mine, compiles=False, **numbers), torch.optim.AdamW(theirs, **numbers)
    for step in range(20):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for each in (optimizer, reference):
            each.param_groups[0]["lr"] = 1e-2 / (1 + step)
            each.step()
        assert optimizer.param_groups[0]["lr"] == 1e-2 / (1 + step)  # a number again
    assert [optimizer.state[each]["exp_avg"].dtype for each in mine] == [torch.bfloat16, torch.float32]
    moved = (theirs[0] - start[0]).norm()
    assert 0 < (mine[0] - theirs[0]).norm() < 0.01 * moved
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-5, atol=1e-6)


def test_runs_follow_those_with_float32_moments_and_resume_exactly(train, tmp_path, monkeypatch):
    """Through the switch, which reorders moments with their neurons, and a changed learning rate."""
    seen, moments = [], Sparsity._moments

    def watched(self, weight):
        found = moments(self, weight)
        seen.extend(each.dtype for each in found)
        return found

    monkeypatch.setattr(Sparsity, "_moments", watched)
    plain = train(tmp_path / "plain", recipe="columns_quarter")
    seen.clear()
    whole = train(tmp_path / "whole", *BF16, recipe="columns_quarter")
    assert set(seen) == {torch.bfloat16}
    assert losses(whole) == pytest.approx(losses(plain), rel=0.01) and losses(whole) != losses(plain)
    for stop in (3, 6, None):
        run = train(tmp_path / "run", *BF16, recipe="columns_quarter", stop_after=stop)
    assert losses(run) == losses(whole)
    assert [run[step]["lr"] for step in run] == [plain[step]["lr"] for step in run]
    with pytest.raises(ConfigError, match=r'optimizer.moments = "float32", but the run in .* has "bfloat16"'):
        train(tmp_path / "run", recipe="columns_quarter")


def test_shards_keep_bf16_moments_and_resume(tiny, train, tmp_path):
    """Also where one rank's shard is smaller: 144 and 143 of the rows that the switch to a sparse phase reorders."""
    uneven = ("--model.hidden_dim", "287", "--router.cluster_size", "41", "--activations.keep", "0.25", *BF16)
    one = train(tmp_path / "one", *uneven, recipe="columns_quarter")
    words = ["--training.local_batch_size", "2", "--training.global_batch_size", "4", *uneven]
    words = merge(tiny, [*words, "--job.dump_folder", str(tmp_path / "two")])
    for resumes in (False, True):
        if resumes:
            whole = losses(rows(tmp_path / "two"))
            for step in (8, 12):
                shutil.rmtree(tmp_path / "two" / "checkpoint" / f"step-{step}")
            (tmp_path / "two" / "checkpoint" / "latest").write_text("step-4")
        result = fork("--config", "configs/debug.toml", "--recipe", "recipes/columns_quarter.toml", *words, processes=2)
        assert result.returncode == 0, result.stdout + result.stderr
    assert losses(rows(tmp_path / "two")) == whole
    # Up to the switch: a block has tokens of one micro-batch, which is smaller on two ranks.
    assert [whole[step] for step in (1, 2, 3)] == pytest.approx([one[step]["loss"] for step in (1, 2, 3)], rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--optimizer.beta2", "0.999"), "beta2 = 0.999 would round away"),
        (("--optimizer.name", "Adam"), 'is for optimizer.name = "AdamW"'),
        (("--model.name", "llama_moe_relu2", "--model.flavor", "moe_debug"), "not supported for experts"),
        (("--training.enable_cpu_offload", "true"), "not supported with training.enable_cpu_offload"),
    ],
)
def test_what_it_is_not_for_is_refused(words, message):
    config, _ = load_config(["--config", "configs/debug.toml", "--recipe", "recipes/dense.toml", *BF16, *words])
    with pytest.raises(ConfigError, match=message):
        check_keys(config, 1)
