"""The arithmetic of parallel layouts: which degrees a model, a batch and a world size can be shared out by.

Used by ``checks.py`` for configs and by planners for plans, which must refuse the same things in the same words.
Every check is a generator of problems; a size that is out of range is reported once, and what divides or is
divided by it is then not judged.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import gcd
from types import MappingProxyType

from .errors import Problem
from .vocabulary import DataParallel, Degrees, ModelShape, Schedule

STAGES_A_RANK: Mapping[Schedule, int] = MappingProxyType(
    {Schedule.GPIPE: 1, Schedule.ONE_F_ONE_B: 1, Schedule.ZBV: 2}
)
"""what ``Degrees.vpp`` must be where the schedule fixes it"""


def check_layout(
    shape: ModelShape,
    degrees: Degrees,
    *,
    schedule: Schedule,
    data: DataParallel,
    micro_batches: int,
    global_batch: int,
    seq_len: int,
    world_size: int,
    sequence_degree: int | None = 1,
) -> list[Problem]:
    """Everything that keeps a model of this shape from training under this layout on ``world_size`` ranks.

    ``sequence_degree`` replicas share each sequence; None if plans decide which do.
    """
    return [
        *check_mesh(
            degrees,
            schedule=schedule,
            data=data,
            micro_batches=micro_batches,
            global_batch=global_batch,
            world_size=world_size,
            sequence_degree=sequence_degree,
        ),
        *check_model(shape, degrees, schedule=schedule, seq_len=seq_len),
    ]


def check_model(shape: ModelShape, degrees: Degrees, *, schedule: Schedule, seq_len: int) -> list[Problem]:
    """The part of ``check_layout`` that looks at the model: what must be shared out evenly."""
    return [
        *_shape(shape),
        *_tensor(shape, degrees.tp, seq_len),
        *_stages(shape.num_layers, degrees, schedule),
    ]


def check_mesh(
    degrees: Degrees,
    *,
    schedule: Schedule,
    data: DataParallel,
    micro_batches: int,
    global_batch: int,
    world_size: int,
    sequence_degree: int | None = 1,
) -> list[Problem]:
    """The part of ``check_layout`` that needs no model: ranks, schedule, batch, sharding groups."""
    sizes = {
        "parallel.tp": degrees.tp,
        "parallel.pp": degrees.pp,
        "parallel.dp": degrees.dp,
        "parallel.vpp": degrees.vpp,
        "parallel.micro_batches": micro_batches,
        "data.global_batch": global_batch,
        "the world size": world_size,
    }
    return [
        *_too_small(sizes),
        *_ranks(degrees, world_size),
        *_schedule(degrees, schedule, micro_batches),
        *(_batch(degrees.dp, sequence_degree, micro_batches, global_batch) if sequence_degree else ()),
        *_sharding(degrees, data),
    ]


# -- the mesh and what runs on it ---------------------------------------------------------------


def _ranks(degrees: Degrees, world_size: int) -> Iterator[Problem]:
    """A mesh that is larger or smaller than the world."""
    used, model = degrees.world_size, degrees.tp * degrees.pp
    if used == world_size or min(degrees.tp, degrees.pp, degrees.dp, world_size) < 1:
        return
    fits = world_size % model == 0
    yield Problem(
        "there are too few ranks for the layout" if used > world_size else "the layout leaves ranks over",
        f"tp {degrees.tp} x pp {degrees.pp} x dp {degrees.dp} = {used} ranks, world size {world_size}",
        f"tp x pp x dp = {world_size}" if fits else f"a world size that tp x pp = {model} divides",
        f"--set parallel.dp={world_size // model}" if fits else f"start {_round_up(world_size, model)} ranks",
    )


def _schedule(degrees: Degrees, schedule: Schedule, micro_batches: int) -> Iterator[Problem]:
    """Degrees and micro-batches that the schedule cannot be drawn for."""
    pp, vpp = degrees.pp, degrees.vpp
    if schedule in (Schedule.INTERLEAVED, Schedule.ZBV) and pp == 1:
        yield Problem(
            f"schedule {schedule} needs a pipeline", "pp = 1", "2 or more", "--set parallel.schedule=1f1b"
        )
    if schedule is Schedule.INTERLEAVED:
        if vpp == 1:
            yield Problem(
                "schedule interleaved needs several stages a rank",
                "vpp = 1",
                "2 or more",
                "--set parallel.vpp=2",
            )
        if not _divides(pp, micro_batches):
            yield _not_multiple("parallel.micro_batches", micro_batches, "pp", pp)
    elif pp > 1 and vpp >= 1 and vpp != STAGES_A_RANK[schedule]:
        yield Problem(
            f"schedule {schedule} fixes the stages a rank", f"vpp = {vpp}", str(STAGES_A_RANK[schedule])
        )


def _batch(dp: int, sequence_degree: int, micro_batches: int, global_batch: int) -> Iterator[Problem]:
    """A step whose sequences do not come out even over replicas, or groups of them, and micro-batches."""
    places = dp // sequence_degree
    if min(places, micro_batches) >= 1 and not _divides(places * micro_batches, global_batch):
        unit = "dp" if sequence_degree == 1 else "dp / sequence_degree"
        yield _not_multiple(
            "data.global_batch", global_batch, f"{unit} x micro_batches", places * micro_batches
        )


def _sharding(degrees: Degrees, data: DataParallel) -> Iterator[Problem]:
    """HSDP groups that are no proper part of the replicas."""
    dp, shard = degrees.dp, degrees.dp_shard
    if data is not DataParallel.HSDP or dp < 1 or (1 < shard < dp and dp % shard == 0):
        return
    choices = [divisor for divisor in _divisors(dp) if 1 < divisor < dp]
    yield Problem(
        "parallel.hsdp_shard is no group of replicas",
        f"hsdp_shard = {shard}, dp = {dp}",
        _listed(choices) if choices else "a dp that has a divisor between 1 and itself",
        f"--set parallel.hsdp_shard={choices[-1]}" if choices else "--set parallel.data=fsdp2",
    )


# -- the model on it ----------------------------------------------------------------------------


def _shape(shape: ModelShape) -> Iterator[Problem]:
    """A decoder that cannot be built under any layout."""
    names = ("d_model", "num_layers", "num_heads", "num_kv_heads", "d_ffn", "vocab_size")
    yield from _too_small({f"model.{name}": getattr(shape, name) for name in names})
    if not _divides(shape.num_heads, shape.d_model):
        yield _indivisible("model.num_heads", shape.num_heads, "model.d_model", shape.d_model)
    elif min(shape.num_heads, shape.d_model) >= 1 and shape.head_dim % 2:
        yield Problem(
            "the head dimension is odd, and rotary embedding turns pairs",
            f"d_model / num_heads = {shape.d_model} / {shape.num_heads} = {shape.head_dim}",
            "an even quotient",
            f"--set model.d_model={shape.num_heads * (shape.head_dim + 1)}",
        )
    if not _divides(shape.num_kv_heads, shape.num_heads):
        yield _indivisible("model.num_kv_heads", shape.num_kv_heads, "model.num_heads", shape.num_heads)


def _tensor(shape: ModelShape, tp: int, seq_len: int) -> Iterator[Problem]:
    """Sizes that tensor parallelism cannot share out evenly; the sequence is one, by its parallel norms."""
    if seq_len < 2:
        yield Problem("data.seq_len is out of range", str(seq_len), "2 or more: each token predicts the next")
    shared = {
        "model.num_heads": shape.num_heads,
        "model.num_kv_heads": shape.num_kv_heads,
        "model.d_ffn": shape.d_ffn,
        "model.vocab_size": shape.vocab_size,
        "data.seq_len": seq_len,
    }
    best = max((divisor for divisor in _divisors(gcd(*shared.values())) if divisor <= tp), default=1)
    for name, size in shared.items():
        if not _divides(tp, size):
            padded = (
                f" or {name}={_round_up(size, tp)}" if name in ("model.vocab_size", "model.d_ffn") else ""
            )
            yield _indivisible("parallel.tp", tp, name, size, hint=f"--set parallel.tp={best}{padded}")


def _stages(num_layers: int, degrees: Degrees, schedule: Schedule) -> Iterator[Problem]:
    """Stages without a layer, and uneven ones where the schedule wants them even."""
    pp, vpp, stages = degrees.pp, degrees.vpp, degrees.num_stages
    if min(pp, vpp, num_layers) < 1:
        return
    if stages > num_layers:
        yield Problem(
            "there are more pipeline stages than layers",
            f"pp {pp} x {vpp} a rank = {stages} stages, num_layers = {num_layers}",
            f"at most {num_layers} stages",
            f"--set parallel.pp={max(1, num_layers // vpp)}",
        )
    elif schedule is Schedule.INTERLEAVED and num_layers % stages:
        choices = [count // pp for count in _divisors(num_layers) if count % pp == 0 and count > pp]
        yield Problem(
            "interleaving needs as many layers on each stage",
            f"pp {pp} x vpp {vpp} = {stages} stages, num_layers = {num_layers}",
            f"vpp of {_listed(choices)}" if choices else f"a pp that divides {num_layers}",
            f"--set parallel.vpp={choices[0]}" if choices else "--set parallel.schedule=1f1b",
        )


# -- arithmetic ---------------------------------------------------------------------------------


def _too_small(sizes: Mapping[str, int]) -> Iterator[Problem]:
    for name, value in sizes.items():
        if value < 1:
            yield Problem(f"{name} is out of range", str(value), "1 or more")


def _divides(divisor: int, number: int) -> bool:
    """Whether it divides; true where one of them is out of range, which is a problem of its own."""
    return min(divisor, number) < 1 or number % divisor == 0


def _divisors(number: int) -> list[int]:
    """Divisors up to 65,536: no degree is larger, and a mistyped size must not take minutes to refuse."""
    return [divisor for divisor in range(1, min(number, 65_536) + 1) if number % divisor == 0]


def _round_up(number: int, unit: int) -> int:
    """The least positive multiple of ``unit`` that is not below ``number``."""
    return max(1, -(-number // unit)) * unit


def _listed(numbers: Iterable[int], most: int = 12) -> str:
    """``1, 2, 4``; of a long list its first ones and its last."""
    words = [str(number) for number in numbers]
    return ", ".join(words if len(words) <= most else [*words[: most - 1], "...", words[-1]])


def _indivisible(divisor: str, by: int, name: str, number: int, hint: str = "") -> Problem:
    """The size ``name``, a ``number``, that the degree or count ``divisor``, which is ``by``, does not divide."""
    allowed = _divisors(number)
    best = max((choice for choice in allowed if choice <= by), default=1)
    return Problem(
        f"{divisor} does not divide {name}",
        f"{_leaf(divisor)} = {by}, {_leaf(name)} = {number}",
        _listed(allowed),
        hint or f"--set {divisor}={best}",
    )


def _not_multiple(name: str, number: int, unit_name: str, unit: int) -> Problem:
    return Problem(
        f"{name} is not a multiple of {unit_name}",
        f"{_leaf(name)} = {number}, {unit_name} = {unit}",
        f"{unit}, {2 * unit}, {3 * unit}, ...",
        f"--set {name}={_round_up(number, unit)}",
    )


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]
