"""Words and shapes that several rooms must agree on: fault kinds, incident classes, degrees, model and cluster shapes.

Everything here is a frozen dataclass or a string enum without behaviour beyond arithmetic, so that planners, the
trainer and files on disk speak of the same things by the same names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

REPORT = "DISTRAIN_REPORT"
"""environment variable: the file in which the launcher of node 0 tells, as JSON, how all ranks ended"""


class IncidentClass(StrEnum):
    """What can go wrong with a job, as detectors report it and drills score it."""

    CRASH = "crash"
    FROZEN = "frozen"
    NONCOMM_HANG = "noncomm_hang"
    COMM_HANG = "comm_hang"
    NONCOMM_SLOW = "noncomm_slow"
    COMM_SLOW = "comm_slow"
    DESYNC = "desync"
    DATA_STALL = "data_stall"
    WORKLOAD_IMBALANCE = "workload_imbalance"
    STAGE_IMBALANCE = "stage_imbalance"
    NUMERIC = "numeric"
    SILENT_CORRUPTION = "silent_corruption"


class FaultKind(StrEnum):
    """What the fault harness can break; the first word of a kind names the engine that breaks it."""

    PROC_KILL = "proc.sigkill"
    PROC_STOP = "proc.sigstop"
    PROC_EXIT = "proc.exit"
    PROC_EXCEPTION = "proc.exception"
    PROC_GIL_HOG = "proc.gil_hog"
    PROC_CPU_THROTTLE = "proc.cpu_throttle"
    PROC_OOM = "proc.oom"
    CGROUP_FREEZE = "cgroup.freeze"
    NET_DROP = "net.drop"
    NET_LOSS = "net.loss"
    NET_RATE = "net.rate"
    NET_DELAY = "net.delay"
    NET_PARTITION = "net.partition"
    NET_FLAP = "net.flap"
    COMM_SKIP = "comm.skip"
    COMM_DELAY = "comm.delay"
    COMM_MISMATCH = "comm.mismatch"
    COMM_REORDER = "comm.reorder"
    DATA_STALL = "data.stall"
    DATA_CORRUPT = "data.corrupt"
    NUMERIC_BITFLIP = "numeric.bitflip"
    NUMERIC_NAN = "numeric.nan"
    NUMERIC_ZERO = "numeric.zero"
    CKPT_SLOW = "ckpt.slow"
    CKPT_TORN = "ckpt.torn"
    CKPT_ENOSPC = "ckpt.enospc"
    CKPT_EIO = "ckpt.eio"
    CKPT_CORRUPT = "ckpt.corrupt"
    SIDECAR_KILL = "sidecar.kill"
    STORE_KILL = "store.kill"
    COORDINATOR_KILL = "coordinator.kill"
    NODE_LOSS = "node.loss"
    CLOCK_SKEW = "clock.skew"
    GPU_XID = "gpu.xid_sim"


class Action(StrEnum):
    """What a verdict may ask the launcher to do, mildest first."""

    OBSERVE = "observe"
    DUMP = "dump"
    SOFT_RESTART = "soft_restart"
    RESTART = "restart"
    SWAP_SPARE = "swap_spare"
    DRAIN_NODE = "drain_node"
    REMAP = "remap"


class Schedule(StrEnum):
    """Pipeline schedules, as ``parallel.schedule`` names them."""

    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    ZBV = "zbv"


class DataParallel(StrEnum):
    """How data-parallel replicas share the model states, as ``parallel.data`` names it."""

    DDP = "ddp"
    ZERO1 = "zero1"
    FSDP2 = "fsdp2"
    HSDP = "hsdp"


class Sequences(StrEnum):
    """How data-parallel ranks share the tokens of sequences, as ``parallel.sequence`` names it."""

    NONE = "none"
    """they do not: each replica has its own sequences"""
    ULYSSES = "ulysses"
    """groups of one size, whose ranks share the heads during attention"""
    RING = "ring"
    """groups of one size, among whose ranks keys and values go round"""
    USP = "usp"
    """both: rings of ranks that share the heads"""
    ADAPTIVE = "adaptive"
    """groups of the sizes that a plan finds for each batch"""


class Activations(StrEnum):
    """What becomes of activations between forward and backward, as ``activations.mode`` names it."""

    NONE = "none"
    """they stay on the device"""
    RECOMPUTE = "recompute"
    """each layer is computed again from its input"""
    SWAP = "swap"
    """they wait on the host"""
    MEMO = "memo"
    """a share of the tokens waits on the host, the others are computed again (MEMO)"""
    AUTO = "auto"
    """a program chooses, for each layer, what is kept, swapped and computed again"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """Sizes of the mesh axes; ``world_size`` is their product. Ranks count tp fastest, then dp, then pp."""

    tp: int = 1
    """tensor-parallel degree: ranks that share each layer's matrices"""
    pp: int = 1
    """pipeline-parallel degree: ranks in a row, each holding ``vpp`` stages"""
    dp: int = 1
    """data-parallel degree: replicas that see different sequences"""
    vpp: int = 1
    """stages a rank (virtual pipeline degree)"""
    dp_shard: int = 1
    """ranks among which a replica's states are sharded (FSDP2: dp, HSDP: a divisor of dp, otherwise 1)"""

    @property
    def world_size(self) -> int:
        """Number of ranks that these degrees occupy."""
        return self.tp * self.pp * self.dp

    @property
    def num_stages(self) -> int:
        """Pipeline stages over all ranks."""
        return self.pp * self.vpp


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A Llama-style decoder by its sizes, without weights."""

    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    d_ffn: int
    vocab_size: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    parallel_block: bool = False
    """attention and MLP read the same normed input (MegaScale section 3.1); one norm a layer"""
    window: int = 0
    """sliding-window attention reaches this many tokens back (MegaScale section 3.1); 0 means all"""

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.d_model // self.num_heads

    @property
    def layer_params(self) -> int:
        """Parameters of one decoder layer."""
        attention = self.d_model * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        norms = self.d_model * (1 if self.parallel_block else 2)
        return attention + 3 * self.d_model * self.d_ffn + norms

    @property
    def num_params(self) -> int:
        """Parameters of the whole model; the embedding and the output projection are not tied."""
        return self.num_layers * self.layer_params + 2 * self.vocab_size * self.d_model + self.d_model

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of forward and backward a token (PTD-P section 5.1, causal attention halved)."""
        matmuls = self.num_layers * (self.layer_params - self.d_model) + self.vocab_size * self.d_model
        span = min(seq_len, self.window) if self.window else seq_len
        attention = self.num_layers * self.num_heads * self.head_dim * span
        return 6.0 * (matmuls + attention)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """What one accelerator can do."""

    name: str
    memory_bytes: int
    peak_flops: float
    """dense matrix FLOP/s at the training precision"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """Nodes of one kind; planners need no more of a cluster than this."""

    num_nodes: int
    devices_per_node: int
    device: DeviceSpec
    host_memory_bytes: int
    intra_node_gb_s: float = 300.0
    inter_node_gb_s: float = 25.0

    @property
    def world_size(self) -> int:
        """Number of devices."""
        return self.num_nodes * self.devices_per_node


GIB = 1024**3

# Datasheet values, dense bf16 and unidirectional link rates.
DEVICES: Mapping[str, DeviceSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            DeviceSpec(name="cpu", memory_bytes=16 * GIB, peak_flops=1e11),
            DeviceSpec(name="v100-32g", memory_bytes=32 * GIB, peak_flops=125e12),
            DeviceSpec(name="a100-40g", memory_bytes=40 * GIB, peak_flops=312e12),
            DeviceSpec(name="a100-80g", memory_bytes=80 * GIB, peak_flops=312e12),
            DeviceSpec(name="h100-80g", memory_bytes=80 * GIB, peak_flops=989e12),
            DeviceSpec(name="h200-141g", memory_bytes=141 * GIB, peak_flops=989e12),
            DeviceSpec(name="b200-180g", memory_bytes=180 * GIB, peak_flops=2250e12),
        )
    }
)

# Llama-style presets under the names of the literature. Those from 7b to 65b are the Llama 1 shapes; 175b has GPT-3's
# depth and width with a SwiGLU of 8/3 d. "tiny" trains to a bigram model's loss in half a minute on two CPU cores.
PRESETS: Mapping[str, ModelShape] = MappingProxyType(
    {
        "tiny": ModelShape(d_model=128, num_layers=2, num_heads=4, num_kv_heads=2, d_ffn=384, vocab_size=264),
        "125m": ModelShape(
            d_model=768, num_layers=12, num_heads=12, num_kv_heads=12, d_ffn=2048, vocab_size=32_000
        ),
        "1.3b": ModelShape(
            d_model=2048, num_layers=24, num_heads=16, num_kv_heads=16, d_ffn=5504, vocab_size=32_000
        ),
        "7b": ModelShape(
            d_model=4096, num_layers=32, num_heads=32, num_kv_heads=32, d_ffn=11_008, vocab_size=32_000
        ),
        "13b": ModelShape(
            d_model=5120, num_layers=40, num_heads=40, num_kv_heads=40, d_ffn=13_824, vocab_size=32_000
        ),
        "30b": ModelShape(
            d_model=6656, num_layers=60, num_heads=52, num_kv_heads=52, d_ffn=17_920, vocab_size=32_000
        ),
        "65b": ModelShape(
            d_model=8192, num_layers=80, num_heads=64, num_kv_heads=64, d_ffn=22_016, vocab_size=32_000
        ),
        "175b": ModelShape(
            d_model=12_288, num_layers=96, num_heads=96, num_kv_heads=96, d_ffn=32_768, vocab_size=51_200
        ),
    }
)
