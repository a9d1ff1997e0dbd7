"""From the command line to ``LaunchOptions``: reads every value, and lists all that cannot be read or cannot work."""

import os
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distrain.core.errors import Problem, nearest, raise_if

from . import flags
from .devices import count_devices
from .options import LaunchOptions, check

CONFIG_SUFFIXES = (".toml", ".json")
RUN_PATH = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
CONF_KEYS = ("join_timeout", "timeout", "is_host")
TORCH_CONF_KEYS = (
    "last_call_timeout",
    "close_timeout",
    "heartbeat_timeout",
    "keep_alive_interval",
    "keep_alive_max_attempt",
    "read_timeout",
    "store_type",
    "use_libuv",
)
"""Keys that tune torchrun's rendezvous; ours has nothing they could tune."""


def parse(argv: Sequence[str], *, environ: Mapping[str, str] = os.environ) -> LaunchOptions:
    """The launch that ``argv`` asks for.

    Raises SystemExit on wrong usage or ``--help``, ConfigError with every impossible value.
    """
    values, words = flags.parse(argv, environ=environ)
    reader = _Reader(values)
    options = reader.options(words, environ=environ)
    raise_if(reader.problems)
    return options


class _Reader:
    """Turns the text of options into values, and notes what it cannot read."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = values
        self.problems: list[Problem] = []

    def options(self, words: Sequence[str], *, environ: Mapping[str, str]) -> LaunchOptions:
        """The whole record; with problems noted, it is not to be used."""
        for dest, instead in flags.UNSUPPORTED.items():
            if self.values[dest] not in ("", "null"):
                self._problem(dest, "is not supported", hint=instead)
        if self._integer("max_restarts") != 0:
            self._problem("max_restarts", "must be 0: restarts are not there yet", allowed="0")
        nnodes, nproc = self._nnodes(), self._nproc()
        redirects, tee = self._streams("redirects", nproc=nproc), self._streams("tee", nproc=nproc)
        if self.values["log_dir"] and not self.values["redirects"] and not self.values["tee"]:
            tee = (3,) * max(nproc, 0)
        timeout = self.values["shutdown_timeout"] or environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")
        options = LaunchOptions(
            command=self._command(words, environ=environ),
            nproc=nproc,
            emulate_nodes=self._integer("emulate_nodes") if self.values["emulate_nodes"] else 1,
            netns=bool(self.values["netns"]),
            role=self.values["role"],
            local_addr=self.values["local_addr"],
            plan=os.path.abspath(self.values["plan"]) if self.values["plan"] else "",
            virtual_local_rank=bool(self.values["virtual_local_rank"]),
            log_dir=self.values["log_dir"],
            redirects=redirects,
            tee=tee,
            shown_ranks=self._ranks("local_ranks_filter"),
            plain_rank=self._integer("plain_rank") if self.values["plain_rank"] else None,
            prefix=not self.values["no_prefix"],
            holds_keeper=not self._is_config(words[0]),
            shutdown_timeout_s=self._number("shutdown_timeout", timeout) if timeout else None,
            **self._meeting(nnodes=nnodes),
        )
        self.problems += check(options)
        if options.emulate_nodes > 1 and nnodes > 1:
            self._problem("emulate_nodes", "needs --nnodes 1: the emulated nodes are all there is")
        return options

    def _problem(self, dest: str, error: str, *, allowed: str = "", hint: str = "") -> None:
        name = f"--{dest.replace('_', '-')}"
        self.problems.append(Problem(f"{name} {error}", got=self.values[dest], allowed=allowed, hint=hint))

    def _integer(self, dest: str) -> int:
        try:
            return int(self.values[dest])
        except ValueError:
            self._problem(dest, "is not a whole number")
            return 0

    def _number(self, dest: str, text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not 0 <= number < float("inf"):
            self._problem(dest, f"is not a number of seconds: {text}", allowed="0 or more")
            return 0.0
        return number

    def _nnodes(self) -> int:
        low, _, high = self.values["nnodes"].partition(":")
        if not low.isdecimal() or not (high or low).isdecimal():
            self._problem("nnodes", "is not a number of nodes", allowed="N or MIN:MAX")
            return 1
        if high and low != high:
            self._problem(
                "nnodes", "gives a range, but the number of nodes cannot change yet", hint=f"--nnodes {high}"
            )
        return int(high or low)

    def _nproc(self) -> int:
        text = self.values["nproc_per_node"]
        if text not in ("auto", "gpu", "cpu", "xpu"):
            return self._integer("nproc_per_node")
        count = count_devices(text)
        if count == 0:
            self._problem("nproc_per_node", "finds no device", allowed="a number, auto, gpu, cpu, xpu")
        return max(count, 1)

    def _streams(self, dest: str, *, nproc: int) -> tuple[int, ...]:
        """``3`` or ``0:3,1:1`` as one number a local rank."""
        text = self.values[dest] or "0"
        if text in ("0", "1", "2", "3"):
            return (int(text),) * max(nproc, 0) if text != "0" else ()
        streams = [0] * max(nproc, 0)
        for item in text.split(","):
            rank, _, which = item.partition(":")
            if not rank.isdecimal() or which not in ("0", "1", "2", "3") or int(rank) >= len(streams):
                self._problem(
                    dest, f"cannot be read at {item!r}", allowed="0, 1, 2, 3 or RANK:N,... by local rank"
                )
                return ()
            streams[int(rank)] = int(which)
        return tuple(streams)

    def _ranks(self, dest: str) -> tuple[int, ...]:
        words = [word.strip() for word in self.values[dest].split(",")] if self.values[dest] else []
        if not all(word.isdecimal() for word in words):
            self._problem(dest, "is not a list of local ranks", allowed="0,1,2")
            return ()
        return tuple(int(word) for word in words)

    def _command(self, words: Sequence[str], *, environ: Mapping[str, str]) -> tuple[str, ...]:
        """The program of a rank with its arguments."""
        script, arguments = words[0], tuple(words[1:])
        python = environ.get("PYTHON_EXEC", sys.executable)
        module, program, run_path = (bool(self.values[key]) for key in ("module", "no_python", "run_path"))
        if module and (program or run_path):
            self._problem("module", "cannot be combined with --no-python or --run-path")
        if module:
            return (python, "-m", script, *arguments)
        if program and not run_path:
            if shutil.which(script) is None:
                self.problems.append(Problem("there is no such program", got=script))
            return (script, *arguments)
        if not Path(script).is_file():
            self.problems.append(Problem("there is no such script", got=script, hint="-m for a module"))
        if run_path:
            return (python, "-c", RUN_PATH, script, *arguments)
        if self._is_config(script):
            return (python, "-m", "distrain.train", script, *arguments)
        return (python, script, *arguments)

    def _is_config(self, script: str) -> bool:
        """Whether our own trainer runs: its next launch finds again what was in memory."""
        is_ours = not any(self.values[key] for key in ("module", "no_python", "run_path"))
        return is_ours and script.endswith(CONFIG_SUFFIXES)

    def _meeting(self, *, nnodes: int) -> dict[str, Any]:
        """The fields of ``LaunchOptions`` that say where and how the nodes meet."""
        conf = self._conf()
        backend = self.values["rdzv_backend"]
        if backend not in ("static", "c10d"):
            self._problem("rdzv_backend", "is unknown", allowed="static, c10d")
        endpoint = self.values["rdzv_endpoint"]
        if self.values["standalone"] or (nnodes == 1 and not endpoint and not self.values["master_port"]):
            if self.values["standalone"] and nnodes != 1:
                self._problem("nnodes", "must be 1 with --standalone", allowed="1")
            node_rank = 0 if self.values["standalone"] else self._integer("node_rank")
            return {"nnodes": nnodes, "node_rank": node_rank, "run_id": str(uuid.uuid4())}
        c10d = backend == "c10d"
        if c10d and not endpoint:
            self._problem("rdzv_endpoint", "is needed by --rdzv-backend c10d", allowed="HOST:PORT")
        address, port = self.values["master_addr"], self.values["master_port"]
        if endpoint:
            address, port = self._endpoint(endpoint)
        dest = "rdzv_endpoint" if endpoint else "master_port"
        number = self._port(dest, port or ("29400" if c10d else "29500"))
        if number == 0 and nnodes > 1:
            self._problem(dest, "must name a port that every node knows", allowed="1 to 65535")
        return {
            "nnodes": nnodes,
            "node_rank": None if c10d else self._integer("node_rank"),
            "master_addr": address.strip("[]"),
            "master_port": number,
            "shared_port": not c10d or nnodes == 1,
            "is_host": conf.get("is_host"),
            "join_timeout_s": conf.get("join_timeout_s", 600.0),
            "run_id": self.values["rdzv_id"],
        }

    def _endpoint(self, endpoint: str) -> tuple[str, str]:
        """``host:port``, ``[::1]:port`` or a host alone, taken apart."""
        if endpoint.endswith("]") or ":" not in endpoint:
            return endpoint, ""
        host, _, port = endpoint.rpartition(":")
        return host, port

    def _port(self, dest: str, text: str) -> int:
        if not text.isdecimal() or int(text) > 65535:
            self._problem(dest, f"has an impossible port: {text}", allowed="0 to 65535")
            return 0
        return int(text)

    def _conf(self) -> dict[str, Any]:
        conf: dict[str, Any] = {}
        for item in filter(None, (item.strip() for item in self.values["rdzv_conf"].split(","))):
            key, _, value = (part.strip() for part in item.partition("="))
            if key in ("join_timeout", "timeout"):
                conf["join_timeout_s"] = self._number("rdzv_conf", value)
            elif key == "is_host":
                conf["is_host"] = value.lower() in ("1", "true", "t", "yes", "y")
            elif key not in TORCH_CONF_KEYS:
                known = (*CONF_KEYS, *TORCH_CONF_KEYS)
                close = nearest(key, known)
                self._problem("rdzv_conf", f"has an unknown key: {key}", allowed=", ".join(known), hint=close)
        return conf
