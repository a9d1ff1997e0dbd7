"""What a training loop's objects hold, as boxes of named tensors and plain values.

Three kinds of things are understood: modules and optimizers of torch, whatever shards itself in a way of its own
(``ShardedState``), and anything else with ``state_dict`` and ``load_state_dict``. Tensors become items, whose box says
which part of which whole tensor this rank has; everything else becomes objects, saved without pickle.

An optimizer's state goes by the names of its parameters, not by their numbers, so that it fits any layout. The names
are those under which the tracked modules know the parameters.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from distrain.core.boxes import Point
from distrain.core.errors import ConfigError
from distrain.core.protocols import ShardBox, ShardedState

from .torch_memory import dtype_name


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """The memory of one box: a tensor of the box's shape and dtype, which may be a view."""

    box: ShardBox
    tensor: Tensor

    def part(self, box: ShardBox) -> "Item":
        """The part of this item that ``box`` names; views the same memory."""
        if box.shape == self.box.shape:
            return self
        tensor = self.tensor
        for dim, (inner, outer, size) in enumerate(zip(box.offset, self.box.offset, box.shape, strict=True)):
            tensor = tensor.narrow(dim, inner - outer, size)
        return Item(box, tensor)


@dataclass(frozen=True, slots=True)
class State:
    """Everything that one rank saves."""

    items: list[Item]
    objects: dict[str, Any]


def item_of(name: str, tensor: Tensor) -> Item:
    """What this rank holds of ``tensor``: all of a plain one, the local part of a DTensor."""
    local, offset = tensor.detach(), (0,) * tensor.dim()
    if isinstance(tensor, DTensor):
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        local = tensor.to_local().detach()
        if local.numel() == 0:
            offset = tuple(min(a, n) for a, n in zip(offset, tensor.shape, strict=True))
    return Item(_box(name, tensor.dtype, tuple(tensor.shape), tuple(offset), tuple(local.shape)), local)


@lru_cache(maxsize=1 << 17)  # the same thousands at every save, which are then compared by identity
def _box(name: str, dtype: torch.dtype, whole: Point, offset: Point, shape: Point) -> ShardBox:
    return ShardBox(fqn=name, dtype=dtype_name(dtype), global_shape=whole, offset=offset, shape=shape)


def collect(tracked: Mapping[str, Any]) -> State:
    """Items and objects of everything in ``tracked``, by its name there."""
    names = _parameter_names(tracked)
    state = State([], {})
    for name, thing in tracked.items():
        if isinstance(thing, torch.optim.Optimizer):
            _collect_optimizer(name, thing, names, state)
        elif isinstance(thing, ShardedState):
            for box, tensor in thing.shards():
                state.items.append(Item(replace(box, fqn=f"{name}.{box.fqn}"), tensor.detach()))
            if hasattr(thing, "state_dict"):
                state.objects[name] = thing.state_dict()
        elif isinstance(thing, nn.Module):
            values = thing.state_dict()
            state.items.extend(
                item_of(f"{name}.{key}", v) for key, v in values.items() if isinstance(v, Tensor)
            )
            state.objects[name] = {key: v for key, v in values.items() if not isinstance(v, Tensor)}
        else:
            state.objects[name] = _split(name, _state_dict(name, thing), state.items)
    _refuse_twins(state.items)
    return state


def fenced_storages(tracked: Mapping[str, Any]) -> set[int]:
    """Addresses of the storages that only a tracked optimizer's step changes: its parameters and its state."""
    addresses = set()
    for thing in tracked.values():
        for optimizer in _optimizers(thing):
            tensors = [p for group in optimizer.param_groups for p in group["params"]]
            tensors += [
                v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)
            ]
            addresses |= {_local(t).untyped_storage().data_ptr() for t in tensors}
    return addresses


def optimizers(tracked: Mapping[str, Any]) -> list[torch.optim.Optimizer]:
    """The optimizers among ``tracked``, or that one of them names as its ``optimizer``."""
    return list(dict.fromkeys(each for thing in tracked.values() for each in _optimizers(thing)))


def apply_objects(tracked: Mapping[str, Any], objects: Mapping[str, Any], loaded: Sequence[Item]) -> None:
    """Give every thing its objects back; tensors have been written into the items of ``targets`` already."""
    by_name = {item.box.fqn: item.tensor for item in loaded}
    for name, thing in tracked.items():
        if name not in objects:
            continue
        if isinstance(thing, torch.optim.Optimizer):
            _apply_optimizer(thing, objects[name], _parameter_names(tracked))
        elif isinstance(thing, ShardedState):
            if hasattr(thing, "load_state_dict"):
                thing.load_state_dict(objects[name])
        elif isinstance(thing, nn.Module):
            if objects[name]:  # what set_extra_state takes
                thing.load_state_dict(objects[name], strict=False)
        else:
            values = _join(name, objects[name], by_name)
            if isinstance(thing, dict):
                thing.update(values)
            else:
                thing.load_state_dict(values)


