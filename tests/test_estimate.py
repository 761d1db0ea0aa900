"""The estimate against what was measured on an H100, and against what PyTorch keeps on the CPU."""

import json
import math
import re
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, family_named
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from configs.errors import ConfigError
from configs.loader import load_config
from configs.titan import ParallelDims, build_cross_entropy_loss, titan_config
from kernels.columns.ffn import LARGE_BLOCKS
from models.llama import Llama
from recipes.check import check_keys
from recipes.pipeline import stages
from recipes.qat import prepare_qat, set_fake_quantization
from recipes.sparsity import flops_per_token
from recipes.trainer import _parallelize
from scripts.estimate import GIB, estimate, expected_vocabulary, layout, memory, parts_of, rounded_weights

SLICE = ("--config", "configs/7b_slice.toml")
ALONE = ("--training.global_batch_size", "-1", "--activation_checkpoint.mode", "none")
QUARTER = ("--recipe", "recipes/groups_quarter.toml")


def parts(*words, gpus=1, mode="none", backend=None):
    config, _ = load_config([*words])
    args, _ = check_keys(config, gpus)
    args.vocab_size = expected_vocabulary(config)
    with torch.device("meta"):
        model = Llama(args)
    family = None if backend is None else family_named(backend, args.sparsity)
    return {name: size / GIB for name, size in memory(config, model, layout(config, gpus), mode, family).items()}


def numbers(report, name):
    """The cells of the report's first row of this name."""
    (line, *_) = [line for line in report.splitlines() if line.startswith(name)]
    return [float(cell.replace(",", "")) for cell in re.findall(r"(?<= )[\d.,]+(?= |$)", line[len(name) :])]


def measured(config):
    return json.loads((ROOT / "docs" / "training" / config / "training.json").read_bytes())["contenders"]


def test_the_configuration_of_experts_says_what_memory_is_estimated():
    (said,) = re.findall(r'"none"  # (\d+) GiB of each of eight GPUs', (ROOT / "configs" / "moe_1b.toml").read_text())
    assert round(parts("--config", "moe_1b", gpus=8)["peak"]) == int(said)


def test_memory_is_that_of_an_h100():
    for name, backend in (("dense", None), ("groups_quarter", "groups"), ("groups_eighth", "groups")):
        words = ("--config", "configs/1b.toml", "--recipe", f"recipes/{name}.toml", *ALONE)
        (*_, tensors) = measured("1b")[name]["active_gib"].values()  # of the sparse phase, where there is one
        assert parts(*words, backend=backend)["peak"] == pytest.approx(tensors, rel=0.01)
    for name, backend in (("columns_quarter", "columns"), ("columns_eighth", "columns"), ("venom_4of16", "venom")):
        words = ("--config", "configs/1b.toml", "--recipe", f"recipes/{name}.toml", *ALONE)
        tensors = measured("1b_peers")[name]["active_gib"]["sparse"]
        assert parts(*words, backend=backend)["peak"] == pytest.approx(tensors, rel=0.01)
    words = (*SLICE, "--recipe", "recipes/columns_eighth.toml", *ALONE, "--schedule.dense_layers", "0")
    tensors = measured("7b_slice_peers")["columns_eighth"]["active_gib"]["sparse"]
    assert parts(*words, backend="columns")["peak"] == pytest.approx(tensors, rel=0.01)
    tensor = ("--parallelism.tensor_parallel_degree", "2", "--training.dtype", "bfloat16")
    words = ("--config", "configs/1b.toml", *ALONE, *tensor, "--training.local_batch_size", "8")
    run = json.loads((ROOT / "docs" / "training" / "layouts" / "tensor_columns_eighth.json").read_bytes())
    for mode, backend in (("dense", None), ("sparse", "columns")):
        tensors = run["contenders"]["columns_eighth"]["active_gib"][mode]
        assert parts(*words, gpus=2, backend=backend)["peak"] == pytest.approx(tensors, rel=0.01)
    stages = ("--parallelism.pipeline_parallel_degree", "2", "--parallelism.pipeline_parallel_microbatch_size", "2")
    words = ("--config", "configs/1b.toml", *ALONE, *stages, "--training.dtype", "bfloat16")
    run = json.loads((ROOT / "docs" / "training" / "layouts" / "pipeline_columns_eighth.json").read_bytes())
    tensors = run["contenders"]["columns_eighth"]["active_gib"]["dense"]
    assert parts(*words, "--training.local_batch_size", "8", gpus=2)["peak"] == pytest.approx(tensors, rel=0.01)
    held = measured("7b_slice")["dense"]["peak_gib"]["dense"]
    assert parts(*SLICE, *ALONE)["peak"] / held - 1 == pytest.approx(-0.04, abs=0.005)  # as the docstring says


