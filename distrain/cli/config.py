"""``distrain config``: look at a config as a run would see it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from distrain.core.config import flatten, nested
from distrain.core.load import Loaded, load

config = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@config.callback()
def _config() -> None:
    """Look at configs."""


@config.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="CONFIG", help="A .toml or .json config.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value; repeatable.")
    ] = None,
    origin: Annotated[bool, typer.Option("--origin", help="Say where each value comes from.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print every value of CONFIG after environment and overrides, as TOML or JSON."""
    loaded = load(path, overrides=overrides or ())
    print(_as_json(loaded, origin=origin) if as_json else _as_toml(loaded, origin=origin))


def _as_json(loaded: Loaded, *, origin: bool) -> str:
    """The config, which ``load`` reads back; with ``origin`` a table of value and origin by dotted key."""
    if not origin:
        return json.dumps(nested(loaded.config), indent=2)
    flat = flatten(loaded.config)
    return json.dumps({key: {"value": flat[key], "origin": loaded.origins[key]} for key in flat}, indent=2)


def _as_toml(loaded: Loaded, *, origin: bool) -> str:
    """TOML that ``load`` reads back; origins stand in comments, aligned."""
    lines: list[tuple[str, str]] = []
    rows: list[
        tuple[str, str]
    ] = []  # tables of a list stand behind the values of the table that they belong to
    table = ""
    for key, value in flatten(loaded.config).items():
        section, _, leaf = key.rpartition(".")
        if section != table:
            lines += [*rows, ("", ""), (f"[{section}]", "")]
            table, rows = section, []
        if isinstance(value, list) and value:
            for row in value:
                rows += [("", ""), (f"[[{key}]]", loaded.origins[key])]
                rows += [
                    (f"{name} = {json.dumps(cell, ensure_ascii=False)}", "") for name, cell in row.items()
                ]
        else:
            lines.append((f"{leaf} = {json.dumps(value, ensure_ascii=False)}", loaded.origins[key]))
    lines += rows
    width = max(len(text) for text, _ in lines)
    return "\n".join(f"{text:{width}}  # {where}" if origin and where else text for text, where in lines)
