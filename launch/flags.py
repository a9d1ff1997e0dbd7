"""The command line of ``distrain launch`` as a table: torchrun's flags under both spellings, and our own.

The table feeds three readers that must never disagree: the parser with its help, the environment (``PET_<NAME>``,
as torchrun reads it), and ``split``, which finds where the script begins. What follows the script is never shown to
argparse, so it cannot mistake ``--d 64`` for an abbreviation of one of ours.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

USAGE = "distrain launch [options] SCRIPT | -m MODULE | CONFIG [arguments of the script ...]"

EXAMPLES = """\
examples:
  distrain launch --nproc-per-node 4 train.py --lr 3e-4
  distrain launch --standalone --nproc-per-node gpu -m package.train
  distrain launch --nproc-per-node 8 --nnodes 2 --node-rank 0 --master-addr host0 --master-port 29500 train.py
  distrain launch --nproc-per-node 8 --nnodes 2 --rdzv-backend c10d --rdzv-endpoint host0:29400 train.py
  distrain launch --nproc-per-node 2 --emulate-nodes 2 --netns train.py
  distrain launch --nproc-per-node 2 --emulate-nodes 2 --plan plan.json run.toml

Every option can also come from the environment, as with torchrun: PET_NPROC_PER_NODE=4. Exit codes: 0 every rank
ended with 0, 1 a rank failed, 2 usage, 3 an impossible option, 128 + N stopped by signal N (130: Ctrl-C).
"""


@dataclass(frozen=True, slots=True)
class Flag:
    """One option; ``metavar`` is empty for a switch, ``hidden`` ones are accepted but not in the help."""

    name: str
    help: str
    metavar: str = ""
    short: str = ""
    default: str = ""

    @property
    def dest(self) -> str:
        """Its name as an attribute, and with ``PET_`` in front and in capitals as an environment variable."""
        return self.name.lstrip("-").replace("-", "_")

    @property
    def spellings(self) -> tuple[str, ...]:
        """Every way to write it: the short one, with dashes, with underscores."""
        return tuple(dict.fromkeys(s for s in (self.short, self.name, f"--{self.dest}") if s))


NO_EFFECT = "accepted for torchrun's sake, without effect: "

GROUPS: Mapping[str, tuple[Flag, ...]] = {
    "ranks and nodes": (
        Flag("--nnodes", "number of nodes, or MIN:MAX with MIN = MAX (default 1)", "N", default="1"),
        Flag(
            "--nproc-per-node",
            "ranks on this node: a number, auto, gpu, cpu or xpu (default 1)",
            "N",
            default="1",
        ),
        Flag("--node-rank", "number of this node, for static rendezvous (default 0)", "K", default="0"),
        Flag("--emulate-nodes", "run N local 'nodes' of --nproc-per-node ranks each, one agent a node", "N"),
        Flag("--netns", "give each emulated node a network and a control group of its own"),
        Flag("--plan", "a ParallelPlan: checked, ranks placed by it, exported as DISTRAIN_PLAN", "P.json"),
    ),
    "what to run": (
        Flag("--module", "SCRIPT is a module, as in python -m", short="-m"),
        Flag("--no-python", "SCRIPT is a program of its own"),
        Flag("--run-path", "SCRIPT is run by runpy.run_path"),
        Flag("--role", "name of the ranks' role (default 'default')", "NAME", default="default"),
        Flag("--virtual-local-rank", "each rank sees its GPU as device 0 and LOCAL_RANK=0"),
        Flag("--max-restarts", "restarts after a failure; only 0 for now", "N", default="0"),
    ),
    "rendezvous": (
        Flag("--standalone", "one node, a free port, whatever the options below say"),
        Flag("--rdzv-backend", "static or c10d (default static)", "NAME", default="static"),
        Flag("--rdzv-endpoint", "HOST:PORT where the nodes meet", "HOST:PORT"),
        Flag("--rdzv-id", "name of the job; nodes that name another are refused", "ID", default="none"),
        Flag("--rdzv-conf", "KEY=VALUE,...: join_timeout (seconds), is_host (true or false)", "CONF"),
        Flag("--master-addr", "address of node 0 (default 127.0.0.1)", "ADDR", default="127.0.0.1"),
        Flag("--master-port", "port on node 0 (default: a free one on one node, else 29500)", "PORT"),
        Flag("--local-addr", "address of this node; node 0 listens there", "ADDR"),
    ),
    "output": (
        Flag("--log-dir", "write each rank's output below DIR too", "DIR"),
        Flag(
            "--redirects",
            "to files only: 1 stdout, 2 stderr, 3 both, or 0:3,1:1 by local rank",
            "WHICH",
            "-r",
        ),
        Flag("--tee", "to files and to the console; as --redirects", "WHICH", "-t"),
        Flag("--local-ranks-filter", "only these local ranks on the console: 0,1", "RANKS"),
        Flag("--plain-rank", "pass this rank's output through as it is; its stdout is the terminal's", "R"),
        Flag("--no-prefix", "no [rank N] in front of lines"),
    ),
    "stopping": (
        Flag(
            "--shutdown-timeout",
            "seconds between the first signal and SIGKILL (default 5 after a failure or Ctrl-C, 30 after SIGTERM)",
            "S",
        ),
        Flag("--monitor-interval", NO_EFFECT + "exits are noticed when they happen", "S"),
        Flag("--start-method", NO_EFFECT + "ranks are programs, not forks", "NAME"),
        Flag(
            "--signals-to-handle",
            NO_EFFECT + "TERM, INT, HUP, QUIT, USR1 and USR2 all reach the ranks",
            "LIST",
        ),
    ),
}

UNSUPPORTED: Mapping[str, str] = {
    "duplicate_stdout_filters": "filter the files of --log-dir",
    "duplicate_stderr_filters": "filter the files of --log-dir",
    "event_log_handler": "leave it out",
    "logs_specs": "use --log-dir, --redirects and --tee",
    "numa_binding": "run numactl in a --no-python script",
}
"""Options of torchrun that have no counterpart here, and what to do instead."""

FLAGS: tuple[Flag, ...] = (
    *(flag for group in GROUPS.values() for flag in group),
    *(Flag(f"--{dest.replace('_', '-')}", argparse.SUPPRESS, "X") for dest in UNSUPPORTED),
)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our options, and the script with its arguments (empty if there is none)."""
    valued = {spelling for flag in FLAGS if flag.metavar for spelling in flag.spellings}
    index = 0
    while index < len(argv):
        word = argv[index]
        if word == "--":
            return list(argv[:index]), list(argv[index + 1 :])
        if not word.startswith("-"):
            break
        index += 2 if word in valued else 1
    return list(argv[:index]), list(argv[index:])


