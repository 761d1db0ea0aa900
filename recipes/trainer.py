"""The trainer: torchtitan's, with phases.

torchtitan builds the model, shards and compiles it, and takes the training steps. Added here: what a step is
depends on its phase (`recipes/schedule.py`, `recipes/sparsity.py`), a sparse phase is validated twice, the run can
be interrupted by a signal at any time, and it resumes exactly.
"""

import contextlib
import functools
import importlib.metadata
import itertools
import json
import logging
import math
import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import configs.titan as titan
from configs.errors import STOPPING, ConfigError, writing
from configs.loader import resolved
from configs.repository import commit
from configs.schema import JobConfig
from models.experts import expert_balance
from models.head import Head
from models.llama import Llama, LlamaArgs, count_parameters, parameters_in_words
from recipes.atomic import write_atomically
from recipes.check import device_dtype
from recipes.checkpoint import BAD_BATCHES, SPARSITY, SafeCheckpointManager, fail_together
from recipes.data import Loader, build_dataloader, refused_in_process
from recipes.metrics import Metrics, build_metrics
from recipes.mixture import load_corpus
from recipes.pipeline import Inference, build_loss, build_pipeline, micro_batch_size, stage_peers
from recipes.qat import prepare_qat, set_fake_quantization
from recipes.restore import check_initial_model, copy_tokenizer
from recipes.resume import check_resume
from recipes.schedule import Span, span_at
from recipes.sparsity import Sparsity, computes_in, describe_experts, flops_per_token, sparse_family
from recipes.summary import outcome
from recipes.tokenizer import build_tokenizer, check_same_tokenizer, prepare_tokenizer, token_bytes
from recipes.validation import Validator, reshard
from recipes.watchdog import Watchdog

logger = logging.getLogger("sparsetitan")


class _Batches:
    """An iterator of micro-batches, the next of which can be looked at before they are taken."""

    def __init__(self, batches: Iterator) -> None:
        self._batches = batches
        self._next: list = []

    def __iter__(self) -> "_Batches":
        return self

    def __next__(self):
        return self._next.pop(0) if self._next else self._read()

    def _read(self):
        try:
            return next(self._batches)
        except ConfigError as error:
            raise refused_in_process(error) from None

    def peek(self, together: int = 1):
        """The next micro-batches, as one."""
        while len(self._next) < together:
            self._next.append(self._read())
        return next(_joined(iter(self._next), together))


def _joined(batches: Iterator, together: int) -> Iterator:
    """So many micro-batches at a time, as one."""
    while several := list(itertools.islice(batches, together)):
        inputs, labels = zip(*several, strict=True)
        yield {name: torch.cat([each[name] for each in inputs]) for name in inputs[0]}, torch.cat(labels)


class BadBatches(Stateful):
    """How many batches a run has skipped because their loss or gradient was not finite; part of its checkpoints."""

    def __init__(self) -> None:
        self.skipped = 0

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped = state_dict["skipped"]


