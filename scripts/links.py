"""Makes ``.links/distrain``: the package as an installed wheel lays it out, in symbolic links.

The rooms launch/, checkpoint/, faults/ and planners/ are top-level folders that Python imports as ``distrain.<room>``
through the ``__path__`` of distrain/__init__.py. Type checkers and import-linter do not follow ``__path__``; through
this tree they see one package, and beside it the tests' ``helpers``, as pytest does. Editors that follow
pyproject.toml find it too, so run this once after cloning.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("launch", "checkpoint", "faults", "planners")


def make_links(root: Path = ROOT) -> Path:
    """Bring ``root/.links`` up to date and return it."""
    tree = root / ".links" / "distrain"
    tree.mkdir(parents=True, exist_ok=True)
    package = (path for path in (root / "distrain").iterdir() if path.name != "__pycache__")
    wanted = {path.name: path for path in (*package, *(root / room for room in ROOMS))}
    for link in tree.iterdir():
        if link.name not in wanted or not link.exists():
            link.unlink()
    for name, target in wanted.items():
        _link(tree / name, Path("../..") / target.relative_to(root))
    _link(tree.parent / "helpers", Path("../tests/helpers"))
    return tree.parent


def _link(link: Path, target: Path) -> None:
    if not link.is_symlink():
        link.symlink_to(target)


if __name__ == "__main__":
    sys.stdout.write(f"{make_links().relative_to(ROOT)}\n")
