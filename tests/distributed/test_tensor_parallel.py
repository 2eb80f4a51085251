"""Parameters that are ``DTensor``s, by hand or by ``parallelize_module``, with the same samples on
each process."""

import pytest
import torch
from distributed_cases import RANKS, batch, loss_of, model, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

FAMILIES = ("dense", "symmetric", "orthogonal")


def run(rank, kind, how):
    mesh = init_device_mesh("cpu", (RANKS,))
    module, one = model(kind), model(kind)
    cell = module[1].cell
    if how == "W":
        w = cell.weight.weight.detach()
        cell.weight.weight = nn.Parameter(distribute_tensor(w, mesh, [Shard(0)]))
    else:
        plan = {
            "injection": {"injection": ColwiseParallel(output_layouts=Replicate())},
            "cell": {"first": ColwiseParallel(), "second": RowwiseParallel()},
        }[how]
        parallelize_module(cell, mesh, plan)
    x, y = batch()
    loss_of(module, x, y).backward()
    loss_of(one, x, y).backward()
    for p, q in zip(module.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-9, atol=1e-11)
    if how == "W":
        assert cell.weight.weight.grad.to_local().shape == (8 // RANKS, 8)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("how", ["W", "injection"])
def test_parts_of_an_affine_cell(ranks, kind, how):
    ranks.run(run, kind, how)


def test_a_general_cell(ranks):
    """All processes have the same state, and stop together."""
    ranks.run(run, "general", "cell")


def refused(rank, kind):
    mesh = init_device_mesh("cpu", (RANKS,))
    x = distribute_tensor(torch.zeros(4, 8, dtype=torch.float64), mesh, [Shard(0)])
    with pytest.raises(TypeError, match=r"DTensor.*to_local\(\)"):
        model(kind)[1](x)


@pytest.mark.parametrize("kind", [*FAMILIES, "general"])
def test_distributed_samples_are_refused(ranks, kind):
    ranks.run(refused, kind)
