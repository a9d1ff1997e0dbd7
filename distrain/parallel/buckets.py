"""DDP and ZeRO-1 on flat buckets, which know of tensor and pipeline parallelism.

Parameters are views of a few flat buffers, in the order in which backward reaches them. As soon as the last
micro-batch has left a gradient for each parameter of a bucket, its reduction starts, while backward goes on with
earlier layers:

- DDP sums the flat gradient over the replicas; each replica updates everything.
- ZeRO-1 (Rajbhandari et al. 2020, P_os) scatters the sum: each replica keeps 1/dp of the gradient and of the
  optimizer's states, updates its slice of the flat parameters, and gathers the others' slices, for which each module
  waits only when it is about to run::

      backward ──► flat gradient ──reduce-scatter──► slice ──optimizer──► slice of flat parameters ──all-gather──► model

torch's DDP is not used since it neither takes DTensor parameters nor can tell which backward of a pipeline is the
last. Here readiness is counted: a parameter is ready after as many gradients as there are micro-batches, whatever
their order. Buckets are reduced strictly in their order, so that all replicas issue the same collectives.

Norms under sequence parallelism see only their own tokens, so their gradients are partial sums over tp. They live in
buckets of their own, which are summed over tp before they are reduced over the replicas.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from .collectives import Pending, all_gather, reduce_scatter, scratch_elements
from .context import Parallel
from .shards import Segment, Shard, box_of, is_decayed

BUCKET_BYTES = 25 * 1024**2
"""of a bucket at most; large enough that the latency of a collective does not count"""
NUM_BUCKETS = 2
"""buckets at least, where they do not become too small: reductions overlap only with what backward has still to do"""
SMALLEST_BUCKET_BYTES = 8 * 1024**2
"""below which a bucket is not divided: the messages of another one cost more than overlapping saves (on gloo, a step of
ZeRO-1 with 13 MB of gradients on four ranks takes 305 ms with one bucket, 311 with two, 322 with four)"""


@dataclass(frozen=True, slots=True)
class _Kind:
    """Parameters with the same kind can share a bucket."""

    dtype: torch.dtype
    over_tp: bool
    """replicated over tp: gradients are partial sums"""


@dataclass(eq=False, slots=True)
class _Bucket:
    kind: _Kind
    params: list[nn.Parameter]
    names: list[str]
    starts: list[int]
    flat: Tensor
    """all parameters, padded to a multiple of the sharding degree"""
    gradient: Tensor
    scratch: Tensor
    shards: list[Shard]
    missing: int = 0
    """gradients still to come in this step"""
    pending: Pending | None = None


@dataclass(eq=False, slots=True)
class _Home:
    """Where a parameter's gradient belongs, and how many have come in this step."""

    bucket: _Bucket
    place: Tensor
    count: int = 0


