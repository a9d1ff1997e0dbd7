"""`make check`: everything about the code that can be said without running it.

All tools run even if one fails, so that one look shows everything there is to repair; a tool's output is shown only
if it complains.
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from links import ROOT, make_links

BIN = Path(sys.executable).parent  # the tools of this virtual environment, activated or not


@dataclass(frozen=True, slots=True)
class Tool:
    """A command, and the folder below the root in which it runs."""

    name: str
    command: tuple[str, ...]
    folder: str = "."


TOOLS = (
    Tool("ruff check", ("ruff", "check", "--output-format", "concise", ".")),
    Tool("ruff format", ("ruff", "format", "--check", "--output-format", "concise", ".")),
    Tool("mypy, package", ("mypy",)),
    Tool("mypy, the rest", ("mypy", "tests", "scripts", "benchmarks", "examples")),
    Tool("import layers", ("lint-imports", "--no-logo", "--config", "../pyproject.toml"), folder=".links"),
    Tool("codespell", ("codespell",)),
)


def main() -> int:
    """Run all tools; 1 if any complains."""
    make_links()
    failed = [tool.name for tool in TOOLS if not _passes(tool)]
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


def _passes(tool: Tool) -> bool:
    start = time.monotonic()
    program, *arguments = tool.command
    done = subprocess.run(
        [str(BIN / program), *arguments],
        cwd=ROOT / tool.folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    ok = done.returncode == 0
    if not ok:
        print(done.stdout.rstrip())
    print(f"{'ok' if ok else 'FAILED':6} {tool.name:16} {time.monotonic() - start:5.1f} s", flush=True)
    return ok


if __name__ == "__main__":
    sys.exit(main())