class SparseTrainer(titan.Trainer):
    """Trains one job through its phases.

    Args:
        config: a checked configuration.
        args: the model's arguments; the vocabulary is filled in from the tokenizer.
        spans: the run's phases in steps.
        watchdog: ends the process if a part of the run hangs.
    """

    job_config: JobConfig
    metrics_processor: Metrics
    checkpointer: SafeCheckpointManager
    dataloader: Loader
    gradient_accumulation_steps: int

    def __init__(self, config: JobConfig, args: LlamaArgs, spans: list[Span], watchdog: Watchdog) -> None:
        set_up_process(config)
        self.watchdog = watchdog
        self.handlers: dict[int, Any] = {}  # of signals, before this run's
        new_folder = not Path(config.job.dump_folder).exists()
        self.lock = _lock(config)
        try:
            self._set_up(config, args, spans)
        except BaseException:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            if new_folder:  # a start that failed leaves no empty folder
                _remove_if_empty(self.lock)
            raise

    def _set_up(self, config: JobConfig, args: LlamaArgs, spans: list[Span]) -> None:
        self.interrupted = False
        self.received: set[int] = set()
        self.skips = False  # whether the step at hand left its batch out
        self.quantises = False  # whether forward passes round weights, by precision.qat
        self._validated: set[Span] = set()  # phases that this process has validated, and so compiled it for
        self.watchdog.watch("the start (reading the data)", starts=True)
        for line in load_corpus(config).summary():
            logger.info(line)
        self.watchdog.watch("the start (preparing the tokenizer)", starts=True)
        config.model.hf_assets_path = prepare_tokenizer(config)  # until it is trained, a signal ends the run at once
        self.handlers = {number: signal.signal(number, self._interrupt) for number in STOPPING}
        args.vocab_size = len(token_bytes(config.model.hf_assets_path))
        check_initial_model(config, args)
        self.watchdog.watch("the start (connecting the ranks, building the model)", starts=True)
        titan.use_train_spec(config.model.name, train_spec(config, args), SafeCheckpointManager)
        super().__init__(config)
        self._micro_batches = self.gradient_accumulation_steps
        # Micro-batches of dense phases that make one of a sparse phase.
        self._together = micro_batch_size(config, sparse=True) // micro_batch_size(config)
        if self._together > 1:
            # Graphs for each size: a second one would make PyTorch compile for any size, and kernels are for one.
            torch._dynamo.config.automatic_dynamic_shapes = False
        # A block has a graph for each kind of phase, and as many for validation, with and without a dense layer.
        kinds = {span.kind for span in spans}
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(kinds))
        # A rank that has stopped is noticed as soon as in any other collective; gloo's own timeout is half an hour.
        timeout = timedelta(seconds=max(config.comm.init_timeout_seconds, config.comm.train_timeout_seconds))
        several = dist.get_world_size() > 1
        self.signals = dist.new_group(backend="gloo", timeout=timeout) if several else None
        parts: list[Llama] = self.model_parts  # type: ignore[assignment]  # of several stages this rank's, else the model
        feed_forwards = {name: each for part in parts for name, each in part.feed_forwards().items()}
        depth = 0 if args.swiglu else args.n_layers
        peers = stage_peers(self.parallel_dims)
        self.sparsity = Sparsity(config, feed_forwards, list(self.optimizers), spans, depth, peers)
        if self.sparsity.depth and self.checkpointer.enable:
            self.checkpointer.states[SPARSITY] = self.sparsity
        self.bad_batches = BadBatches()
        if self.checkpointer.enable:
            self.checkpointer.states[BAD_BATCHES] = self.bad_batches
        self._about: dict[str, Any] = {}  # run.json
        if config.training.skip_bad_batches:
            self._losses: list[torch.Tensor] = []
            self._norms: list[torch.Tensor] = []
            self._take_step, self.optimizers.step = self.optimizers.step, self._step_unless_bad

    def init_distributed(self) -> titan.ParallelDims:
        config = self.job_config
        if config.comm.trace_buf_size:  # torchtitan makes this folder, but does not say what it could not write
            with writing(config.comm.save_traces_folder, config.job.dump_folder):
                os.makedirs(Path(config.job.dump_folder) / config.comm.save_traces_folder, exist_ok=True)
        return super().init_distributed()

    def train(self) -> None:
        """Run from the newest checkpoint, or from the start, to the last step or the first signal."""
        config = self.job_config
        self.watchdog.watch("the start (loading a checkpoint)", starts=True)
        if self.checkpointer.has_begun():
            check_resume(config, self.model_args, corpus_facts(config))
        self.checkpointer.load(step=config.checkpoint.load_step)
        if self.step:
            self._use_given_rates()
            check_same_tokenizer(config.model.hf_assets_path, Path(config.job.dump_folder), "job.dump_folder")
        if self.step >= config.training.steps:
            logger.info(f"{config.job.dump_folder} is complete, {self.step} steps: raise training.steps to go on")
            return
        # The first batch is taken before anything is written: a loader that refuses its state leaves the run as it was.
        self.watchdog.watch("the start (reading the first batch)", starts=True)
        batches = _Batches(self.batch_generator(self.dataloader))
        batches.peek()
        with fail_together(self.signals):
            self.metrics_processor.start(self.step, self.sparsity.spans)
        began = time.perf_counter()
        device, tensor = torch.device(titan.device_type), self.parallel_dims.tp
        dtype = titan.TORCH_DTYPE_MAP[computes_in(config, self.parallel_dims.fsdp_enabled)]
        spans = self.sparsity.spans
        family, reason = sparse_family(self.model_args, spans, device, dtype, tensor_parallel=tensor)
        dense = self.metrics_processor.num_flops_per_token
        tokens = micro_batch_size(config, sparse=True) * config.training.seq_len

        def flops_of(spans: Sequence[Span]) -> dict[str, float]:
            return flops_per_token(dense, config, self.model_args, spans, family, tensor, tokens, self.parallel_dims.ep)

        flops = flops_of(spans)
        executed = {span.kind: flops_of([span])["sparse_executed"] / dense for span in spans}
        self.metrics_processor.executed_share = executed
        with fail_together(self.signals):
            self._describe_run("dense" if family is None else family.name, reason, flops)
            if self.model_args.num_experts and dist.get_rank() == 0:
                said, slow = describe_experts(config, self.model_args, spans, family)
                logger.info(f"experts: {said}")
                if slow:
                    logger.warning(f"sparse experts will not be faster than dense ones: {slow}")
        if self.step:
            logger.info(f"resumed after step {self.step}")
        profile = {"global_step": self.step, "base_folder": config.job.dump_folder}
        with (
            titan.maybe_enable_profiling(config.profiling, **profile) as profiler,
            titan.maybe_enable_memory_snapshot(config.profiling, **profile) as memory_profiler,
        ):
            first = self.step + 1
            while self.step < config.training.steps and not self._any_rank_interrupted():
                self.step += 1
                self.gc_handler.run(self.step)
                compiles = self.step == first or span_at(spans, self.step).start == self.step - 1
                self.watchdog.watch(f"step {self.step}", compiles or self.sparsity.prepares(self.step))
                self._enter_phase(batches)
                self._train_validate_log(batches)
                last_step = self.step == config.training.steps
                if self._saves() or last_step:
                    self.watchdog.watch(f"the save of step {self.step}")
                    self._before_save()
                self.checkpointer.save(self.step, last_step=last_step)
                for each in (profiler, memory_profiler):
                    if each:
                        each.step()
                if self.step == first and titan.device_type != "cpu":
                    # Compilation and lazy initialisation are over: a stuck collective is noticed sooner from here on.
                    timeout = timedelta(seconds=config.comm.train_timeout_seconds)
                    titan.dist_utils.set_pg_timeouts(timeout, self.parallel_dims)
        if self.step == config.training.steps:
            for line in outcome(config, self._about, self.metrics_processor.row, first, time.perf_counter() - began):
                logger.info(line)
        else:
            logger.info(f"stopped by a signal after step {self.step}")
            if self.step >= first:  # else nothing is new, and the first batch has been taken from the loader
                self.watchdog.watch(f"the save of step {self.step}")
                self._before_save()
                self.checkpointer.save_now(self.step)
                if self.checkpointer.enable and not self.checkpointer.load_only:
                    logger.info("the same command resumes")

    def _use_given_rates(self) -> None:
        """Let the optimizer's numbers be the configuration's, where the checkpoint brought those of the run so far."""
        given = self.job_config.optimizer
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if group["initial_lr"] != given.lr:
                    logger.info(f"optimizer.lr = {given.lr:g} from here on; the run had {float(group['initial_lr']):g}")
                numbers = {"lr": given.lr, "initial_lr": given.lr, "betas": (given.beta1, given.beta2)}
                numbers |= {"eps": given.eps, "weight_decay": given.weight_decay}
                group.update({name: value for name, value in numbers.items() if name in group})
        for scheduler in self.lr_schedulers.schedulers:
            scheduler.base_lrs = [given.lr for _ in scheduler.base_lrs]
            rates = [given.lr * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates  # what is logged

    def close(self) -> None:
        self.watchdog.watch("the end (ending data processes, waiting for a save)")
        self.dataloader.close()
        try:
            super().close()
        finally:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            if self.lock.is_locked:
                _remove_empty_folders(Path(self.lock.lock_file).parent)
            self.lock.release()

    def _enter_phase(self, batches: "_Batches") -> None:
        def forward() -> None:
            batch, labels = batches.peek(self._together)
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(batch, labels.to(self.device))
            with self.train_context(), self.maybe_enable_amp:
                if self.parallel_dims.pp_enabled:
                    pipeline = Inference(self.pp_schedule, self.pp_has_first_stage, self.pp_has_last_stage)
                    pipeline.losses(inputs, labels, **extra_kwargs)
                else:
                    self.model_parts[0](inputs, **extra_inputs, **extra_kwargs)
            for part in self.model_parts:
                reshard(part)  # the neurons' order is for the shards

        prepares = self.sparsity.prepares(self.step)
        if prepares:
            self.optimizers.zero_grad()  # clustering has a use for their memory
            titan.device_module.synchronize()  # steps that the device has not ended yet are not the switch's
        began = time.perf_counter()
        changed = self.sparsity.enter(self.step, forward)
        if prepares:
            titan.device_module.synchronize()
        seconds = time.perf_counter() - began
        self.metrics_processor.switch_seconds += seconds
        if changed:
            span = span_at(self.sparsity.spans, self.step)
            does = "begins" if span.start == self.step - 1 else "goes on"  # resumed
            keeps = "" if span.keep is None else f", keep = {span.keep:g}"
            logger.info(f"step {self.step}: {span.mode} phase {does}{keeps} (switched in {seconds:.1f} s)")
        if self.job_config.precision.qat != "none":
            self._enter_qat()

    def _enter_qat(self) -> None:
        """Round weights from the first step of the last phase on."""
        wanted, kind = self.step > self.sparsity.spans[-1].start, self.job_config.precision.qat
        if wanted and not self.quantises:
            set_fake_quantization(self.model_parts, True)
            logger.info(
                f"step {self.step}: weights of the blocks' linear layers are rounded to {kind} in the forward pass "
                "(precision.qat)"
            )
        self.quantises = wanted

    def _train_validate_log(self, batches) -> None:
        """One training step; where a row is due, also its validation and the health of its sparsity."""
        config, metrics = self.job_config, self.metrics_processor
        validates = config.validation.enable and self.validator.should_validate(self.step)
        metrics.log_next = validates or self._saves() or self.step == config.training.steps
        sparse = self.sparsity.phase == "sparse"
        flips = metrics.should_log(self.step) and sparse and config.weights.pattern == "2:4"
        masks = self.sparsity.weight_masks() if flips else None
        graphs = _graphs_compiled()
        self.train_step(batches)
        metrics.graphs_compiled += _graphs_compiled() - graphs
        metrics.steps_since_last_log += 1
        if not metrics.should_log(self.step):
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics.row[name]) and not self.skips:
                raise self._diverged(f"the {name.replace('grad_norm', 'norm of the gradient')} is {metrics.row[name]}")
        extra = {f"train_{name}": value for name, value in self._expert_balance().items() if "/" not in name}
        extra |= self._validation_metrics() if validates else {}
        if config.training.skip_bad_batches:
            extra["skipped_batches"] = self.bad_batches.skipped
        if masks is not None:
            extra |= self.sparsity.flip_rate(masks)
        with fail_together(self.signals):
            metrics.finish(span_at(self.sparsity.spans, self.step), extra)

    def train_step(self, data_iterator) -> None:
        """torchtitan's training step; with training.skip_bad_batches the optimizer takes no step of a bad batch."""
        self._forget_load()
        together = self._together if self.sparsity.phase == "sparse" else 1
        self.gradient_accumulation_steps = self._micro_batches // together
        data_iterator = _joined(data_iterator, together)
        if not self.job_config.training.skip_bad_batches:
            super().train_step(data_iterator)
            return
        self._losses = []
        with titan.watch_gradient_norms() as self._norms:
            super().train_step(data_iterator)

    def post_dataloading_process(self, input_dict, labels):
        inputs, labels, extra_inputs, extra_kwargs = super().post_dataloading_process(input_dict, labels)
        if self.job_config.training.loss_chunk_tokens:
            extra_kwargs["labels"] = labels
        return inputs, labels, extra_inputs, extra_kwargs

    def forward_backward_step(self, *, global_valid_tokens: torch.Tensor, **kwargs) -> torch.Tensor:
        if self.parallel_dims.pp_enabled:
            # torchtitan divides the loss that a pipeline returns, but not the one that it takes gradients of.
            with self.loss_fn.divided_by(global_valid_tokens):
                loss = super().forward_backward_step(global_valid_tokens=torch.ones(()), **kwargs)
        else:
            loss = super().forward_backward_step(global_valid_tokens=global_valid_tokens, **kwargs)
        if self.job_config.training.skip_bad_batches:
            self._losses.append(loss.detach())
        return loss

    def _step_unless_bad(self, *args, **kwargs) -> None:
        """The optimizer's step, unless the loss or the gradient of any rank is not finite; all ranks decide alike.

        Raises:
            ConfigError: on all ranks, when training.skip_bad_batches have been skipped before.
        """
        seen = [each.full_tensor() if isinstance(each, DTensor) else each for each in (*self._losses, *self._norms)]
        bad = (~torch.stack([torch.isfinite(each).all().to(self.device) for each in seen]).all()).int()
        if dist.get_world_size() > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        self.skips = bool(bad)
        if not self.skips:
            self._take_step(*args, **kwargs)
            return
        limit = self.job_config.training.skip_bad_batches
        skipped = self.bad_batches.skipped
        if skipped >= limit:  # above it where a resume has lowered the limit
            raise self._diverged(
                f"training.skip_bad_batches = {limit}, {skipped} batches were skipped before, and the loss or the "
                "gradient is not finite"
            )
        self.bad_batches.skipped += 1
        logger.warning(
            f"step {self.step}: the loss or the gradient is not finite: the batch is skipped "
            f"({self.bad_batches.skipped} of at most {limit})"
        )
        with fail_together(self.signals):
            self._write_about()

    def _saves(self) -> bool:
        """Whether a checkpoint is due after this step."""
        return self.checkpointer.enable and self.step % self.job_config.checkpoint.interval == 0

    def _before_save(self) -> None:
        """Refuse to save what is not finite, and make the rows so far durable, which a resume takes as written."""
        self._check_finite()
        with fail_together(self.signals):
            self.metrics_processor.sync()

    def _check_finite(self) -> None:
        """Refuse to save weights or moments that are not finite: a step between two logged ones may have spoilt them.

        Raises:
            ConfigError: on all ranks, where any rank holds such a number.
        """
        tensors = [parameter for part in self.model_parts for parameter in part.parameters()]
        for optimizer in self.optimizers:
            tensors += [
                value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
            ]
        local = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
        finite = torch.stack([torch.isfinite(each.detach()).all().to(self.device) for each in local if each.numel()])
        spoilt = (~finite.all()).int()
        if dist.get_world_size() > 1:
            dist.all_reduce(spoilt, op=dist.ReduceOp.MAX)
        if spoilt:
            raise self._diverged("weights or the optimizer's moments are not finite")

    def _diverged(self, what: str) -> ConfigError:
        config = self.job_config
        newest = self.checkpointer.newest()
        kept = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"
        return ConfigError(
            f"{what} at step {self.step}: the run has diverged and ends before it saves that; {kept}. Lower "
            f"optimizer.lr = {config.optimizer.lr:g} or training.max_norm = {config.training.max_norm:g} and resume"
        )

    def _forget_load(self) -> None:
        """Count the tokens that experts get from here on: of a step, or of a validation, alone."""
        for part in self.model_parts:
            for mixture in part.mixtures():
                mixture.tokens_per_expert.zero_()
                mixture.load.zero_()

    def _expert_balance(self) -> dict[str, float]:
        """How equally busy the experts have been, of all ranks, since `_forget_load`; empty without experts."""
        loads = [mixture.load for part in self.model_parts for mixture in part.mixtures()]
        if not loads:
            return {}
        load = torch.stack(loads)
        if dist.get_world_size() > 1:
            dist.all_reduce(load)
        return expert_balance(load)

    def _validation_metrics(self) -> dict[str, float]:
        """Dense inference in any phase; in a sparse one the pattern's as well, and how well it fits.

        Where weights are rounded, by precision.qat, first with the weights as they are, and then rounded.
        """
        span = span_at(self.sparsity.spans, self.step)
        compiles = span not in self._validated
        self._validated.add(span)
        self.watchdog.watch(f"the validation of step {self.step}", compiles)
        if self.quantises:
            set_fake_quantization(self.model_parts, False)
        with self.sparsity.dense():
            self.validator.warm_up(self.model_parts)
            self.sparsity.reset_health()
            self._forget_load()
            score = self.validator.validate(self.model_parts, self.step)
        row = {"val_loss": score.loss, "val_bpb": score.bits_per_byte} | self._expert_balance()
        if self.sparsity.phase == "sparse":
            self.watchdog.watch(f"the validation of step {self.step} with the pattern", compiles)
            self.sparsity.reset_health()
            score = self.validator.validate(self.model_parts, self.step, sparse=True)
            row |= {"val_loss_sparse": score.loss, "val_bpb_sparse": score.bits_per_byte}
        row |= self.sparsity.health()
        if self.quantises:
            self.watchdog.watch(f"the validation of step {self.step} with rounded weights", compiles)
            set_fake_quantization(self.model_parts, True)
            score = self.validator.validate(self.model_parts, self.step)
            row |= {"val_loss_quantised": score.loss, "val_bpb_quantised": score.bits_per_byte}
        self.watchdog.watch(f"step {self.step}")
        return row

    def _interrupt(self, number: int, frame) -> None:
        """Note a signal: the run saves and ends after this step. A second Ctrl-C ends it at once.

        torchrun answers a Ctrl-C, which its processes get too, with a SIGTERM to them: another signal is no second one.
        """
        if number == signal.SIGINT and number in self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.received:
            again = "; Ctrl-C again ends it at once, unsaved" if number == signal.SIGINT else ""
            if os.environ.get("RANK", "0") == "0":  # written, not logged: the signal may come while something is
                line = f"{signal.Signals(number).name}: the run saves and ends after this step{again}\n"
                os.write(sys.stderr.fileno(), line.encode())
        self.received.add(number)
        self.interrupted = True

    def _any_rank_interrupted(self) -> bool:
        """Whether a signal reached any rank; over gloo, so that no rank waits for its GPU."""
        if self.signals is None:
            return self.interrupted
        flag = torch.tensor(int(self.interrupted))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.signals)
        return bool(flag)

    def _write_about(self) -> None:
        """Write run.json on rank 0, with how many batches were skipped so far."""
        if dist.get_rank() != 0:
            return
        self._about["skipped_batches"] = self.bad_batches.skipped
        folder = self.job_config.job.dump_folder
        with writing("run.json", folder):
            write_atomically(Path(folder) / "run.json", json.dumps(self._about, indent=2) + "\n")

    def _describe_run(self, family: str, reason: str, flops: dict[str, float]) -> None:
        """On rank 0, say what is about to run, and keep `run.json` and the tokenizer beside the metrics."""
        if dist.get_rank() != 0:
            return
        config, args, spans = self.job_config, self.model_args, self.sparsity.spans
        parameters = count_parameters(args)
        packages = ("torch", "torchtitan", "torchao", "datasets", "tokenizers", "triton")
        device = titan.device_module.get_device_name()
        run = {
            "config": resolved(config),
            "command": sys.argv,
            "corpus": corpus_facts(config),
            "parameters": parameters,
            "active_parameters": parameters - args.inactive_parameters,
            "vocabulary": args.vocab_size,
            "unigram_entropy": self.validator.unigram_entropy if config.validation.enable else None,
            "phases": [[span.mode, span.start + 1, span.stop] for span in spans],
            "flops_per_token": flops,
            "peak_flops": self.metrics_processor.peak_flops,
            "backend": {"name": family, "reason": reason},
            "versions": {name: importlib.metadata.version(name) for name in packages}
            | {"python": platform.python_version(), "cuda": torch.version.cuda},
            "hardware": {"device": device, "ranks": dist.get_world_size()},
            "commit": commit(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        folder = Path(config.job.dump_folder)
        # A resume needs both files of the run so far, so they are replaced as a whole.
        with writing("the tokenizer", config.job.dump_folder):
            copy_tokenizer(config.model.hf_assets_path, folder / "tokenizer")
        self._about = run
        self._write_about()
        logger.info(
            f"{config.model.name} {config.model.flavor}: {parameters_in_words(args)}, "
            f"vocabulary {args.vocab_size}, on {dist.get_world_size()} x {device}, in {config.job.dump_folder}"
        )
        if self.parallel_dims.fsdp_enabled or not (self.parallel_dims.tp_enabled or self.parallel_dims.pp_enabled):
            dtype, (chosen, why) = config.training.mixed_precision_param, device_dtype()
            given = f'as the configuration or the run so far has it; "auto" for a new run is {chosen}: {why}'
            logger.info(f"products in {dtype} (training.mixed_precision_param), {why if dtype == chosen else given}")
        else:
            logger.info(
                f"products in {config.training.dtype} (training.dtype): tensor and pipeline parallelism have mixed "
                "precision only with FSDP2"
            )
        if config.lr_scheduler.warmup_steps > config.training.steps:
            logger.info(f"lr_scheduler.warmup_steps = {config.lr_scheduler.warmup_steps} is cut to training.steps")
        phases = ", ".join(f"{span.name} to step {span.stop}" for span in spans)
        logger.info(f"{config.recipe}: {phases}")
        if any(span.mode == "sparse" for span in spans):
            logger.info(
                f"FFN in sparse phases: {family} ({reason}); a step's FLOPs are "
                f"{100 * flops['sparse_executed'] / flops['dense']:.0f}% of the dense model's, without the zeros they "
                f"would be {100 * flops['sparse_pattern'] / flops['dense']:.0f}%"
            )


def corpus_facts(config: JobConfig) -> dict[str, int | None]:
    """What a run reads, in numbers, for its run.json."""
    corpus = load_corpus(config)
    return {
        "documents": None if corpus.streamed else len(corpus.documents),
        "copies": sum(part.copies for part in corpus.parts),
        "file_bytes": sum(part.report.file_bytes for part in corpus.parts),
        "files_not_read": sum(n for part in corpus.parts for n, _ in part.report.left_out.values()),
    }


def _graphs_compiled() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _lock(config: JobConfig) -> FileLock:
    """Hold the dump folder for as long as this process lives: two runs in one would spoil each other's files.

    Processes that read data inherit the lock. Where torchrun restarts a killed rank, those of the rank before hold it
    until they notice that it is gone, which takes PyTorch's data loader up to 5 seconds.
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    folder = Path(config.job.dump_folder)
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.environ["RANK"] == "0":
            lock.acquire(timeout=30 if restarts else 0)
    except Timeout:
        raise ConfigError(
            f'job.dump_folder = "{folder}" is in use by another run: wait for it to end, or name another folder'
        ) from None
    except OSError as error:
        raise ConfigError(
            f'job.dump_folder = "{folder}" cannot be written ({error.strerror}): name another folder'
        ) from error
    return lock


def _remove_if_empty(lock: FileLock) -> None:
    """Remove the folder of a lock that was acquired, if it holds nothing but the lock's file."""
    folder = Path(lock.lock_file).parent
    if lock.is_locked:
        _remove_empty_folders(folder)
    if lock.is_locked and [each.name for each in folder.iterdir()] == [".lock"]:
        os.remove(lock.lock_file)
        lock.release()
        folder.rmdir()


def _remove_empty_folders(folder: Path) -> None:
    """Remove the folders in it that hold nothing, such as torchtitan's for traces of collectives that failed."""
    for each in folder.glob("*/"):
        with contextlib.suppress(OSError):  # it holds something
            each.rmdir()


class _Console(logging.StreamHandler):
    """Lines that cannot be written, as on a full disk or into a closed pipe, are reported once and do not end a run."""

    reported = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.reported:
            self.reported = True
            with contextlib.suppress(OSError):
                print(f"the run's output cannot be written ({error.strerror}); the run goes on", file=sys.stderr)


def set_up_process(config: JobConfig) -> None:
    """Run as one process where torchrun did not start this, and let rank 0 alone speak."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        # Port 0: one that is free when the store opens it. One that was found free before may be another run's by then.
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    handler = _Console(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    speaks = os.environ["RANK"] == "0"
    # torchtitan logs to the root logger.
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger().setLevel(logging.INFO if config.metrics.verbose and speaks else logging.ERROR)
    logger.setLevel(logging.INFO if speaks else logging.ERROR)
    # Neither says anything about the run: float32 needs no autocast, and the data loader's call is torchdata's own.
    warnings.filterwarnings("ignore", message="In CPU autocast")
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")


def _parallelize(model: Llama, parallel_dims, job_config) -> nn.Module:
    if job_config.precision.qat != "none":
        prepare_qat(model, job_config.precision.qat)
    parallelize = titan.parallelize_moe if model.model_args.num_experts else titan.parallelize_llama
    try:
        model = parallelize(model, parallel_dims, job_config)
    except ValueError as error:
        key = "per_op_sac_force_recompute_mm_shapes_by_fqns"
        if key not in str(error):
            raise
        names = getattr(job_config.activation_checkpoint, key)
        raise ConfigError(f"activation_checkpoint.{key} = {json.dumps(names)}: name linear layers alone") from error
    compiles = job_config.compile.enable and "model" in job_config.compile.components
    for mixture in model.mixtures():
        mixture.experts.keep_buffers_whole()
        if compiles:
            mixture.compile_routing(job_config.compile.backend)
        if compiles and not parallel_dims.ep_enabled:  # which brings another number of rows in every step
            mixture.experts.compile_products(job_config.compile.backend)
    if parallel_dims.tp_enabled and model.tok_embeddings is not None:
        # It gives the result of a collective that is under way. As the input of a compiled block that would get a
        # gradient of another kind than it was given (torch 2.13: a Tensor where autograd expects a DTensor).
        model.get_submodule("tok_embeddings").register_forward_hook(lambda module, inputs, output: output.clone())
    training = job_config.training
    if training.loss_chunk_tokens and isinstance(model.output, Head):
        _set_up_head(model.output, job_config)
    autocasts = not (parallel_dims.fsdp_enabled or parallel_dims.tp_enabled or parallel_dims.pp_enabled)
    if autocasts and training.bf16_residual and training.mixed_precision_param == "bfloat16":
        model.get_submodule("tok_embeddings").register_forward_hook(lambda module, inputs, output: output.bfloat16())
        # Its weight is float32, and PyTorch's fused norm is for one dtype; inside of blocks the compiler fuses its own.
        model.get_submodule("norm").register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    if titan.device_type == "cpu":
        # gloo has no pre-multiplied sum, which FSDP2 reduces gradients with by default.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return model


def _set_up_head(head: Head, job_config) -> None:
    head.chunk = job_config.training.loss_chunk_tokens
    if job_config.compile.enable and "loss" in job_config.compile.components:
        head.compute = torch.compile(head.compute, backend=job_config.compile.backend)


def _optimizers(config: JobConfig, args: LlamaArgs) -> Callable:
    if args.num_experts:
        return titan.build_optimizers_with_moe_load_balancing
    if config.optimizer.moments == "float32":
        return titan.build_optimizers
    from recipes.optimizer import build_optimizers

    return functools.partial(build_optimizers, compiles=config.compile.enable)


def train_spec(config: JobConfig, args: LlamaArgs) -> titan.TrainSpec:
    """What torchtitan's Trainer builds this job from."""
    return titan.TrainSpec(
        model_cls=Llama,
        model_args={config.model.flavor: args},
        parallelize_fn=_parallelize,
        pipelining_fn=build_pipeline,
        build_optimizers_fn=_optimizers(config, args),
        build_lr_schedulers_fn=titan.build_lr_schedulers,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_tokenizer,
        build_loss_fn=build_loss,
        build_validator_fn=Validator,
        build_metrics_processor_fn=build_metrics,
    )
