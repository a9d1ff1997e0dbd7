"""``distrain plan memory``: will it train at this length, what is swapped and made again, and where does it all lie."""

import json
from dataclasses import replace
from enum import StrEnum
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from distrain.core.errors import ConfigError, Problem, nearest, raise_if
from distrain.core.vocabulary import DEVICES, PRESETS

from ._units import number

if TYPE_CHECKING:
    from distrain.planners.memory_plan import MemoryPlan
    from distrain.planners.memory_request import MemoryRequest

_GIB = 2**30
_GPT_VOCABULARY = 50_257
_ACHIEVED = 0.55


class Layer(StrEnum):
    """What a layer is made of."""

    LLAMA = "llama"
    GPT = "gpt"


def memory(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "7b",
    seq: Annotated[str, typer.Option(help="Tokens of a sequence: 65536, 128K, 1M.")] = "128K",
    gpus: Annotated[int, typer.Option(min=1, help="All GPUs.")] = 8,
    tp: Annotated[
        int | None, typer.Option(min=1, help="Tensor-parallel ranks.", show_default="as many as a node has")
    ] = None,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline ranks, 1F1B.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Replicas; states are sharded over all GPUs.")] = 1,
    cp: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks that share a sequence beside tp.", show_default="all others"),
    ] = None,
    micro_batches: Annotated[
        int | None, typer.Option(min=1, help="Sequences of a replica's step.", show_default="1, or 2 x pp")
    ] = None,
    layer: Annotated[
        Layer, typer.Option(help="llama, or gpt: MEMO's, with GELU, 4 x as wide.")
    ] = Layer.LLAMA,
    device: Annotated[str, typer.Option(help=f"One of {', '.join(DEVICES)}.")] = "a100-80g",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs that share a host.")] = 8,
    hbm: Annotated[str | None, typer.Option(help="Memory of a GPU.", show_default="the device's")] = None,
    host: Annotated[str, typer.Option(help="Memory of a node for swapped activations.")] = "2TiB",
    pcie: Annotated[str, typer.Option(help="To the host and back, each GPU while all copy.")] = "11GB/s",
    flops: Annotated[
        str | None, typer.Option(help="What a GPU achieves.", show_default=f"{_ACHIEVED:.0%} of its peak")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the plan (JSON).", metavar="FILE")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Write the arena's buffers with their addresses.", metavar="FILE")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the plan here.", metavar="FILE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Plan the memory of training at a length, without a GPU: trace a layer, choose what to keep, swap and make
    again, and give every transient tensor its address.

    Exit codes: 0 planned, 4 proven that it does not fit.

    \b
    Examples:
      distrain plan memory --model 7b --seq 1M --gpus 8 --hbm 80GiB --host 2TiB --pcie 11GB/s
      distrain plan memory --model 65b --seq 1408K --gpus 64 --layer gpt -o plan.json --plot plan.svg
      distrain plan memory --model 13b --seq 256K --gpus 32 --tp 8 --pp 4 --json
    """
    request = _request(
        model, seq, layer, device, hbm, host, pcie, flops, gpus=gpus, tp=tp, pp=pp, dp=dp, cp=cp,
        micro_batches=micro_batches, gpus_per_node=gpus_per_node,
    )  # fmt: skip
    if plot is not None:
        from distrain.planners.drawing import require

        require()
    with Console(stderr=True).status("tracing a layer", spinner="line") as status:
        from distrain.activation.layer_facts import layer_facts
        from distrain.planners.buffers.engine import engine
        from distrain.planners.memory_plan import plan_memory

        facts = layer_facts(
            request.shape, kind=layer.value, tp=request.tp, cp=request.cp, seq_len=request.seq_len
        )
        status.update("planning")
        plan = plan_memory(request, facts, engine=engine(build=True))
        _write(plan, output, csv, plot)
    if as_json:
        print(json.dumps(plan.to_dict(), indent=2))
    else:
        _show(plan)


def _request(
    model: str, seq: str, layer: Layer, device: str, hbm: str | None, host: str, pcie: str, flops: str | None,
    *, gpus: int, tp: int | None, pp: int, dp: int, cp: int | None, micro_batches: int | None, gpus_per_node: int,
) -> "MemoryRequest":  # fmt: skip
    """The flags as a request; ConfigError lists all that is wrong with them."""
    from distrain.planners.memory_request import MemoryRequest, layer_problems, request_problems

    problems: list[Problem] = []
    for flag, word, known in (("--model", model, PRESETS), ("--device", device, DEVICES)):
        if word not in known:
            close = nearest(word, known)
            hint = f"{flag} {close}" if close else ""
            problems.append(Problem(f"{flag} is unknown", got=word, allowed=", ".join(known), hint=hint))
    shape = PRESETS.get(model, PRESETS["tiny"])
    spec = DEVICES.get(device, DEVICES["a100-80g"])
    if layer is Layer.GPT:
        shape = replace(
            shape, d_ffn=4 * shape.d_model, num_kv_heads=shape.num_heads, vocab_size=_GPT_VOCABULARY
        )
    seq_len = int(number(seq, kind="tokens", flag="--seq", problems=problems))
    sharers = max(1, gpus // (pp * dp))
    tp = tp if tp is not None else gcd(sharers // (cp or 1), gpus_per_node, shape.num_kv_heads)
    cp = cp if cp is not None else max(1, sharers // tp)
    if tp * cp * pp * dp != gpus:
        problems.append(
            Problem(
                "tp x cp x pp x dp is not the number of GPUs",
                got=f"{tp} x {cp} x {pp} x {dp} = {tp * cp * pp * dp}",
                allowed=str(gpus),
            )
        )
    request = MemoryRequest(
        shape=shape, kind=layer.value, seq_len=seq_len, tp=tp, cp=cp, pp=pp, dp=dp,
        micro_batches=micro_batches or (1 if pp == 1 else 2 * pp),
        gpus_per_node=gpus_per_node,
        peak_flops=spec.peak_flops,
        flops=_ACHIEVED * spec.peak_flops
        if flops is None
        else number(flops, kind="flops", flag="--flops", problems=problems),
        hbm_bytes=spec.memory_bytes
        if hbm is None
        else int(number(hbm, kind="bytes", flag="--hbm", problems=problems)),
        host_bytes=int(number(host, kind="bytes", flag="--host", problems=problems)),
        link_bytes_s=number(pcie, kind="rate", flag="--pcie", problems=problems),
    )  # fmt: skip
    if model in PRESETS and seq_len:
        problems += [*request_problems(request), *layer_problems(shape, tp=tp, cp=cp, seq_len=seq_len)]
    raise_if(problems)
    return request


def _write(plan: "MemoryPlan", output: Path | None, csv: Path | None, plot: Path | None) -> None:
    from distrain.planners.buffers import table

    try:
        if output is not None:
            output.write_text(json.dumps(plan.to_dict(), indent=2) + "\n")
        if csv is not None:
            table.write(csv, plan.buffers, plan.arena.offsets)
    except OSError as error:
        raise ConfigError("this cannot be written", got=f"{error.filename}: {error.strerror}") from None
    if plot is not None:
        from distrain.planners.memory_plots import plot as draw

        draw(plot, plan)


def _show(plan: "MemoryPlan") -> None:
    request, predicted, alphas = plan.request, plan.predicted, plan.alphas
    replayed = plan.choice.replay
    units = plan.layer.layer_bytes / plan.layer.hidden_bytes
    memory = Table("a GPU's memory", "GiB", box=None, header_style="bold")
    for name, size in plan.device.items():
        memory.add_row(name, f"{size / _GIB:.2f}")
    memory.add_row("in all", f"{sum(plan.device.values()) / _GIB:.2f}")
    memory.add_row(
        "host, swapped", f"{replayed.host_bytes / _GIB:.2f} of {request.host_bytes_rank / _GIB:.2f}"
    )
    lines = [
        f"{request.seq_len:,} tokens on {request.gpus} GPUs: tp {request.tp}, cp {request.cp}, pp {request.pp}, "
        f"dp {request.dp}; {request.kind} layers",
        f"a layer keeps {units:.2f} units of tokens x width: {plan.layer.layer_bytes / _GIB:.2f} GiB a GPU",
        f"MEMO's rule, on its own layer: {_memo_line(plan)}",
        f"plan: of what can be made again, layers keep or swap {min(alphas):.3f} to {max(alphas):.3f} "
        f"({plan.choice.status}, gap {plan.choice.gap:.1e})",
        f"arena: {len(plan.buffers)} buffers, gap {plan.arena.gap:.2%}, {plan.arena.status}; two levels cost "
        f"{plan.levels.loss:.2%} over the flat bound",
    ]
    after = [
        f"a step takes {predicted['step_s']:.2f} s, of it stalls {predicted['stall_s']:.2f} s, "
        f"made again {predicted['recompute_s']:.2f} s",
        f"MFU {predicted['mfu_causal']:.1%} (causal), {predicted['mfu_full']:.1%} (full attention); "
        f"{predicted['tokens_per_s_per_gpu']:.1f} tokens/s a GPU",
    ]
    console = Console(soft_wrap=True)
    for part in (*lines, "", memory, "", *after):
        console.print(part, markup=False, highlight=False)


def _memo_line(plan: "MemoryPlan") -> str:
    alpha = plan.memo.alpha
    return plan.memo.explanation if alpha is None else f"alpha {alpha:.3f}; {plan.memo.explanation}"
