"""``distrain ckpt``: look at checkpoints, check, compare, convert, mend and clear them away."""

from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from distrain.checkpoint.candidates import Candidate, candidates, folders
from distrain.checkpoint.collect import Retention, collect, unwanted
from distrain.checkpoint.diff import diff as differences
from distrain.checkpoint.layout import EXTENT_BYTES
from distrain.checkpoint.locate import locate, place
from distrain.checkpoint.manifest import read_manifest
from distrain.checkpoint.names import Kind, read_name
from distrain.checkpoint.repair import repair as mend
from distrain.checkpoint.storage import Storage
from distrain.checkpoint.tensors import TensorReader
from distrain.checkpoint.tiers import open_storage
from distrain.checkpoint.verify import verify as check
from distrain.core.errors import ConfigError, DataError
from distrain.core.load import load

from ._checkpoints import (
    described,
    head,
    one_line,
    print_json,
    progress,
    show,
    show_report,
    size,
    some,
    summary,
    tensor_fields,
)

ckpt = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


def _existing(address: str) -> str:
    """An address that is no path has its own way to say that nothing is there."""
    if "://" not in address and not Path(address).is_dir():
        raise typer.BadParameter(f"there is no folder {address}")
    return address


def _all_existing(addresses: list[str] | None) -> list[str]:
    return [_existing(address) for address in addresses or ()]