def test_sparse_phases_may_have_larger_micro_batches():
    words = [*SLICE, "--recipe", "recipes/columns_quarter.toml", "--training.global_batch_size", "16"]
    same, larger = estimate(words), estimate([*words, "--training.sparse_local_batch_size", "8"])
    assert "micro-batches of 16,384, 4 a step; in sparse phases of 32,768, 2 a step" in larger
    dense_run = ["--recipe", "recipes/dense.toml", "--training.sparse_local_batch_size", "8"]
    assert "in sparse phases" not in estimate([*words[:-4], *dense_run, *words[-2:]])
    dense, sparse = numbers(larger, "peak")
    assert dense == numbers(same, "peak")[0] and sparse > 1.2 * numbers(same, "peak")[1]
    assert numbers(larger, "run")[:2] == numbers(same, "run")[:2]  # steps, FLOPs


def test_logits_of_a_chunk_a_bf16_residual_stream_and_bf16_moments_take_less():
    words = ("--config", "configs/1b.toml", "--recipe", "recipes/dense.toml", *ALONE)
    plain, chunks = parts(*words), parts(*words, "--training.loss_chunk_tokens", "4096")
    vocabulary, tokens, d = 32768, 16384, 2048
    saved = 4 * vocabulary * (tokens - 4096) - 4 * vocabulary * d  # two numbers of two bytes; a gradient in float32
    assert (plain["logits and loss"] - chunks["logits and loss"]) * GIB == pytest.approx(saved)
    assert (plain["peak"] - chunks["peak"]) * GIB == pytest.approx(saved)
    narrow = parts(*words, "--training.bf16_residual", "true")
    name = "activations: attention, norms"
    assert (plain[name] - narrow[name]) * GIB == pytest.approx(16 * tokens * d * 2)
    moments = parts(*words, "--optimizer.moments", "bfloat16")
    assert plain["peak"] - moments["peak"] == pytest.approx(plain["optimizer's two moments"] / 2)
    sharded = parts(*words, gpus=2), parts(*words, "--training.bf16_residual", "true", gpus=2)
    assert sharded[0] == sharded[1]


def test_time_is_that_of_an_h100():
    step = measured("7b_slice")["dense"]["ms"]["dense"]
    for mfu, error in (("0.5", 0.17), ("0.59", 0.0)):
        report = estimate([*SLICE, "--recipe", "recipes/dense.toml", "--mfu", mfu])
        assert numbers(report, "run")[3] / step - 1 == pytest.approx(error, abs=0.01)


def test_the_bound_of_fp8_is_at_twice_the_peak():
    words = ("--config", "7b", "--gpus", "8", "--recipe", "columns_half")
    bf16, fp8 = estimate([*words]), estimate([*words, "--precision.ffn", "fp8"])
    (reached, speedup, bound) = re.search(r"reaches (\d+)% of it: ([\d.]+)x of ([\d.]+)x", fp8).groups()
    assert int(reached) < 100 and float(speedup) < float(bound)
    assert f"x of {float(bound) / 2:.2f}x" in bf16
    times = [numbers(report, "sparse to step")[-2] for report in (bf16, fp8)]
    with_ffn = float(re.search(r"a sparse step takes ([\d,.]+) ms", fp8)[1].replace(",", ""))
    assert times[1] < with_ffn < times[0]
    assert numbers(bf16, "sparse to step")[:-2] == numbers(fp8, "sparse to step")[:-2]  # the same steps and FLOPs
    assert numbers(bf16, "dense to step") == numbers(fp8, "dense to step")


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_activations_are_those_that_a_compiled_block_keeps(mode, backend):
    """A compiled block's saved tensors, under autocast, counted; matrices in bf16 included."""
    words = ["--config", "configs/debug.toml", *QUARTER, "--model.n_layers", "1", "--tokenizer.vocab_size", "640"]
    words += ["--training.seq_len", "128", "--training.local_batch_size", "12", "--training.global_batch_size", "-1"]
    words += ["--activation_checkpoint.mode", mode, "--training.mixed_precision_param", "bfloat16"]
    config, _ = load_config(words)
    args, _ = check_keys(config, 1)
    args.vocab_size = 640
    model = Llama(args)
    with torch.no_grad():
        model.init_weights()
    if mode == "full":
        from torchtitan.distributed.activation_checkpoint import apply_ac

        apply_ac(model, titan_config.ActivationCheckpoint(mode=mode), model_compile_enabled=True)
    for ffn in model.feed_forwards().values():
        ffn.sparse = backend is not None
    torch._dynamo.reset()
    block = torch.compile(model.layers["0"], backend="aot_eager_decomp_partition", fullgraph=True)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(12, 128, args.dim, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, model.freqs_cis, None)
    family = None if backend is None else family_named(backend, args.sparsity)
    estimated = memory(config, model, layout(config, 1), mode, family)
    head = 2 * args.vocab_size * args.dim
    kept = sum(size for name, size in estimated.items() if name.startswith(("activations", "matrices"))) - head
    # Beside them: angles of RoPE and the generator's state, the same for any batch; a sparse FFN recasts one matrix.
    assert sum(saved.values()) == pytest.approx(kept, rel=0.1)


