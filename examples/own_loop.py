"""Distrain's parallelism in a training loop of one's own.

distrain launch --nproc-per-node 4 examples/own_loop.py
"""

import os

import torch
import torch.distributed as dist

from distrain.core.config import OptimizerConfig
from distrain.core.vocabulary import PRESETS, DataParallel, Degrees, Schedule
from distrain.parallel import MicroBatch, init
from distrain.parallel.shards import clip_, global_norm
from distrain.parallel.tensor import loss_context
from distrain.train.assembly import assemble
from distrain.train.optim import build_optimizer

STEPS, MICRO_BATCHES, ROWS, LENGTH = 5, 4, 2, 32


def main() -> None:
    """Train on random bytes under tp 2 x pp 2, with a data-parallel axis for whatever ranks are left."""
    torch.manual_seed(0)  # the same data everywhere; each replica takes its rows
    parallel = init(Degrees(tp=2, pp=2, dp=int(os.environ["WORLD_SIZE"]) // 4))
    shape = PRESETS["tiny"]
    model = assemble(
        shape,
        parallel,
        schedule=Schedule.ONE_F_ONE_B,
        data=DataParallel.ZERO1,
        micro_batches=MICRO_BATCHES,
        seed=0,
    )
    optimizer = build_optimizer(
        model.data.shards, OptimizerConfig(lr=1e-2), names=model.names, group=parallel.groups.axis("model")
    )
    replica, num_replicas = parallel.coordinates["dp"], parallel.degrees.dp
    ids = torch.randint(0, 256, (MICRO_BATCHES, num_replicas, ROWS, LENGTH + 1))
    hidden = (ROWS, LENGTH // parallel.degrees.tp, shape.d_model)
    for step in range(STEPS):
        model.loss.num_tokens = MICRO_BATCHES * num_replicas * ROWS * LENGTH
        with loss_context(parallel.degrees.tp):
            losses = model.runtime.step(
                [MicroBatch(piece[replica, :, :-1], piece[replica, :, 1:], hidden) for piece in ids]
            )
        model.data.reduce()
        clip_(model.data.shards, global_norm(model.data.shards), largest=1.0)
        optimizer.step()
        model.data.updated()
        total = torch.stack(losses).sum() if losses else torch.zeros(())
        dist.all_reduce(total)
        if parallel.rank == 0:
            print(f"step {step}  loss {total.item() / parallel.degrees.tp:.4f}")
    model.data.gather()  # all parameters are whole now, to be looked at or saved
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
