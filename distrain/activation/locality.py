"""Finds out which operators work token by token, by trying.

An operator is token-local at given shapes if its result on some rows of its arguments equals, to the bit, those rows
of its result on all of them. That is tried with random arguments of the same form, the whole and the tail that will
be recomputed; so kernels that round differently for another number of rows, convolutions over neighbours, and
attention all turn out not to be local, and are swapped whole instead. What was found is kept for programs that are
equal, which those of equal layers are: one layer pays for all.

Where the tokens of an argument lie follows from the operators before. For tensors from outside (rotary tables, the
output of attention) the possible places are tried as well, and so are sizes among the arguments that may count tokens
(``view(B, n, H, E)``).
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .program import Group, Node, Ref, tensors_in
from .rows import Rows, dense, possible
from .storage import Window, taken_apart

MOST_TRIES = 48
"""combinations of places and sizes that are tried for one operator"""

OUTLIER = 1000.0
"""first element of what is tried, and so of no tail: what scales by the largest of all is not to pass for local"""

Agree = Callable[[bool], bool]
"""whether all ranks that compute a layer together say so: they must recompute the same, or would wait for ever"""


Same = Callable[[Tensor, Tensor], bool]


class Local(NamedTuple):
    """How an operator is done on a part of the tokens."""

    sliced: tuple[Rows | None, ...]
    """of each argument that is a value, in order; None: whole"""
    sizes: tuple[tuple[tuple[int, ...], int], ...]
    """sizes that count tokens: path into the arguments, and how often a token counts"""
    outs: tuple[Rows | None, ...]
    """of each result"""


class Prober:
    """Tries operators on tokens ``start`` to the end of ``num_tokens``."""

    def __init__(self, *, num_tokens: int, start: int, device: torch.device, agree: Agree) -> None:
        self.num_tokens = num_tokens
        self.start = start
        self._device = device
        self._agree = agree
        self._generator = torch.Generator(device).manual_seed(0)

    def local(
        self,
        node: Node,
        windows: tuple[Window, ...],
        known: Mapping[int, Rows | None],
        *,
        exact: bool = True,
    ) -> Local | None:
        """How ``node`` is done token by token; None if it is not.

        ``known`` has the place of the tokens in each argument that is made token by token, and None for those that
        are there as a whole. Unless ``exact``, roundings may differ.
        """
        values, same = [ref.value for ref in node.refs], equal if exact else close
        for sliced in itertools.islice(self._places(values, windows, known), MOST_TRIES):
            for sizes in _sizes(node, self.num_tokens):
                found = self._try(node, windows, Local(sliced, sizes, ()), same)
                if self._agree(found is not None) and found is not None:
                    return found
        return None

    def _places(
        self, values: list[int], windows: tuple[Window, ...], known: Mapping[int, Rows | None]
    ) -> Iterator[tuple[Rows | None, ...]]:
        choices: list[list[Rows | None]] = []
        for value in values:
            place = known[value]
            anywhere = [*possible(windows[value].shape, self.num_tokens), None]
            choices.append(anywhere if place is None else [place])
        return (each for each in itertools.product(*choices) if any(each))

    def _try(self, node: Node, windows: tuple[Window, ...], plan: Local, same: Same) -> Local | None:
        refs = node.refs
        wholes = [self._random(windows[ref.value]) for ref in refs]
        parts = [
            whole.clone() if rows is None else rows.take(whole, self.start, self.num_tokens)
            for whole, rows in zip(wholes, plan.sliced, strict=True)
        ]
        try:
            part = perform(node, parts, plan.sizes, num_tokens=self.num_tokens - self.start)
            whole = perform(node, wholes, (), num_tokens=self.num_tokens)
        except torch.OutOfMemoryError:
            raise  # it says nothing of the operator, and what is found here is kept for good
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
            return None
        if len(whole) != len(part):  # tokens cut into pieces of a size that does not count them
            return None
        outs = tuple([self._place(*pair, same) for pair in zip(whole, part, strict=True)])
        return plan._replace(outs=outs) if any(outs) else None

    def _place(self, whole: Tensor | None, part: Tensor | None, same: Same) -> Rows | None:
        """Where the tokens of a result are, if the part is theirs."""
        if whole is None or part is None or whole.dim() != part.dim():
            return None
        dims = [dim for dim in range(whole.dim()) if whole.shape[dim] != part.shape[dim]]
        if len(dims) != 1:
            return None
        for rows in possible(tuple(whole.shape), self.num_tokens):
            length = self.num_tokens - self.start
            fits = rows.dim == dims[0] and part.shape == rows.shape_of(tuple(whole.shape), length)
            if fits and same(rows.take(whole, self.start, self.num_tokens), part):
                return rows
        return None

    def _random(self, window: Window) -> Tensor:
        like = torch.empty(0, dtype=window.dtype, device=self._device)
        tensor = dense(window.shape, window.order, like)
        if not (window.dtype.is_floating_point or window.dtype.is_complex):
            return tensor.random_(0, 2, generator=self._generator)
        tensor.normal_(generator=self._generator)
        tensor.as_strided((min(tensor.numel(), 1),), (1,)).fill_(OUTLIER)
        return window.read(tensor)


def perform(
    node: Node, values: list[Tensor], sizes: tuple[tuple[tuple[int, ...], int], ...], *, num_tokens: int
) -> list[Tensor | None]:
    """The results of ``node`` on ``values`` (plain, one for each of its refs), each waited for.

    ``sizes`` among its arguments become multiples of ``num_tokens``.
    """
    arguments: Any = (node.args, tuple(value for _, value in node.kwargs))
    for path, factor in sizes:
        arguments = _with(arguments, path, factor * num_tokens)
    left = iter(values)
    args, kwargs = (_decoded(each, left) for each in arguments)
    result = node.func(*args, **dict(zip((name for name, _ in node.kwargs), kwargs, strict=True)))
    if node.is_call:
        dist.Work.unbox(result[-1] if isinstance(result, tuple) else result).wait()
        return [values[0]]
    if "c10d_functional" in node.func.namespace:
        result = torch.utils._pytree.tree_map_only(Tensor, torch.ops._c10d_functional.wait_tensor, result)
    return [None if each is None else taken_apart(each)[0] for each in tensors_in(result)]


def _decoded(argument: Any, left: Iterator[Tensor]) -> Any:
    if isinstance(argument, Ref):
        value = next(left)
        return value if argument.wrap is None else argument.wrap.around(value)
    if isinstance(argument, Group):
        return argument.group.boxed()
    if isinstance(argument, tuple):
        return [_decoded(each, left) for each in argument]
    return argument


def _sizes(node: Node, num_tokens: int) -> Iterator[tuple[tuple[tuple[int, ...], int], ...]]:
    """Which of the sizes that could count tokens do: none, equal ones together, or any choice of them."""
    arguments = (node.args, tuple(value for _, value in node.kwargs))
    places = tuple(_multiples(arguments, num_tokens, (), listed=False))
    factors = sorted({factor for _, factor in places})
    choices = [
        tuple(place for place in places if place[1] in chosen)
        for number in range(len(factors) + 1)
        for chosen in itertools.combinations(factors, number)
    ]
    choices += [chosen for number in (1, 2) for chosen in itertools.combinations(places, number)]
    yield from dict.fromkeys(choices)


def _multiples(
    argument: Any, num_tokens: int, path: tuple[int, ...], *, listed: bool
) -> Iterator[tuple[tuple[int, ...], int]]:
    if isinstance(argument, tuple) and not isinstance(argument, (Ref, Group)):
        for i, each in enumerate(argument):
            yield from _multiples(each, num_tokens, (*path, i), listed=len(path) >= 2)
    elif listed and type(argument) is int and argument > 0 and argument % num_tokens == 0:
        yield path, argument // num_tokens


def _with(argument: Any, path: tuple[int, ...], value: int) -> Any:
    if not path:
        return value
    changed = list(argument)
    changed[path[0]] = _with(argument[path[0]], path[1:], value)
    return tuple(changed)


def equal(left: Tensor, right: Tensor) -> bool:
    """To the bit, so that NaN equals itself."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.dtype is torch.bool:
        return torch.equal(left, right)
    return torch.equal(_bytes(left), _bytes(right))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8)


def close(left: Tensor, right: Tensor) -> bool:
    """But for rounding."""
    if left.dtype != right.dtype or left.shape != right.shape or not left.dtype.is_floating_point:
        return equal(left, right)
    tolerance = 16 * torch.finfo(left.dtype).eps
    largest = left.abs().nan_to_num().max().item()
    return torch.allclose(left, right, rtol=tolerance, atol=tolerance * largest, equal_nan=True)


def like(left: Tensor, right: Tensor) -> bool:
    """But for roundings that had many operators to grow in."""
    if left.dtype != right.dtype or left.shape != right.shape or not left.dtype.is_floating_point:
        return equal(left, right)
    right = right.double()
    return bool((left.double() - right).norm() <= right.norm() / 16)
