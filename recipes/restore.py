"""Load a trained model from its run's folder in one process, without the trainer, however many ranks saved it.

The run's run.json describes the model (width, heads, RoPE base, recipe), and the run's folder has a copy of the
tokenizer. The weights come from the checkpoint, which is verified against its manifest and read by
torch.distributed.checkpoint, which joins the shards of all ranks.
"""

import json
import os
import re
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from configs.errors import ConfigError
from configs.loader import restored
from configs.schema import JobConfig
from configs.titan import TORCH_DTYPE_MAP
from models.llama import Llama, LlamaArgs
from recipes.check import model_args
from recipes.checkpoint import POINTER, SPARSITY, find_fault, what_failed
from recipes.schedule import resolve_phases
from recipes.sparsity import Sparsity, feed_forward_sparsity
from recipes.tokenizer import check_same_tokenizer

# Files of a tokenizer that torchtitan and transformers read; the folder may also hold a whole model.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
)

# Keys of [model] that a checkpoint's shapes do not determine, or determine only under other names.
FACTS = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "rope_theta", "norm_eps")
EXPERT_FACTS = ("num_experts", "top_k", "shared_expert")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint and its run."""

    folder: Path
    """`checkpoint/step-N`."""

    run: Path
    """The run's folder, which holds `run.json` and `tokenizer`."""

    config: JobConfig
    args: LlamaArgs

    @property
    def step(self) -> int:
        return int(self.folder.name.removeprefix("step-"))

    @property
    def tokenizer(self) -> Path:
        return self.run / "tokenizer"

    def autocast(self, device: torch.device, dtype: str | None = None) -> torch.autocast:
        """An autocast context for `dtype` (None: the run's mixed_precision_param); the weights stay float32."""
        wanted = TORCH_DTYPE_MAP[dtype or self.config.training.mixed_precision_param]
        return torch.autocast(device.type, wanted, enabled=wanted != torch.float32)

    def weights(self) -> dict[str, Tensor]:
        """The model's parameters by name, float32 on the CPU.

        Raises:
            ConfigError: the checkpoint does not hold the model that run.json describes.
        """
        try:
            with torch.device("meta"):
                model = Llama(self.args)
            state = {name: torch.empty(value.shape) for name, value in model.state_dict().items()}
        except RuntimeError as error:  # sizes that overflow
            raise self._another(error) from error
        self._load(state)
        return state

    @torch.no_grad()
    def model(self, device: torch.device | None = None, tokens: Tensor | None = None) -> tuple[Llama, Sparsity]:
        """The model in float32, dense and in evaluation mode, and the object that switches its FFNs.

        The state of the sparse phases (2:4 scales and centroids) is loaded from the checkpoint. A checkpoint from
        before the first sparse phase, or one that holds only the model, has none; then it is computed from `tokens`, as
        if the phase started at this step.

        Args:
            device: device of the model; None: the CPU.
            tokens: `[B, S]` int64, used to cluster neurons or tokens if the checkpoint has no clusters. If None, the
                FFNs of such a checkpoint can only run densely.

        Raises:
            ConfigError: the checkpoint does not hold the model that run.json describes.
        """
        with torch.device("meta"):
            model = Llama(self.args)
        model.to_empty(device=device or "cpu").init_weights()
        spans = resolve_phases(self.config.schedule.phases, self.config.training.steps)
        sparsity = Sparsity(self.config, model.feed_forwards(), [], spans)
        state = model.state_dict()
        if f"{SPARSITY}.prepared" in dcp.FileSystemReader(self.folder).read_metadata().state_dict_metadata:
            found = {SPARSITY: {"prepared": ""}}
            self._load(found)
            if sparsity.expect(found[SPARSITY]["prepared"]):  # False: the checkpoint has no sparse state to load
                state[SPARSITY] = sparsity
        self._load(state)
        first = next((span for span in spans if span.mode == "sparse"), None)
        if first is not None and not sparsity.prepared and tokens is not None:
            batch = tokens.to(device or "cpu")
            with self.autocast(batch.device):
                sparsity.enter(first.start + 1, lambda: model(batch))
        sparsity.run_as(None)
        return model.eval(), sparsity

    def _load(self, state: dict[str, Any]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(state, checkpoint_id=self.folder, no_dist=True)
        except (CheckpointException, RuntimeError, ValueError) as error:
            raise self._another(error) from error

    def _another(self, error: BaseException) -> ConfigError:
        return ConfigError(
            f"{self.folder} does not hold the model that {self.run / 'run.json'} describes "
            f"({what_failed(error)}): restore the run.json that the run wrote"
        )


def find_checkpoint(path: str) -> Checkpoint:
    """Find the checkpoint that a path names, and verify it.

    Args:
        path: a `checkpoint/step-N` folder; or a run's folder or its `checkpoint` folder, for the one `latest` names.

    Raises:
        ConfigError: the checkpoint or its run's run.json is missing or damaged.
    """
    given = Path(path)
    if not os.path.isdir(given):  # also of a name that is too long
        raise ConfigError(f"{path}: no such folder; name a run's folder or a checkpoint in it, such as step-100")
    given = given.resolve()
    run = next((folder for folder in (given, *given.parents[:2]) if (folder / "run.json").is_file()), None)
    if run is None:
        raise ConfigError(
            f"{path}: no run.json in this folder or the two above it, so the model is unknown: name a run's folder or "
            "a checkpoint in it"
        )
    config, vocab_size = _read_run(run)
    named = given != run and given.name.startswith("step-")
    if named and not re.fullmatch(r"step-\d+", given.name):
        raise ConfigError(f"{path}: a checkpoint's folder is named step-N when it is saved: rename it back")
    folder = given if named else _newest(run / config.checkpoint.folder)
    fault = find_fault(str(folder))
    if fault:
        others = ", ".join(sorted(str(other) for other in folder.parent.glob("step-*") if other != folder))
        raise ConfigError(f"{folder} is not usable ({fault}); beside it: {others or 'no other checkpoint'}")
    args = model_args(config)
    args.vocab_size = vocab_size
    if any(phase.mode == "sparse" for phase in config.schedule.phases):
        args.sparsity, args.dense_layers = feed_forward_sparsity(config, args.hidden_dim), config.schedule.dense_layers
    return Checkpoint(folder, run, config, args)


def _newest(folder: Path) -> Path:
    try:
        return folder / (folder / POINTER).read_text().strip()
    except FileNotFoundError:
        raise ConfigError(f"{folder / POINTER}: no such file, so the run has no complete checkpoint") from None
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            f"{folder / POINTER} is damaged: name a checkpoint itself, such as {folder}/step-100"
        ) from None


