"""What a run shows and keeps: one row a logged step, the same in TensorBoard, in `metrics.jsonl` and on the console.

With metrics.enable_wandb also in Weights & Biases, whose own variables (WANDB_PROJECT, WANDB_MODE, ...) hold; a resumed
run goes on as the run that it was there.

Columns (a row has those that apply):

    step, phase, keep (where it is the phase's own), loss, lr, grad_norm, tokens (seen so far, all ranks)
    skipped_batches   so far, with training.skip_bad_batches; a skipped one has null where a number is not finite
    tokens_per_second (all ranks), step_seconds
    peak_memory_gib   most that a process held of its GPU's memory so far, of all ranks: what a GPU must have
    peak_active_gib   most that tensors held since the row before, of all ranks: what the phase needs
    switch_seconds    entering the phase since the row before: clustering, fitting the scales
    graphs_compiled   graphs that torch.compile made since the row before: as a kind of phase begins, then none
    mfu           model FLOPs utilisation in percent, dense-equivalent: FLOPs of the dense model over time and peak
    mfu_executed  the same with the FLOPs that the backend executed, recomputation for checkpointing not counted
    val_loss, val_bpb                 dense inference, comparable in all phases and with a dense model
    val_loss_sparse, val_bpb_sparse   with the pattern, in a sparse phase
    val_loss_quantised, val_bpb_quantised   with rounded weights, in the last phase with precision.qat
    nonzero_share, energy_kept, router_balance, flip_rate   and each by layer, `layers/0/nonzero_share`
    expert_balance, expert_load_max   of a mixture of experts, in dense inference (`models.experts.expert_balance`);
                                      in the training step train_expert_balance, train_expert_load_max

The peak is that of the accelerator's dense bf16 tensor cores, `peak_flops` in run.json; where it is not known, as for a
CPU, there is no MFU.
"""

import json
import logging
import math
import os
import secrets
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.errors import ConfigError, writing
from configs.schema import JobConfig
from configs.titan import MetricsProcessor, ParallelDims, TensorBoardLogger, device_type, get_peak_flops
from recipes.atomic import sync, write_atomically
from recipes.data import num_rows
from recipes.progress import duration
from recipes.schedule import Kind, Span

logger = logging.getLogger("sparsetitan")


