"""What ``distrain --version`` prints: enough for a bug report, without importing torch."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import distrain


def describe() -> str:
    """Versions of Distrain, torch and Python, and the commit of a checkout, on one line."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "not installed"
    commit = _commit(Path(distrain.__file__).parent.parent)
    words = f"distrain {distrain.__version__}, torch {torch}, Python {platform.python_version()}"
    return f"{words}, commit {commit}" if commit else words


def _commit(root: Path) -> str:
    """The commit of the checkout at ``root``; empty for an installed package or where git is missing."""
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
