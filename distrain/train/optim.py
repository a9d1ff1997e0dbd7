"""AdamW and LAMB over shards, and the learning-rate schedule.

Both see only this rank's shards (``parallel.shards``). AdamW works element by element, so torch's fused one runs on
the local tensors as they are. LAMB (You et al. 2020; MegaScale section 3.1) scales each parameter's update by the
ratio of two norms over the whole parameter, which are summed over the ranks that share it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distrain.core.config import OptimizerConfig
from distrain.parallel.shards import Shard


def learning_rate(step: int, config: OptimizerConfig, *, num_steps: int) -> float:
    """Rate of ``step`` (from 0): linear warm-up to ``lr``, then half a cosine down to ``min_lr`` at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def build_optimizer(
    shards: Sequence[Shard], config: OptimizerConfig, *, names: Sequence[str], group: dist.ProcessGroup | None
) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names.

    ``names`` are all parameters of this rank's stages and ``group`` the ranks that hold parts or copies of them;
    LAMB's norms are summed over it.
    """
    groups = [
        {
            "params": [s.param for s in shards if s.decay is decay],
            "weight_decay": config.weight_decay if decay else 0.0,
        }
        for decay in (True, False)
        if any(s.decay is decay for s in shards)
    ]
    betas = (config.beta1, config.beta2)
    if config.name == "lamb":
        return Lamb(
            groups, shards=shards, names=names, lr=config.lr, betas=betas, eps=config.eps, group=group
        )
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


class Lamb(torch.optim.Optimizer):
    """Layer-wise adaptive moments, with the bias correction of the paper's algorithm 2.

    Parameters without weight decay (norms) are not scaled, as is customary.
    """

    def __init__(
        self,
        params: Sequence[dict[str, object]],
        *,
        shards: Sequence[Shard],
        names: Sequence[str],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._shards = {shard.param: shard for shard in shards}
        self._index = {name: i for i, name in enumerate(names)}
        self._group = group

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every shard's parameters from its gradient."""
        updates = [
            (p, self._direction(p, options), options)
            for options in self.param_groups
            for p in options["params"]
        ]
        ratios = self._trust_ratios([(self._shards[p], update) for p, update, _ in updates])
        for param, update, options in updates:
            shard = self._shards[param]
            for segment in shard.segments:
                ratio = ratios[self._index[segment.name]] if shard.decay else 1.0
                part = slice(segment.start, segment.stop)
                param.view(-1)[part].sub_(options["lr"] * ratio * update.view(-1)[part])

    def _direction(self, param: Tensor, options: dict[str, Any]) -> Tensor:
        """Adam's step plus decay, before any scaling."""
        state, gradient = self.state[param], param.grad
        assert gradient is not None
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
        state["step"] += 1
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        beta1, beta2 = options["betas"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        deviation = (square / (1 - beta2 ** state["step"])).sqrt_().add_(options["eps"])
        update: Tensor = (mean / (1 - beta1 ** state["step"])).div_(deviation)
        return update.add_(param, alpha=options["weight_decay"])

    def _trust_ratios(self, updates: Sequence[tuple[Shard, Tensor]]) -> Tensor:
        """|weight| / |update| of each whole parameter, by its index; 1 where either norm is 0."""
        first = updates[0][0].param
        squares = torch.zeros(2, len(self._index), dtype=first.dtype, device=first.device)
        for shard, update in updates:
            for segment in shard.segments:
                part = slice(segment.start, segment.stop)
                for row, tensor in enumerate((shard.param, update)):
                    square = tensor.detach().view(-1)[part].square().sum() / shard.copies
                    squares[row, self._index[segment.name]] += square
        if dist.is_initialized() and dist.get_world_size(self._group) > 1:
            dist.all_reduce(squares, group=self._group)
        weight, update_norm = squares.sqrt()
        return torch.where((weight > 0) & (update_norm > 0), weight / update_norm.clamp(min=1e-38), 1.0)
