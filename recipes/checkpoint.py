"""Checkpoints that survive crashes and disk damage: the data is written first, then a manifest, then a pointer.

torchtitan's CheckpointManager writes a step's folder with DCP (one or more `__<rank>_<i>.distcp` files a rank, then
`.metadata`) and resumes from the folder of the highest step, without verifying the files. This module commits a save
in three steps, each durable before the next one starts:

    step-120/*              data, written by all ranks
    step-120/manifest.json  size and crc32 of every file, written by rank 0 once all the data is there
    latest                  holds "step-120"; replaced atomically by rank 0 once the manifest is there

A folder without a manifest is a save that did not finish, a folder that does not match its manifest is damaged, and
`latest` always names a complete checkpoint, whenever the run is killed. In an asynchronous save the last two steps run
in the upload thread, and the save is done only after them.

A resume tries the step folders from the newest to the oldest and takes the first that matches its manifest. Rank 0
chooses and broadcasts the step, so all ranks resume from the same one. Skipped folders are renamed `broken-<step>` and
kept. The manifest only verifies that the bytes are those that were written; DCP checks whether they fit the model. If
they do not fit, an older checkpoint would not fit either, so this is an error and never a fallback.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from configs.errors import ConfigError, first_line, lost_data_process
from configs.titan import AsyncMode, CheckpointHooks
from recipes.atomic import sync, write_atomically
from recipes.data import Loader

MANIFEST = "manifest.json"
POINTER = "latest"
DATALOADER = "dataloader"
SPARSITY = "sparsity"  # state of the sparse FFNs: 2:4 scales, centroids (`recipes.sparsity.Sparsity`)
BAD_BATCHES = "bad_batches"  # how many batches were skipped, `recipes.trainer.BadBatches`
CHUNK_BYTES = 4 << 20
INCOMPLETE = f"no {MANIFEST}: the run ended before it was saved entirely"

logger = logging.getLogger("sparsetitan")
T = TypeVar("T")


class SafeCheckpointManager(CheckpointHooks):
    """torchtitan's checkpoint manager with verified checkpoints, an atomic pointer and a fallback.

    Takes the arguments of CheckpointManager.
    """

    folder: str
    save_future: Future | None = None  # close() also runs on an object whose construction failed

    def __init__(self, *args, **kwargs) -> None:
        config = kwargs.get("checkpoint_config") or args[5]
        if config.enable and config.keep_latest_k == 1:
            raise ConfigError(
                "checkpoint.keep_latest_k = 1 leaves nothing to fall back to; set 2 or more, or 0 to keep all"
            )
        self._saving = ""  # folder of the latest save that was started
        self._resumable = ""  # folder of the latest save, if it holds more than the model
        super().__init__(*args, **kwargs)

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Future | AsyncSaveResponse | None:
        """Save and commit; see CheckpointManager.dcp_save. A returned future is done once `latest` is updated."""
        self._saving, self._resumable = checkpoint_id, ""
        try:
            _on_rank0(lambda: self._make_room(checkpoint_id))
            saved = super().dcp_save(state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf)
            if async_mode == AsyncMode.DISABLED:
                _on_rank0(lambda: self._commit(checkpoint_id))
        except (OSError, CheckpointException) as error:
            if dist.get_rank() == 0:
                logger.error("saving %s failed: %s", checkpoint_id, what_failed(error))
            raise self._save_error(what_failed(error)) from error
        if "optimizer" in state_dict:
            self._resumable = checkpoint_id
        if isinstance(saved, AsyncSaveResponse):
            return AsyncSaveResponse(saved.staging_completion, self._commit_after(saved.upload_completion))
        if isinstance(saved, Future):
            return self._commit_after(saved)
        return None

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Load; see CheckpointManager.dcp_load. A checkpoint from before the first sparse phase fits any recipe."""
        if DATALOADER in state_dict and not from_hf and DATALOADER not in _parts(checkpoint_id):
            raise ConfigError(
                f"{checkpoint_id} holds the model alone (checkpoint.last_save_model_only = true), so the run cannot go "
                "on from it: start another run with checkpoint.initial_load_path"
            )
        if isinstance(loader := state_dict.get(DATALOADER), Loader) and not from_hf:
            saved = {DATALOADER: {"world_size": 0}}
            dcp.load(saved, checkpoint_id=checkpoint_id)
            loader.expect(saved[DATALOADER]["world_size"])
        if SPARSITY in state_dict and not from_hf:
            found = {SPARSITY: {"prepared": ""}}
            dcp.load(found, checkpoint_id=checkpoint_id)
            table = found[SPARSITY]["prepared"]
            sparsity = self.states[SPARSITY]
            state_dict = {key: value for key, value in state_dict.items() if key != SPARSITY}
            if sparsity.expect(table):
                state_dict[SPARSITY] = sparsity
            elif table and dist.get_rank() == 0:  # an empty table: no sparse phase has begun
                logger.info("the checkpoint was made with another router: the next sparse step prepares its FFNs anew")
        # Older versions did not count them.
        if BAD_BATCHES in state_dict and not from_hf and BAD_BATCHES not in _parts(checkpoint_id):
            state_dict = {key: value for key, value in state_dict.items() if key != BAD_BATCHES}
        super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)

    @torch.no_grad()
    def load(self, step: int = -1) -> bool:
        """Load a verified checkpoint, the same on all ranks, into the run's state.

        Args:
            step: the step to load; -1 takes the newest usable one, or else checkpoint.initial_load_path.

        Returns:
            Whether anything was loaded.
        """
        if not self.enable:
            return super().load(step)
        try:
            step = _on_rank0(lambda: self._newest_usable_step() if step == -1 else self._usable_step(step))
        except OSError as error:
            raise ConfigError(
                f"{error.filename or self.folder} cannot be used ({error.strerror}): repair it or move it away, then "
                "run the same command again"
            ) from error
        folder, reason, cause = self.folder, None, None
        try:
            if step == -1:
                self.folder = ""  # torchtitan looks at initial_load_path only if its own folder does not exist
            loaded = super().load(step)
        except (torch.OutOfMemoryError, dist.DistError):
            raise
        except (Exception, CheckpointException) as error:  # the latter is a BaseException
            reason, cause = what_failed(error), error
        finally:
            self.folder = folder
        reason = _first_of_all_ranks(reason)
        if isinstance(cause, ConfigError):
            raise cause
        if reason:
            raise self._load_error(step, reason) from cause
        if loaded and dist.get_rank() == 0:
            logger.info(
                "loaded %s",
                self.folder_of(step) if step >= 0 else self.initial_load_path,
            )
        return loaded

    def save_now(self, step: int) -> None:
        """Save everything needed to resume from this step, and wait for it. A no-op if the last save is of this step.

        Args:
            step: the step that the run has just finished.
        """
        if not self.enable or self.load_only:
            if dist.get_rank() == 0:
                key = "load_only = true" if self.enable else "enable = false"
                logger.warning("step %d is not saved: checkpoint.%s", step, key)
            return
        with contextlib.suppress(ConfigError):  # reported when it failed; this save may still succeed
            self.wait_for_save()
        checkpoint_id = self.folder_of(step)
        if self._resumable != checkpoint_id:
            self.dcp_save(self.resumable_state(), checkpoint_id, AsyncMode.DISABLED)

    def close(self) -> None:
        """Wait for a save in progress, so that `latest` is updated before the process ends. Not a collective."""
        if self.save_future is not None:
            self.save_future.exception()  # waits; a failure was reported when it happened
            self.save_future = None
        super().close()

    def wait_for_save(self) -> None:
        if self.save_future is None:
            return
        error = self.save_future.exception()
        self.save_future = None
        reason = _first_of_all_ranks(what_failed(error) if error else None)
        if reason:
            self._resumable = ""
            raise self._save_error(reason) from error

    def has_begun(self) -> bool:
        """Whether the run's folder has a complete checkpoint to resume from."""
        return self.enable and any(self._is_complete(step) for step in self._steps())

    def newest(self) -> str:
        """The folder of the newest complete checkpoint, or an empty string if there is none."""
        steps = [step for step in self._steps() if self._is_complete(step)] if self.enable else []
        return self.folder_of(steps[0]) if steps else ""

    # Saving, on rank 0.

    def _make_room(self, checkpoint_id: str) -> None:
        """Remove an older save of the same step, after pointing `latest` at another checkpoint if it named this one."""
        if not os.path.isdir(checkpoint_id):
            return
        name = os.path.basename(checkpoint_id)
        if self._read_pointer() == name:
            others = [s for s in self._steps() if f"step-{s}" != name and self._is_complete(s)]
            self._move_pointer(others[0] if others else -1)
        shutil.rmtree(self._rename(int(name.removeprefix("step-")), "purged"))

    def _commit(self, checkpoint_id: str) -> None:
        write_manifest(checkpoint_id)
        sync(os.path.dirname(self.folder))  # the name of the folder of checkpoints, at the first save
        self._move_pointer(int(os.path.basename(checkpoint_id).removeprefix("step-")))
        logger.info("saved %s", checkpoint_id)
        self.delete_stale()

    def _commit_after(self, upload: Future) -> Future:
        """Return a future that is done once the upload is done and, on rank 0, committed."""
        committed: Future = Future()
        checkpoint_id, is_rank0 = self._saving, dist.get_rank() == 0

        def commit(upload: Future) -> None:
            try:
                upload.result()
                if is_rank0:
                    self._commit(checkpoint_id)
            except BaseException as error:  # runs in DCP's thread, where an exception would be lost
                if is_rank0:
                    logger.error("saving %s failed: %s", checkpoint_id, what_failed(error))
                committed.set_exception(error)
            else:
                committed.set_result(None)

        upload.add_done_callback(commit)
        return committed

    def delete_stale(self) -> None:
        """Delete all but the newest keep_latest_k complete checkpoints and the one that `latest` names. On rank 0."""
        if self.keep_latest_k == 0:
            return
        complete = [step for step in self._steps() if self._is_complete(step)]
        for step in complete[self.keep_latest_k :]:
            if f"step-{step}" != self._read_pointer():
                # Deleting takes time, and a half-deleted step-<N> would look like a damaged checkpoint.
                self._rename(step, "purged")
        for name in self._names():
            if name.startswith("purged-"):
                self.purge_queue.put(os.path.join(self.folder, name))

    def _save_error(self, reason: str) -> ConfigError:
        if "DataLoader worker" in reason:  # PyTorch raises its death in whatever the rank is doing
            return lost_data_process("a signal")
        return ConfigError(
            f"checkpoint {self._saving} could not be saved: {reason}. Free space or repair the folder, then run the "
            f"same command again: it resumes from {self._read_pointer() or 'the start, as no checkpoint is complete'}"
        )

    # Choosing what to load, on rank 0.

    def _usable_step(self, step: int) -> int:
        """Verify the step that checkpoint.load_step asks for, and no other."""
        complete = [s for s in self._steps() if self._is_complete(s)]
        available = "available: " + (", ".join(map(str, sorted(complete))) or "none")
        path = self.folder_of(step)
        if not os.path.isdir(path):
            raise ConfigError(f"checkpoint.load_step = {step}: there is no {path}; {available}")
        fault = find_fault(path)
        if fault:
            raise ConfigError(f"checkpoint.load_step = {step}: {path} is not usable ({fault}); {available}")
        if complete[0] > step:
            logger.warning(
                "loading step-%d although %s has newer checkpoints up to step-%d: without load_step a run resumes "
                "from the newest, so move the newer ones away to continue from this step",
                *(step, self.folder, complete[0]),
            )
        return step

    def _newest_usable_step(self) -> int:
        """Find the newest step that matches its manifest and rename the newer ones; -1 if there is none."""
        steps, named = self._steps(), self._read_pointer()
        if named and named not in [f"step-{s}" for s in steps]:
            logger.warning("%s names %r, which does not exist", os.path.join(self.folder, POINTER), named)
        faults: dict[int, str] = {}
        usable = -1
        for step in steps:
            fault = find_fault(self.folder_of(step))
            if fault is None:
                usable = step
                break
            faults[step] = fault

        if usable == -1 and any(self._is_complete(step) for step in faults):
            found = "; ".join(f"step-{step}: {fault}" for step, fault in faults.items())
            raise ConfigError(
                f"no checkpoint in {self.folder} is usable ({found}). Restore one from a backup, or remove the "
                "folder to start over"
            )
        if usable == -1:
            self._check_initial_load_path()
        if not self.load_only and named != (f"step-{usable}" if usable >= 0 else ""):
            self._move_pointer(usable)
        instead = f"step-{usable}" if usable >= 0 else self.initial_load_path or "step 0"
        for step, fault in faults.items():
            state = "damaged" if self._is_complete(step) else "incomplete"
            path = self.folder_of(step)
            kept = path if self.load_only else self._rename(step, "broken")
            logger.warning("%s is %s (%s): using %s instead; kept as %s", path, state, fault, instead, kept)
        return usable

    def _check_initial_load_path(self) -> None:
        path = self.initial_load_path
        if not path:
            return
        if not os.path.isdir(path):
            raise ConfigError(f"checkpoint.initial_load_path = {path}: no such folder; name a checkpoint's own folder")
        if os.path.exists(os.path.join(path, MANIFEST)):
            fault = find_fault(path)
        else:  # not saved by this module, so there is no manifest
            fault = None if os.path.isfile(os.path.join(path, ".metadata")) else "no .metadata"
        if fault:
            raise ConfigError(
                f"checkpoint.initial_load_path = {path}: not a usable checkpoint ({fault}); name a checkpoint's own "
                "folder, such as outputs/run/checkpoint/step-100"
            )

    def _load_error(self, step: int, reason: str) -> ConfigError:
        if step >= 0:
            return ConfigError(
                f"checkpoint {self.folder_of(step)} does not fit this configuration: {reason}. Resume with "
                "the run's own configuration (see its run.json), or start another run with another job.dump_folder"
            )
        return ConfigError(
            f"checkpoint.initial_load_path = {self.initial_load_path} does not fit this configuration: {reason}. Name "
            "a checkpoint of the same model, or set [model] and [tokenizer] to the checkpoint's"
        )

    # Files in the checkpoint folder.

    def _names(self) -> list[str]:
        return os.listdir(self.folder) if os.path.isdir(self.folder) else []

    def _steps(self) -> list[int]:
        """Steps that have a folder, complete or not, newest first."""
        steps = [name for name in self._names() if re.fullmatch(r"step-(0|[1-9]\d*)", name)]
        return sorted((int(name.removeprefix("step-")) for name in steps), reverse=True)

    def _is_complete(self, step: int) -> bool:
        return os.path.exists(os.path.join(self.folder_of(step), MANIFEST))

    def _read_pointer(self) -> str:
        try:
            with open(os.path.join(self.folder, POINTER), errors="replace") as file:
                return file.read(256).strip()
        except FileNotFoundError:
            return ""

    def _move_pointer(self, step: int) -> None:
        """Make `latest` name this step; -1 removes it."""
        path = os.path.join(self.folder, POINTER)
        if step >= 0:
            write_atomically(path, f"step-{step}")
        elif os.path.exists(path):
            os.remove(path)

    def _rename(self, step: int, kind: str) -> str:
        """Rename step-<N> to <kind>-<N>, or <kind>-<N>-2 and so on if that is taken, and return the new path."""
        path = first = os.path.join(self.folder, f"{kind}-{step}")
        count = 1
        while os.path.exists(path):
            count += 1
            path = f"{first}-{count}"
        os.rename(self.folder_of(step), path)
        return path


