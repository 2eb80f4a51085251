"""One model, several processes: a DEQ layer under ``DistributedDataParallel`` or ``fully_shard``.

    torchrun --nproc-per-node 2 examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py --shard

Each process solves for its own samples, to their own convergence; nothing is exchanged during a
solve. Gradients are averaged as those of any module. On CPUs, with gloo.
"""

from __future__ import annotations

import argparse

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastdeq import AffineCell, DEQLayer
from fastdeq.study import digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128, help="samples of all processes together")
    parser.add_argument("--shard", action="store_true", help="fully_shard instead of replicas")
    options = parser.parse_args()

    distributed.init_process_group("gloo")
    train(options)
    distributed.barrier()  # nobody leaves while another still needs it
    distributed.destroy_process_group()


def train(options: argparse.Namespace) -> None:
    rank, count = distributed.get_rank(), distributed.get_world_size()
    data = digits()
    torch.manual_seed(0)  # the same parameters everywhere
    cell = AffineCell(data.in_features, 64, weight="orthogonal", scale=0.9)
    layer = DEQLayer(cell, tol=1e-5)
    model = nn.Sequential(layer, nn.Linear(64, data.classes))
    if options.shard:
        fully_shard(layer)  # the layer as a whole, never a part of its cell
        fully_shard(model)
        trained: nn.Module = model
    else:
        trained = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    for step in range(options.steps):
        everyone = torch.randint(len(data.x_train), (options.batch,))  # the same draw everywhere
        mine = everyone[rank::count]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(trained(data.x_train[mine]), data.y_train[mine])
        loss.backward()
        optimizer.step()
        mean = loss.detach() / count
        distributed.all_reduce(mean)
        slowest = layer.last_solution.iterations.max()
        distributed.all_reduce(slowest, distributed.ReduceOp.MAX)
        if rank == 0 and (step % 20 == 0 or step == options.steps - 1):
            print(f"step {step:2}: loss {mean:.4f}; at most {slowest} iterations", flush=True)

    with torch.no_grad():
        predicted = trained(data.x_test).argmax(1)
    if rank == 0:
        print(f"test accuracy {(predicted == data.y_test).float().mean():.1%}")


if __name__ == "__main__":
    main()
