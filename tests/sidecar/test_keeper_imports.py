"""The keeper starts in a fraction of a second and stays small: it never loads torch."""

import subprocess
import sys

LOOK = """
import pkgutil, sys
import distrain.sidecar, distrain.core.sidecar_client, distrain.checkpoint.tiers.posix, distrain.checkpoint.tiers.remote
names = [each.name for each in pkgutil.iter_modules(distrain.sidecar.__path__, "distrain.sidecar.")]
assert "distrain.sidecar.keeper" in names
for name in names:
    __import__(name)
heavy = {"torch", "zarr", "fsspec", "pandas", "scipy", "typer"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_no_module_of_the_sidecar_loads_anything_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
