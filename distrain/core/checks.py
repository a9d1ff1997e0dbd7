"""Whether the values of a RunConfig can work together: pure, and all problems at once.

``check_layout`` (of ``layout.py``) knows the arithmetic of parallel layouts; ``check_run`` adds ranges, choices,
paths and the ladder of timeouts. Both return problems instead of raising, so that callers can add their own before
``raise_if``. Neither needs torch or starts anything.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from .config import ActivationsConfig, CheckpointConfig, DataConfig, ParallelConfig, RunConfig, flatten
from .errors import Problem, nearest
from .layout import check_layout, check_mesh, check_model
from .timeouts import check_ladder
from .vocabulary import DEVICES, PRESETS, Activations, DataParallel, ModelShape, Schedule, Sequences

__all__ = ["BYTE_TOKENS", "CHOICES", "check_layout", "check_run"]

BYTE_TOKENS = 258
"""tokens of the byte tokenizer: 256 bytes, beginning and end of a document"""

CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "model.preset": tuple(PRESETS),
        "data.source": ("stdlib", "text", "tokens"),
        "data.packing": ("fixed", "documents"),
        "optimizer.name": ("adamw", "lamb"),
        "train.dtype": ("float32", "bfloat16", "float64"),
        "checkpoint.policy": ("block", "skip", "drop"),
        "launch.device": ("auto", "cpu", "cuda"),
        "cluster.device": ("", *DEVICES),
    }
)

_Range = tuple[Callable[[float], bool], str]


def _at_least(least: int) -> _Range:
    return (lambda value: value >= least), f"{least} or more"


_POSITIVE: _Range = (lambda value: value > 0), "more than 0"
_BETA: _Range = (lambda value: 0 <= value < 1), "0 or more and less than 1"

# What check_layout looks at is not repeated here.
_RANGES: Mapping[str, _Range] = MappingProxyType(
    {
        "seed": ((lambda value: 0 <= value < 2**63), "0 to 2^63 - 1"),
        "model.rope_theta": _at_least(0),
        "model.norm_eps": _at_least(0),
        "model.window": _at_least(0),
        "data.held_out": ((lambda value: 0 < value <= 0.5), "more than 0, at most 0.5"),
        "optimizer.lr": _POSITIVE,
        "optimizer.min_lr": _at_least(0),
        "optimizer.beta1": _BETA,
        "optimizer.beta2": _BETA,
        "optimizer.eps": _POSITIVE,
        "optimizer.weight_decay": _at_least(0),
        "optimizer.clip": _at_least(0),
        "optimizer.warmup_steps": _at_least(0),
        "train.steps": _at_least(1),
        "activations.alpha": ((lambda value: 0 <= value <= 1), "0 to 1"),
        "activations.host_gib": _at_least(0),
        "activations.link_gb_s": _at_least(0),
        "checkpoint.every": _at_least(0),
        "checkpoint.disk_every": _at_least(0),
        "checkpoint.overhead": ((lambda value: 0 < value < 1), "more than 0 and less than 1"),
        "checkpoint.keep_last": _at_least(1),
        "train.eval_every": _at_least(0),
        "train.eval_sequences": _at_least(1),
        "train.log_every": _at_least(1),
        "launch.ranks": _at_least(1),
        "cluster.devices_per_node": _at_least(1),
        "cluster.host_memory_gib": _at_least(0),
    }
)


def check_run(config: RunConfig, world_size: int) -> list[Problem]:
    """Everything that keeps ``config`` from running on ``world_size`` ranks.

    With ``parallel = "auto"`` the layout is the planner's affair, and only what no layout can mend is listed.
    """
    parallel, data = config.parallel, config.data
    if parallel.auto:  # one rank is the layout that no machine refuses
        parallel, world_size = ParallelConfig(), 1
    degrees = parallel.degrees(world_size)
    if parallel.schedule is Schedule.INTERLEAVED:  # degrees() drops vpp where pp = 1
        degrees = replace(degrees, vpp=parallel.vpp)
    problems = [*_choices(config), *_ranges(config), *_relations(config), *_folders(config)]
    problems += [*_activations(config.activations), *_tiers(config.checkpoint)]
    problems += [*check_ladder(config.timeouts), *_sequences(config, degrees.dp)]
    problems += check_mesh(
        degrees,
        schedule=parallel.schedule,
        data=parallel.data,
        micro_batches=parallel.drawn_micro_batches,
        global_batch=data.global_batch,
        world_size=world_size,
        sequence_degree=parallel.group_degree,
    )
    if config.model.preset in PRESETS:
        shape = config.model.shape()
        problems += check_model(shape, degrees, schedule=parallel.schedule, seq_len=data.seq_len)
        problems += _vocabulary(shape, data)
    return problems


def _vocabulary(shape: ModelShape, data: DataConfig) -> Iterator[Problem]:
    if data.source != "tokens" and 1 <= shape.vocab_size < BYTE_TOKENS:
        yield Problem(
            "model.vocab_size is too small for the byte tokenizer",
            f"vocab_size = {shape.vocab_size}, data.source = {data.source}",
            f"{BYTE_TOKENS} or more",
            f"--set model.vocab_size={BYTE_TOKENS}",
        )


def _choices(config: RunConfig) -> Iterator[Problem]:
    flat = flatten(config)
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            close = nearest(flat[key], choices)
            yield Problem(
                f"{key} knows no such choice",
                repr(flat[key]),
                ", ".join(filter(None, choices)),
                close and f"--set {key}={close}",
            )


def _ranges(config: RunConfig) -> Iterator[Problem]:
    flat = flatten(config)
    for key, (holds, allowed) in _RANGES.items():
        if not holds(flat[key]):
            yield Problem(f"{key} is out of range", f"{key} = {flat[key]}", allowed)


def _relations(config: RunConfig) -> Iterator[Problem]:
    """Values that are fine alone and not together; given and unused is a mistake too."""
    optimizer, parallel = config.optimizer, config.parallel
    if optimizer.min_lr > optimizer.lr:
        yield Problem(
            "optimizer.min_lr is above optimizer.lr",
            f"min_lr = {optimizer.min_lr}, lr = {optimizer.lr}",
            f"0 to {optimizer.lr}",
        )
    if config.checkpoint.auto and config.checkpoint.every:
        yield Problem(
            "checkpoint.every is not used with checkpoint.auto",
            f"every = {config.checkpoint.every}, auto = true",
            "one of the two",
            "--set checkpoint.every=0",
        )
    if parallel.vpp != 1 and parallel.schedule is not Schedule.INTERLEAVED and not parallel.auto:
        yield Problem(
            f"parallel.vpp is not used by schedule {parallel.schedule}",
            f"vpp = {parallel.vpp}",
            "1, or schedule = interleaved",
            "--set parallel.vpp=1",
        )
    if parallel.hsdp_shard != 0 and parallel.data is not DataParallel.HSDP and not parallel.auto:
        yield Problem(
            f"parallel.hsdp_shard is not used by data = {parallel.data}",
            f"hsdp_shard = {parallel.hsdp_shard}",
            "0, or data = hsdp",
            "--set parallel.hsdp_shard=0",
        )


def _activations(given: ActivationsConfig) -> Iterator[Problem]:
    """Values that the chosen mode does not use."""
    mode = given.mode
    unused = {
        "alpha": (1.0, mode is Activations.MEMO),
        "host_gib": (0.0, mode in (Activations.SWAP, Activations.MEMO, Activations.AUTO)),
        "link_gb_s": (0.0, mode is Activations.AUTO),
    }
    for name, (default, is_used) in unused.items():
        value = getattr(given, name)
        if value != default and not is_used:
            yield Problem(
                f"activations.{name} is not used by mode = {mode}",
                f"{name} = {value}",
                f"{default}",
                f"--set activations.{name}={default}",
            )


_TIER_RANGES: Mapping[str, _Range] = MappingProxyType(
    {
        "every": _at_least(1),
        "keep_last": _at_least(1),
        "keep_every": _at_least(0),
        "bytes_per_s": _at_least(0),
    }
)


def _tiers(given: CheckpointConfig) -> Iterator[Problem]:
    """Levels of storage that cannot be, and what is not used where there are levels."""
    if not given.tiers:
        return
    unused = {"path": "", "disk_every": 0, "keep_last": CheckpointConfig().keep_last}
    for name, default in unused.items():
        if (value := getattr(given, name)) != default:
            allowed = (
                f"url of a tier in place of {name}" if name == "path" else "every and keep_last of each tier"
            )
            yield Problem(
                f"checkpoint.{name} is not used with checkpoint.tiers", f"{name} = {value}", allowed
            )
    if not given.enabled:
        yield Problem(
            "checkpoint.tiers get no snapshots",
            "every = 0, auto = false",
            "snapshots that are written to them",
            "--set checkpoint.every=100",
        )
    for number, tier in enumerate(given.tiers, start=1):
        where = f"table {number} of checkpoint.tiers"
        if not tier.url:
            yield Problem(
                "a tier has no url", where, "a folder, or an address that fsspec knows", "url = ..."
            )
        for name, (holds, allowed) in _TIER_RANGES.items():
            if not holds(getattr(tier, name)):
                yield Problem(f"{name} of a tier is out of range", f"{where}: {getattr(tier, name)}", allowed)
    names = [tier.name or tier.url for tier in given.tiers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield Problem(
            "two tiers have the same name or url", ", ".join(twice), "a name for each", "name = ..."
        )


def _sequences(config: RunConfig, dp: int) -> Iterator[Problem]:
    """What ranks that share sequences need, and what the chosen way of it does not use."""
    parallel = config.parallel
    kind, degree, ring = parallel.sequence, parallel.sequence_degree, parallel.sequence_ring
    is_static = kind not in (Sequences.NONE, Sequences.ADAPTIVE)
    if parallel.auto and kind is not Sequences.NONE:
        yield Problem(
            "the planner of layouts does not plan for shared sequences: their cost model is of one tp and pp",
            f'parallel = "auto", sequence = {kind}',
            "parallel.sequence = none, or a layout of one's own",
            "--set parallel.auto=false",
        )
        return
    unused = {
        "sequence_degree": (0, "", is_static),
        "sequence_ring": (0, "", kind is Sequences.USP),
        "sequence_cost": ("", "", kind is Sequences.ADAPTIVE),
        "micro_batches": (1, ": its plans decide", kind is not Sequences.ADAPTIVE),
    }
    for name, (default, why, is_used) in unused.items():
        value = getattr(parallel, name)
        if value != default and not is_used:
            yield Problem(
                f"parallel.{name} is not used by sequence = {kind}{why}",
                f"{name} = {value}",
                f"{default}" if default != "" else "no value",
                f"--set parallel.{name}={default}",
            )
    if kind is Sequences.ADAPTIVE:
        yield from _adaptive(config)
    elif is_static:
        known = config.model.preset in PRESETS
        num_heads = config.model.shape().num_heads // max(1, parallel.tp) if known else dp
        yield from _groups(kind, degree, ring, dp=dp, num_heads=num_heads)


def _adaptive(config: RunConfig) -> Iterator[Problem]:
    if not config.parallel.sequence_cost:
        yield Problem(
            "parallel.sequence_cost is missing",
            "sequence = adaptive",
            "a file that `distrain doctor --profile` has written, or 7b, 13b, 30b",
            "--set parallel.sequence_cost=FILE",
        )
    if config.data.packing != "documents":
        yield Problem(
            "windows of one length leave nothing to adapt to",
            f"data.packing = {config.data.packing}, sequence = adaptive",
            "documents",
            "--set data.packing=documents",
        )


def _groups(kind: Sequences, degree: int, ring: int, *, dp: int, num_heads: int) -> Iterator[Problem]:
    """Groups of one size that the replicas or the heads cannot be shared out by."""
    divisors = [size for size in range(2, min(dp, 65_536) + 1) if dp % size == 0]
    if degree not in divisors:
        yield Problem(
            "parallel.sequence_degree does not divide dp into groups",
            f"sequence_degree = {degree}, dp = {dp}",
            ", ".join(map(str, divisors)) or "a dp of 2 or more",
            f"--set parallel.sequence_degree={divisors[-1]}" if divisors else "--set parallel.sequence=none",
        )
    elif ring and (ring < 2 or degree % ring):
        rings = [size for size in range(2, degree + 1) if degree % size == 0]
        yield Problem(
            "parallel.sequence_ring does not divide parallel.sequence_degree",
            f"sequence_ring = {ring}, sequence_degree = {degree}",
            f"0, {', '.join(map(str, rings))}",
            f"--set parallel.sequence_ring={rings[0]}",
        )
    else:
        ulysses = degree if kind is Sequences.ULYSSES else degree // ring if ring else 1
        if ulysses > num_heads:
            yield Problem(
                "there are more ranks than heads to share",
                f"{ulysses} ranks, {num_heads} heads on each rank of tensor parallelism",
                f"at most {num_heads}",
                "--set parallel.sequence_ring=0" if kind is Sequences.USP else "--set parallel.sequence=usp",
            )


def _folders(config: RunConfig) -> Iterator[Problem]:
    yield from _corpus(config.data)
    run_dir = Path(config.run_dir)
    if not config.run_dir:
        yield Problem(
            "run_dir is empty", allowed="a folder that can be written", hint="--set run_dir=runs/default"
        )
    elif blocked := next((p for p in (run_dir, *run_dir.parents) if p.exists() and not p.is_dir()), None):
        yield Problem("run_dir is no folder", f"{blocked} is a file", "a folder, which may be made")


def _corpus(data: DataConfig) -> Iterator[Problem]:
    if data.source == "stdlib":
        if data.path:
            yield Problem(
                "data.path is not used by source = stdlib",
                f"path = {data.path}",
                "no path",
                "--set data.source=text",
            )
    elif not data.path:
        yield Problem(
            "data.path is missing",
            f"source = {data.source}",
            "a folder of documents or token files",
            "--set data.path=FOLDER",
        )
    elif not Path(data.path).is_dir():
        what = "is a file" if Path(data.path).exists() else "does not exist"
        yield Problem("data.path is no folder", f"{data.path} {what}", "a folder of documents or token files")
