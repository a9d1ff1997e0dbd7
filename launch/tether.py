"""Tie a process to the life of its parent: if the parent dies, even by SIGKILL, the kernel kills the child.

``preexec_fn`` runs Python between fork and exec, which can deadlock; so the worker is started through this file
instead (``python -I -S tether.py PARENT_PID PROGRAM ARGS...``), which sets PR_SET_PDEATHSIG and then becomes the
program by exec. The setting survives exec, not fork.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def tie_to_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when ``parent_pid`` (the thread that started it) ends."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it died before the setting took effect
        os.kill(os.getpid(), signal.SIGKILL)


def tethered(command: Sequence[str]) -> list[str]:
    """The command line that runs ``command`` tied to the calling process."""
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid()), *command]


if __name__ == "__main__":
    tie_to_parent(int(sys.argv[1]))
    try:
        os.execvp(sys.argv[2], sys.argv[2:])
    except OSError as error:
        print(f"cannot start {sys.argv[2]}: {error.strerror}", file=sys.stderr)
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)
