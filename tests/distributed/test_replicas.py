"""``DistributedDataParallel`` around a layer: two processes that solve for half of the samples each
train as one does."""

import pytest
import torch
from distributed_cases import (
    KINDS,
    TIGHT,
    Perceptron,
    batch,
    check_as_one_process,
    iterations,
    loss_of,
    model,
    share,
    trained,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastdeq import DEQLayer


def train(rank, kind, how, options):
    module = model(kind, **options)
    ours = trained(DistributedDataParallel(module, **how), lambda t: share(rank, t))
    check_as_one_process(ours, kind, **options)
    return iterations(module[1])


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_one_process(ranks, kind):
    first, second = ranks.run(train, kind, {}, {"solver": "anderson"})
    assert first != second


@pytest.mark.parametrize(
    "how", [{"find_unused_parameters": True}, {"static_graph": True}], ids=lambda h: next(iter(h))
)
@pytest.mark.parametrize("kind", ["dense", "general"])
def test_other_ways_to_find_the_gradients(ranks, kind, how):
    ranks.run(train, kind, how, {})


@pytest.mark.parametrize("gradient", ["one_step", "phantom", "unrolled", "reversible"])
def test_gradients_without_an_adjoint(ranks, gradient):
    ranks.run(train, "general", {}, {"gradient": gradient})


def accumulate(rank, kind):
    module, one = model(kind), model(kind)
    replica = DistributedDataParallel(module)
    with replica.no_sync():
        loss_of(replica, *(share(rank, t) for t in batch(0))).backward()
    for p in module.parameters():
        assert p.grad.isfinite().all()
    loss_of(replica, *(share(rank, t) for t in batch(1))).backward()
    for step in range(2):
        loss_of(one, *batch(step)).backward()
    for p, q in zip(module.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients(ranks, kind):
    ranks.run(accumulate, kind)


def replicate_the_cell(rank, with_buffer):
    cell, one = Perceptron(), Perceptron()
    one.load_state_dict(cell.state_dict())
    if with_buffer:
        cell.register_buffer("count", torch.zeros(()))
    x = batch()[0].repeat(1, 2)
    layer = DEQLayer(DistributedDataParallel(cell), **TIGHT)
    layer(share(rank, x)).square().mean().backward()
    DEQLayer(one, **TIGHT)(x).square().mean().backward()
    for p, q in zip(cell.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)


def test_a_cell_that_is_replicated_by_itself(ranks):
    ranks.run(replicate_the_cell, False)


def refused(rank, *args):
    with pytest.raises(RuntimeError, match=r"sends the buffers .*broadcast_buffers=False"):
        replicate_the_cell(rank, *args)


def test_buffers_that_are_sent_in_each_evaluation_are_refused(ranks):
    ranks.run(refused, True)


def normalised(rank):
    """Buffers around the layer are sent once for each call."""
    module, x = model("general"), share(rank, batch()[0])
    whole = nn.Sequential(nn.BatchNorm1d(4, dtype=torch.float64), module)
    loss = DistributedDataParallel(whole)(x).square().mean()
    loss.backward()
    return iterations(module[1])


def test_buffers_around_the_layer(ranks):
    ranks.run(normalised)