def test_rounded_weights_of_qat_are_those_that_a_step_keeps():
    words = ["--config", "debug", "--recipe", "dense", "--precision.qat", "int8", "--model.n_layers", "2"]
    config, _ = load_config(words)
    args, _ = check_keys(config, 1)
    args.vocab_size, kept = 50, []
    model = Llama(args)
    with torch.no_grad():
        model.init_weights()
    expected = rounded_weights(config, model, layout(config, 1))
    prepare_qat(model, "int8")
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for rounds in (False, True):
        set_fake_quantization([model], rounds)
        saved = {}

        def pack(tensor, saved=saved):
            storage = tensor.untyped_storage()
            saved |= {storage.data_ptr(): storage} if storage.data_ptr() not in own else {}
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(torch.arange(8)[None]).sum()
        kept.append(sum(storage.nbytes() for storage in saved.values()))
        del loss
    assert kept[1] - kept[0] == pytest.approx(expected, rel=0.03)  # beside them: scales
    report = estimate(words)
    assert f"keep up to {expected / GIB:.2f} GiB more" in report and max(map(len, report.splitlines())) <= 120


@pytest.fixture
def first_of_two():
    """This process is rank 0 of two whose collectives communicate nothing."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_rank_of_tensor_parallelism_keeps_what_it_gathered_and_float32_of_the_logits(first_of_two, backend):
    """The saved tensors of a compiled block, of the head and of the compiled loss, counted."""
    words = ["--config", "configs/debug.toml", *QUARTER, "--model.n_layers", "1", "--tokenizer.vocab_size", "640"]
    words += ["--training.seq_len", "128", "--training.local_batch_size", "12", "--training.global_batch_size", "-1"]
    words += ["--training.dtype", "bfloat16", "--parallelism.tensor_parallel_degree", "2"]
    words += ["--compile.enable", "true", "--compile.backend", "aot_eager_decomp_partition"]
    config, _ = load_config(words)
    args, _ = check_keys(config, 2)
    args.vocab_size = 640
    torch._dynamo.reset()
    with torch.device("meta"):
        model = Llama(args).bfloat16()
    degrees = dict.fromkeys(("dp_replicate", "dp_shard", "cp", "pp", "ep", "etp"), 1)
    model = _parallelize(model, ParallelDims(**degrees, tp=2, world_size=2), config)
    with torch.no_grad():
        model.to_empty(device="cpu").init_weights()
    for ffn in model.feed_forwards().values():
        ffn.sparse = backend is not None
    own = {parameter.to_local().untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {"blocks": {}, "head": {}, "loss": {}}

    def counting(where):
        def pack(tensor):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            storage = local.untyped_storage()
            if storage.data_ptr() not in own:
                saved[where][storage.data_ptr()] = storage
            return tensor

        return saved_tensors_hooks(pack, lambda tensor: tensor)

    x = torch.randn(12, 64, args.dim, dtype=torch.bfloat16, requires_grad=True)  # half of each sequence
    with loss_parallel():
        with counting("blocks"):
            x = model.layers["0"](x, model.freqs_cis, None)
        x = model.norm(x)
        with counting("head"):
            logits = model.output(x)
        with counting("loss"):
            build_cross_entropy_loss(config)(logits, torch.zeros(12, 128, dtype=torch.int64))
    kept = {where: sum(storage.nbytes() for storage in storages.values()) for where, storages in saved.items()}
    tokens, d, logits_here = 12 * 128, args.dim, 12 * 128 * 640 // 2
    family = None if backend is None else family_named(backend, args.sparsity)
    estimated = memory(config, model, layout(config, 2), "none", family)
    activations = sum(size for name, size in estimated.items() if name.startswith("activations"))
    assert kept["blocks"] == pytest.approx(activations, rel=0.02)  # beside them: angles of RoPE, norms, an order
    assert kept["head"] == 2 * tokens * d  # of all ranks
    # Beside them the norm's input, of this rank, the logits, and a second float32 number for each at the loss's peak:
    # together 10 bytes a logit, with which the estimate is within 0.6% of what two GPUs measured (docs/training).
    assert estimated["logits and loss"] == pytest.approx(
        kept["loss"] + kept["head"] + 2 * tokens * d // 2 + (2 + 4) * logits_here, rel=0.01
    )
    assert estimated["optimizer's two moments"] == 2 * estimated["parameters"]  # of bf16 parameters, in bf16
    whole = parts(*words, "--parallelism.disable_loss_parallel", "true", gpus=2)["logits and loss"] * GIB
    assert whole == 2 * 2 * 2 * logits_here + 2 * tokens * d * 3 // 2  # bf16 numbers and gradients, of all ranks


def test_a_sparse_step_keeps_h_as_its_backend_does():
    dense = parts(*SLICE, *ALONE)["activations: h, y1 of the FFN"]

    def h(recipe, backend, *more):
        words = (*SLICE, *ALONE, "--recipe", f"recipes/{recipe}.toml", *more)
        return parts(*words, backend=backend)["activations: h, y1 of the FFN"] / dense

    assert h("groups_quarter", "groups") == 1 / 8  # no y1, and a quarter of h
    assert h("groups_eighth", "groups") == 1 / 16
    assert h("venom_2of16", "venom") == h("venom_4of16", "venom") == 1 / 8  # four columns of sixteen
    assert h("activations_2of4", "two_four") == 9 / 32
    assert h("weights_2of4", "two_four") == h("groups_quarter", "reference") == 1 / 2
    assert h("groups_quarter", "groups", "--schedule.dense_layers", "3") == (1 + 1 / 8) / 2  # of six layers


def test_phases_that_keep_shares_of_their_own():
    """Each has its own time, and memory is that of the phase that keeps most."""
    words = [
        "--config",
        "configs/1b.toml",
        "--recipe",
        "columns_quarter",
        "--training.steps",
        "100",
        "--schedule.phases",
    ]
    ends = {"0.125": 40, "0.5": 80}
    sparse = ", ".join(f'{{mode = "sparse", keep = {keep}, end = {end}}}' for keep, end in ends.items())
    report = estimate([*words, f"[{sparse}, {{}}]"])
    alone = {keep: estimate([*words, '[{mode = "sparse"}]', "--activations.keep", keep]) for keep in ends}
    for keep, end in ends.items():
        assert numbers(report, f"sparse ({keep}) to step {end}")[3] == numbers(alone[keep], "sparse to step 100")[3]
    assert numbers(report, "peak")[1] == numbers(alone["0.5"], "peak")[1] > numbers(alone["0.125"], "peak")[1]


def test_flops_are_means_over_the_sparse_steps():
    phases = '[{mode = "sparse", keep = 0.5, end = 1}, {mode = "sparse", end = 4}, {end = 1.0}]'
    words = ["--config", "configs/1b.toml", "--recipe", "columns_quarter", "--training.steps", "8"]
    config, _ = load_config([*words, "--schedule.phases", phases])
    args, spans = check_keys(config, 1)
    half, quarter, every = (
        flops_per_token(1e12, config, args, each, LARGE_BLOCKS) for each in (spans[:1], spans[1:2], spans)
    )
    for kind in ("sparse_pattern", "sparse_executed"):
        assert every[kind] == pytest.approx((half[kind] + 3 * quarter[kind]) / 4)
        assert quarter[kind] < half[kind] < every["dense"] == 1e12


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_layers_that_stay_dense_count_as_dense(mode):
    """Their share of what is kept; and the backward pass ends in one of them, at the dense step's peak."""
    words = (*SLICE, "--training.global_batch_size", "-1", "--activation_checkpoint.mode", mode)
    words = (*words, "--recipe", "recipes/columns_eighth.toml")
    dense, sparse, half = (
        parts(*words, "--schedule.dense_layers", str(layers), mode=mode, backend=backend)
        for layers, backend in ((0, None), (0, "columns"), (3, "columns"))
    )
    for name in ("activations: attention, norms", "activations: h, y1 of the FFN"):
        assert half[name] == pytest.approx((dense[name] + sparse[name]) / 2)
    assert sparse["peak"] < half["peak"] <= dense["peak"]
    if mode == "full":
        assert half["peak"] == dense["peak"]