def _read_run(run: Path) -> tuple[JobConfig, int]:
    file = run / "run.json"
    try:
        values = json.loads(file.read_text())
        config, vocab_size = values["config"], int(values["vocabulary"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({type(error).__name__}: {error}): restore the file that the run wrote"
        ) from None
    if not isinstance(config, dict) or not 0 < vocab_size < 2**31:
        wrong = "config is no object" if not isinstance(config, dict) else f"vocabulary = {vocab_size}"
        raise ConfigError(f"{file} cannot be read ({wrong}): restore the file that the run wrote")
    return restored(config, str(file)), vocab_size


def copy_tokenizer(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copy a tokenizer's files, and no other files of its folder.

    Raises:
        ConfigError: the folder has no tokenizer files.
    """
    names = [name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
    if not names:
        raise ConfigError(f"{source} holds no tokenizer: copy the tokenizer.json of the model's training into it")
    os.makedirs(target, exist_ok=True)
    if os.path.samefile(source, target):
        return
    for name in names:  # a copy that fails leaves the file that was there
        unfinished = Path(target) / f".{name}.unfinished"
        shutil.copyfile(Path(source) / name, unfinished)
        os.replace(unfinished, Path(target) / name)
    for name in set(TOKENIZER_FILES) - set(names):
        (Path(target) / name).unlink(missing_ok=True)  # left over from another tokenizer


def model_facts(args: LlamaArgs) -> dict[str, Any]:
    """The keys of [model] that define the model, whatever its flavor, with the values of `args`."""
    name = "llama_swiglu" if args.swiglu else "llama_moe_relu2" if args.num_experts else "llama_relu2"
    scaling = asdict(args.rope_scaling_args)
    return {
        "name": name,
        **{key: getattr(args, key) for key in ((*FACTS, *EXPERT_FACTS) if args.num_experts else FACTS)},
        "n_kv_heads": args.n_kv_heads or args.n_heads,
        "rope_scaling": {"factor": scaling.pop("scaling_factor"), **scaling},
    }


def check_initial_model(config: JobConfig, args: LlamaArgs) -> None:
    """Refuse to start from a checkpoint of another model, if the checkpoint has a run.json to compare with.

    Different shapes would fail later with a less clear message; different heads or RoPE base would not fail at all.

    Raises:
        ConfigError: the first key whose value differs.
    """
    path = config.checkpoint.initial_load_path
    if not path or not (Path(path) / ".." / ".." / "run.json").is_file():
        return
    run = Path(path).resolve().parent.parent
    other, vocab_size = _read_run(run)
    found = model_facts(model_args(other))
    for key, value in model_facts(args).items():
        if value != found[key]:
            raise ConfigError(
                f"checkpoint.initial_load_path = {path} is a model of {key} = {found[key]}, but model.{key} = {value}: "
                f"set it to {found[key]}, or name a checkpoint of this model"
            )
    if vocab_size != args.vocab_size:
        raise ConfigError(
            f"checkpoint.initial_load_path = {path} has a vocabulary of {vocab_size} tokens, but the tokenizer has "
            f"{args.vocab_size}: set tokenizer.path = {run / 'tokenizer'}"
        )
    check_same_tokenizer(config.model.hf_assets_path, run, "checkpoint.initial_load_path")