class Metrics(MetricsProcessor):
    """torchtitan's metrics processor with this project's row. Constructed by torchtitan's Trainer."""

    job_config: JobConfig

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims, tag: str | None = None) -> None:
        job_config.metrics.disable_color_printing |= not sys.stdout.isatty()
        self.writes = dist.get_rank() == 0
        self.folder = Path(job_config.job.dump_folder)
        wandb = job_config.metrics.enable_wandb and self.writes
        if wandb:
            with writing("wandb_run", str(self.folder)):
                _name_wandb_run(job_config)
        # Before a writer opens one of its own.
        self._events = list((self.folder / job_config.metrics.save_tb_folder).rglob("*tfevents*"))
        # TensorBoard's writer makes its file at once: it is made for the first row, so that a failed start has none.
        metrics, self.tag, self.tensorboard = job_config.metrics, tag, None
        enabled, metrics.enable_tensorboard = metrics.enable_tensorboard, False
        super().__init__(job_config, parallel_dims, tag)
        metrics.enable_tensorboard = enabled
        self._shown = threading.excepthook
        threading.excepthook = self._show_unless_reported
        if wandb and not _wandb_runs():
            raise ConfigError(
                "metrics.enable_wandb = true, but Weights & Biases did not start, as said above: run `wandb login`, "
                "set WANDB_MODE=offline, or set the key to false"
            )
        # For a device it does not know torchtitan falls back to the A100's peak.
        known = "A100" in self.device_memory_monitor.device_name or self.gpu_peak_flops != get_peak_flops("A100")
        self.peak_flops = self.gpu_peak_flops if known else None
        self.file = self.folder / "metrics.jsonl"
        self.steps_since_last_log = 0
        self.log_next = False
        self.switch_seconds = 0.0
        self.graphs_compiled = 0
        self.row: dict[str, Any] = {}  # the newest
        self.time_left = TimeLeft()
        # FLOPs executed over those of the dense model, by kind of phase; the trainer knows what its backend executes.
        self.executed_share: dict[Kind, float] = {}

    def should_log(self, step: int) -> bool:
        """Whether this step gets a row: as torchtitan decides, and where the trainer asks for one."""
        return self.log_next or super().should_log(step)

    def start(self, step: int, spans: Sequence[Span]) -> None:
        """
        Begin after `step`, resumed or 0: rows and TensorBoard's points of steps that will be run again are dropped,
        those of an earlier run are set aside.

        Args:
            step: the last step that was done before.
            spans: the run's phases.
        """
        self.time_last_log = time.perf_counter()
        self.time_left = TimeLeft(spans)
        if not self.writes:
            return
        with writing("TensorBoard's file", str(self.folder)):
            for events in self._events:
                _set_aside(events) if step == 0 else _keep_events(events, step)
        with writing(self.file.name, str(self.folder)):
            self._start_file(step)

    def _start_file(self, step: int) -> None:
        if not self.file.exists():
            return
        if step == 0:
            number = 1
            while (aside := self.file.with_name(f"metrics-{number}.jsonl")).exists():
                number += 1
            os.replace(self.file, aside)
            logger.info(f"{self.file} is of an earlier run: kept as {aside.name}")
            return
        kept = [line for line in self.file.read_text(errors="replace").splitlines() if _step_of(line) <= step]
        write_atomically(self.file, "".join(line + "\n" for line in kept))

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Begin the row of a step; called by torchtitan at the end of its training step, on all ranks."""
        if (pipeline := self.parallel_dims.get_optional_mesh("pp")) is not None:  # the last stage has the loss
            losses = torch.tensor([global_avg_loss, global_max_loss], dtype=torch.float64, device=device_type)
            dist.broadcast(losses, group=pipeline.get_group(), group_src=pipeline.size() - 1)
            global_avg_loss, global_max_loss = losses.tolist()
        seconds = time.perf_counter() - self.time_last_log
        # Counted a rank; over the ranks that share a batch it is the same tokens.
        tokens_per_second = self.ntokens_since_last_log / seconds / self.parallel_dims.non_data_parallel_size
        replicas = self.parallel_dims.dp_replicate * self.parallel_dims.dp_shard
        # torchtitan's own count is a rank's, which is wrong where a run resumes on other ranks or shares sequences out.
        tokens = step * num_rows(self.job_config, replicas) * self.job_config.training.seq_len
        stats = self.device_memory_monitor.get_peak_stats()
        # Ranks differ: a stage of a pipeline, or a shard that is one row longer. The fullest one decides what fits.
        memory = torch.tensor([stats.max_reserved_gib, stats.max_active_gib], device=device_type)
        if dist.get_world_size() > 1:
            dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        reserved, active = memory.tolist()
        self.row = {
            "step": step,
            "loss": float(global_avg_loss),
            "lr": (extra_metrics or {}).get("lr"),
            "grad_norm": grad_norm,
            "tokens": tokens,
            "tokens_per_second": tokens_per_second * dist.get_world_size(),
            "step_seconds": seconds / (self.steps_since_last_log + 1),  # and this one
            "peak_memory_gib": reserved,
            "peak_active_gib": active,
        }
        if self.peak_flops is not None:
            self.row["mfu"] = 100 * self.num_flops_per_token * tokens_per_second / self.peak_flops

    def finish(self, span: Span, extra: dict[str, float]) -> None:
        """Complete the row with what was measured after the training step, and write it everywhere.

        Args:
            span: the step's phase.
            extra: what was measured, by the names of the row.
        """
        keep = {} if span.keep is None else {"keep": span.keep}
        row = self.row = {"step": self.row["step"], "phase": span.mode, **keep, **self.row, **extra}
        row |= {"switch_seconds": self.switch_seconds, "graphs_compiled": self.graphs_compiled}
        if "mfu" in row:
            row["mfu_executed"] = row["mfu"] * self.executed_share[span.kind]
        if self.writes:
            # JSON has no NaN: a validation loss of that is written as null.
            plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
            with writing(self.file.name, str(self.folder)), self.file.open("a") as file:
                file.write(json.dumps(plain, allow_nan=False) + "\n")
        numbers = {key: value for key, value in row.items() if key != "phase"} | {"sparse": span.mode == "sparse"}
        self.logger.log(numbers, row["step"])
        with writing("TensorBoard's file", str(self.folder)):
            if tensorboard := self._open_tensorboard():
                tensorboard.log(numbers, row["step"])
        seconds = time.perf_counter() - self.time_last_log - self.switch_seconds
        self.time_left.add(span.kind, self.steps_since_last_log, seconds, compiled=self.graphs_compiled > 0)
        logger.info(self._line(row))
        self.ntokens_since_last_log = 0
        self.steps_since_last_log = 0
        self.switch_seconds = 0.0
        self.graphs_compiled = 0
        self.data_loading_times.clear()
        self.time_last_log = time.perf_counter()
        self.device_memory_monitor.reset_peak_stats()

    def sync(self) -> None:
        """Make the rows of `metrics.jsonl` durable: a checkpoint must not outlive the rows before it.

        Raises:
            ConfigError: on rank 0, where the disk is full.
        """
        if self.writes and self.file.exists():
            with writing(self.file.name, str(self.folder)):
                sync(self.file)
                sync(self.folder)

    def close(self) -> None:
        """Write what TensorBoard and W&B have not yet.

        Raises:
            ConfigError: the disk is full.
        """
        super().close()
        try:
            if self.tensorboard is not None:
                with writing("TensorBoard's file", str(self.folder)):
                    self.tensorboard.close()
        finally:
            threading.excepthook = self._shown

    def _show_unless_reported(self, error: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread fails on a full disk, and its next call raises that again: no traceback beside it."""
        from_tensorboard = type(error.thread).__module__.startswith("tensorboard.")
        if not (from_tensorboard and isinstance(error.exc_value, OSError)):
            self._shown(error)

    def _open_tensorboard(self) -> TensorBoardLogger | None:
        """The writer of TensorBoard's points; None where this rank writes none."""
        metrics = self.job_config.metrics
        if self.tensorboard is None and metrics.enable_tensorboard and (self.writes or metrics.save_for_all_ranks):
            folder = self.folder / metrics.save_tb_folder / time.strftime("%Y%m%d-%H%M")
            if metrics.save_for_all_ranks:
                folder /= f"rank_{dist.get_rank()}"
            self.tensorboard = TensorBoardLogger(str(folder), self.tag)
        return self.tensorboard

    def _line(self, row: dict[str, Any]) -> str:
        """A row as one console line."""
        color, steps = self.color, self.job_config.training.steps
        tint = color.cyan if row["phase"] == "sparse" else color.green
        parts = [
            f"step {row['step']:>{len(str(steps))}}/{steps} {tint}{row['phase']:6}{color.reset}",
            f"loss {row['loss']:.4f}",
            f"lr {row['lr']:.1e}",
            f"{short(row['tokens_per_second'])} tok/s",
            f"{row['peak_memory_gib']:.1f} GiB",
        ]
        if "mfu" in row:
            parts.append(f"mfu {row['mfu']:.0f}%")
        if "val_loss" in row:
            other = f" ({row['val_loss_sparse']:.4f} sparse)" if "val_loss_sparse" in row else ""
            if "val_loss_quantised" in row:
                other = f" ({row['val_loss_quantised']:.4f} {self.job_config.precision.qat})"
            parts.append(f"{color.yellow}val {row['val_loss']:.4f}{other} {row['val_bpb']:.3f} bpb{color.reset}")
        if row["graphs_compiled"]:
            parts.append(f"{row['graphs_compiled']} graphs compiled")
        parts.append(f"{duration(self.time_left.after(row['step']))} left")
        return "  ".join(parts)