def test_gpus_share_the_states_and_a_node_accumulates_less():
    words = ("--config", "configs/1b.toml", *QUARTER)
    one, eight = parts(*words), parts(*words, gpus=8)
    for name in ("parameters", "gradients", "optimizer's two moments"):
        assert eight[name] == one[name] / 8
    assert eight["peak"] < one["peak"]
    hybrid = ("--parallelism.data_parallel_replicate_degree", "2", "--parallelism.data_parallel_shard_degree", "4")
    assert parts(*words, *hybrid, gpus=8)["parameters"] == one["parameters"] / 4
    config, _ = load_config([*words])
    check_keys(config, 8)
    assert layout(config, 8).accumulates == 8 and layout(config, 64).accumulates == 1
    assert layout(config, 8).step_tokens == layout(config, 64).step_tokens == 256 * 4096


def test_gpus_that_share_a_sequence_have_its_tokens_and_shard_the_states():
    words = ("--config", "configs/1b.toml", *QUARTER, "--training.global_batch_size", "8")
    context = ("--parallelism.context_parallel_degree", "2")
    data, both = parts(*words, gpus=2), parts(*words, *context, gpus=2)
    for name in ("parameters", "optimizer's two moments"):
        assert both[name] == data[name]
    for name in ("activations: attention, norms", "activations: h, y1 of the FFN", "logits and loss"):
        assert both[name] == data[name] / 2
    config, _ = load_config([*words, *context])
    check_keys(config, 2)
    assert layout(config, 2).accumulates == 2 and layout(config, 2).step_tokens == 8 * 4096
    report = estimate([*words, *context])
    assert "2 GPUs: 1 x 2 x 1 x 1 (replicate x shard x tensor x pipeline), 2 to a sequence" in report