def prepare_targets(tracked: Mapping[str, Any], saved: Sequence[str]) -> None:
    """Make room for what will be loaded: optimizers that have not stepped yet get zeros for each saved state."""
    names = _parameter_names(tracked)
    for name, thing in tracked.items():
        if not isinstance(thing, torch.optim.Optimizer):
            continue
        params = {_name_of(p, names, name): p for group in thing.param_groups for p in group["params"]}
        prefix = f"{name}.state."
        keys: dict[str, list[str]] = defaultdict(list)
        for full in saved:
            if full.startswith(prefix):
                owner, key = _owner(full.removeprefix(prefix), params)
                keys[owner].append(key)
        for owner, param in params.items():  # in their order, which the state then has too
            for key in keys[owner]:
                if key not in thing.state[param]:
                    thing.state[param][key] = torch.zeros_like(param)


def _owner(name: str, params: Mapping[str, Tensor]) -> tuple[str, str]:
    """The parameter with whose name ``name`` begins, and the rest; both may have dots in them."""
    end = len(name)
    while (end := name.rfind(".", 0, end)) >= 0:
        if name[:end] in params:
            return name[:end], name[end + 1 :]
    return "", name


def _optimizers(thing: Any) -> Iterator[torch.optim.Optimizer]:
    found = thing if isinstance(thing, torch.optim.Optimizer) else getattr(thing, "optimizer", None)
    if isinstance(found, torch.optim.Optimizer):
        yield found


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _state_dict(name: str, thing: Any) -> Mapping[str, Any]:
    if isinstance(thing, Mapping):
        return thing
    if not hasattr(thing, "state_dict") or not hasattr(thing, "load_state_dict"):
        raise ConfigError(
            f"{name} cannot be tracked",
            got=type(thing).__name__,
            allowed="something with state_dict and load_state_dict, a dict, or a ShardedState",
        )
    return thing.state_dict()  # type: ignore[no-any-return]


def _parameter_names(tracked: Mapping[str, Any]) -> dict[int, str]:
    modules = [thing for thing in tracked.values() if isinstance(thing, nn.Module)]
    return {id(param): name for module in modules for name, param in module.named_parameters()}


def _name_of(param: Tensor, names: Mapping[int, str], optimizer: str) -> str:
    try:
        return names[id(param)]
    except KeyError:
        raise ConfigError(
            f"{optimizer} updates a parameter that no tracked module has",
            got=f"a parameter of shape {tuple(param.shape)}",
            allowed="track the optimizer together with the modules whose parameters it updates",
            hint="track(model=model, optimizer=optimizer)",
        ) from None


def _collect_optimizer(
    name: str, thing: torch.optim.Optimizer, names: Mapping[int, str], state: State
) -> None:
    values: dict[str, Any] = {}
    for param, entries in thing.state.items():
        owner = _name_of(param, names, name)
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.shape == param.shape and value.dim():
                state.items.append(item_of(f"{name}.state.{owner}.{key}", value))
            else:
                values.setdefault(owner, {})[key] = value
    _take_numbers(values)
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        | {"params": [_name_of(param, names, name) for param in group["params"]]}
        for group in thing.param_groups
    ]
    state.objects[name] = {"values": values, "param_groups": groups}


def _take_numbers(values: dict[str, Any]) -> None:
    """Replace tensors of one element by their numbers: those of a device all at once, since each time is a wait."""
    found: dict[tuple[torch.device, torch.dtype], list[tuple[str, str, Tensor]]] = defaultdict(list)
    for owner, entries in values.items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                found[value.device, value.dtype].append((owner, key, value))
    for places in found.values():
        numbers = torch.stack([value.reshape(()) for _, _, value in places]).tolist()
        for (owner, key, _), number in zip(places, numbers, strict=True):
            values[owner][key] = number


def _apply_optimizer(
    thing: torch.optim.Optimizer, objects: Mapping[str, Any], names: Mapping[int, str]
) -> None:
    options = {name: group for group in objects["param_groups"] for name in group["params"]}
    for group in thing.param_groups:
        for param in group["params"]:
            owner = names[id(param)]
            saved = options.get(owner)
            if saved is not None:
                group.update({key: value for key, value in saved.items() if key != "params"})
            for key, value in objects["values"].get(owner, {}).items():
                # torch's optimizers count steps in a float32 tensor, beside the parameter if they are fused.
                beside = param.device if group.get("fused") or group.get("capturable") else "cpu"
                number = isinstance(value, float) and key == "step"
                thing.state[param][key] = (
                    torch.tensor(value, dtype=torch.float32, device=beside) if number else value
                )


_TENSOR = "__tensor__"


def _split(name: str, value: Any, items: list[Item]) -> Any:
    """``value`` with tensors taken out into ``items`` and their names left in their place."""
    if isinstance(value, Tensor):
        items.append(item_of(name, value))
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {key: _split(f"{name}.{key}", each, items) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_split(f"{name}.{i}", each, items) for i, each in enumerate(value)])
    return value


def _join(name: str, value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The reverse of ``_split``."""
    if isinstance(value, Mapping):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _join(f"{name}.{key}", each, tensors) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_join(f"{name}.{i}", each, tensors) for i, each in enumerate(value)])
    return value


def _refuse_twins(items: Sequence[Item]) -> None:
    """Two tensors of one rank may share a name only as different boxes of the same whole."""
    seen: dict[tuple[str, tuple[int, ...]], ShardBox] = {}
    for item in items:
        if not item.tensor.numel() and item.tensor.dim():
            continue
        other = seen.setdefault((item.box.fqn, item.box.offset), item.box)
        if other is not item.box:
            raise ConfigError("two tensors of the state have one name", got=item.box.fqn)
