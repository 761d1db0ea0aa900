"""Every key of a configuration and of a recipe: one dataclass a TOML section, the meaning under each field.

A configuration (`configs/*.toml`) is one complete job: model, data, training, parallelism, checkpoints, metrics, and
the recipe's file. A recipe (`recipes/*.toml`) says what is sparse and when, whatever the model: the sections
`schedule`, `weights`, `activations`, `router` and `precision`. Sections that torchtitan has keep its names and keys;
this file adds to them and changes a few defaults.

Bounds stand in a field's metadata, `_in(low, high)`, both ends included.
"""

from dataclasses import dataclass, field
from typing import Literal

from configs.titan import titan_config

RECIPE_SECTIONS = ("schedule", "weights", "activations", "router", "precision")


YEAR = 365 * 24 * 3600
"""Seconds. PyTorch counts timeouts in nanoseconds, of which there cannot be any number."""

WHOLE = 2**63 - 1
"""The largest whole number that TOML has and PyTorch takes: the bound of all keys without a lower one."""


def _in(default, low=None, high=None):
    return field(default=default, metadata={"low": low, "high": high})


@dataclass
class Source:
    """One corpus of a mixture; in TOML a `[[data.sources]]` table."""

    type: Literal["auto", "text", "json", "parquet", "tokens", "stdlib", "hub"] = "auto"
    """
    auto: files, each read by its suffix, in any case: .jsonl, .ndjson and .json as JSON lines, .parquet as Parquet, all
        others as text, a file a document. text, json, parquet: files of that kind alone. Any may be compressed (.gz,
        .bz2, .xz, .zst). Files that hold no text are counted in the log, with the reason.
    tokens: a folder that `python -m scripts.make_tokens` made of other sources: the same batches, without the encoding.
    stdlib: the source of the running Python's standard library, a file a document; there on any machine.
    hub: a data set on the Hugging Face hub, streamed.
    """

    path: str = ""
    """A file, a folder (searched through) or a glob; for hub the data set's name, such as "allenai/c4"."""

    name: str = ""
    """hub: the data set's configuration, such as "en"."""

    split: str = "train"
    """hub: the split to train on."""

    validation_split: str = ""
    """hub: the split to validate on; empty holds documents out of `split`."""

    column: str = "text"
    """JSON lines, Parquet, hub: the column that holds the text."""

    weight: float = _in(1.0, 0.0)
    """Share of the documents that the mixture draws from here, relative to the other sources."""


@dataclass
class Data:
    sources: list[Source] = field(default_factory=lambda: [Source(type="stdlib")])
    """The corpora. The default is the embedded one."""

    validation_share: float = _in(0.02, 0.0, 0.5)
    """Share of the documents held out for validation, chosen by a hash of their text."""

    seed: int = _in(0, 0)
    """Order of the documents."""


@dataclass
class Tokenizer:
    path: str = ""
    """A Hugging Face tokenizer folder (tokenizer.json). Empty: a byte-level BPE is trained on the corpus and cached."""

    vocab_size: int = _in(16384, 260, 1 << 20)
    """Size of the BPE to train."""

    sample_bytes: int = _in(64 << 20, 1 << 16)
    """Bytes of training text that the BPE is trained on."""

    cache_folder: str = "outputs/tokenizers"
    """Where trained BPEs are kept, a folder for each corpus and size."""


@dataclass
class Phase:
    mode: Literal["dense", "sparse"] = "dense"

    end: int | float = 1.0
    """Last step of the phase: a whole number is a step, a fraction such as 0.75 a share of training.steps."""

    keep: float | None = _in(None, 0.0, 1.0)
    """sparse, groups: share of the groups that this phase keeps, instead of activations.keep."""


@dataclass
class Schedule:
    phases: list[Phase] = field(default_factory=lambda: [Phase()])
    """The run's phases in order; the last ends at 1.0."""

    decay_with_tail: bool = False
    """The learning rate starts to decay where the last phase starts (sets lr_scheduler.decay_ratio)."""

    dense_layers: int = _in(0, 0)
    """FFNs of so many first layers stay dense in sparse phases: an error made there goes through all the others."""


@dataclass
class Weights:
    pattern: Literal["none", "2:4"] = "none"
    """2:4: soft-thresholded weights, beta fixed when sparsity starts."""

    products: list[int] = field(default_factory=lambda: [1, 3])
    """
    Which of the FFN's six products (docs/glossary.md) read the 2:4 weight: 1 (W1, forward, exact gradients) and 3 (W2
    for the gradient of h only, an approximation).
    """


