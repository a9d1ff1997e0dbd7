"""A network of a process's own: a network namespace whose only way out is a pair of hands.

The namespace has a loopback and one *tun* device. What its processes send comes out of the device's descriptor as whole
IP packets, and what is written there arrives at them; so whoever holds the descriptors of several namespaces is the
network between them. Neither bridges nor queueing disciplines are needed, and nothing has a name that could be left
behind: the kernel takes namespace and device away with the last process that is in the one or holds the other.

A user without privileges gets the same inside a user namespace, where the system allows that.
"""

import ctypes
import errno
import fcntl
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

INTERFACE = "distrain0"
MTU_BYTES = 9000
"""jumbo frames, as clusters have them"""
NETMASK = "255.254.0.0"

_CLONE_NEWNET, _CLONE_NEWUSER = 0x40000000, 0x10000000
_TUN = "/dev/net/tun"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFMTU = 0x8914, 0x8916, 0x891C, 0x8922
_IFF_UP, _IFF_RUNNING = 0x1, 0x40
_FIRST = int.from_bytes(socket.inet_aton("198.18.0.1"))  # RFC 2544: a network for tests, which is nobody's
MAX_NODES = 1 << 16
HINT = (
    "be root (in a container: --cap-add SYS_ADMIN), or allow user namespaces; "
    "/dev/net/tun must be there for this user (in a container: --device /dev/net/tun)"
)
"""how to get what ``enter`` needs"""


def address(node: int) -> str:
    """The address of node ``node``, from 0."""
    return socket.inet_ntoa((_FIRST + node).to_bytes(4))


def node_at(packed: bytes) -> int:
    """The node whose address these four bytes are; a number that no node has if they are nobody's."""
    return int.from_bytes(packed) - _FIRST


def enter(node: int) -> int:
    """Leave for a namespace of this process's own; the descriptor of its device, which does not block.

    The process must have a single thread; what it starts later is in the namespace too. Raises OSError, whose
    ``filename`` is what was refused: ``namespace`` or ``tun``.
    """
    _unshare()
    try:
        device = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        name = INTERFACE.encode()
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name, _IFF_TUN | _IFF_NO_PI))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP | _IFF_RUNNING))
            for request, text in ((_SIOCSIFADDR, address(node)), (_SIOCSIFNETMASK, NETMASK)):
                packed = struct.pack("16sHH4s8x", name, socket.AF_INET, 0, socket.inet_aton(text))
                fcntl.ioctl(control, request, packed)
            fcntl.ioctl(control, _SIOCSIFMTU, struct.pack("16si12x", name, MTU_BYTES))
            fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", name, _IFF_UP | _IFF_RUNNING))
    except OSError as error:
        raise OSError(error.errno, error.strerror, "tun") from None
    return device


def missing() -> str:
    """What keeps ``enter`` from working here, found by trying it; empty if nothing does."""
    tried = subprocess.run(
        [sys.executable, "-I", "-S", str(Path(__file__).resolve())],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if not tried.returncode:
        return ""
    what, _, reason = tried.stdout.strip().partition(" ")
    names = {"namespace": "no network namespace can be made", "tun": f"{_TUN} cannot be used"}
    return f"{names.get(what, 'the attempt failed')}: {reason or tried.stderr.strip()[-200:]}"


def _unshare() -> None:
    """Into a new network namespace; by way of a user namespace if need be, in which users keep their numbers."""
    user, group = os.geteuid(), os.getegid()
    try:
        code = _unshared(_CLONE_NEWNET)
        if is_user := code == errno.EPERM:
            code = _unshared(_CLONE_NEWNET | _CLONE_NEWUSER)
        if code:
            raise OSError(code, os.strerror(code))
        if is_user:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    except OSError as error:
        raise OSError(error.errno, error.strerror, "namespace") from None


def _unshared(flags: int) -> int:
    """0, or why not."""
    return ctypes.get_errno() if ctypes.CDLL(None, use_errno=True).unshare(flags) else 0


if __name__ == "__main__":
    try:
        enter(0)
    except OSError as error:
        print(error.filename, error.strerror)
        sys.exit(1)