_HELP = "The folder of a checkpoint, or of several: a path, or an address such as s3://bucket/run."
Folder = Annotated[str, typer.Argument(callback=_existing, help=_HELP)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@ckpt.callback()
def _ckpt() -> None:
    """Look at checkpoints, check, compare, convert, mend and clear them away."""


@ckpt.command(short_help="list checkpoints, and why some cannot be restored")
def ls(root: Folder = ".", as_json: AsJson = False) -> None:
    """List the checkpoints below ROOT, newest first, and why some cannot be restored.

    \b
    Examples:
      distrain ckpt ls runs/default/checkpoints
      distrain ckpt ls s3://bucket/run --json
    """
    storage = open_storage(root)
    found = list(candidates(storage))
    unfinished = [name for name in storage.names() if _kind(name) is Kind.TEMPORARY]
    if as_json:
        print_json({"root": root, "checkpoints": [summary(c) for c in found], "unfinished": unfinished})
        return
    table = Table("step", "folder", "saved", "ranks", "size", "state", box=None, header_style="bold")
    for candidate in found:
        manifest = candidate.manifest
        columns = ("-", "-", "-") if manifest is None else described(manifest)
        table.add_row(str(candidate.step), candidate.folder, *columns, one_line(candidate.refused) or "good")
    for name in unfinished:
        table.add_row("", name, "-", "-", "-", "unfinished")
    show(table if table.row_count else f"no checkpoints in {root}")


@ckpt.command(short_help="what a checkpoint holds")
def inspect(
    path: Folder,
    pattern: Annotated[
        str, typer.Argument(help="Show only tensors of these names (* and ? as in a shell).")
    ] = "*",
    as_json: AsJson = False,
) -> None:
    """Show what the checkpoint at PATH holds: where it comes from, tensors, objects.

    \b
    Examples:
      distrain ckpt inspect runs/default/checkpoints           the newest good one
      distrain ckpt inspect runs/default/checkpoints/step-00000100 '*.wq.*'
    """
    found = locate(path)
    manifest = found.manifest
    tensors = {name: t for name, t in manifest.tensors.items() if fnmatchcase(name, pattern)}
    if as_json:
        print_json({**head(found), "tensors": {name: tensor_fields(t) for name, t in tensors.items()}})
        return
    heading = Table(show_header=False, box=None)
    for key, value in head(found).items():
        heading.add_row(key, ", ".join(value) if isinstance(value, list) else str(value))
    table = Table("tensor", "dtype", "shape", "boxes", "size", box=None, header_style="bold")
    for name, tensor in tensors.items():
        shape = " x ".join(map(str, tensor.global_shape)) or "scalar"
        table.add_row(name, tensor.dtype, shape, str(len(tensor.boxes)), size(tensor.nbytes))
    show(heading, "", table)


@ckpt.command(short_help="read every byte")
def verify(
    path: Folder,
    threads: Annotated[int, typer.Option(min=1, help="Extents to read at once.")] = 2,
    as_json: AsJson = False,
) -> int:
    """Read every byte of the checkpoint at PATH, or of all below it; exit with 1 if anything is damaged.

    \b
    Examples:
      distrain ckpt verify runs/default/checkpoints
      distrain ckpt verify runs/default/checkpoints/step-00000100 --threads 8
    """
    storage, chosen = _all_of(path)
    reports = []
    for folder in chosen:
        with progress(f"verify {folder}", _total(storage, folder)) as advance:
            reports.append(check(storage, folder, num_threads=threads, progress=advance))
    if as_json:
        print_json([{**asdict(report), "good": report.is_good} for report in reports])
    else:
        for report in reports:
            show_report(report)
    return 0 if all(report.is_good for report in reports) else 1


@ckpt.command(short_help="in what two checkpoints differ")
def diff(first: Folder, second: Folder, as_json: AsJson = False) -> int:
    """Show in which tensors and objects two checkpoints differ; exit with 1 if they do.

    \b
    Examples:
      distrain ckpt diff runs/a/checkpoints runs/b/checkpoints
    """
    readers = [TensorReader(at.storage, at.folder, at.manifest) for at in (locate(first), locate(second))]
    with progress("compare", readers[0].manifest.nbytes) as advance:
        found = list(differences(*readers, progress=advance))
    if as_json:
        print_json([asdict(difference) for difference in found])
    else:
        table = Table("name", "differs in", "detail", "largest gap", box=None, header_style="bold")
        table.columns[0].min_width = max((len(each.name) for each in found), default=0)  # to be copied
        for difference in found:
            gap = "" if difference.max_abs is None else f"{difference.max_abs:.3g}"
            table.add_row(difference.name, difference.what, difference.detail, gap)
        show(table if found else "no difference")
    return 1 if found else 0


@ckpt.command(short_help="from and to safetensors, hf, dcp, deepspeed")
def convert(
    source: Annotated[Path, typer.Argument(exists=True, help="A checkpoint of any format: folder or file.")],
    target: Annotated[Path, typer.Argument(help="The new folder; for distrain, a root that may exist.")],
    to: Annotated[str, typer.Option("--to", help="distrain, safetensors, hf, dcp or deepspeed.")],
    config: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The run's TOML file, which hf needs.")
    ] = None,
    shard_gb: Annotated[
        float, typer.Option(min=0.001, help="Data of one file of safetensors and hf, in 10^9 bytes.")
    ] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Write the checkpoint at SOURCE in another format to TARGET; nothing is there until all of it is.

    Objects that differ between ranks, and what the format has no place for, are left out and named.

    \b
    Examples:
      distrain ckpt convert runs/a/checkpoints/step-00000100 llama --to hf --config run.toml
      distrain ckpt convert llama runs/b/checkpoints --to distrain
    """
    from distrain.checkpoint.convert import convert as run
    from distrain.checkpoint.convert import total_bytes

    shape = load(config).config.model.shape() if config else None
    with progress(f"convert to {to}", total_bytes(source)) as advance:
        done = run(source, target, to=to, shape=shape, shard_bytes=round(shard_gb * 1e9), progress=advance)
    if as_json:
        print_json({**asdict(done), "path": str(done.path)})
        return
    show(f"{done.path}: {done.num_tensors} tensors, {size(done.num_bytes)}, from {done.source_format}")
    if done.left_out:
        show(f"left out: {some(done.left_out)}")


@ckpt.command(short_help="mend what is damaged")
def repair(
    path: Folder,
    copies: Annotated[
        list[str] | None,
        typer.Option("--from", callback=_all_existing, help="Another copy of it; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Mend the checkpoint at PATH; what cannot be derived from the rest of it comes from copies.

    A temporary folder in which every rank had finished is committed. Exits with 1 if damage is left.

    \b
    Examples:
      distrain ckpt repair runs/a/checkpoints/step-00000100 --from s3://bucket/run/step-00000100
    """
    storage, folder = _one(path)
    with progress(f"repair {folder}", None) as advance:
        done, report = mend(storage, folder, copies=[_one(copy) for copy in copies or ()], progress=advance)
    if as_json:
        print_json({"done": done, **asdict(report), "good": report.is_good})
    else:
        show(*(done or ["nothing to repair" if report.is_good else "nothing could be repaired"]))
        show_report(report)
    return 0 if report.is_good else 1


@ckpt.command(short_help="delete what is old")
def gc(
    root: Folder,
    keep_last: Annotated[int, typer.Option(help="Keep so many of the newest good ones.")] = 3,
    keep_every: Annotated[int, typer.Option(help="Keep steps that are a multiple of this; 0 for none.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Trust the newest without reading all of them.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete old checkpoints below ROOT and what crashes left behind, never the last good one.

    \b
    Examples:
      distrain ckpt gc runs/a/checkpoints --keep-last 2 --keep-every 1000 --dry-run
    """
    storage = open_storage(root)

    def is_good(candidate: Candidate) -> bool:
        if quick:
            return True
        with progress(f"verify {candidate.folder}", _total(storage, candidate.folder)) as advance:
            return check(storage, candidate.folder, progress=advance).is_good

    act = unwanted if dry_run else collect
    deleted = act(storage, Retention(keep_last=keep_last, keep_every=keep_every), is_good=is_good)
    if as_json:
        print_json({"root": root, "dry_run": dry_run, "deleted": deleted})
    else:
        verb = "would delete" if dry_run else "deleted"
        show(*([f"{verb} {name}" for name in deleted] or ["nothing to delete"]))


def _kind(name: str) -> Kind | None:
    read = read_name(name)
    return read.kind if read else None


def _one(address: str) -> tuple[Storage, str]:
    """A checkpoint's folder, damaged as it may be."""
    storage, folder = place(address)
    if not folder:
        raise ConfigError("not the folder of a checkpoint", got=address, allowed="step-00000012, for example")
    return storage, folder


def _all_of(address: str) -> tuple[Storage, list[str]]:
    """A checkpoint's folder, or all those below it."""
    storage, folder = place(address)
    found = [folder] if folder else [each for each, _ in folders(storage)]
    if not found:
        raise DataError(f"there is no checkpoint in {address}")
    return storage, found


def _total(storage: Storage, folder: str) -> int | None:
    """Bytes that verifying reads; None if the manifest cannot be read."""
    try:
        manifest = read_manifest(storage, folder)
    except DataError:
        return None
    return sum(len(writer.crcs) for writer in manifest.writers) * EXTENT_BYTES
