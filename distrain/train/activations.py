"""What a rank does with the activations of its layers: ``[activations]`` becomes a plan and a manager that follows it.

With ``mode = "auto"`` the plan solves a program (``activation_task``), with the link as it was measured while all ranks
copied at once. All ranks of a stage find the same plan, and check that they have.
"""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from distrain.activation.agreement import agree_on
from distrain.activation.ledger import ActivationReport
from distrain.activation.manager import ActivationManager
from distrain.core.config import RunConfig
from distrain.core.device import Device
from distrain.core.vocabulary import Activations
from distrain.parallel import Parallel
from distrain.planners.activation_plan import ActivationPlan, uniform
from distrain.planners.activation_policy import ActivationTask, Choice, choose
from distrain.planners.activations import GROUPS
from distrain.planners.memory import gib
from distrain.planners.parallel_plan import ParallelPlan

from .activation_task import host_bytes_of, row_of, task_of
from .machine import Machine
from .sequences.settings import SequenceSettings

_SAMPLE_BYTES = 64 * 2**20
_ROUNDS = 5


@dataclass(slots=True)
class Managed:
    """The layers of one rank under a plan."""

    manager: ActivationManager
    plan: ActivationPlan
    choice: Choice | None
    """of mode auto"""

    def report(self) -> ActivationReport:
        """What has happened since the last report."""
        return self.manager.report()

    def describe(self) -> str:
        """One line for people: the shares of all layers, input and attention aside, and what the plan is worth."""
        splits = [
            each for layer in self.plan.layers for each in (layer.before_attention, layer.after_attention)
        ]
        total = max(1, sum(split.num_tokens for split in splits))
        shares = ", ".join(
            f"{name} {sum(getattr(split, field) for split in splits) / total:.0%}"
            for name, field in (("kept", "keep"), ("swapped", "swap"), ("computed again", "recompute"))
        )
        if self.choice is None:
            return shares
        replay = self.choice.replay
        slower = (replay.stall_s + replay.recompute_s) / replay.total_s
        return (
            f"{shares}; planned {gib(replay.device_bytes)} on the device and {gib(replay.host_bytes)} on the host,"
            f" {slower:.1%} of the time for it, gap {self.choice.gap:.1%}"
        )


def manage(
    config: RunConfig,
    plan: ParallelPlan,
    parallel: Parallel,
    layers: list[nn.Module],
    *,
    sequences: SequenceSettings | None,
) -> Managed | None:
    """The manager of this rank's ``layers``, in the order of their stages; None with mode none.

    All ranks call it. Raises:
        InfeasibleError: mode auto, and proven that the activations fit nowhere; says what is short.
    """
    mode = config.activations.mode
    if mode is Activations.NONE:
        return None
    cluster = Machine.of(config, world_size=plan.world_size, here=True).cluster
    _, row_tokens = row_of(config, plan, sequences)
    host_bytes = host_bytes_of(config, plan, cluster)
    choice = None
    if mode is Activations.AUTO:
        task = task_of(
            config,
            plan,
            cluster,
            sequences=sequences,
            layers=len(layers),
            pp_rank=parallel.coordinates["pp"],
            host_bytes=host_bytes,
            link_bytes_s=config.activations.link_gb_s * 1e9 or measured_link(parallel.device),
        )
        choice = choose(task)
        found = plan_of(task, choice)
    else:
        made = uniform(
            mode.value, num_layers=len(layers), num_tokens=row_tokens, alpha=config.activations.alpha
        )
        found = ActivationPlan(layers=made.layers, host_bytes=int(host_bytes) or None)
    # Groups of sequences recompute their all-to-alls together, whichever ranks they are made of.
    agree_on(found.digest, [parallel.groups.axis("model")])
    together = [parallel.groups.axis("tp")] if plan.degrees.tp > 1 else []
    manager = ActivationManager(layers, found, device=parallel.device, groups=together)
    if choice is not None:  # pinning takes its time: not in the first step
        manager.reserve_host(int(choice.replay.host_bytes))
    return Managed(manager, found, choice)


def plan_of(task: ActivationTask, choice: Choice) -> ActivationPlan:
    """The choice as a manager follows it.

    The program leaves open what becomes of a layer whose backward follows so soon that it never leaves its rounding
    buffer: it is kept.
    """
    stays = [all(counts[layer] == 0 for counts in task.in_flight) for layer in range(task.num_layers)]
    everything, nothing = (task.num_tokens,) * len(GROUPS), (0,) * len(GROUPS)
    policy = choice.policy
    return ActivationPlan.of_policy(
        [everything if stay else row for stay, row in zip(stays, policy.kept, strict=True)],
        [nothing if stay else row for stay, row in zip(stays, policy.swapped, strict=True)],
        groups=GROUPS,
        num_tokens=task.num_tokens,
        host_bytes=int(task.host_bytes),
    )


def measured_link(device: Device) -> float:
    """Bytes a second from this device to pinned host memory and back, the slower way, on the slowest rank.

    All ranks call it, so that they share what they will share.
    """
    host = device.pinned(_SAMPLE_BYTES, dtype=torch.uint8)
    there = torch.empty(_SAMPLE_BYTES, dtype=torch.uint8, device=device.torch_device)
    times = []
    for _ in range(_ROUNDS):
        for source, target in ((there, host), (host, there)):
            device.synchronize()
            dist.barrier()
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            device.synchronize()
            times.append(time.perf_counter() - start)
    ways = [sorted(times[way::2])[_ROUNDS // 2] for way in (0, 1)]
    slowest = torch.tensor(max(ways), dtype=torch.float64, device=device.torch_device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return _SAMPLE_BYTES / float(slowest)