def test_checkpointing_trades_in_its_order():
    for backend in (None, "groups"):
        for option in ("2", "op"):
            words = (*SLICE, *QUARTER, "--activation_checkpoint.selective_ac_option", option)
            none, selective, full = (
                parts(*words, mode=mode, backend=backend) for mode in ("none", "selective", "full")
            )
            assert full["peak"] < selective["peak"] < none["peak"]


def test_report():
    report = estimate(["--config", "configs/1b.toml", "--gpus", "8", *QUARTER])
    assert max(map(len, report.splitlines())) <= 120
    assert "1,107.4 M parameters, 973.1 M without embedding and output; vocabulary 32768" in report
    assert "60,000 steps of 1,048,576 tokens: 62,914,560,000; micro-batches of 16,384, 8 a step" in report
    names = "dense to step 6000 ", "sparse to step 45000", "dense to step 60000", "run"
    dense, sparse, tail, run = (numbers(report, name) for name in names)
    # groups_quarter executes (1 + 5/4) / 6 of the FFN's products, a 1b's six of each of its matrices' numbers.
    ffn = 6 * 16 * 2 * 2048 * 12288 * 2**20 / 1e15
    per_step = 1e3 * dense[1] / dense[0]
    assert 1e3 * sparse[2] / sparse[0] == pytest.approx(per_step - ffn * (1 - 0.375), rel=0.01)
    assert run[0] == 60000 and run[4] == pytest.approx(dense[4] + sparse[4] + tail[4], abs=0.02)
    assert "(groups_quarter in docs/kernels/kernels.json)" in report
    assert "has not this recipe" in estimate(["--config", "configs/160m.toml", *QUARTER])
    assert "reference" in estimate([*SLICE, *QUARTER, "--training.mixed_precision_param", "float32"])
    assert math.isfinite(
        numbers(estimate([*SLICE, "--model.name", "llama_swiglu", "--recipe", "recipes/dense.toml"]), "run")[3]
    )