def parse(argv: Sequence[str], *, environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Every option by name, from ``argv``, else ``PET_<NAME>``, else its default; and the script's own words.

    Values stay text (a switch is "1" or empty). Raises SystemExit: 2 on an unknown option or no script, 0 on --help.
    """
    ours, script = split(argv)
    parser = _parser()
    given = {dest: value for dest, value in vars(parser.parse_args(ours)).items() if value is not None}
    values = {flag.dest: given.get(flag.dest, _from_environment(flag, environ)) for flag in FLAGS}
    if not script:
        parser.error("there is no SCRIPT to run")
    return values, script


def _from_environment(flag: Flag, environ: Mapping[str, str]) -> str:
    value = environ.get(f"PET_{flag.dest.upper()}", flag.default)
    return "" if not flag.metavar and value == "0" else value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage=USAGE,
        description="Start a script on many ranks, like torchrun; nothing after SCRIPT is interpreted.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            _add(group, flag)
    for flag in FLAGS[-len(UNSUPPORTED) :]:
        _add(parser, flag)
    return parser


def _add(parser: argparse._ActionsContainer, flag: Flag) -> None:
    """One spelling in the help, the others beside it."""
    shown = [s for s in (flag.short, flag.name) if s]
    other = [s for s in flag.spellings if s not in shown]
    for spellings, text in ((shown, flag.help), (other, argparse.SUPPRESS)):
        if not spellings:
            continue
        if flag.metavar:
            parser.add_argument(*spellings, dest=flag.dest, metavar=flag.metavar, help=text)
        else:
            parser.add_argument(
                *spellings, dest=flag.dest, action="store_const", const="1", default=None, help=text
            )