class TimeLeft:
    """Estimates how long the rest of a run takes, from the mean time of its steps so far, by kind of phase.

    The time of validations and of saves between two rows counts as that of the steps between them. The first row and
    rows in which graphs were compiled count only as long as there is no other.

    Args:
        spans: the run's phases.
    """

    def __init__(self, spans: Sequence[Span] = ()) -> None:
        self._spans = spans
        # By kind of phase, and whether the interval is representative.
        self._steps: Counter[tuple[Kind, bool]] = Counter()
        self._seconds: defaultdict[tuple[Kind, bool], float] = defaultdict(float)

    def add(self, kind: Kind, steps: int, seconds: float, compiled: bool = False) -> None:
        """Count an interval between two rows of a kind of phase."""
        steady = not compiled and bool(self._steps)
        self._steps[kind, steady] += steps
        self._seconds[kind, steady] += seconds

    def after(self, step: int) -> float:
        """Seconds that the steps after this one are expected to take.

        A kind not seen yet is as slow as the others of its mode, and a mode not seen yet as the other.
        """
        return sum(max(0, span.stop - max(span.start, step)) * self._step_seconds(span.kind) for span in self._spans)

    def _step_seconds(self, kind: Kind) -> float:
        for steady in (True, False):
            seen = [each for each, is_steady in self._steps if is_steady == steady]
            for alike in ([kind] if kind in seen else [], [each for each in seen if each[0] == kind[0]], seen):
                if steps := sum(self._steps[each, steady] for each in alike):
                    return sum(self._seconds[each, steady] for each in alike) / steps
        return 0.0


