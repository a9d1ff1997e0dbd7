"""``python -m benchmarks``: every benchmark of this folder, one after the other.

Takes the options of a single benchmark, but ``--json`` names a folder, by default ``benchmarks/results`` (nothing is
kept of ``--quick``). Fails if one of them does, after all have run.
"""

import argparse
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The files that end in a call of ``main`` with their own name."""
    return sorted(
        path.stem for path in FOLDER.glob("[a-z]*.py") if f'main("{path.stem}", run' in path.read_text()
    )


def main() -> int:
    """Run all of them; 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="smoke test of each, ours only")
    parser.add_argument("--rounds", type=int, help="interleaved rounds of all contenders")
    parser.add_argument(
        "--resume", type=Path, metavar="DIR", help="keep finished parts here and take them from here"
    )
    parser.add_argument("--json", type=Path, metavar="DIR", help="folder of the results")
    options = parser.parse_args()
    folder = options.json or (None if options.quick else FOLDER / "results")
    passed_on = [
        *(["--quick"] if options.quick else []),
        *(["--rounds", str(options.rounds)] if options.rounds else []),
        *(["--resume", str(options.resume)] if options.resume else []),
    ]
    failed = []
    for name in names():
        start = time.monotonic()
        print(f"== {name}", flush=True)
        json_file = ["--json", str(folder / f"{name}-{date.today()}.json")] if folder else []
        command = [sys.executable, "-m", f"benchmarks.{name}", *passed_on, *json_file]
        if subprocess.run(command, cwd=FOLDER.parent, check=False).returncode:
            failed.append(name)
        print(f"== {name} took {time.monotonic() - start:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
