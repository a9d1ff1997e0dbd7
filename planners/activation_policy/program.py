"""The program: which fractions of which layer are kept, swapped or made again, so that the step ends soonest.

MEMO has one alpha for all layers, one average of time for the copies, and never keeps what would fit. Here each layer l
and group g has fractions k + w + r = 1, and the streams are in the program as the times at which events end, so that a
copy may take long where another was short. With e an event, d its duration, x its bytes over a link, and 'buffer' the
end of whatever was in its rounding buffer::

    min   end of the last event
          end(e)  >=  end(e - 1) + d(e)                     d of backward: what it makes again comes on top
          end(e)  >=  buffer(e) + d(e)
    out:  c(e)    >=  end(e) + x(e),   c(e) >= c(previous) + x(e)
    back: h(e)    >=  h(previous) + x(e),  buffer(e) + x(e),  c(its forward) + x(e);    end(e) >= h(e) + d(e)
    host, device: at each worst moment of the schedule, what is away fits

Stalls are in it as what they are, time; so there is a solution as long as the memory suffices, and if there is none,
it is because of memory, and the error says how much. Fractions are then rounded to whole multiples of 128 tokens so
that memory is never exceeded, and the result is timed again by ``replay``. No policy takes less than ``bound_s``, the
program's own time, so the gap says what the rounding cost.
"""

from dataclasses import dataclass, replace
from typing import Any

import pulp

from distrain.core.errors import InfeasibleError, UndecidedError

from ..activation_plan import TOKENS
from ..solve import solve
from .problem import ROUNDING_BUFFERS, ActivationTask, Policy, whole_tokens
from .replay import Replay, replay

_GIB = 2**30
_PREFERENCE = 1e-6  # among equals: keep rather than swap, swap rather than make again


@dataclass(frozen=True, slots=True)
class Choice:
    """The policy, what it takes, and how much better any could be."""

    policy: Policy
    replay: Replay
    bound_s: float
    status: str
    """of the program before rounding"""
    seconds: float

    @property
    def gap(self) -> float:
        """Time over the bound, relative to it: what the rounding to whole tokens cost."""
        return self.replay.total_s / self.bound_s - 1


def choose(task: ActivationTask, *, time_limit_s: float = 30.0) -> Choice:
    """The policy with which the passes of ``task`` end soonest.

    Raises:
        InfeasibleError: proven; says which memory is short, by how much.
        UndecidedError: it fits in fractions, but whole tokens were not found to.
    """
    raise_if_impossible(task)
    program = _Program(task)
    try:
        found = solve(program.problem, time_limit_s=time_limit_s)
    except InfeasibleError as error:
        raise InfeasibleError(
            "the activations fit nowhere",
            got=_needs(task),
            hint="more host memory, more ranks, a shorter sequence",
        ) from error
    bound_s = min(found.bound, found.objective) - program.most_taste
    policy = program.policy(task)
    if replay(task, policy).host_bytes > task.host_bytes:
        policy = _rounded_up(task, time_limit_s)
    return Choice(policy, replay(task, policy), bound_s, found.status, found.seconds)


def _rounded_up(task: ActivationTask, time_limit_s: float) -> Policy:
    """With less host than there is: what is swapped is rounded up, by fewer than 128 tokens of each layer in flight."""
    layers = max((sum(counts) for counts in task.in_flight), default=0)
    margin = layers * task.layer_bytes * TOKENS / task.num_tokens
    program = _Program(replace(task, host_bytes=max(0.0, task.host_bytes - margin)))
    try:
        solve(program.problem, time_limit_s=time_limit_s)
    except InfeasibleError as error:
        raise UndecidedError(
            f"the activations fit, but not in whole multiples of {TOKENS} tokens as far as is known",
            got=_needs(task),
            hint="a little more host memory",
        ) from error
    return program.policy(task)


def raise_if_impossible(task: ActivationTask) -> None:
    """Raise InfeasibleError if memory is short whatever is done."""
    buffers = ROUNDING_BUFFERS * task.layer_bytes
    if buffers > task.device_bytes:
        raise InfeasibleError(
            "the device cannot hold the two rounding buffers",
            got=f"2 x {task.layer_bytes / _GIB:.2f} GiB of activations a layer",
            allowed=f"{max(0.0, task.device_bytes) / _GIB:.2f} GiB are left for them",
            hint="more ranks to share the sequence, or a shorter one",
        )
    fixed = sum(group.num_bytes for group in task.groups if group.recompute_s is None)
    need = max((sum(counts) for counts in task.in_flight), default=0) * fixed
    have = task.host_bytes + task.device_bytes - buffers
    if need > have:
        raise InfeasibleError(
            "what is never made again fits neither on the host nor on the device",
            got=_needs(task),
            allowed=f"{need / _GIB:.2f} GiB are needed, {have / _GIB:.2f} GiB are there",
            hint="more host memory, more ranks to share the sequence, or a shorter one",
        )


