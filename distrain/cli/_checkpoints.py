"""How ``distrain ckpt`` shows checkpoints: tables for people, JSON for scripts, a bar for what takes long."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from distrain.checkpoint.candidates import Candidate
from distrain.checkpoint.locate import Located
from distrain.checkpoint.manifest import Manifest, StoredTensor
from distrain.checkpoint.verify import Report

_SHOWN = 5  # tensors named in a line; --json names all


def described(manifest: Manifest) -> tuple[str, str, str]:
    """When it was saved, by how many ranks, and how large it is."""
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.created))
    return saved, str(manifest.world_size), size(manifest.nbytes)


def summary(candidate: Candidate) -> dict[str, Any]:
    """A line of ``ls`` as JSON."""
    known: dict[str, Any] = {"folder": candidate.folder, "step": candidate.step}
    if (manifest := candidate.manifest) is None:
        return {**known, "good": False, "reason": candidate.refused}
    about = {"created": manifest.created, "world_size": manifest.world_size, "num_bytes": manifest.nbytes}
    return {**known, "good": True, "job": manifest.job, "attempt": manifest.attempt, **about}


def head(found: Located) -> dict[str, Any]:
    """What ``inspect`` says of the whole."""
    manifest = found.manifest
    return {
        "folder": f"{found.storage.name}/{found.folder}",
        "job": manifest.job,
        "step": manifest.step,
        "attempt": manifest.attempt,
        "saved": described(manifest)[0],
        "world_size": manifest.world_size,
        "mesh": dict(manifest.mesh),
        "num_bytes": manifest.nbytes,
        "num_tensors": len(manifest.tensors),
        "objects": list(manifest.objects),
    }


def tensor_fields(tensor: StoredTensor) -> dict[str, Any]:
    """What ``inspect`` says of a tensor, as JSON."""
    return {**asdict(tensor), "num_bytes": tensor.nbytes}


def show_report(report: Report) -> None:
    """What ``verify`` found."""
    if report.is_good:
        show(f"{report.folder}: good, {report.num_extents} extents read")
        return
    table = Table("writer", "extent", "what", "tensors", title=f"{report.folder} is damaged", box=None)
    for damage in report.damages:
        where = ("-" if number is None else str(number) for number in (damage.writer, damage.extent))
        table.add_row(*where, one_line(damage.message), some(damage.tensors))
    show(table)


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def one_line(message: str) -> str:
    """An error of several lines in one."""
    return message.removeprefix("error: ").replace("\n", ", ")


def size(num_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} TiB"


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, for work that reads a lot."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)


def show(*parts: Table | str) -> None:
    """Print tables and lines."""
    console = Console(soft_wrap=True)
    for part in parts:
        console.print(part, markup=False, highlight=False)


def print_json(value: Any) -> None:
    """Print for a script."""
    print(json.dumps(value, indent=2))
