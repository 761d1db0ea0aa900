"""Bad input: one message that names the key or file, the value and the remedy; status 2; no traceback."""

import json
import re
import shlex
import tomllib

import pytest
import torch
from conftest import ROOT, fork, launch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import recipes.check
from configs.errors import ConfigError
from configs.loader import as_word, load_config
from configs.schema import RECIPE_SECTIONS
from recipes.check import RING_ATTENTION, check_config
from recipes.summary import summary

DEBUG = "--config configs/debug.toml"
PIPELINE = f"{DEBUG} --parallelism.pipeline_parallel_degree 2"


def check(words: str):
    config, _ = load_config(shlex.split(words))
    return config, *check_config(config)


def test_the_dtype_of_products_is_the_device_s(monkeypatch):
    cuda = {"is_bf16_supported": True}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: cuda["is_bf16_supported"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device, bf16, dtype in (("cpu", True, "float32"), ("cuda", True, "bfloat16"), ("cuda", False, "float32")):
        monkeypatch.setattr(recipes.check, "device_type", device)
        cuda["is_bf16_supported"] = bf16
        assert check("--config 160m")[0].training.mixed_precision_param == dtype
        for given in ("float32", "bfloat16"):
            words = f"--config 160m --training.mixed_precision_param {given}"
            assert check(words)[0].training.mixed_precision_param == given


# A command line, and what the message has to name: the key or file, the value, the remedy.
BAD = [
    ("", ["--config", "configs/debug.toml"]),
    ("--config", ["config", "no such file"]),
    ("--config configs/nope.toml", ["configs/nope.toml", "configs/debug.toml"]),
    ("--config configs", ["configs", "is a folder", "configs/debug.toml"]),
    (f"{DEBUG} --recipe recipes/venom.toml", ["recipes/venom.toml", "recipes/venom_2of16.toml"]),
    (f"{DEBUG} --recipe", ["recipe", "recipes/dense.toml"]),
    (f"{DEBUG} stray", ["stray", "--section.key value"]),
    (f"{DEBUG} --check stray", ["--check stray", "give no value, or json"]),
    ("--config debu", ['--config = "debu" is unknown', "did you mean debug?", "1b"]),
    ("--config debug --recipe column_quarter", ['recipe = "column_quarter"', "did you mean columns_quarter?"]),
    ("--config zzz", ['--config = "zzz" is unknown: there are 160m, 1b']),
    (f"--config {300 * 'x'}", ["is unknown: there are 160m, 1b"]),
    (f"--config configs/{300 * 'x'}.toml", ["no such file; there are configs/160m.toml"]),
    ("--config /proc/self/mem", ["/proc/self/mem cannot be read (Input/output error)"]),
    (f"{DEBUG} --training.steps 5 --training.steps 6", ["training.steps", "twice"]),
    (f"{DEBUG} --training.step 5", ["training.step", "did you mean training.steps?"]),
    (f"{DEBUG} --trainin.steps 5", ["trainin.steps", "did you mean training.steps?"]),
    (f"{DEBUG} --activation.pattern venom", ["activation.pattern", "did you mean activations.pattern?"]),
    (f"{DEBUG} --wholly.unknown 1", ["wholly.unknown", "the keys are"]),
    (f"{DEBUG} --training.dataset c4", ["training.dataset", "data.sources"]),
    (f"{DEBUG} --model.hf_assets_path x", ["model.hf_assets_path", "tokenizer.path"]),
    (f"{DEBUG} --training.steps abc", ["training.steps", "abc", "whole number"]),
    (f"{DEBUG} --training.steps 2.5", ["training.steps", "2.5", "whole number"]),
    (f"{DEBUG} --training.steps 1e3", ["training.steps = 1000.0", "whole number, without point and exponent: 1000"]),
    (f"{DEBUG} --training.steps 1e20", ["training.steps = 1e+20", "whole number", "at most 9223372036854775807"]),
    (f"{DEBUG} --training.steps {10**12 + 1}", ["training.steps", "out of bounds: from 1 to 1000000000000"]),
    (f"{DEBUG} --training.steps {10**20}", ["training.steps", "out of bounds: from 1 to 1000000000000"]),
    (f"{DEBUG} --training.seq_len {2**63}", ["training.seq_len", "out of bounds: from 1 to 2147483647"]),
    (f"{DEBUG} --training.local_batch_size {10**20}", ["training.local_batch_size", "out of bounds"]),
    (f"{DEBUG} --validation.freq {2**63}", ["validation.freq", "out of bounds", "to 9223372036854775807"]),
    (f"{DEBUG} --schedule.phases '[{{end = {10**20}}}]'", ["schedule.phases[0].end", "to 9223372036854775807"]),
    (f"{DEBUG} --training.steps true", ["training.steps", "true", "whole number"]),
    (f"{DEBUG} --training.steps", ["training.steps", "needs a value"]),
    (f"{DEBUG} --optimizer.lr fast", ["optimizer.lr", "fast", "number"]),
    (f"{DEBUG} --optimizer.lr nan", ["optimizer.lr", "nan", "number"]),
    (f"{DEBUG} --compile.enable maybe", ["compile.enable", "maybe", "true or false"]),
    (f"{DEBUG} --activations.pattern columns", ['pattern = "groups" with g = 1', "recipes/columns_quarter.toml"]),
    (f"{DEBUG} --activations.pattern venon", ["activations.pattern", "venon", '"venom"']),
    (f"{DEBUG} --data.sources 5", ["data.sources", "5", "list of table"]),
    (f"{DEBUG} --data.sources '[{{typ = \"text\"}}]'", ["data.sources[0].typ", "did you mean data.sources[0].type?"]),
    (f"{DEBUG} --data.sources '[{{weight = -1}}]'", ["data.sources[0].weight", "-1", "at least 0"]),
    (f"{DEBUG} --training.steps 0", ["training.steps", "0", "from 1"]),
    (f"{DEBUG} --training.local_batch_size 0", ["training.local_batch_size", "0", "from 1"]),
    (f"{DEBUG} --optimizer.lr -1", ["optimizer.lr", "-1", "at least 0"]),
    (f"{DEBUG} --data.validation_share 0.9", ["data.validation_share", "0.9", "from 0.0 to 0.5"]),
    (f"{DEBUG} --tokenizer.vocab_size 100", ["tokenizer.vocab_size", "100", "260"]),
    (f"{DEBUG} --lr_scheduler.decay_ratio 1.5", ["lr_scheduler.decay_ratio", "1.5", "from 0 to 1"]),
    (f"{DEBUG} --activations.keep 2 --activations.pattern groups", ["activations.keep", "2", "from 0.0 to 1.0"]),
    (f"{DEBUG} --activations.keep 0 --activations.pattern groups", ["activations.keep", "above 0"]),
    (f"{DEBUG} --activations.n 3", ["activations.n = 3", "2 or 4"]),
    (f"{DEBUG} --activations.m 10", ["activations.m = 10", "multiple of 4"]),
    (f"{DEBUG} --activations.m 40", ["activations.m = 40", "hidden_dim = 768"]),
    (f"{DEBUG} --activations.v 0", ["activations.v", "0", "at least 1"]),
    (f"{DEBUG} --activations.v 4096", ["activations.v = 4096", "2048 tokens", "lower v"]),
    (f"{DEBUG} --recipe recipes/groups_quarter.toml --activations.g 100", ["activations.g = 100", "hidden_dim = 768"]),
    (f"{DEBUG} --router.cluster_size 100", ["router.cluster_size = 100", "hidden_dim = 768"]),
    (f"{DEBUG} --router.token_clusters 4096", ["router.token_clusters = 4096", "2048 tokens", "lower it"]),
    (f"{DEBUG} --router.token_clusters 4097", ["router.token_clusters = 4097", "from 0 to 4096"]),
    (
        f"{DEBUG} --router.token_clusters 8 --router.enable false --router.spread false",
        ["router.token_clusters = 8", "router.enable = false", "set that to true, or router.token_clusters to 0"],
    ),
    (
        f"{DEBUG} --router.recluster_every 8 --router.enable false",
        ["router.recluster_every = 8", "router.enable = false", "or router.recluster_every to 0"],
    ),
    *(
        (
            f"{DEBUG} --recipe columns_quarter --activations.v 512 --router.token_clusters 8 --router.{key} {value}",
            [f"router.{key} = ", value, "router.token_clusters = 8", "leave it at"],
        )
        for key, value in (("cluster_size", "32"), ("cluster_by", "weights"), ("spread", "true"))
    ),
    (f"{DEBUG} --model.hidden_dim 1000", ["activations.m = 16", "hidden_dim = 1000"]),
    (f"{DEBUG} --recipe recipes/weights_2of4.toml --router.enable true", ["router.enable", "set it to false"]),
    (f"{DEBUG} --recipe weights_2of4 --activations.keep 0.5", ["keep = 0.5 is not read", '"none"', "leave it at 0.25"]),
    (f"{DEBUG} --training.enable_cpu_offload", ["training.enable_cpu_offload", "set it to false"]),
    (f"{DEBUG} --weights.products '[2]'", ["weights.products", "[2]", "1, 3"]),
    (
        f"{DEBUG} --recipe recipes/groups_quarter.toml --activations.cut_along_tokens true",
        ["activations.cut_along_tokens", "groups", "false"],
    ),
    (
        f"{DEBUG} --recipe recipes/activations_2of4.toml --training.seq_len 250 --training.local_batch_size 1",
        ["activations.cut_along_tokens", "250", "4"],
    ),
    (
        f"{DEBUG} --activations.cut_along_tokens true",
        ["activations.cut_along_tokens", 'pattern = "venom"', "false"],
    ),
    (f"{DEBUG} --model.name llama_swiglu", ["llama_swiglu", "recipes/dense.toml"]),
    (f"{DEBUG} --model.flavor 16m", ["model.flavor", "16m", "160m"]),
    (f"{DEBUG} --model.n_heads 5", ["model.n_heads = 5", "model.dim = 128"]),
    (f"{DEBUG} --model.n_kv_heads 3", ["model.n_kv_heads = 3", "model.n_heads = 4"]),
    (f"{DEBUG} --schedule.phases '[]'", ["schedule.phases", "empty"]),
    (
        f'{DEBUG} --schedule.phases \'[{{mode = "dense", end = 0.5}}, {{mode = "sparse", end = 0.3}}]\'',
        ["schedule.phases[1].end = 0.3", "order"],
    ),
    (f"{DEBUG} --schedule.phases '[{{mode = \"dense\", end = 5000}}]'", ["5000", "training.steps = 400", "1.0"]),
    (f"{DEBUG} --schedule.phases '[{{mode = \"dense\", end = 1.5}}, {{}}]'", ["1.5", "share of the run"]),
    (
        f"{DEBUG} --schedule.decay_with_tail false --schedule.phases '[{{mode = \"dense\", end = 0.5}}]'",
        ["step 200", "training.steps = 400"],
    ),
    (
        f"{DEBUG} --recipe recipes/dense.toml --schedule.decay_with_tail true",
        ["schedule.decay_with_tail", "two phases"],
    ),
    (f"{DEBUG} --schedule.dense_layers 4", ["schedule.dense_layers = 4", "4 layers", "recipes/dense.toml"]),
    (f"{DEBUG} --activations.pattern none --weights.pattern none --router.enable false", ["sparse phase", "set one"]),
    (f"{DEBUG} --parallelism.data_parallel_shard_degree 4", ["data_parallel_shard_degree = 4", "1 process", "-1"]),
    (f"{DEBUG} --parallelism.tensor_parallel_degree 5", ["model.hidden_dim = 768", "tensor_parallel_degree = 5"]),
    (
        f"{DEBUG} --parallelism.tensor_parallel_degree 2 --activations.m 256",
        ["activations.m = 256", "tensor_parallel_degree = 768 / 2 = 384"],
    ),
    (
        f"{DEBUG} --parallelism.tensor_parallel_degree 2 --router.cluster_size 256",
        ["router.cluster_size = 256", "tensor_parallel_degree = 768 / 2 = 384"],
    ),
    (
        f"{DEBUG} --parallelism.tensor_parallel_degree 2 --parallelism.enable_async_tensor_parallel",
        ["enable_async_tensor_parallel", "dense phases only"],
    ),
    (f"{DEBUG} --parallelism.context_parallel_degree 2", ["x context_parallel_degree = 2 is not the 1 process"]),
    (
        f"{DEBUG} --parallelism.context_parallel_degree 2 --activations.v 2048",
        ["activations.v = 2048 exceeds the 1024 tokens", "/ parallelism.context_parallel_degree = 2"],
    ),
    (
        f"{PIPELINE} --parallelism.context_parallel_degree 2 --activations.v 256",
        ["activations.v = 256 exceeds the 128 tokens", "/ parallelism.context_parallel_degree = 2"],
    ),
    (
        f"{DEBUG} --parallelism.context_parallel_degree 2 --parallelism.context_parallel_load_balancer ptrr",
        ['context_parallel_load_balancer = "ptrr"', 'use "headtail"'],
    ),
    (
        f"{DEBUG} --parallelism.context_parallel_degree 2 --parallelism.context_parallel_rotate_method alltoall",
        ['context_parallel_rotate_method = "alltoall"', 'leave it at "allgather"'],
    ),
    (
        f"{PIPELINE} --activations.v 512",
        ["activations.v = 512", "256 tokens", "pipeline_parallel_microbatch_size x training.seq_len"],
    ),
    (PIPELINE, ["pipeline_parallel_degree = 2", "1 process"]),
    (f"{PIPELINE} --training.local_batch_size 1", ["1 / 1 = 1", "pipeline_parallel_degree = 2", '"GPipe"']),
    (
        f"{PIPELINE} --parallelism.pipeline_parallel_microbatch_size 3",
        ["training.local_batch_size = 8", "pipeline_parallel_microbatch_size = 3"],
    ),
    (
        f"{PIPELINE} --parallelism.pipeline_parallel_schedule ZBVZeroBubble",
        ["pipeline_parallel_schedule", "ZBVZeroBubble", "1F1B, GPipe, Interleaved1F1B"],
    ),
    (
        f"{PIPELINE} --parallelism.pipeline_parallel_schedule Interleaved1F1B --training.local_batch_size 5",
        ["5 / 1 = 5", "Interleaved1F1B", "a multiple of parallelism.pipeline_parallel_degree = 2"],
    ),
    (
        f"{PIPELINE} --parallelism.pipeline_parallel_layers_per_stage 1",
        ["pipeline_parallel_layers_per_stage = 1", "6 stages of 4 layers", "needs 2"],
    ),
    (
        f"{DEBUG} --parallelism.pipeline_parallel_degree 6",
        ["pipeline_parallel_degree = 6", "4 layers", "6 stages", "lower the degree"],
    ),
    (
        f"{PIPELINE} --parallelism.module_fqns_per_model_part '[[\"layers.0\"]]'",
        ["module_fqns_per_model_part", "pipeline_parallel_layers_per_stage"],
    ),
    (f"{DEBUG} --training.global_batch_size 12", ["global_batch_size = 12", "local_batch_size = 8"]),
    (f"{DEBUG} --training.sparse_local_batch_size 16", ["sparse_local_batch_size = 16", "the 8 sequences of a step"]),
    (
        f"{DEBUG} --training.sparse_local_batch_size 12 --training.global_batch_size 48",
        ["sparse_local_batch_size = 12", "not a multiple of training.local_batch_size = 8"],
    ),
    (
        f"{DEBUG} --training.sparse_local_batch_size 16 --training.global_batch_size 16"
        " --parallelism.pipeline_parallel_degree 2",
        ["sparse_local_batch_size is not supported with parallelism.pipeline_parallel_degree"],
    ),
    (
        f"{DEBUG} --training.local_batch_size 4 --training.global_batch_size 16 --training.sparse_local_batch_size 8"
        " --activations.v 4096",
        ["activations.v = 4096 exceeds the 2048 tokens", "(training.sparse_local_batch_size x training.seq_len)"],
    ),
    (f"{DEBUG} --profiling.profile_freq 0", ["profiling.profile_freq = 0", "at least 1"]),
    (f"{DEBUG} --profiling.profiler_active -1", ["profiling.profiler_active = -1", "at least 1"]),
    (f"{DEBUG} --profiling.profiler_warmup -1", ["profiling.profiler_warmup = -1", "at least 0"]),
    (
        f"{DEBUG} --profiling.enable_profiling --profiling.profile_freq 3",
        ["profiling.profile_freq = 3", "profiler_warmup = 3", "profiler_active = 1", "raise it"],
    ),
    (
        f"{DEBUG} --model.converters '[\"quantize.linear.float8\"]' --quantize.linear.float8.emulate --compile.enable",
        ['model.converters = ["quantize.linear.float8"] needs a GPU', "emulate = true and compile.enable = false"],
    ),
    (f"{DEBUG} --profiling.enable_memory_snapshot", ["profiling.enable_memory_snapshot", "needs a GPU"]),
    (f"{DEBUG} --checkpoint.load_step -2", ["checkpoint.load_step = -2", "at least -1"]),
    (f"{DEBUG} --metrics.save_tb_folder ../..", ['save_tb_folder = "../.."', "inside job.dump_folder", '"tb"']),
    (f"{DEBUG} --checkpoint.folder /tmp/x", ['checkpoint.folder = "/tmp/x"', "inside job.dump_folder"]),
    (f"{DEBUG} --checkpoint.folder ''", ['checkpoint.folder = ""', '"checkpoint"', "linked"]),
    (f"{DEBUG} --comm.save_traces_folder tokenizer/a", ['save_traces_folder = "tokenizer/a"', "free for it"]),
    (f"{DEBUG} --comm.init_timeout_seconds {10**30}", ["comm.init_timeout_seconds", "from 1 to 31536000"]),
    (f"{DEBUG} --training.hang_timeout_seconds 1e300", ["training.hang_timeout_seconds", "to 31536000"]),
    (f"{DEBUG} --training.dataloader.prefetch_factor {10**9}", ["prefetch_factor", "from 1 to 1000"]),
    (f"{DEBUG} --parallelism.context_parallel_load_balancer ''", ["context_parallel_load_balancer", "command line"]),
    (f"{DEBUG} --recipe dense --training.enable_cpu_offload", ["training.enable_cpu_offload", "needs a GPU"]),
    (f"{DEBUG} --comm.trace_buf_size -1", ["comm.trace_buf_size = -1", "from 0 to"]),
    (f"{DEBUG} --optimizer.lr {'9' * 400}", ["optimizer.lr", "number"]),
    (f"{DEBUG} --training.steps {'9' * 5000}", ["training.steps", "whole number"]),
    (f"{DEBUG} --checkpoint.keep_latest_k 1", ["checkpoint.keep_latest_k = 1", "2 or more"]),
    (f"{DEBUG} --checkpoint.async_mode sometimes", ["checkpoint.async_mode", "sometimes", '"async"']),
    (f"{DEBUG} --recipe recipes", ["recipe", "is a folder", "recipes/dense.toml"]),
    (f"{DEBUG} --lr_scheduler.decay_ratio 0.5", ["decay_ratio 0.5", "decay_with_tail", "leave it out"]),
    (f"{DEBUG} --lr_scheduler.total_steps 399", ["total_steps = 399", "training.steps = 400"]),
    (
        f"{DEBUG} --lr_scheduler.total_steps 800 --schedule.decay_with_tail true",
        ["total_steps = 800", "decay_with_tail = true", "leave it out"],
    ),
    (f"{DEBUG} --optimizer.lr inf", ["optimizer.lr", "inf", "number"]),
    (f"{DEBUG} --optimizer.beta1 1.0", ["optimizer.beta1", "1.0", "0.999999"]),
    (f"{DEBUG} --debug.seed -1", ["debug.seed", "-1", "from 0"]),
    (f"{DEBUG} --comm.mode fake_backend", ["comm.mode", "torchrun"]),
    (f"{DEBUG} --metrics.enable_wandb", ["metrics.enable_wandb", "pip install wandb"]),
    (f"{DEBUG} --schedule.phases '[{{mode = \"dense\", end = 0}}]'", ["phases[0].end = 0", "before the first step"]),
    *(
        (f"{DEBUG} --recipe {recipe} --schedule.phases '[{{{phase}}}, {{}}]'", ["schedule.phases[0].keep", *named])
        for recipe, phase, named in (
            ("columns_quarter", 'mode = "dense", keep = 0.5, end = 3', ["= 0.5", "dense phase", "leave it out"]),
            ("venom_2of16", 'mode = "sparse", keep = 0.5, end = 3', ["= 0.5", '"venom"', "leave it out"]),
            ("weights_2of4", 'mode = "sparse", keep = 0.5, end = 3', ["= 0.5", '"none"', "leave it out"]),
            ("columns_quarter", 'mode = "sparse", keep = 0.0, end = 3', [".keep = 0.0: the share of", "above 0"]),
            ("columns_quarter", 'mode = "sparse", keep = 1.5, end = 3', ["1.5", "1.0"]),
            ("columns_quarter_fp8", 'mode = "sparse", keep = 0.3, end = 3', ["= 0.3", "fp8", "multiples of 16"]),
        )
    ),
    (
        f"{DEBUG} --activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option foo",
        ["selective_ac_option", "foo", '"op"'],
    ),
    (f"{DEBUG} --activation_checkpoint.mode memory_budget", ["memory_budget", "compile.enable"]),
    (f"{DEBUG} --optimizer.name SGD", ["optimizer.name", "SGD", "AdamW"]),
    (f"{DEBUG} --parallelism.context_parallel_degree 0", ["context_parallel_degree = 0", "at least 1"]),
    (f"{DEBUG} --parallelism.expert_parallel_degree -1", ["expert_parallel_degree = -1", "at least 1"]),
    (f"{DEBUG} --training.max_norm 0", ["training.max_norm", "0", "1e30"]),
    (f"{DEBUG} --training.seq_len 33", ["training.seq_len", "33", "2 x"]),
    (f"{DEBUG} --compile.components modle", ["compile.components", "modle", '"model"']),
    (f"{DEBUG} --compile.enable true --compile.backend inductr", ["compile.backend", "inductr", '"inductor"']),
    (f"{DEBUG} --model.converters '[\"float8\"]'", ["model.converters", "float8", '"quantize.linear.float8"']),
    (f"{DEBUG} --training.dataloader.prefetch_factor 0", ["prefetch_factor = 0", "from 1 to 1000"]),
    (f"{DEBUG} --job.dump_folder /dev/null/x", ["job.dump_folder", "/dev/null/x", "another folder"]),
    (f"{DEBUG} --job.dump_folder ''", ['job.dump_folder = ""', "name one"]),
    (f"{DEBUG} --recipe dense --precision.ffn fp8", ["precision.ffn", "recipes/dense.toml has none", "converters"]),
]


@pytest.mark.parametrize(("words", "named"), BAD, ids=[words.replace(DEBUG, "") or "none" for words, _ in BAD])
def test_bad_command_line(words, named):
    with pytest.raises(ConfigError) as error:
        check(words)
    message = str(error.value)
    assert "\n" not in message
    for part in named:
        assert part in message, message


@pytest.mark.parametrize(
    "keep, others, first",
    [
        (0.0, "", "schedule.phases[0].keep = 0.0: the share of groups"),
        (1e-9, "--activations.window 64", "activations.window = 64: the share schedule.phases[0].keep = 1e-09 of its"),
        (0.3, "--precision.ffn fp8", 'schedule.phases[0].keep = 0.3: precision.ffn = "fp8" needs multiples'),
    ],
)
def test_a_share_that_does_not_fit_is_named_once(keep, others, first):
    """By the key of the phase, or of the recipe, that has it."""
    recipe, of_phase = f"{DEBUG} --recipe columns_quarter {others}", f'{{mode = "sparse", keep = {keep}, end = 3}}'
    for words, section in (
        (f"--schedule.phases '[{of_phase}, {{}}]'", "schedule.phases[0]"),
        (f"--activations.keep {keep}", "activations"),
    ):
        with pytest.raises(ConfigError) as error:
            check(f"{recipe} {words}")
        message = str(error.value)
        assert message.startswith(first.replace("schedule.phases[0]", section))
        assert message.count("keep = ") == 1, message


BAD_FILES = [
    ("config", "recipe = 'recipes/dense.toml'\n[training\nsteps = 3", ["not valid TOML", "line 2"]),
    ("config", "[training]\nstepz = 3", ["training.stepz", "did you mean training.steps?"]),
    ("config", "[trainning]\nsteps = 3", ["trainning", "did you mean training?"]),
    ("config", "[training]\nsteps = '3'", ["training.steps", '"3"', "whole number"]),
    ("config", "[schedule]\ndecay_with_tail = true", ["[schedule] belongs in a recipe"]),
    ("config", "training = 3", ["training = 3", "table"]),
    ("recipe", "[training]\nsteps = 3", ["[training] belongs in a configuration"]),
    ("recipe", "[activation]\npattern = '2:4'", ["[activation]", "did you mean activations?"]),
    ("recipe", "[activations]\npatern = '2:4'", ["activations.patern", "did you mean activations.pattern?"]),
    ("recipe", "[[schedule.phases]]\nmode = 'dens'", ["schedule.phases[0].mode", '"dens"', '"dense"']),
    ("recipe", "[weights]\nproducts = ['1']", ["weights.products", "list of whole number"]),
]


@pytest.mark.parametrize(("kind", "text", "named"), BAD_FILES)
def test_bad_file_names_the_file(tmp_path, kind, text, named):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    words = f"--config {file}" if kind == "config" else f"{DEBUG} --recipe {file}"
    with pytest.raises(ConfigError) as error:
        check(words)
    for part in [str(file), *named]:
        assert part in str(error.value), str(error.value)


def test_world_size_must_match_the_degrees(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check(f"{DEBUG} --parallelism.data_parallel_shard_degree 2")
    for words, part in [
        ("--parallelism.data_parallel_shard_degree 1", "2 processes"),
        ("--parallelism.data_parallel_replicate_degree 2", "halves gradients"),
        ("--training.global_batch_size 8", "2 data-parallel ranks"),
        (
            "--recipe recipes/dense.toml --parallelism.tensor_parallel_degree 2 --model.n_kv_heads 1",
            "model.n_kv_heads = 1 is not divisible by tensor_parallel_degree = 2",
        ),
        (
            "--parallelism.context_parallel_degree 2 --activations.v 32 --training.seq_len 98",
            "training.seq_len = 98 is not divisible by 2 x tensor_parallel_degree x context_parallel_degree = 4",
        ),
    ]:
        with pytest.raises(ConfigError, match=part):
            check(f"{DEBUG} {words}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has ring attention")
def test_context_parallelism_needs_ring_attention(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = f"{DEBUG} --parallelism.context_parallel_degree 2"
    with pytest.raises(ConfigError, match=r"context_parallel_degree = 2 needs GPUs: .* for the cpu"):
        check(words)
    monkeypatch.setitem(RING_ATTENTION, "cpu", ("bfloat16",))
    with pytest.raises(ConfigError, match=r'mixed_precision_param = "float32"; use "bfloat16"'):
        check(words)
    check(f"{words} --training.mixed_precision_param bfloat16")


def test_restarts_need_a_store_that_they_do_not_share(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    check(DEBUG)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ConfigError, match=r"--max-restarts=3 .*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        check(DEBUG)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    check(DEBUG)


def test_command_line_over_recipe_over_configuration():
    config, _, spans = check(
        f"{DEBUG} --recipe recipes/groups_quarter.toml --activations.keep 0.5 "
        "--training.seq-len=128 --training.steps=300"
    )
    assert (config.activations.pattern, config.activations.keep, config.activations.v) == ("groups", 0.5, 128)
    assert config.training.seq_len == 128
    assert [(span.mode, span.start, span.stop) for span in spans] == [
        ("dense", 0, 30),
        ("sparse", 30, 225),
        ("dense", 225, 300),
    ]
    config, *_ = check(f"{DEBUG} --compile.enable --compile.components model,loss")
    assert config.compile.enable and config.compile.components == ["model", "loss"]


def test_decay_starts_with_the_tail():
    phases = '[{mode = "dense", end = 30}, {mode = "sparse", end = 0.6}, {mode = "dense"}]'
    config, *_ = check(f"{DEBUG} --schedule.phases '{phases}'")
    assert config.lr_scheduler.decay_ratio == pytest.approx(0.4)
    # A tail too short to have a step of its own is still where the decay would start.
    phases = '[{mode = "dense", end = 0.1}, {mode = "sparse", end = 0.99}, {mode = "dense"}]'
    config, *_ = check(f"{DEBUG} --training.steps 20 --schedule.phases '{phases}'")
    assert config.lr_scheduler.decay_ratio == pytest.approx(0.01)


def test_an_unknown_pattern_is_refused_without_a_sparse_phase_too():
    with pytest.raises(ConfigError, match=r'activations.pattern = "venon" is unknown: did you mean "venom"'):
        check("--config configs/debug.toml --recipe recipes/dense.toml --activations.pattern venon")


def test_short_runs_leave_out_phases_of_no_step():
    _, _, spans = check(f"{DEBUG} --training.steps 2")
    assert [(span.mode, span.stop) for span in spans] == [("sparse", 2)]


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("job", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_configuration_with_every_recipe(job, recipe):
    kind = recipe.stem.partition("_")[0]
    if job.stem.startswith("moe_") and kind not in ("dense", "columns", "groups"):
        with pytest.raises(ConfigError, match="is not supported for experts"):
            check(f"--config {job} --recipe {recipe}")
    else:
        check(f"--config {job} --recipe {recipe}")
    assert set(tomllib.loads(recipe.read_text())) <= set(RECIPE_SECTIONS)


@pytest.mark.parametrize("recipe, more", [("half", {"schedule.dense_layers"}), ("quarter", set()), ("eighth", set())])
def test_a_recipe_in_fp8_differs_from_the_one_in_bf16_as_its_comment_says(recipe, more):
    file = ROOT / "recipes" / f"columns_{recipe}_fp8.toml"
    tables = [tomllib.loads((file.parent / name).read_text()) for name in (f"columns_{recipe}.toml", file.name)]
    bf16, fp8 = ({f"{s}.{k}": v for s, keys in table.items() for k, v in keys.items()} for table in tables)
    differ = {key for key in bf16.keys() | fp8.keys() if bf16.get(key) != fp8.get(key)} - {"router.cluster_size"}
    every = {"precision.ffn", "activations.sample", "activations.balance", "router.token_clusters", "schedule.phases"}
    assert differ == every | more
    assert f"with {'five' if len(differ) == 5 else 'six'} differences" in file.read_text()


def test_check_prints_the_resolved_configuration():
    result = fork(*shlex.split(f"{DEBUG} --check json --training.steps 77"))
    assert result.returncode == 0, result.stderr
    config = json.loads(result.stdout)
    assert config["training"]["steps"] == 77
    assert config["activations"]["m"] == 16
    assert config["lr_scheduler"]["decay_ratio"] == pytest.approx(0.25, abs=0.01)


def test_check_says_what_would_run_and_names_are_enough(corpus):
    sources = f'[{{type = "text", path = "{corpus}"}}]'
    words = ["--config", "debug", "--recipe", "columns_quarter", "--check", "--data.sources", sources]
    result = fork(*words, "--training.steps", "20", "--precision.qat", "int4")
    assert result.returncode == 0, result.stderr
    said = result.stdout
    assert "QAT         weights of the blocks' linear layers in int4 from step 19\n" in said
    assert "recipes/columns_quarter.toml: dense to step 2, sparse to step 18, dense to step 20" in said
    assert f"240 files of {corpus}" in said and said.endswith("This job can run.\n")
    assert "M parameters" in said and "sparse FFN  " in said and len(said.splitlines()) < 12
    result = fork(*words[:-1], f'[{{path = "{corpus}/nowhere"}}]')
    assert result.returncode == 2 and "no such file or folder" in result.stderr, result.stderr


def test_a_name_stands_for_its_file_with_and_without_its_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("debug", "debug.toml"):
        (tmp_path / name).mkdir()  # a folder of that name is not what is meant
        config, _ = load_config(["--config", name, "--recipe", "columns_half.toml"])
        assert config.recipe == "recipes/columns_half.toml" and config.model.flavor == "debug"


@pytest.mark.parametrize(
    "words, said",
    [
        ("--data.sources '[]'", "nothing to train on"),
        ("--data.sources '[{weight = 0}]'", "the weights of all sources are 0"),
        ('--data.sources \'[{type = "hub", path = "a/b"}, {type = "tokens", path = "x"}]\'', "are not mixed with"),
        ('--data.sources \'[{type = "tokens", path = "x"}]\' --tokenizer.path {tokenizer}', "no such folder"),
        ("--data.sources '[{type = \"hub\"}]'", "needs a data set's name"),
        ("--training.dataloader.num_workers 3", "num_workers = 3: the processes share the micro-batches"),
        ('--data.sources \'[{path = "nowhere", weight = 0}, {type = "stdlib"}]\'', ""),
    ],
)
def test_a_check_refuses_what_a_run_does(words, said, tmp_path):
    Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    config, args, spans = check(f"{DEBUG} {words.replace('{tokenizer}', str(tmp_path))}")
    if said:
        with pytest.raises(ConfigError, match=said):
            summary(config, args, spans)
    else:
        assert "reads       stdlib: " in summary(config, args, spans)


def test_a_block_has_room_in_a_micro_batch_of_sparse_phases():
    small = "--training.local_batch_size 4 --training.global_batch_size 16"  # 4 x 256 tokens
    with pytest.raises(ConfigError, match=r"activations.v = 2048 exceeds the 1024 tokens"):
        check(f"{DEBUG} {small} --activations.v 2048")
    check(f"{DEBUG} {small} --training.sparse_local_batch_size 8 --activations.v 2048")


def test_help_lists_every_section():
    result = fork("--help")
    assert '--precision.qat "none" (or "int4", "int8")\n' in result.stdout
    assert result.returncode == 0
    for key in ("--training.steps", "--activations.keep", "--checkpoint.interval", "--data.sources", "--recipe"):
        assert key in result.stdout


@pytest.mark.parametrize("processes", [0, 2])
def test_an_error_is_printed_once_with_status_2_and_no_traceback(processes):
    words = shlex.split(f"{DEBUG} --training.stepz 5")
    result = launch(*words, processes=processes) if processes else fork(*words)
    output = result.stdout + result.stderr
    assert result.returncode == 2 if processes == 0 else result.returncode != 0
    assert len(re.findall("unknown key training.stepz", output)) == 1, output
    if processes == 0:
        assert "Traceback" not in output
    else:
        assert "exitcode  : 2" in output, output


def test_paths_expand_and_a_check_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    words = ["--config", str(ROOT / "configs/debug.toml"), "--recipe", str(ROOT / "recipes/dense.toml")]
    for folder, expanded in (("~/runs/x", "home/runs/x"), ("$SCRATCH/x", "scratch/x"), ("${SCRATCH}/x", "scratch/x")):
        config, _ = load_config([*words, "--job.dump_folder", folder])
        assert config.job.dump_folder == str(tmp_path / expanded)
        check_config(config)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r'job.dump_folder = "\$NOWHERE/x": the variable \$NOWHERE is not set'):
        load_config([*words, "--job.dump_folder", "$NOWHERE/x"])


@pytest.mark.parametrize("word, value", [(".5", 0.5), ("1.", 1.0), ("-.5e1", -5.0), ("1e3", 1000.0)])
def test_numbers_on_the_command_line_are_read_as_people_write_them(word, value):
    config, _ = load_config(["--config", "configs/debug.toml", "--training.max_norm", word.lstrip("-")])
    assert config.training.max_norm == abs(value)


@pytest.mark.parametrize(
    "value", [["a b", "\u00e9", "\U0001f600", 'q"\\', "a\x7f\n"], [{"\u00e9": 1, "a b": 2}], [1e16, 1e-7, True, 10]]
)
def test_what_is_written_for_the_command_line_is_read_as_it_was(value):
    assert tomllib.loads(f"x = {as_word(value)}")["x"] == value