def _name_wandb_run(config: JobConfig) -> None:
    """Let W&B continue the run that this folder's checkpoints are of; torchtitan's logger leaves that to variables."""
    folder = Path(config.job.dump_folder)
    file, resumes = folder / "wandb_run", any((folder / config.checkpoint.folder).glob("step-*"))
    if not (resumes and file.exists()):
        file.write_text(secrets.token_hex(4))
    os.environ.setdefault("WANDB_PROJECT", "sparsetitan")
    os.environ.setdefault("WANDB_RUN_ID", file.read_text())
    os.environ.setdefault("WANDB_RESUME", "allow")


def _wandb_runs() -> bool:
    """Whether W&B has a run; torchtitan only logs why it has none, and trains without."""
    import wandb

    return wandb.run is not None


def _set_aside(events: Path) -> None:
    """Rename a file of TensorBoard's events so that TensorBoard does not find it: it is of an earlier run."""
    os.replace(events, events.with_name(events.name.replace("tfevents", "earlier-run")))


def _keep_events(events: Path, last_step: int) -> None:
    """Drop the events of later steps from a file of TensorBoard's, and a last one that was cut off by a kill."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    records = list(RawEventFileLoader(str(events)).Load())
    kept = [record for record in records if Event.FromString(record).step <= last_step]
    if len(kept) == len(records):
        return
    temporary = events.with_name("rewritten.tmp")
    with temporary.open("wb") as file:
        writer = RecordWriter(file)
        for record in kept:
            writer.write(record)
    os.replace(temporary, events)


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for a line that was cut off or damaged, which is not kept."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def short(number: float) -> str:
    """A count as 812, 3.3k or 1.50M."""
    return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number / 1e3:.1f}k" if number >= 1e3 else f"{number:.0f}"


def build_metrics(job_config: JobConfig, parallel_dims: ParallelDims, model_args=None, tag=None) -> Metrics:
    """torchtitan's hook for a metrics processor of one's own."""
    return Metrics(job_config, parallel_dims, tag)