class Buckets:
    """Data parallelism of the parameters of ``modules``; a ``shards.DataParallelism``.

    ``sharded`` chooses ZeRO-1 instead of DDP. The parameters' storage is replaced by views of the buckets.
    """

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        parallel: Parallel,
        *,
        sharded: bool,
        micro_batches: int,
    ) -> None:
        """``modules`` are this rank's stages by their index."""
        self._dp = parallel.groups.axis("dp")
        self._tp = parallel.groups.axis("tp")
        self._dp_rank = parallel.coordinates["dp"]
        self._degrees = parallel.degrees
        self._sharded = sharded and parallel.degrees.dp > 1
        # Gloo's all-reduce goes round a ring twice; sums exchanged directly arrive in half the time.
        self._is_direct = parallel.degrees.dp > 1 and dist.get_backend(self._dp) == dist.Backend.GLOO
        self._micro_batches = micro_batches
        self._buckets: list[_Bucket] = []
        self._home: dict[nn.Parameter, _Home] = {}
        self._next = 0
        named = [item for module in modules.values() for item in module.named_parameters()]
        total_bytes = sum(_local(param).nbytes for _, param in named)
        # Backward reaches the last parameters first.
        at_most = max(SMALLEST_BUCKET_BYTES, min(BUCKET_BYTES, total_bytes // NUM_BUCKETS))
        for group in _grouped(list(reversed(named)), at_most):
            self._buckets.append(self._flatten(group))
        for module in modules.values():
            self._adopt(module)
        self._stages = {
            index: [(param, self._home[param]) for param in module.parameters()]
            for index, module in modules.items()
        }
        self._num_w = dict.fromkeys(modules, 0)
        self.shards: Sequence[Shard] = [shard for bucket in self._buckets for shard in bucket.shards]
        self._restart()

    # -- building ------------------------------------------------------------------------------------------------

    def _flatten(self, named: Sequence[tuple[str, nn.Parameter]]) -> _Bucket:
        # What is decayed comes first, so that a slice of the bucket is two shards at most.
        named = sorted(named, key=lambda item: not is_decayed(item[1]))
        locals_ = [_local(param.detach()) for _, param in named]
        starts = list(accumulate((tensor.numel() for tensor in locals_), initial=0))
        parts = self._degrees.dp
        size = -(-starts[-1] // parts)
        flat = locals_[0].new_zeros(size * parts)
        for tensor, start in zip(locals_, starts, strict=False):
            flat[start : start + tensor.numel()].copy_(tensor.flatten())
        gradient = torch.zeros_like(flat)
        scratch = flat.new_empty(scratch_elements(len(flat), self._dp) if self._degrees.dp > 1 else 0)
        first = size * self._dp_rank if self._sharded else 0
        size = size if self._sharded else len(flat)
        border = starts[sum(is_decayed(param) for _, param in named)]
        ranges = ((True, first, min(border, first + size)), (False, max(border, first), first + size))
        kind = _kind(named[0][1])
        copies = (self._degrees.tp if kind.over_tp else 1) * (1 if self._sharded else self._degrees.dp)
        shards = [
            _shard(named, starts, flat, gradient, begin=begin, end=end, copies=copies, decay=decay)
            for decay, begin, end in ranges
            if begin < end
        ]
        names, params = [name for name, _ in named], [param for _, param in named]
        return _Bucket(kind, params, names, starts, flat, gradient, scratch, shards)

    def _adopt(self, module: nn.Module) -> None:
        """Make the parameters of ``module`` views of their buckets, and count their gradients."""
        places = {param: (bucket, i) for bucket in self._buckets for i, param in enumerate(bucket.params)}
        for owner in module.modules():
            owned = list(owner.named_parameters(recurse=False))
            if self._sharded and owned:
                needed = list(dict.fromkeys(places[param][0] for _, param in owned))
                owner.register_forward_pre_hook(partial(_wait_for, needed))
            for name, param in owned:
                bucket, i = places[param]
                local = _local(param.detach())
                span = slice(bucket.starts[i], bucket.starts[i] + local.numel())
                view = bucket.flat[span].view(local.shape)
                if isinstance(param, DTensor):
                    view = DTensor.from_local(
                        view,
                        param.device_mesh,
                        param.placements,
                        run_check=False,
                        shape=param.shape,
                        stride=param.stride(),
                    )
                viewing = nn.Parameter(view)
                setattr(owner, name, viewing)
                bucket.params[i] = viewing
                home = self._home[viewing] = _Home(bucket, bucket.gradient[span].view(local.shape))
                viewing.register_post_accumulate_grad_hook(partial(self._take, home))

    # -- one step ------------------------------------------------------------------------------------------------

    def _restart(self) -> None:
        self._next = 0
        for home in self._home.values():
            home.count = 0
        self._num_w = dict.fromkeys(self._num_w, 0)
        for bucket in self._buckets:
            bucket.missing = len(bucket.params) * self._micro_batches

    def begin(self, micro_batches: int) -> None:
        """Expect so many gradients of each parameter; see DataParallelism."""
        if micro_batches != self._micro_batches:
            self._micro_batches = micro_batches
            self._restart()

    @contextmanager
    def around(self, op: str, stage: int, micro_batch: int, *, last: bool) -> Iterator[None]:
        """Take the gradients that W leaves without passing autograd's hooks; see MicrobatchHooks."""
        yield
        if op == "W":
            self._num_w[stage] += 1
            for param, home in self._stages[stage]:
                # What has been added in place already is counted at the end.
                if last or param.grad is not home.place:
                    missed = self._num_w[stage] - home.count
                    if missed:
                        self._take(home, param, times=missed)

    def _take(self, home: _Home, param: Tensor, *, times: int = 1) -> None:
        """Count the gradient that backward has just left, and see that it is in the bucket.

        The first of a step is copied there; autograd then adds the others to the copy by itself, unless the gradient
        is a DTensor, for which that would be slow.
        """
        bucket, place, gradient = home.bucket, home.place, param.grad
        if gradient is not place:
            assert gradient is not None
            with torch.no_grad():
                summand = self._as_summand(gradient, bucket)
                place.add_(summand) if home.count else place.copy_(summand)
            param.grad = None if isinstance(gradient, DTensor) else place
        home.count += times
        bucket.missing -= times
        if bucket.missing == 0:
            with torch.no_grad():
                self._start_complete()

    def _start_complete(self) -> None:
        """Start the buckets whose turn it is; strictly in order, so that all replicas do the same."""
        while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._start(self._buckets[self._next])
            self._next += 1

    def _as_summand(self, gradient: Tensor, bucket: _Bucket) -> Tensor:
        """The local tensor whose sum over tp is the gradient, for buckets that are summed over tp."""
        if not isinstance(gradient, DTensor):
            return gradient
        local = gradient.to_local()
        if bucket.kind.over_tp and not isinstance(gradient.placements[0], Partial):
            return local / self._degrees.tp
        return local

    def _start(self, bucket: _Bucket) -> None:
        if bucket.kind.over_tp:
            dist.all_reduce(bucket.gradient, group=self._tp)
        if self._degrees.dp == 1:
            return
        if self._sharded or self._is_direct:
            bucket.pending = reduce_scatter(bucket.gradient, scratch=bucket.scratch, group=self._dp)
        else:
            bucket.pending = dist.all_reduce(bucket.gradient, group=self._dp, async_op=True)

    def reduce(self) -> None:
        """Wait until every bucket's sum has arrived; see DataParallelism."""
        short = [
            name
            for b in self._buckets
            if b.missing
            for name, p in zip(b.names, b.params, strict=True)
            if self._home[p].count < self._micro_batches
        ]
        if short:
            raise RuntimeError(f"no gradient in some micro-batch for {', '.join(short)}")
        for bucket in self._buckets:
            _wait_for([bucket])
            if self._is_direct and not self._sharded:
                bucket.pending = all_gather(bucket.gradient, group=self._dp)
        _wait_for(self._buckets)
        for param in self._home:
            param.grad = None
        self._restart()

    def updated(self) -> None:
        """Start gathering the slices that the other replicas have updated; see DataParallelism."""
        if self._sharded:
            for bucket in reversed(self._buckets):
                bucket.pending = all_gather(bucket.flat, group=self._dp)

    def gather(self) -> None:
        """Wait for all parameters; see DataParallelism."""
        _wait_for(self._buckets)


def _wait_for(buckets: Sequence[_Bucket], *_: object) -> None:
    """Let what is on its way to ``buckets`` arrive; a module's pre-hook for its own parameters."""
    for bucket in buckets:
        if bucket.pending is not None:
            bucket.pending.wait()
            bucket.pending = None


def _shard(
    named: Sequence[tuple[str, nn.Parameter]],
    starts: Sequence[int],
    flat: Tensor,
    gradient: Tensor,
    *,
    begin: int,
    end: int,
    copies: int,
    decay: bool,
) -> Shard:
    """Elements ``begin`` to ``end`` of a bucket as an optimizer sees them."""
    owned = nn.Parameter(flat[begin:end])
    owned.grad = gradient[begin:end]
    segments = []
    for (name, param), start, stop in zip(named, starts, starts[1:], strict=False):
        low, high = max(start, begin), min(stop, end)
        if low < high:
            segments.append(Segment(box_of(name, param), low - start, low - begin, high - begin))
    return Shard(owned, tuple(segments), copies, decay)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _kind(param: nn.Parameter) -> _Kind:
    over_tp = isinstance(param, DTensor) and all(isinstance(p, Replicate) for p in param.placements)
    return _Kind(param.dtype, over_tp)


def _grouped(
    named: Sequence[tuple[str, nn.Parameter]], bucket_bytes: int
) -> list[list[tuple[str, nn.Parameter]]]:
    """Cut into runs of one kind and at most ``bucket_bytes`` (or one parameter), by the time each run is complete."""
    done: list[list[tuple[str, nn.Parameter]]] = []
    filling: dict[_Kind, list[tuple[str, nn.Parameter]]] = {}
    for name, param in named:
        run = filling.setdefault(_kind(param), [])
        if run and sum(_local(p).nbytes for _, p in run) + _local(param).nbytes > bucket_bytes:
            done.append(filling.pop(_kind(param)))
            run = filling.setdefault(_kind(param), [])
        run.append((name, param))
    return done + list(filling.values())