def _parts(folder: str) -> set[str]:
    """What a checkpoint holds: the first parts of its entries' names, such as "optimizer"."""
    return {name.split(".")[0] for name in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata}


def write_manifest(folder: str) -> None:
    """Record the size and crc32 of every file in a checkpoint's folder."""
    names = sorted(
        os.path.relpath(os.path.join(parent, file), folder) for parent, _, files in os.walk(folder) for file in files
    )
    sums = _crc32_of_files([os.path.join(folder, name) for name in names])
    files = {
        name: {"size": os.path.getsize(os.path.join(folder, name)), "crc32": crc32}
        for name, crc32 in zip(names, sums, strict=True)
    }
    write_atomically(os.path.join(folder, MANIFEST), json.dumps({"files": files}, indent=1))


def find_fault(folder: str) -> str | None:
    """Compare a checkpoint's folder with its manifest.

    Returns:
        A description of the first fault, or None if all files match.
    """
    try:
        with open(os.path.join(folder, MANIFEST)) as file:
            files = json.load(file)["files"]
            expected = {name: (int(entry["size"]), int(entry["crc32"])) for name, entry in files.items()}
    except FileNotFoundError:
        return INCOMPLETE
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {what_failed(error)}"
    try:
        for name, (size, _) in expected.items():  # sizes first: cheaper than checksums
            path = os.path.join(folder, name)
            if not os.path.isfile(path):
                return f"{name} is missing"
            if os.path.getsize(path) != size:
                return f"{name} has {os.path.getsize(path)} bytes instead of {size}"
        sums = _crc32_of_files([os.path.join(folder, name) for name in expected])
        for (name, (_, crc32)), found in zip(expected.items(), sums, strict=True):
            if found != crc32:
                return f"{name} has other contents than were saved: crc32 {found:08x} instead of {crc32:08x}"
    except OSError as error:
        return f"a file cannot be read: {error}"
    return None