def _needs(task: ActivationTask) -> str:
    fixed = [group for group in task.groups if group.recompute_s is None]
    names = " and ".join(group.name for group in fixed)
    layers = max((sum(counts) for counts in task.in_flight), default=0)
    spare = task.device_bytes - ROUNDING_BUFFERS * task.layer_bytes
    return (
        f"{layers} layers in flight x {sum(group.num_bytes for group in fixed) / _GIB:.2f} GiB of {names}; "
        f"host {task.host_bytes / _GIB:.2f} GiB, device {spare / _GIB:.2f} GiB beside the rounding buffers"
    )


class _Program:
    """The variables and rows."""

    def __init__(self, task: ActivationTask) -> None:
        self.task = task
        self.problem = pulp.LpProblem("activations", pulp.LpMinimize)
        self._names = 0
        layers, groups = range(task.num_layers), task.groups
        self.keep = [[self._variable(1) for _ in groups] for _ in layers]
        self.swap = [[self._variable(1) for _ in groups] for _ in layers]
        self.again = [[self._variable(0 if g.recompute_s is None else 1) for g in groups] for _ in layers]
        for layer in layers:
            for number in range(len(groups)):
                self.problem += (
                    self.keep[layer][number] + self.swap[layer][number] + self.again[layer][number] == 1
                )
        self._memory()
        end = self._times()
        taste = [
            _PREFERENCE * group.num_bytes / task.d2h_bytes_s * self.swap[layer][number]
            + _PREFERENCE * 10 * (group.recompute_s or 0.0) * self.again[layer][number]
            for layer in layers
            for number, group in enumerate(groups)
        ]
        self.problem.setObjective(end + pulp.lpSum(taste))
        self.most_taste = (
            _PREFERENCE
            * task.num_layers
            * sum(
                max(group.num_bytes / task.d2h_bytes_s, 10 * (group.recompute_s or 0.0)) for group in groups
            )
        )

    def _variable(self, most: float | None = None) -> Any:
        self._names += 1
        return self.problem.add_variable(f"v{self._names}", 0, most)

    def _bytes(self, fractions: list[Any]) -> Any:
        """In GiB, so that numbers suit the solver."""
        return pulp.lpSum(
            group.num_bytes / _GIB * each for group, each in zip(self.task.groups, fractions, strict=True)
        )

    def _memory(self) -> None:
        task = self.task
        spare = task.device_bytes - ROUNDING_BUFFERS * task.layer_bytes
        for counts in task.in_flight:
            away = [(layer, count) for layer, count in enumerate(counts) if count]
            for fractions, most in ((self.swap, task.host_bytes), (self.keep, spare)):
                self.problem += (
                    pulp.lpSum(n * self._bytes(fractions[layer]) for layer, n in away) <= most / _GIB
                )

    def _times(self) -> Any:
        """Rows of all events; the end of the last."""
        task, program = self.task, self.problem
        out_s = [self._bytes(each) * (_GIB / task.d2h_bytes_s) for each in self.swap]
        back_s = [self._bytes(each) * (_GIB / task.h2d_bytes_s) for each in self.swap]
        again_s = [
            pulp.lpSum((g.recompute_s or 0.0) * each for g, each in zip(task.groups, row, strict=True))
            for row in self.again
        ]
        free: list[Any] = [0.0] * ROUNDING_BUFFERS
        copied: dict[tuple[int, int], Any] = {}
        last: Any = 0.0
        outward: Any = 0.0
        inward: Any = 0.0
        for event in task.events:
            key, layer = (event.micro_batch, event.layer), event.layer
            end = self._variable()
            duration = task.forward_s
            if event.backward:
                duration = task.backward_s + (0 if event.resident else again_s[layer])
            program += end >= last + duration
            if not (event.resident and event.backward):
                program += end >= free[event.buffer] + duration
            if event.backward and not event.resident:
                arrived = self._variable()
                for start in (inward, copied[key], free[event.buffer]):
                    program += arrived >= start + back_s[layer]
                program += end >= arrived + duration
                inward = arrived
            last = free[event.buffer] = end
            if not event.resident and not event.backward:
                leaves = self._variable()
                program += leaves >= end + out_s[layer]
                program += leaves >= outward + out_s[layer]
                free[event.buffer] = copied[key] = outward = leaves
        return last

    def policy(self, task: ActivationTask) -> Policy:
        """The solution in whole tokens of ``task``."""
        rows = [
            [
                whole_tokens(
                    task.num_tokens,
                    keep=_fraction(keep),
                    swap=_fraction(swap),
                    recomputed=group.recompute_s is not None,
                )
                for group, keep, swap in zip(task.groups, self.keep[layer], self.swap[layer], strict=True)
            ]
            for layer in range(task.num_layers)
        ]
        return Policy(
            tuple(tuple(kept for kept, _ in row) for row in rows),
            tuple(tuple(swapped for _, swapped in row) for row in rows),
        )


def _fraction(variable: Any) -> float:
    return min(1.0, max(0.0, float(variable.value() or 0.0)))
