"""Pictures of a memory plan: its addresses, alpha over the length, what is kept over memory, and the streams."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distrain.core.errors import InfeasibleError

from .activation_policy import ActivationTask, Choice, choose
from .buffers.address_map import address_map
from .drawing import Painter, draw
from .memory_plan import MemoryPlan, memo_of_the_paper

_BINDING = {"overlap": "#e67e22", "host": "#2980b9", "none": "#4c9f70"}
_STREAMS = {"compute": "#4c9f70", "recompute": "#c0392b", "to host": "#2980b9", "from host": "#8e44ad"}
_GIB = 2**30


def plot(path: Path, plan: MemoryPlan) -> None:
    """Write all four to ``path``; MissingDependencyError without matplotlib."""
    panels: list[Painter] = [
        address_map(
            plan.buffers, plan.arena.offsets, lower_bound=plan.arena.lower_bound,
            title=f"arena: {len(plan.buffers)} buffers of a step, gap {plan.arena.gap:.2%}",
        ),
        lambda axes: _alphas(axes, plan),
        lambda axes: _memory_curve(axes, plan),
        lambda axes: _gantt(axes, plan),
    ]  # fmt: skip
    draw(path, panels, columns=2)


def _alphas(axes: Any, plan: MemoryPlan) -> None:
    """MEMO's alpha over the length; the colour is the row that binds."""
    request = plan.request
    lengths = [2**power * factor // 2 for power in range(15, 23) for factor in (2, 3)]
    found = [(length, memo_of_the_paper(replace(request, seq_len=length))) for length in lengths]
    for name, colour in _BINDING.items():
        points = [(length / 1024, each.alpha) for length, each in found if each.binding == name]
        points = [(length, alpha) for length, alpha in points if alpha is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=colour, label=f"bound by {name}")
    drawn = [(length / 1024, each.alpha) for length, each in found if each.alpha is not None]
    if drawn:
        axes.plot(*zip(*drawn, strict=True), color="#999999", linewidth=0.8, zorder=0)
    impossible = [length / 1024 for length, each in found if each.alpha is None]
    axes.plot(impossible, [0.0] * len(impossible), "x", color="#c0392b", label="no alpha")
    axes.axvline(request.seq_len / 1024, color="black", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", ylim=(-0.05, 1.05), xlabel="sequence length, K tokens", ylabel="alpha (MEMO)")
    axes.legend(fontsize=7)


def _memory_curve(axes: Any, plan: MemoryPlan) -> None:
    """Bytes kept, swapped and made again as device memory grows, and the time of a step beside it."""
    task = plan.task
    least, most = 2 * task.layer_bytes, (task.num_layers + 1) * task.layer_bytes
    memory, shares, times = [], [], []
    for step in range(13):
        device = least + (most - least) * step / 12
        try:
            choice = choose(replace(task, device_bytes=device))
        except InfeasibleError:
            continue
        memory.append(device / _GIB)
        shares.append(_shares(task, choice))
        times.append(choice.replay.total_s)
    labels = ("keep", "swap", "recompute")
    colours = ("#4c9f70", "#2980b9", "#c0392b")
    axes.stackplot(memory, *zip(*shares, strict=True), labels=labels, colors=colours, alpha=0.7)
    axes.axvline(task.device_bytes / _GIB, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="device memory for activations, GiB", ylabel="% of bytes", ylim=(0, 100))
    axes.legend(fontsize=7, loc="lower right")
    beside = axes.twinx()
    beside.plot(memory, times, color="black", marker=".")
    beside.set_ylabel("time of the simulated passes, s")


def _shares(task: ActivationTask, choice: Choice) -> tuple[float, float, float]:
    def of(rows: Sequence[Sequence[int]]) -> float:
        total = sum(
            group.num_bytes * tokens for row in rows for group, tokens in zip(task.groups, row, strict=True)
        )
        return 100 * total / (task.layer_bytes * task.num_tokens * task.num_layers)

    kept, swapped = of(choice.policy.kept), of(choice.policy.swapped)
    return kept, swapped, 100 - kept - swapped


def _gantt(axes: Any, plan: MemoryPlan) -> None:
    """The streams of one step."""
    rows = {"compute": 0, "recompute": 0, "to host": 1, "from host": 2}
    for name, colour in _STREAMS.items():
        pieces = [(s.start_s, s.end_s - s.start_s) for s in plan.choice.replay.spans if s.stream == name]
        axes.broken_barh(
            pieces, (rows[name] + 0.1, 0.8), facecolors=colour, edgecolor="white", linewidth=0.2, label=name
        )
    axes.set(yticks=[0.5, 1.5, 2.5], yticklabels=["compute", "to host", "from host"], ylim=(3, 0))
    axes.set_xlabel(f"s; stall {plan.choice.replay.stall_s:.3g} s")
    axes.legend(fontsize=7)