def test_nothing_is_asked_of_this_machine(tmp_path):
    folder = tmp_path / "run"
    estimate([*SLICE, "--job.dump_folder", str(folder), "--model.converters", "quantize.linear.float8"])
    assert not folder.exists()
    assert (ROOT / "docs" / "kernels" / "kernels.json").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--gpus", "0"], "--gpus 0: give 1 or more"),
        (["--mfu", "55"], "--mfu 55: give a share of the peak"),
        (["--mfu", "nan"], "--mfu nan: give a share of the peak"),
        (["--peak-tflops", "-1"], "--peak-tflops -1: give the GPU's"),
        (["--training.stepz", "5"], "unknown key training.stepz"),
        (["--gpus", "3", "--training.global_batch_size", "256"], "training.global_batch_size = 256 is not a multiple"),
        (["--gpus", "4", "--parallelism.data_parallel_shard_degree", "8"], "is not the 4 processes of this run"),
        (["--tokenizer.path", "nowhere"], 'tokenizer.path = "nowhere": no such folder'),
    ],
)
def test_refusals(words, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        estimate([*SLICE, *words])


@pytest.mark.parametrize(("degree", "per_stage", "count"), [(2, None, 4), (2, None, 2), (4, None, 8), (2, 3, 6)])
def test_an_interleaved_pipeline_keeps_what_its_schedule_does(degree, per_stage, count):
    """Forward passes without their backward passes yet, in the order of operations of PyTorch's schedule."""
    words = [*SLICE, "--model.n_layers", "16", "--training.local_batch_size", str(count), *pipeline(degree)]
    words += ["--parallelism.pipeline_parallel_schedule", "Interleaved1F1B"]
    words += ["--parallelism.pipeline_parallel_layers_per_stage", str(per_stage)] if per_stage else []
    config, _ = load_config(words)
    check_keys(config, degree)
    number = len(stages(config, 16))
    mine = [
        SimpleNamespace(stage_index=index, num_stages=number, group_size=degree, group_rank=0)
        for index in range(0, number, degree)
    ]
    for stage in mine:
        stage.is_first, stage.is_last, stage.device, stage.group = stage.stage_index == 0, False, "cpu", None
        stage.submod, stage.has_backward = torch.nn.Linear(1, 1), True
    schedule = ScheduleInterleaved1F1B(mine, n_microbatches=count, loss_fn=lambda output, target: output)
    for rank, part in enumerate(parts_of(config, 16)):
        names = [action.computation_type.name for action in schedule.pipeline_order[rank] if action is not None]
        changes = [{"FORWARD": 1, "FULL_BACKWARD": -1}.get(name, 0) for name in names]
        assert part.in_flight == max(accumulate(changes)) / len(mine)


def pipeline(degree):
    return ["--parallelism.pipeline_parallel_degree", str(degree)]


def test_the_gpu_of_a_pipeline_that_holds_most():
    words = (*SLICE, "--training.dtype", "bfloat16", "--training.local_batch_size", "8", *pipeline(2))
    schedule = "--parallelism.pipeline_parallel_schedule"
    report = estimate([*words, schedule, "GPipe"])
    assert "2 GPUs: 1 x 1 x 1 x 2" in report and "micro-batches of 4,096" in report
    assert "work 89% of a step" in report and "layers of a GPU: 3, 3" in report
    # 1F1B: the first of two stages keeps two micro-batches, GPipe's keep all eight. The last has the logits.
    two, eight = parts(*words, gpus=2), parts(*words, schedule, "GPipe", gpus=2)
    name = "activations: h, y1 of the FFN"
    alone = parts(*SLICE, "--training.dtype", "bfloat16", "--training.local_batch_size", "1")
    assert two[name] == alone[name] / 2 * 2 and eight[name] == alone[name] / 2 * 8
    assert two["logits and loss"] == 0 and eight["logits and loss"] == 8 * alone["logits and loss"]
    head = 32768 * 4096 * 2 / GIB
    assert two["parameters"] == pytest.approx((alone["parameters"] - 2 * head) / 2 + head, rel=1e-4)
    # With FSDP parameters, gathered in bf16, and float32 gradients are whole from the first micro-batch on.
    four = parts(*words, gpus=4)
    assert four["parameters"] == two["parameters"] / 2
    assert four["gathered layers, head"] == pytest.approx(two["parameters"] * 3)
