"""Small models of the kinds of torchdeq's zoo, trained by it and by ``fastdeq.compat.torchdeq``."""

import pytest
from torchdeq_models import CharacterTransformer, ImplicitGraphNetwork, MultiscaleConvolution, train

import fastdeq.compat.torchdeq as ours

theirs = pytest.importorskip("torchdeq")


@pytest.mark.parametrize(
    ("model", "options", "apart"),
    [
        # The same evaluations: rounding.
        (MultiscaleConvolution, {}, 1e-9),
        # Both adjoints to 1e-8, one of all nodes together.
        (ImplicitGraphNetwork, {}, 1e-6),
        (ImplicitGraphNetwork, {"ift": False, "grad": 3, "tau": 0.8}, 1e-9),
        # Different steps to a residual of 1e-6.
        (CharacterTransformer, {"lr": 2e-3}, 1e-6),
    ],
    ids=["convolution", "graph", "graph-phantom", "transformer"],
)
def test_training_is_the_same(model, options, apart):
    their, our = (train(model, package, 30, **options) for package in (theirs, ours))
    assert our[-1] < 0.8 * our[0]
    assert max(abs(a - b) / a for a, b in zip(their, our, strict=True)) < apart
