"""``python -m distrain.sidecar``: start a keeper on sockets that the caller has bound (``core.sidecar_home``)."""

import argparse
import asyncio
import os
import sys


def main() -> None:
    """Run a keeper; without a lease, as a process that belongs to nobody."""
    parser = argparse.ArgumentParser(prog="python -m distrain.sidecar", description="The keeper of one node.")
    parser.add_argument("--job", required=True, help="name of the job")
    parser.add_argument("--node-rank", type=int, required=True, help="rank of this node")
    parser.add_argument("--listen-fd", type=int, required=True, help="bound unix socket")
    parser.add_argument("--tcp-fd", type=int, help="bound TCP socket, on node 0")
    parser.add_argument("--lease-fd", type=int, help="pipe that ends with the job")
    found = parser.parse_args()
    if found.lease_fd is None and os.fork():
        os._exit(0)
    from distrain.faults.inject import arm

    from .keeper import Keeper, Options

    with arm(role="keeper", node=found.node_rank):
        os.chdir("/")
        asyncio.run(Keeper(Options(**vars(found))).run())
    sys.stdout.flush()
    os._exit(0)  # a thread that waits for a dead disk would keep the process


if __name__ == "__main__":
    main()
