"""Tie a process to the life of its parent: if the parent dies, even by SIGKILL, the kernel kills the child.

``preexec_fn`` runs Python between fork and exec, which can deadlock; so a rank is started through this file
instead (``python -I -S tether.py PARENT_PID PROGRAM ARGS...``), which asks the kernel for the death signal and then
becomes the program by exec, keeping process id and setting.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def tie_to_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread of ``parent_pid`` that started it ends."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


def tethered(command: Sequence[str]) -> list[str]:
    """The command line that runs ``command`` tied to the calling process."""
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid()), *command]


def _become(command: list[str]) -> None:
    for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored_by_python, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)


if __name__ == "__main__":
    tie_to_parent(int(sys.argv[1]))
    _become(sys.argv[2:])