@dataclass
class Activations:
    pattern: str = "none"
    """What h is cut to in a sparse phase: none, 2:4, venom or groups."""

    v: int = _in(64, 1)
    """venom, groups: tokens in a block."""

    n: int = 2
    """venom: entries that a token keeps of its block's four columns, 2 or 4."""

    m: int = _in(16, 4)
    """venom: columns in a block; the density is n / m."""

    g: int = _in(64, 1)
    """groups: neurons in a group."""

    keep: float = _in(0.25, 0.0, 1.0)
    """groups: share of the groups that is kept."""

    window: int = _in(0, 0)
    """
    groups: neurons in a window; every window of neighbouring neurons keeps the share `keep` of its groups, as Venom
    keeps four columns of every m. 0: one window of all neurons.
    """

    sample: int = _in(1, 1)
    """groups: a block chooses by every `sample`-th of its tokens, so that x W1^T need not be computed for all."""

    balance: float = _in(0.0, 0.0, 1.0)
    """
    groups: blocks choose by sums over a power of their mean over the blocks, so that neurons that fire weakly get
    gradients too. 0: by the sums as they are. 1: every group is wanted equally often.
    """

    cut_along_tokens: bool = False
    """
    2:4: cut the operands of the weight gradients along the tokens as well, as arXiv 2503.16672 does for speed. Off:
    exact gradients.
    """


@dataclass
class Router:
    enable: bool = False
    """
    Cluster neurons or tokens when sparsity starts, and sort the tokens by cluster in every sparse step. Off: a block is
    neighbours of one text, and a Venom model learns to read later ones from what it keeps.
    """

    cluster_size: int = _in(64, 1)
    """Neurons in a cluster, a divisor of the FFN's width."""

    cluster_by: Literal["activations", "weights"] = "activations"
    """
    What makes neurons alike: firing for the same tokens of the batch at hand, or the directions of their rows in W1
    ("weights", arXiv 2602.06183).
    """

    token_clusters: int = _in(0, 0, 4096)
    """
    Clusters of tokens: where sparsity starts, the inputs of each FFN are clustered by k-means, and in every sparse step
    a token goes to the cluster with the nearest centroid. 0: a token goes to the cluster of neurons whose rows of W1
    are nearest to it.
    """

    spread: bool = False
    """
    Place the neurons of a cluster apart, every C-th of C clusters, and clusters that are alike apart, so that a Venom
    block holds neurons that fire for different tokens.
    """

    recluster_every: int = _in(0, 0)
    """Steps between re-clusterings in a sparse phase; 0: once, when it starts."""


@dataclass
class Precision:
    ffn: Literal["model", "fp8"] = "model"
    """
    What the products of sparse FFNs read in sparse phases. model: what the rest of the model reads
    (training.mixed_precision_param). fp8: operands rounded to e4m3, for pattern = "groups" with v of at least 512; it
    needs a GPU of compute capability 9.0 or higher, elsewhere the reference rounds alike and is slow. Weights, moments
    and gradients stay as they are. For dense phases and layers there is torchtitan's converter, model.converters =
    ["quantize.linear.float8"].
    """

    qat: Literal["none", "int4", "int8"] = "none"
    """
    Quantisation-aware training in the last phase, which has to be dense: the weights of the blocks' linear layers are
    rounded in the forward pass as `scripts.evaluate --quantize` rounds those of an export, int4 with a scale for 32
    weights, int8 with a scale a row. For models that are served so.
    """


@dataclass
class Job(titan_config.Job):
    dump_folder: str = "outputs/run"
    """Where the run keeps metrics, checkpoints, TensorBoard and its resolved configuration."""


@dataclass
class RopeScaling:
    """
    Llama 3's scaling of RoPE for long contexts (rope_type "llama3" of a Hugging Face folder), for a model that was
    trained with it. A pair of entries that turns once in w positions keeps its angle where w is below
    original_max_position_embeddings / high_freq_factor, is slowed down by `factor` where w is above
    original_max_position_embeddings / low_freq_factor, and between the two by a mixture.
    """

    factor: float = _in(1.0, 1.0)
    """How much slower long wavelengths turn; 1: no scaling."""

    low_freq_factor: float = _in(1.0, 1e-6)
    """original_max_position_embeddings over the shortest wavelength that is slowed down by the whole factor."""

    high_freq_factor: float = _in(4.0, 1e-6)
    """original_max_position_embeddings over the longest wavelength that stays as it is; above low_freq_factor."""

    original_max_position_embeddings: int = _in(8192, 1)
    """Positions that the model was trained at before its context was extended."""


