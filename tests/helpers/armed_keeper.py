"""A keeper in which things go wrong: ``armed_keeper.py FAULTS ARGUMENTS...``, for ``Keepers.start_keeper``."""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from distrain.core.failpoints import FAILPOINTS
from distrain.sidecar.__main__ import main


def arm(fault: Mapping[str, Any]) -> None:
    """Arm one failpoint; one that is to fail always is armed again whenever it has."""
    action = _action(fault["action"])

    def again(context: Mapping[str, Any]) -> None:
        if fault["always"]:
            FAILPOINTS.disarm(fault["point"])
            FAILPOINTS.arm(fault["point"], again)
        action(context)

    FAILPOINTS.arm(fault["point"], again, on_hit=fault["on_hit"])


def _action(name: str) -> Callable[[Mapping[str, Any]], object]:
    if name == "kill":
        return lambda _: os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("E"):
        number = getattr(errno, name)

        def fail(_: Mapping[str, Any]) -> None:
            raise OSError(number, os.strerror(number))

        return fail
    return lambda _: time.sleep(float(name))


if __name__ == "__main__":
    for each in json.loads(sys.argv.pop(1)):
        arm(each)
    main()
