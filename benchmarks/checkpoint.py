"""Checkpoints against torch.save, safetensors, DCP and DeepSpeed, and against what memory and disk can do at best.

Every contender saves the same training state in a process of its own. All take turns, round after round, and so do
the raw limits: a copy between warm buffers, and O_DIRECT. The first turn of each, when memory is fresh, is told apart.
What a contender says is taken at its word: the optimizer steps as soon as it may, and what is restored afterwards must
be the state at the save. Who restores anything else has a stall that is worth nothing and is no peer.

Everything lies in a fresh folder of the temporary folder (TMPDIR), which should be on a disk.
"""

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .crew import Crew, CrewError, crew
from .harness import Row, Session, main, package_version
from .intervals import Interval, paired_ratio

if TYPE_CHECKING:
    from .checkpoint_contenders.base import Factory, Job

RAW, EAGER, LAZY = "raw", "distrain eager", "distrain lazy"
DCP, DCP_ASYNC, TORCH_SAVE = "DCP", "DCP async thread", "torch.save"
CHANGED_BYTES_PER_S = 100e6
"""at least so much of the state changes in a second of the steps that are all saved"""
SAVES, WARM_UP_SAVES = 200, 30
MISSING = {
    "DeepSpeed": "pip install -c .venv/constraints.txt -e '.[deepspeed]'",
    "safetensors": "pip install -c .venv/constraints.txt safetensors",
    "NVRx": "copies tensors of a GPU only; on a CPU it calls torch.cuda and takes no snapshot",
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A metric: one time over another, round by round."""

    metric: str
    over: tuple[str, str]
    under: tuple[str, str]
    """contender and the name of its times"""
    at_least: float = -math.inf
    at_most: float = math.inf


COMPARISONS = (
    Comparison("stall_over_memcpy", (EAGER, "stall_s"), (RAW, "memcpy_s"), at_most=1.3),
    Comparison("lazy_stall_over_memcpy", (LAZY, "stall_s"), (RAW, "memcpy_s"), at_most=0.1),
    Comparison("durable_over_raw_write", (RAW, "write_s"), (EAGER, "durable_s"), at_least=0.75),
    Comparison("restore_over_raw_read", (RAW, "read_s"), (EAGER, "restore_s"), at_least=0.7),
    Comparison("pool_restore_over_memcpy", (EAGER, "recall_s"), (RAW, "memcpy_s"), at_most=2.0),
    Comparison("lazy_stall_speedup_over_best_peer", ("", "stall_s"), (LAZY, "stall_s"), at_least=10.0),
    Comparison("durable_speedup_over_dcp", (DCP, "durable_s"), (EAGER, "durable_s"), at_least=3.0),
    Comparison("durable_speedup_over_best_peer", ("", "durable_s"), (EAGER, "durable_s"), at_least=2.0),
    Comparison("restore_speedup_over_dcp", (DCP, "restore_s"), (EAGER, "restore_s"), at_least=3.0),
)
"""an empty name stands for the best peer"""


def contenders(*, quick: bool) -> "dict[str, Factory]":
    """All that can run here; ours only if it has to be quick."""
    from .checkpoint_contenders import dcp, deepspeed_engines, ours, plain_files

    found: dict[str, Factory] = {EAGER: ours.eager, LAZY: ours.lazy}
    if quick:
        return found
    found |= {TORCH_SAVE: plain_files.TorchSave}
    if package_version("safetensors"):
        found |= {"safetensors": plain_files.Safetensors}
    found |= {
        DCP: dcp.sync,
        DCP_ASYNC: dcp.thread,
        "DCP async thread, cached": dcp.thread_cached,
        "DCP async thread, async staging": dcp.thread_async_staging,
        "DCP async process, shared": dcp.process_shared,
        "DCP async process, async staging": dcp.process_async_staging,
    }
    if package_version("deepspeed"):
        found |= {
            "DeepSpeed torch": deepspeed_engines.Torch,
            "DeepSpeed fast": deepspeed_engines.Fast,
            "DeepSpeed decoupled": deepspeed_engines.Decoupled,
        }
    return found


def jobs(*, quick: bool) -> "dict[str, Job]":
    """What is saved: few large tensors, and many small ones."""
    from .checkpoint_contenders.base import Job

    if quick:
        return {"large": Job(4, (512, 512), 0.1, first_save_s=0.0)}
    return {"large": Job(4, (3072, 2048), 0.2), "small": Job(500, (128, 128), 0.2)}


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(name: str, job: "Job", factories: "Mapping[str, Factory]", session: Session) -> list[Row]:
    """One row a contender, and one for the raw limits: the times of each round, or why there are none."""
    from .checkpoint_contenders.base import make_worker
    from .checkpoint_contenders.raw import make_raw

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-checkpoint-")))
        crews = {RAW: stack.enter_context(crew(RAW, make_raw, job, folder / RAW, world_size=1))}
        for number, (contender, factory) in enumerate(factories.items()):
            crews[contender] = stack.enter_context(
                crew(
                    contender,
                    make_worker,
                    factory,
                    job,
                    folder / str(number),
                    world_size=1,
                    has_children=True,
                )
            )
        session.say(f"{name}: starting {len(crews)} contenders")
        rows = {contender: _row(name, contender, job) for contender in crews}
        _each(crews, rows, session, Crew.ready)
        session.say(f"{name}: first saves")
        _each(crews, rows, session, lambda started: started.call("turn"))
        for row in rows.values():
            row["first"] = {key: values.pop() for key, values in row["times"].items() if key != "consistent"}
        rounds = (
            session.rounds if name == "large" else -(-session.rounds // 3)
        )  # no metric depends on the others
        for number in range(rounds):
            session.say(f"{name}: round {number + 1} of {rounds}")
            _each(crews, rows, session, lambda started: started.call("turn"), first=number)
        _each(crews, rows, session, lambda started: started.call("close"))
    for row in rows.values():
        _summarise(row)
    return list(rows.values())


def _each(
    crews: Mapping[str, Crew],
    rows: Mapping[str, Row],
    session: Session,
    call: Callable[[Crew], object],
    *,
    first: int = 0,
) -> None:
    """Call one after the other, in an order that turns with ``first``, and keep what they find; who fails is out."""
    names = list(crews)
    for name in names[first % len(names) :] + names[: first % len(names)]:
        row = rows[name]
        if row["problem"]:
            continue
        try:
            answer = call(crews[name])
        except CrewError as error:
            session.say(str(error))
            row["problem"] = str(error).strip().splitlines()[-1]
            continue
        for key, value in answer[0].items() if isinstance(answer, list) and answer[0] else ():
            row["times"].setdefault(key, []).append(value)


def _row(family: str, contender: str, job: "Job") -> Row:
    return {
        "family": family,
        "contender": contender,
        "state_mib": job.nbytes / 2**20,
        "problem": "",
        "times": {},
    }


def _summarise(row: Row) -> None:
    """Medians into cells of their own, and the verdict on the bytes; lists are not shown."""
    times, first = row.pop("times"), row.pop("first", {})
    if "stall_s" in first:
        row["first_stall_ms"] = first["stall_s"] * 1e3
        row["first_after_s"] = first["age_s"]
    times.pop("age_s", None)
    for key, values in times.items():
        if not values:
            continue
        if key == "consistent":
            row["consistent"] = "yes" if all(values) else "no"
        else:
            row[key.replace("_s", "_ms")] = statistics.median(values) * 1e3
            row[f"each_{key}"] = values


def every_step(factories: "Mapping[str, Factory]", session: Session) -> list[Row]:
    """Training that saves at every step, next to the same without, in turns of a few steps each."""
    from .checkpoint_contenders.base import Job, make_worker

    job = Job(1, (256, 256) if session.quick else (4096, 2048), 0.0)
    step_s = 0.05 if session.quick else 0.8 * job.nbytes / CHANGED_BYTES_PER_S
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-checkpoint-")))
        crews = {
            name: stack.enter_context(
                crew(name, make_worker, factory, job, folder / str(i), world_size=1, has_children=True)
            )
            for i, (name, factory) in enumerate(factories.items())
        }
        session.say("every step: starting")
        rows = {name: _row("every step", name, job) for name in crews}
        _each(crews, rows, session, Crew.ready)
        (amount,) = crews[LAZY].call("calibrate", step_s)
        for number in range(session.rounds):
            session.say(f"every step: round {number + 1} of {session.rounds}")
            _each(crews, rows, session, lambda started: started.call("train", 3, amount), first=number)
        _each(crews, rows, session, lambda started: started.call("close"))
    for row in rows.values():
        _summarise(row)
    return list(rows.values())


def growth(factory: "Factory", session: Session) -> list[Row]:
    """Resident memory of the trainer and of its keeper before and after many saves."""
    from .checkpoint_contenders.base import Job, make_worker

    job = Job(1, (2048, 1024), 0.0)
    with tempfile.TemporaryDirectory(prefix="benchmark-checkpoint-") as folder:
        started = (LAZY, make_worker, factory, job, Path(folder) / "0")
        with crew(*started, world_size=1, has_children=True) as saver:
            saver.ready()
            session.say(f"memory: {SAVES} saves")
            (before,) = saver.call("grow", WARM_UP_SAVES)
            (after,) = saver.call("grow", SAVES)
            saver.call("close")
    row = {"family": "memory", "contender": LAZY, "saves": SAVES}
    for place, name in enumerate(("trainer", "keeper")):
        row[f"{name}_mib"] = before[str(place)] / 2**20
        row[f"{name}_growth"] = after[str(place)] / before[str(place)] - 1
    return [row]


# -- comparing -------------------------------------------------------------------------------------------------------


def compare(comparison: Comparison, rows: Mapping[str, Row]) -> tuple[float, str]:
    """The metric and a note; NaN where a contender is missing, has failed or has lost bytes."""
    key = f"each_{comparison.over[1]}"
    over = comparison.over[0] or best_peer(rows, key)
    for name in (over, comparison.under[0]):
        if name not in rows:
            return math.nan, f"{name or 'no peer'} has not taken part"
        if fault := _fault(rows[name]):
            return math.nan, f"{name}: {fault}"
    interval = paired_ratio(rows[over][key], rows[comparison.under[0]][f"each_{comparison.under[1]}"])
    against = over if over != RAW and comparison.under[0] != RAW else ""
    return interval.median, f"{interval} {against}".strip()


def best_peer(rows: Mapping[str, Row], key: str) -> str:
    """Whose median is the least, of those that are not ours and have kept every byte; "" if there is none."""
    peers = {
        name: statistics.median(row[key])
        for name, row in rows.items()
        if name not in (RAW, EAGER, LAZY) and not _fault(row)
    }
    return min(peers, key=peers.__getitem__, default="")


def _fault(row: Row) -> str:
    if row["problem"]:
        return str(row["problem"])
    return "" if row.get("consistent", "yes") == "yes" else "what it restored is not what was saved"


def run(session: Session) -> None:
    """Measure all and report."""
    factories = contenders(quick=session.quick)
    for name, job in jobs(quick=session.quick).items():
        rows = session.part(
            name,
            lambda name=name, job=job: measure(name, job, factories, session),  # type: ignore[misc]
        )
        _report(session, rows)
        if name == "large" and not session.quick:
            _compare_saves(session, {row["contender"]: row for row in rows})
    chosen = {name: factories[name] for name in (LAZY, DCP_ASYNC, TORCH_SAVE) if name in factories}
    rows = session.part("every_step", lambda: every_step(chosen, session))
    _report(session, rows)
    if not session.quick:
        _compare_training(session, {row["contender"]: row for row in rows})
        (memory,) = session.part("memory", lambda: growth(factories[LAZY], session))
        session.row(**memory)
        grown = max(memory["trainer_growth"], memory["keeper_growth"])
        session.metric("rss_growth_200_saves", grown, at_most=0.01)
        for peer, hint in MISSING.items():
            if not any(name.startswith(peer) for name in factories):
                session.row(family="large", contender=peer, problem=hint)


def _report(session: Session, rows: Sequence[Row]) -> None:
    for row in rows:
        session.row(**row)
        if row["contender"] in (EAGER, LAZY) and (fault := _fault(row)):
            session.failed.append(f"{row['contender']}: {fault}")


def _compare_saves(session: Session, rows: Mapping[str, Row]) -> None:
    for comparison in COMPARISONS:
        value, note = compare(comparison, rows)
        session.metric(
            comparison.metric, value, at_least=comparison.at_least, at_most=comparison.at_most, note=note
        )
    ours = rows[EAGER]
    session.metric(
        "first_stall_over_steady",
        ours.get("first_stall_ms", math.nan) / ours.get("stall_ms", math.nan),
        at_most=1.5,
        note=f"one sample, {ours.get('first_after_s', math.nan):.1f} s after the process began to train",
    )


def _compare_training(session: Session, rows: Mapping[str, Row]) -> None:
    ours = rows[LAZY]
    if ours["problem"]:
        session.metric("every_step_slowdown", math.nan, at_most=1.05, note=ours["problem"])
        return
    slowdown = paired_ratio(ours["each_with_s"], ours["each_without_s"])
    session.metric("every_step_slowdown", slowdown.median, at_most=1.05, note=str(slowdown))
    for peer, metric in ((DCP_ASYNC, "dcp_async"), (TORCH_SAVE, "torch_save")):
        speedup: Interval | None = None
        if peer in rows and not rows[peer]["problem"]:
            speedup = paired_ratio(rows[peer]["each_with_s"], ours["each_with_s"])
        session.metric(
            f"every_step_speedup_over_{metric}",
            speedup.median if speedup else math.nan,
            note=str(speedup) if speedup else f"{peer} has not finished",
        )


if __name__ == "__main__":
    main("checkpoint", run)