@dataclass
class Model(titan_config.Model):
    name: Literal["llama_relu2", "llama_swiglu", "llama_moe_relu2"] = "llama_relu2"
    """
    llama_relu2: squared-ReLU FFN. llama_swiglu: the same Llama with a SwiGLU of equal parameters, the dense baseline.
    llama_moe_relu2: a mixture of experts, each a squared-ReLU FFN; with the flavors moe_*.
    """

    flavor: str = "debug"
    """Size: a key of models.llama.FLAVORS."""

    dim: int | None = _in(None, 1)
    """Model width, instead of the flavor's."""

    n_layers: int | None = _in(None, 1, 10_000)
    """Number of blocks, instead of the flavor's."""

    n_heads: int | None = _in(None, 1)
    """Query heads, instead of the flavor's."""

    n_kv_heads: int | None = _in(None, 1)
    """Key and value heads, instead of the flavor's."""

    hidden_dim: int | None = _in(None, 1)
    """
    FFN width of the squared-ReLU model, instead of the flavor's; the SwiGLU takes two thirds of it. With experts the
    width of one.
    """

    num_experts: int | None = _in(None, 0)
    """Experts of a layer, instead of the flavor's."""

    top_k: int | None = _in(None, 1)
    """Experts that a token goes to, instead of the flavor's."""

    shared_expert: bool | None = None
    """Whether every token also goes to one more expert, which stays dense, instead of the flavor's."""

    load_balance_coeff: float | None = _in(None, 0.0)
    """
    What the bias of an expert changes by at every step, up if it got fewer tokens than the mean and down if it got
    more, instead of the flavor's; 0: experts are not balanced.
    """

    rope_theta: float | None = _in(None, 1.0)
    """Base of the rotary embedding's wavelengths, instead of the flavor's."""

    rope_scaling: RopeScaling = field(default_factory=RopeScaling)

    max_position_embeddings: int | None = _in(None, 1)
    """
    Positions that an export's config.json says the model takes, instead of training.seq_len: for a model that was
    trained on longer sequences before this run.
    """

    norm_eps: float | None = _in(None, 0.0, 1.0)
    """What RMSNorm adds to the mean square, instead of the flavor's."""


@dataclass
class Metrics(titan_config.Metrics):
    enable_tensorboard: bool = True
    """Whether to log metrics to TensorBoard."""

    verbose: bool = False
    """Show torchtitan's own log lines as well."""


@dataclass
class Training(titan_config.Training):
    mixed_precision_param: Literal["auto", "bfloat16", "float32"] = "auto"  # type: ignore[assignment]
    """
    dtype of products. auto: bfloat16 on GPUs that compute in it, float32 on others and on CPUs. run.json has what was
    chosen, and a resumed run keeps it on any device. float32 runs on the reference instead of the sparse kernels.
    """

    sparse_local_batch_size: int | None = _in(None, 1)
    """
    Sequences of a micro-batch in sparse phases, a multiple of local_batch_size; default: local_batch_size. A sparse
    step keeps fewer activations, and blocks of tokens are sorted from a whole micro-batch, so a larger one lowers the
    loss. The global batch and the order of the data stay.
    """

    loss_chunk_tokens: int = _in(0, 0)
    """
    Tokens whose logits are there at once, such as 4096; 0: those of the whole micro-batch. The head computes the loss
    chunk by chunk, and the gradient with it, so that logits and their gradient take chunk x vocabulary numbers. Not for
    tensor parallelism, nor for a head in float8.
    """

    bf16_residual: bool = False
    """
    Keep the residual stream in bfloat16 where products are, as FSDP2 does, on one GPU as well, where it is float32
    otherwise. Halves what norms and additions between blocks read and write.
    """

    hang_timeout_seconds: float = _in(1800.0, 0.0, YEAR)
    """
    How long a step may take, or one of its validations, or the saving of its checkpoint: a run that takes longer hangs.
    It says which of them it was and where its threads stand, and ends with status 1; the same command resumes. A save
    writes 12 bytes a parameter, so leave time for that on a slow file system. 0: any time.
    """

    start_timeout_seconds: float = _in(7200.0, 0.0, YEAR)
    """
    The same for each part of the start: reading the data, preparing the tokenizer, connecting the ranks and building
    the model, loading a checkpoint, reading the first batch. It is also the limit of steps that compile, the first one
    of a run, of a resume and of each phase, of the first validation in each phase, which compiles as well, and of steps
    in which a sparse phase prepares its pattern. 0: any time.
    """

    skip_bad_batches: int = _in(0, 0)
    """
    Batches whose loss or gradient is not finite that a run may skip: weights and moments stay as they were, the step
    and its learning rate count as taken. One more ends the run, as the first one does with 0. Costs one
    synchronisation of host and device a step.
    """


@dataclass
class Optimizer(titan_config.Optimizer):
    moments: Literal["float32", "bfloat16"] = "float32"
    """
    dtype of AdamW's two moments. bfloat16: half of their memory, by torchao's step; for name = "AdamW" and averages
    over few steps, beta2 up to 0.99.
    """


@dataclass
class Comm(titan_config.Comm):
    train_timeout_seconds: int = 600
    """Timeout of collectives after the first step; the first step of a new phase and the first validation compile."""


