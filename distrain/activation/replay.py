"""Carries out a recipe: makes saved tensors again, on all tokens or the last ones.

It runs below autograd and autocast, whose work is in the program already. Where the layer drew random numbers the
generator is put back to where it was, and all of them are drawn again: those of the last tokens come after the others.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .locality import perform
from .program import Draw, Node, generator_state, set_generator_state
from .recipe import Recipe, Step
from .rows import dense
from .storage import Window

Done = Callable[[int, Tensor], None]


class Replay:
    """One run of ``recipe`` on tokens ``start`` to the end of ``num_tokens``.

    ``at_hand`` gives a value from outside or put by whole; ``done`` is called with each value that was wanted, as
    soon as it is made.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        windows: Sequence[Window],
        seeds: Sequence[Draw],
        device: torch.device,
        at_hand: Callable[[int], Tensor],
        done: Done,
        num_tokens: int,
        start: int,
    ) -> None:
        self._recipe = recipe
        self._windows = windows
        self._seeds = seeds
        self._device = device
        self._at_hand = at_hand
        self._done = done
        self._num_tokens = num_tokens
        self._start = start
        self._values: dict[int, Tensor] = {}

    @torch.no_grad()
    def run(self) -> None:
        """Make everything."""
        with torch.autocast(self._device.type, enabled=False):
            for step in self._recipe.steps:
                self._do(step)
                for value in step.done_with:
                    self._values.pop(value, None)

    def _do(self, step: Step) -> None:
        node, local = step.node, step.local
        refs = node.refs
        if local is None:
            values = [
                self._blank(ref.value) if node.blank and i == 0 else self._value(ref.value)
                for i, ref in enumerate(refs)
            ]
            results = self._drawing(node, values)
        else:
            values = [self._value(ref.value) for ref in refs]
            for i, rows in enumerate(local.sliced):
                if rows is not None and self._is_whole(values[i], refs[i].value):
                    values[i] = rows.take(values[i], self._start, self._num_tokens)
            results = perform(node, values, local.sizes, num_tokens=self._num_tokens - self._start)
        for out, result in zip(node.outs, results, strict=True):
            if out is not None and result is not None:
                self._values[out] = result
                if out in self._recipe.rows:
                    self._done(out, result)

    def _is_whole(self, value: Tensor, number: int) -> bool:
        return tuple(value.shape) == self._windows[number].shape

    def _value(self, number: int) -> Tensor:
        value = self._values.get(number)
        return self._at_hand(number) if value is None else value

    def _blank(self, number: int) -> Tensor:
        """Of what is about to be filled only the form matters."""
        window = self._windows[number]
        return dense(window.shape, window.order, torch.empty(0, dtype=window.dtype, device=self._device))

    def _drawing(self, node: Node, values: list[Tensor]) -> list[Tensor | None]:
        if node.seed is None:
            return perform(node, values, (), num_tokens=self._num_tokens)
        device, state = self._seeds[node.seed]
        present = generator_state(device)
        set_generator_state(state, device)
        try:
            return perform(node, values, (), num_tokens=self._num_tokens)
        finally:
            set_generator_state(present, device)
