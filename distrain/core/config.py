"""RunConfig: what a training run is, as frozen dataclasses that mirror the tables of its TOML file.

The dataclasses hold values only. ``load.py`` fills them from file, environment and overrides; ``checks.py`` says
whether the values can work together. Every field carries its documentation as the string below it, from which
``distrain config show`` prints its help.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from distrain.core.vocabulary import (
    PRESETS,
    Activations,
    DataParallel,
    Degrees,
    ModelShape,
    Schedule,
    Sequences,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """``[model]``: a preset, any size of which can be overridden; 0 and "" keep the preset's value."""

    preset: str = "tiny"
    """tiny, 125m, 1.3b, 7b, 13b, 30b, 65b, 175b"""
    d_model: int = 0
    """features of the residual stream"""
    num_layers: int = 0
    """decoder layers"""
    num_heads: int = 0
    """attention heads"""
    num_kv_heads: int = 0
    """key and value heads; fewer than num_heads is grouped-query attention"""
    d_ffn: int = 0
    """width of the SwiGLU MLP"""
    vocab_size: int = 0
    """rows of the embedding; the byte tokenizer needs 258"""
    rope_theta: float = 0.0
    """base of the rotary position embedding"""
    norm_eps: float = 0.0
    """added to the mean square in RMSNorm"""
    parallel_block: bool = False
    """attention and MLP in parallel on one norm (MegaScale)"""
    window: int = 0
    """sliding-window attention in tokens (MegaScale); 0 attends to everything before"""
    weights: str = ""
    """folder of a Llama model in Hugging Face's layout to start from; "" draws weights by the seed"""

    def shape(self) -> ModelShape:
        """The preset with this table's overrides."""
        skipped = ("preset", "parallel_block", "window", "weights")
        sizes = [item.name for item in fields(self) if item.name not in skipped]
        given: dict[str, Any] = {name: getattr(self, name) for name in sizes if getattr(self, name)}
        return replace(PRESETS[self.preset], parallel_block=self.parallel_block, window=self.window, **given)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """``[data]``: where tokens come from and how they become batches."""

    source: str = "stdlib"
    """stdlib (source files of the running Python), text (a folder), tokens (a folder of .bin or .npy files)"""
    path: str = ""
    """folder for source = text or tokens"""
    pattern: str = "**/*"
    """which files below path are documents (text) or token files (tokens)"""
    packing: str = "fixed"
    """fixed: windows of seq_len tokens of the concatenated corpus; documents: whole documents, lengths vary"""
    seq_len: int = 128
    """tokens of a window, or the longest document kept whole (longer ones are cut into pieces)"""
    global_batch: int = 16
    """sequences of one optimizer step, over all replicas and micro-batches"""
    held_out: float = 0.02
    """fraction of the documents kept for validation"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """``[parallel]``: degrees of each axis; ``parallel = "auto"`` lets the planner choose."""

    auto: bool = False
    """let the planner choose every degree for the world size at hand"""
    tp: int = 1
    """tensor-parallel degree"""
    pp: int = 1
    """pipeline-parallel degree"""
    dp: int = 0
    """data-parallel degree; 0 takes the ranks that tp and pp leave"""
    vpp: int = 1
    """stages a rank, for schedule = interleaved (zbv always has 2)"""
    schedule: Schedule = Schedule.ONE_F_ONE_B
    """pipeline schedule: gpipe, 1f1b, interleaved, zbv"""
    micro_batches: int = 1
    """micro-batches of one step on each replica"""
    data: DataParallel = DataParallel.DDP
    """what replicas share: ddp, zero1, fsdp2, hsdp"""
    hsdp_shard: int = 0
    """ranks of one sharding group, for data = hsdp"""
    sequence: Sequences = Sequences.NONE
    """how data-parallel ranks share sequences: none, ulysses, ring, usp, or adaptive: planned for each batch"""
    sequence_degree: int = 0
    """ranks of one sequence group, for sequence = ulysses, ring, usp"""
    sequence_ring: int = 0
    """of these, ranks of one ring, for sequence = usp; 0 takes those that the heads leave over"""
    sequence_cost: str = ""
    """cost model of the plans, for sequence = adaptive: a file of `distrain doctor --profile`, or 7b, 13b, 30b"""

    def degrees(self, world_size: int) -> Degrees:
        """Degrees on ``world_size`` ranks; a dp of 0 is filled in (rounded down: ``checks`` refuses a rest)."""
        dp = self.dp or max(1, world_size // max(1, self.tp * self.pp))
        shard = {DataParallel.FSDP2: dp, DataParallel.HSDP: self.hsdp_shard}.get(self.data, 1)
        vpp = {Schedule.ZBV: 2, Schedule.INTERLEAVED: self.vpp}.get(self.schedule, 1) if self.pp > 1 else 1
        return Degrees(tp=self.tp, pp=self.pp, dp=dp, vpp=vpp, dp_shard=shard)

    @property
    def drawn_micro_batches(self) -> int:
        """Micro-batches for which a schedule is drawn: where plans decide, any number that it allows."""
        return self.pp if self.sequence is Sequences.ADAPTIVE else self.micro_batches

    @property
    def group_degree(self) -> int | None:
        """Ranks that share each sequence; None where plans decide."""
        if self.sequence is Sequences.ADAPTIVE:
            return None
        return 1 if self.sequence is Sequences.NONE else max(1, self.sequence_degree)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """``[optimizer]``: AdamW or LAMB with warm-up and cosine decay."""

    name: str = "adamw"
    """adamw, lamb"""
    lr: float = 3e-4
    """peak learning rate"""
    min_lr: float = 0.0
    """learning rate at the end of the cosine"""
    beta1: float = 0.9
    """decay of the first moment"""
    beta2: float = 0.95
    """decay of the second moment"""
    eps: float = 1e-8
    """added to the root of the second moment"""
    weight_decay: float = 0.1
    """decoupled decay of matrices; norms are not decayed"""
    clip: float = 1.0
    """largest global gradient norm; 0 does not clip"""
    warmup_steps: int = 20
    """steps of linear warm-up"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """``[train]``: how long, how precise, how chatty."""

    steps: int = 100
    """optimizer steps"""
    dtype: str = "float32"
    """precision of matrix products: float32, bfloat16 (autocast, weights stay float32), float64"""
    eval_every: int = 0
    """steps between validations; 0 validates at the end only"""
    eval_sequences: int = 64
    """held-out sequences of one validation"""
    log_every: int = 1
    """steps between log lines"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointTier:
    """``[[checkpoint.tiers]]``: one level of storage below memory, the fastest first."""

    url: str = ""
    """a folder, or an address that fsspec knows (``s3://bucket/run``); ``{node}`` stands for the rank of the node"""
    name: str = ""
    """how events and messages call it; "" is the url"""
    every: int = 1
    """steps between two checkpoints there; 1 takes every snapshot"""
    keep_last: int = 3
    """checkpoints that stay there"""
    keep_every: int = 0
    """and those whose step is a multiple of this; 0 for none"""
    shared: bool = True
    """all nodes see the same folder; false for a disk of the node, which gets the bytes of the node's own ranks"""
    bytes_per_s: float = 0.0
    """most that a node writes to it; 0 for no limit"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """``[checkpoint]``: snapshots in memory, written to disk beside training; with ``every`` or ``auto``."""

    every: int = 0
    """steps between two snapshots; 0 takes none"""
    auto: bool = False
    """choose the steps by what saving costs here and how often nodes fail, in place of ``every``"""
    overhead: float = 0.02
    """with ``auto``: the largest share of the time that training may wait for saves"""
    disk_every: int = 0
    """steps between two checkpoints on disk; 0 writes every snapshot; not with ``tiers``"""
    path: str = ""
    """folder; "" is run_dir/checkpoints; not with ``tiers``"""
    keep_last: int = 3
    """checkpoints that stay on disk; not with ``tiers``"""
    tiers: tuple[CheckpointTier, ...] = ()
    """levels of storage in place of one folder: tables ``[[checkpoint.tiers]]``"""
    lazy: bool = True
    """copy beside the next step instead of before it"""
    policy: str = "block"
    """when no memory is free for a snapshot: block, skip, or drop the oldest unwritten one"""
    strict: bool = False
    """a failed checkpoint ends the run instead of being logged"""

    @property
    def enabled(self) -> bool:
        """Whether anything is saved."""
        return self.auto or self.every > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationsConfig:
    """``[activations]``: what layers save for backward stays on the device, goes to the host, or is made again."""

    mode: Activations = Activations.NONE
    """none, recompute, swap, memo, or auto: planned by layer and token from memory, link and times"""
    alpha: float = 1.0
    """with mode = memo: share of the tokens that wait on the host; the others are computed again"""
    host_gib: float = 0.0
    """host memory of one node for what is swapped; 0 takes half of what is free (none where the device is the CPU)"""
    link_gb_s: float = 0.0
    """with mode = auto: GB/s of one device to the host and back while all copy; 0 measures it at the start"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """``[launch]``: ranks that `distrain train` starts on this machine; torchrun and Slurm decide themselves."""

    ranks: int = 1
    """worker processes on this node"""
    device: str = "auto"
    """auto, cpu, cuda"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeoutConfig:
    """``[timeouts]``: a ladder in which each rung must be longer than the one before (``timeouts.py``)."""

    collective_s: float = 300.0
    """one collective operation"""
    step_s: float = 600.0
    """one training step"""
    heartbeat_s: float = 900.0
    """silence after which a rank counts as dead"""
    barrier_s: float = 1200.0
    """waiting for all ranks at start and end"""
    job_s: float = 30 * 24 * 3600.0
    """the whole job"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """``[cluster]``: what a dry run for another machine assumes."""

    device: str = ""
    """device of datasheet values: cpu, v100-32g, a100-40g, a100-80g, h100-80g, h200-141g, b200-180g; "" probes"""
    devices_per_node: int = 8
    """accelerators of one node"""
    host_memory_gib: float = 0.0
    """memory of one node's host; 0 probes this machine"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything a run needs to know, and the only input of `distrain train`."""

    run_dir: str = "runs/default"
    """folder for events.jsonl, the resolved config and the plan"""
    seed: int = 1234
    """seed of weights, data order and dropout"""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    timeouts: TimeoutConfig = field(default_factory=TimeoutConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every value of ``config`` by its dotted key, in the order of the dataclasses; rows of tables as plain ones."""
    flat: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if hasattr(value, "__dataclass_fields__"):
            flat |= {f"{item.name}.{sub.name}": getattr(value, sub.name) for sub in fields(value)}
        else:
            flat[item.name] = value
    rows = {key: [asdict(row) for row in value] for key, value in flat.items() if isinstance(value, tuple)}
    return flat | rows


def nested(config: RunConfig) -> dict[str, Any]:
    """``config`` as plain tables and values, ready for JSON; ``load.parse`` reads it back unchanged."""
    tables: dict[str, Any] = {}
    for key, value in flatten(config).items():
        table, _, name = key.rpartition(".")
        place: dict[str, Any] = tables.setdefault(table, {}) if table else tables
        place[name] = str(value) if isinstance(value, str) else value
    return tables
