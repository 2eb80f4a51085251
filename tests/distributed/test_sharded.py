"""``fully_shard`` around a layer trains as one process does; inside of a cell it is refused, as
processes that evaluate cells a different number of times would wait for each other."""

import pytest
import torch
from distributed_cases import (
    KINDS,
    batch,
    check_as_one_process,
    iterations,
    loss_of,
    model,
    share,
    trained,
    whole,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fastdeq import fixed_point, trajectory
from fastdeq.ops.kept_factors import version_of


def shard(module, how, **options):
    layer = module[1]
    parts = {
        "model": [module],
        "layer": [layer, module],
        "cell": [layer.cell],
        "cell and model": [layer.cell, module],
        "weight and model": [getattr(layer.cell, "weight", None), module],
        "injection and model": [getattr(layer.cell, "injection", None), module],
        "part of the cell": [getattr(layer.cell, "first", None)],
    }
    for part in parts[how]:
        fully_shard(part, **options)
    return module


def train(rank, kind, how, options):
    module = shard(model(kind, **options), how)
    ours = trained(module, lambda t: share(rank, t))
    check_as_one_process(ours, kind, **options)
    return iterations(module[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["model", "layer"])
def test_training_is_that_of_one_process(ranks, kind, how):
    first, second = ranks.run(train, kind, how, {"solver": "anderson"})
    assert first != second


@pytest.mark.parametrize(
    "options",
    [{"compact": True}, {"adjoint": "gmres"}]
    + [{"gradient": g} for g in ("one_step", "phantom", "unrolled", "reversible")],
    ids=lambda o: "-".join(map(str, *o.items())),
)
def test_options_of_general_layers(ranks, options):
    ranks.run(train, "general", "layer", options)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("symmetric", "weight and model"),
        ("orthogonal", "weight and model"),
        ("dense", "injection and model"),
    ],
)
def test_parts_of_an_affine_cell_that_are_called_once(ranks, kind, how):
    ranks.run(train, kind, how, {})


def accumulate(rank, kind):
    module, one = shard(model(kind), "layer"), model(kind)
    module.set_requires_gradient_sync(False)
    loss_of(module, *(share(rank, t) for t in batch(0))).backward()
    module.set_requires_gradient_sync(True)
    loss_of(module, *(share(rank, t) for t in batch(1))).backward()
    for step in range(2):
        loss_of(one, *batch(step)).backward()
    for p, q in zip(module.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients(ranks, kind):
    ranks.run(accumulate, kind)


def in_bfloat16(rank, kind):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    module = shard(model(kind, tol=1e-2).float(), "model", mp_policy=policy)
    one = model(kind, tol=1e-2)
    x, y = batch()
    value = loss_of(module, share(rank, x).float(), share(rank, y).bfloat16())
    value.backward()
    # bfloat16 has 8 bits, and the solves a tolerance of 1e-2.
    torch.testing.assert_close(
        value.double(), loss_of(one, share(rank, x), share(rank, y)), rtol=0.1, atol=0.05
    )
    assert all(whole(p.grad).isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("kind", ["dense", "general"])
def test_parameters_gathered_in_bfloat16(ranks, kind):
    ranks.run(in_bfloat16, kind)


def refused(rank, kind, how, message):
    module = shard(model(kind), how)
    with pytest.raises(RuntimeError, match=message):
        module(share(rank, batch()[0]))


@pytest.mark.parametrize(
    ("kind", "how", "message"),
    [
        *((k, "cell", "the cell itself .* fully_shard.layer.") for k in ("dense", "general")),
        ("orthogonal", "cell and model", "fully_shard.layer."),
        ("general", "part of the cell", "'first' in Perceptron.* fully_shard.layer."),
        ("dense", "weight and model", "is free.* fully_shard.layer."),
    ],
)
def test_gathering_in_each_evaluation_is_refused(ranks, kind, how, message):
    ranks.run(refused, kind, how, message)


def refused_function(rank):
    cell = fully_shard(model("general")[1].cell)
    x = torch.zeros(3, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="fully_shard"):
        fixed_point(lambda z: cell(z, x), x)


def test_a_function_around_a_sharded_module_is_refused(ranks):
    ranks.run(refused_function)


def along(rank):
    """What does not call the layer itself sees parameters as they lie, unless they are gathered."""
    layer = fully_shard(model("general")[1])
    x = share(rank, batch()[0]).repeat(1, 2)
    layer.unshard()
    z = trajectory(layer, x, states=2)[-1]
    torch.testing.assert_close(z, model("general")[1](x))


def test_states_along_a_solve(ranks):
    ranks.run(along)


def unknown_version(rank):
    # As on a GPU, where entries are not compared; here nothing has an address.
    return version_of(torch.empty(2, device="meta"))[-1]


def test_gathered_parameters_are_not_known_by_their_version(ranks):
    """Gathering writes to memory without another version, maybe at the address of before."""
    assert ranks.run(unknown_version) == [None, None]
    assert version_of(torch.empty(2, device="meta"))[-1] is not None