def _crc32_of_files(paths: list[str]) -> list[int]:
    # zlib and read() release the GIL, so threads hash files in parallel.
    with ThreadPoolExecutor(max_workers=8, thread_name_prefix="crc32") as pool:
        return list(pool.map(_crc32_of_file, paths))


def _crc32_of_file(path: str) -> int:
    crc32 = 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32


def _on_rank0(work: Callable[[], T]) -> T:
    """Run `work` on rank 0, and return its result or raise its error on every rank. A collective."""
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [work()]
        except (ConfigError, OSError) as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _first_of_all_ranks(reason: str | None, group: dist.ProcessGroup | None = None) -> str | None:
    """Return the reason of the lowest rank that has one, on every rank. A collective."""
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason, group)
    return next((r for r in reasons if r), None)


@contextlib.contextmanager
def fail_together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Raise a ConfigError of one rank on all: the others would wait for it in their next collective. A collective.

    Args:
        group: of all ranks; None: the default one.
    """
    error: ConfigError | None = None
    try:
        yield
    except ConfigError as raised:
        error = raised
    if reason := _first_of_all_ranks(str(error) if error else None, group):
        raise error or ConfigError(reason)


def what_failed(error: BaseException) -> str:
    """An error's type and first line; for a CheckpointException, those of the error of the first rank that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        error = error.failures[min(error.failures)][0]
    kind, line = type(error).__name__, first_line(error)
    return line if line == kind else f"{kind}: {line}"