@dataclass
class Checkpoint(titan_config.Checkpoint):
    enable: bool = True
    """Whether to save checkpoints, and to resume from those in the dump folder."""

    change_recipe: bool = False
    """Let a run resume with another recipe than the one in its run.json, which is refused otherwise."""

    last_save_model_only: bool = False
    """Whether the last checkpoint holds the model alone, so that the run cannot be extended."""


@dataclass
class Validation(titan_config.Validation):
    enable: bool = True
    """Whether to validate on held-out documents."""

    freq: int = _in(100, 1)
    """Steps between validations; the last step always validates."""

    sequences: int = _in(64, 1)
    """Held-out sequences of training.seq_len tokens, the same ones on any number of GPUs."""


@dataclass
class JobConfig(titan_config.JobConfig):
    recipe: str = "recipes/dense.toml"
    """The recipe's file, looked up from here, then from the repository."""

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    schedule: Schedule = field(default_factory=Schedule)
    weights: Weights = field(default_factory=Weights)
    activations: Activations = field(default_factory=Activations)
    precision: Precision = field(default_factory=Precision)
    router: Router = field(default_factory=Router)
    metrics: Metrics = field(default_factory=Metrics)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    comm: Comm = field(default_factory=Comm)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    validation: Validation = field(default_factory=Validation)


# Keys of torchtitan that have no meaning here, and what to set instead.
REPLACED = {
    "activations.budget": "activations.keep, a share that every block keeps",
    "training.dataset": "data.sources",
    "training.dataset_path": "data.sources",
    "validation.dataset": "data.sources",
    "validation.dataset_path": "data.sources",
    "validation.local_batch_size": "training.local_batch_size",
    "validation.seq_len": "training.seq_len",
    "validation.steps": "validation.sequences",
    "validation.dataloader": "validation.sequences",
    "model.hf_assets_path": "tokenizer.path",
    "model.tokenizer_path": "tokenizer.path",
    "job.config_file": "--config",
    "job.custom_config_module": "configs/schema.py",
    "job.print_config": "--check",
    "job.save_config_file": "the run's run.json",
    "checkpoint.create_seed_checkpoint": "checkpoint.initial_load_path",
    "checkpoint.initial_load_in_hf": "python -m scripts.import_hf",
    "checkpoint.initial_load_in_hf_quantized": "python -m scripts.import_hf",
    "checkpoint.last_save_in_hf": "python -m scripts.export_hf",
    "comm.mode": "torchrun",
    "experimental": "the code",
    "fault_tolerance": "checkpoint",
    "memory_estimation": "the code",
}

# Bounds of torchtitan's own fields, which carry none.
BOUNDS = {
    "training.local_batch_size": (1, 2**31 - 1),
    "training.seq_len": (1, 2**31 - 1),
    "training.steps": (1, 10**12),  # phases are shares of it, computed in floats
    "training.max_norm": (0, None),
    "training.gc_freq": (1, None),
    "training.dataloader.num_workers": (0, None),
    "training.dataloader.prefetch_factor": (1, 1000),
    "optimizer.lr": (0, None),
    "optimizer.beta1": (0, 0.999999),
    "optimizer.beta2": (0, 0.999999),
    "optimizer.eps": (0, None),
    "optimizer.weight_decay": (0, None),
    "lr_scheduler.warmup_steps": (0, None),
    "lr_scheduler.decay_ratio": (0, 1),
    "lr_scheduler.min_lr_factor": (0, 1),
    "metrics.log_freq": (1, None),
    "profiling.profile_freq": (1, None),
    "profiling.profiler_active": (1, None),
    "profiling.profiler_warmup": (0, None),
    "checkpoint.interval": (1, None),
    "checkpoint.keep_latest_k": (0, None),
    "checkpoint.load_step": (-1, None),
    "parallelism.data_parallel_replicate_degree": (1, None),
    "parallelism.data_parallel_shard_degree": (-1, None),
    "parallelism.tensor_parallel_degree": (1, None),
    "parallelism.pipeline_parallel_degree": (1, None),
    "parallelism.context_parallel_degree": (1, None),
    "parallelism.expert_parallel_degree": (1, None),
    "parallelism.pipeline_parallel_microbatch_size": (1, None),
    "parallelism.pipeline_parallel_layers_per_stage": (1, None),
    "parallelism.pipeline_parallel_first_stage_less_layers": (0, None),
    "parallelism.pipeline_parallel_last_stage_less_layers": (0, None),
    "activation_checkpoint.memory_budget": (0, 1),
    "comm.init_timeout_seconds": (1, YEAR),
    "debug.seed": (0, 2**32 - 1),
    "comm.train_timeout_seconds": (1, YEAR),
    "comm.trace_buf_size": (0, 10_000_000),
}
