"""A memory plan without a GPU: does this model train at this length, what is swapped and made again, where does it lie.

From a traced layer and a machine's numbers:

1. model states, sharded over all ranks, and two gathered layers of weights: fixed
2. the arena: transients of all layers, gradients between layers and a chunk of logits, planned as buffers (flat, and in
   MEMO's two levels; the lower peak is taken)
3. what is left of the device: two rounding buffers, and kept activations
4. the policy: which tokens are kept, swapped, made again, with host and link as limits

Times are FLOPs (``layer_flops``) over what a device achieves.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from distrain.core.errors import InfeasibleError, Problem
from distrain.core.vocabulary import Schedule

from . import schedules
from .activation_policy import ActivationTask, Choice, MemoAlpha, TensorGroup, choose, memo_alpha
from .activation_policy.problem import Pass, stage_passes
from .buffers import Buffer, BufferPlan, Levels, solve, solve_by_layers
from .buffers.engine import Engine
from .buffers.problem import aligned
from .memory import USABLE, gib
from .memory_request import LayerFacts, MemoryRequest

STATE_BYTES = 16
"""of one parameter: bfloat16 weight and gradient, float32 weight and two moments"""

LOGIT_TOKENS = 4096
"""the head and its loss take this many tokens at a time"""

ALIGNMENT = 512
"""of addresses on a GPU"""

_FIRST_GROUPS = ("input", "attention")


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The answer."""

    request: MemoryRequest
    layer: LayerFacts
    memo: MemoAlpha
    """MEMO's rule on its own layer: 16 units of sequence x width, GELU, four times as wide"""
    traced_memo: MemoAlpha
    """MEMO's rule on the layer that was traced"""
    task: ActivationTask
    choice: Choice
    flat: BufferPlan
    levels: Levels
    buffers: tuple[Buffer, ...]
    states_bytes: int
    gathered_bytes: int

    @property
    def arena(self) -> BufferPlan:
        """The addresses to use: of the flat plan or of the two levels, whichever has the lower peak."""
        return min(self.flat, self.levels.plan, key=lambda plan: plan.peak or 0)

    @cached_property
    def device(self) -> dict[str, float]:
        """Bytes of one GPU, by what they are for."""
        buffers = 2 * self.layer.layer_bytes
        return {
            "states": self.states_bytes,
            "gathered weights": self.gathered_bytes,
            "rounding buffers": buffers,
            "kept activations": self.choice.replay.device_bytes - buffers,
            "arena": float(self.arena.peak or 0),
        }

    @property
    def alphas(self) -> tuple[float, ...]:
        """By layer: the share of what can be made again that is not."""
        loose = [number for number, group in enumerate(self.task.groups) if group.recompute_s is not None]
        weights = [self.task.groups[number].num_bytes for number in loose]
        policy = self.choice.policy
        return tuple(
            sum(w * (kept[n] + swapped[n]) for n, w in zip(loose, weights, strict=True))
            / (sum(weights) * self.task.num_tokens)
            for kept, swapped in zip(policy.kept, policy.swapped, strict=True)
        )

    @property
    def predicted(self) -> dict[str, float]:
        """Time and rates of a step; utilisation counts the model's FLOPs only, attention as causal or as full."""
        request, replayed = self.request, self.choice.replay
        simulated = sum(each.backward for each in self.task.passes)
        stage_s = request.stage_layers * (request.forward_s + request.backward_s)
        head_s = 6.0 * request.seq_len * request.shape.vocab_size * request.shape.d_model
        head_s /= request.tp * request.cp * request.flops
        step_s = (replayed.total_s / simulated + head_s) * request.micro_batches + (request.pp - 1) * stage_s
        tokens = request.seq_len * request.micro_batches * request.dp
        shape = request.shape
        matrices = 6.0 * (shape.num_layers * request.layer_params + shape.vocab_size * shape.d_model)
        attention = 6.0 * shape.num_layers * request.seq_len * shape.d_model
        peak = request.gpus * request.peak_flops * step_s / tokens
        return {
            "step_s": step_s,
            "stall_s": replayed.stall_s / simulated * request.micro_batches,
            "recompute_s": replayed.recompute_s / simulated * request.micro_batches,
            "device_bytes": sum(self.device.values()),
            "host_bytes": replayed.host_bytes,
            "mfu_causal": (matrices + attention) / peak,
            "mfu_full": (matrices + 2 * attention) / peak,
            "tokens_per_s_per_gpu": tokens / step_s / request.gpus,
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; the buffers with their addresses go into a table of their own."""
        policy = self.choice.policy
        request = {name: value for name, value in asdict(self.request).items() if name != "shape"}
        return {
            "version": "distrain.memplan/1",
            "objective": "time of a step",
            "status": self.choice.status,
            "bound": self.choice.bound_s,
            "gap": self.choice.gap,
            "seconds": self.choice.seconds + self.flat.seconds + self.levels.plan.seconds,
            "request": {"model": asdict(self.request.shape), **request, "gpus": self.request.gpus},
            "memo": _memo_dict(self.memo),
            "traced_memo": _memo_dict(self.traced_memo),
            "layer": {
                "num_tokens": self.layer.num_tokens,
                "skeletal_bytes": self.layer.layer_bytes,
                "skeletal_units": self.layer.layer_bytes / self.layer.hidden_bytes,
                "groups": dict(self.layer.group_bytes),
            },
            "alpha": list(self.alphas),
            "policy": {
                "groups": [group.name for group in self.task.groups],
                "kept_tokens": [list(row) for row in policy.kept],
                "swapped_tokens": [list(row) for row in policy.swapped],
            },
            "device_bytes": self.device,
            "device_limit_bytes": int(USABLE * self.request.hbm_bytes),
            "host_limit_bytes": self.request.host_bytes_rank,
            "levels": {
                "loss": self.levels.loss,
                "flat": self.flat.to_dict(),
                "two_levels": self.levels.plan.to_dict(),
                "passes": [each.to_dict() for each in self.levels.passes],
                "model": self.levels.model.to_dict(),
            },
            "predicted": self.predicted,
        }


def plan_memory(
    request: MemoryRequest, layer: LayerFacts, *, time_limit_s: float = 30.0, engine: Engine | None = None
) -> MemoryPlan:
    """Answer ``request`` for a layer that was traced at its length.

    Raises:
        InfeasibleError: proven that it does not fit; says what is needed, what is there, and about which length fits.
    """
    buffers, passes = _arena(request, layer)
    flat = solve(buffers, time_limit_s=time_limit_s, engine=engine)
    levels = solve_by_layers(buffers, passes, time_limit_s=time_limit_s, engine=engine)
    arena = min(flat.peak or 0, levels.plan.peak or 0)
    states = STATE_BYTES * request.num_params // request.gpus
    gathered = 2 * 2 * request.layer_params // request.tp
    left = USABLE * request.hbm_bytes - states - gathered - arena
    task = activation_task(request, layer, device_bytes=left)
    try:
        choice = choose(task, time_limit_s=time_limit_s)
    except InfeasibleError as error:
        error.problems += (_whole_device(request, layer, states, gathered, arena),)
        raise
    return MemoryPlan(
        request=request, layer=layer, memo=memo_of_the_paper(request), traced_memo=_memo(request, layer),
        task=task, choice=choice, flat=flat, levels=levels, buffers=buffers,
        states_bytes=states, gathered_bytes=gathered,
    )  # fmt: skip


def activation_task(request: MemoryRequest, layer: LayerFacts, *, device_bytes: float) -> ActivationTask:
    """The policy's problem on the pipeline's first rank, where most is in flight."""
    again_s = {name: each * request.flop_s for name, each in request.layer_flops.again.items()}
    return ActivationTask(
        groups=tuple(TensorGroup(name, size, again_s.get(name)) for name, size in layer.group_bytes.items()),
        num_layers=request.stage_layers,
        num_tokens=layer.num_tokens,
        forward_s=request.forward_s,
        backward_s=request.backward_s,
        passes=_passes(request),
        d2h_bytes_s=request.link_bytes_s,
        h2d_bytes_s=request.link_bytes_s,
        host_bytes=request.host_bytes_rank,
        device_bytes=device_bytes,
    )


def _passes(request: MemoryRequest) -> tuple[Pass, ...]:
    """Of the first pipeline rank; more micro-batches than fill the pipeline twice repeat what was seen."""
    if request.pp == 1:
        return Pass(False, 0), Pass(True, 0)
    num = min(request.micro_batches, 2 * request.pp)
    built = schedules.build(Schedule.ONE_F_ONE_B, num_ranks=request.pp, micro_batches=num)
    return stage_passes(built, rank=0)


def memo_of_the_paper(request: MemoryRequest) -> MemoAlpha:
    """The closed form with the paper's bytes and FLOPs: a layer of 16 units and 24 s h^2 + 2 s^2 h."""
    tokens = request.seq_len / (request.tp * request.cp)
    unit, d = 2.0 * tokens * request.shape.d_model, request.shape.d_model
    return memo_alpha(
        input_bytes=unit,
        attention_bytes=unit,
        other_bytes=14 * unit,
        num_layers=request.shape.num_layers,
        forward_s=tokens * (24.0 * d * d + 2.0 * request.seq_len * d) / request.flops,
        bytes_per_s=request.link_bytes_s,
        host_bytes=request.host_bytes_rank,
    )


def _memo(request: MemoryRequest, layer: LayerFacts) -> MemoAlpha:
    first, second = (layer.group_bytes[name] for name in _FIRST_GROUPS)
    return memo_alpha(
        input_bytes=first,
        attention_bytes=second,
        other_bytes=layer.layer_bytes - first - second,
        num_layers=request.shape.num_layers,
        forward_s=request.forward_s,
        bytes_per_s=request.link_bytes_s,
        host_bytes=request.host_bytes_rank,
    )


def _arena(request: MemoryRequest, layer: LayerFacts) -> tuple[tuple[Buffer, ...], list[tuple[int, int]]]:
    """All transients of a micro-batch on a rank with the head, and the layers' passes.

    Activations lie in the rounding buffers. Backward first makes again what was dropped: the transients of forward.
    """
    found: list[Buffer] = []
    passes = []
    now = 0

    def run(name: str, *parts: tuple[tuple[Buffer, ...], int]) -> None:
        nonlocal now
        start = now
        for number, (transients, ticks) in enumerate(parts):
            for each in transients:
                name_of_it = f"{name}.{number}.{each.id}"
                found.append(Buffer(name_of_it, now + each.lower, now + each.upper, each.size))
            now += ticks
        passes.append((start, now))

    for number in range(request.stage_layers):
        run(f"F{number}", (layer.forward, layer.forward_ticks))
    shape, rows = request.shape, min(LOGIT_TOKENS, layer.num_tokens)
    logits = rows * shape.vocab_size * 4
    head = now
    found += [Buffer("logits", now, now + 2, logits), Buffer("logits.grad", now + 1, now + 3, logits)]
    now += 3
    born = head + 2
    for number in reversed(range(request.stage_layers)):
        name, start = f"B{number}", now
        run(name, (layer.forward, layer.forward_ticks), (layer.backward, layer.backward_ticks))
        found.append(Buffer(f"{name}.gradient", born, now, layer.hidden_bytes))
        born = start + layer.forward_ticks + layer.gradient_birth
    found.append(Buffer("embedding.gradient", born, now + 1, layer.hidden_bytes))
    return aligned(found, alignment=ALIGNMENT), passes


def _whole_device(
    request: MemoryRequest, layer: LayerFacts, states: int, gathered: int, arena: int
) -> Problem:
    """The account of the device, and a length at which it would come out even."""
    fixed = states + gathered
    limit = USABLE * request.hbm_bytes
    need = fixed + arena + 2 * layer.layer_bytes
    host = (request.stage_layers - 2) * request.pp * sum(layer.group_bytes[name] for name in _FIRST_GROUPS)
    by_device = (limit - fixed) / (need - fixed)
    room = request.host_bytes_rank + max(0.0, limit - need)
    by_host = room / host if host > 0 else 1.0
    length = int(request.seq_len * max(0.0, min(by_device, by_host, 1.0)))
    return Problem(
        f"{request.seq_len} tokens do not fit",
        got=f"states {gib(states)} + gathered weights {gib(gathered)} + rounding buffers "
        f"{gib(2 * layer.layer_bytes)} + arena {gib(arena)} = {gib(need)} of a GPU",
        allowed=f"{gib(limit)} ({USABLE:.0%} of {gib(request.hbm_bytes)}); host {gib(request.host_bytes_rank)} a GPU",
        hint=f"about {length // 1024}K tokens may fit"
        if length >= 1024
        else "more GPUs, since the model alone does not fit",
    )


def _memo_dict(memo: MemoAlpha) -> dict[str, Any]:
    return {
        "alpha": memo.alpha, "overlap": memo.overlap, "host": memo.host, "binding": memo.binding,
        "explanation": memo.explanation,
    }  # fmt: skip
