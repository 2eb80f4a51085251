"""The transformer of the study, and the text that it reads."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("pyarrow")

from fastdeq.study import CharacterTransformer, Config, characters, train

FAMILIES = ("dense", "orthogonal", "symmetric")


@pytest.fixture(scope="module")
def text():
    return characters(context=8, windows=256, test_windows=64)


def test_windows_are_codes_and_the_characters_that_follow(text):
    assert text.x_train.shape == text.y_train.shape == (256, 8)
    assert text.x_test.shape == (64, 8)
    assert torch.equal(text.x_train[:, 1:], text.y_train[:, :-1])
    assert text.x_train.dtype == torch.int64
    assert 0 <= text.x_train.min() <= text.x_train.max() < text.classes == 128


def test_windows_follow_the_seed(text):
    same, other = (characters(seed, context=8, windows=256) for seed in (0, 1))
    assert torch.equal(same.x_train, text.x_train)
    assert not torch.equal(other.x_train, text.x_train)


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="windows"):
        characters(windows=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "initialised"])
def test_each_square_weight_starts_in_its_family(family, kept):
    torch.manual_seed(0)
    model = CharacterTransformer(128, 64, 8, weight=family, scale=1.5, parametrized=kept)
    weights = [w().detach() for w in model.recurrent_weights()]
    assert len(weights) == 6
    for w in weights:
        assert w.shape == (64, 64)
        # d^2 entries, half of them free: five standard errors of their root mean square.
        deviation = 1.5 / 8 / (2 if family == "symmetric" else 1)
        assert float(w.square().mean().sqrt()) == pytest.approx(deviation, rel=5 / 64)
        if family == "symmetric":
            assert torch.equal(w, w.t())
        if family == "orthogonal":
            assert torch.allclose(w @ w.t(), 2.25 * torch.eye(64), atol=1e-4)


def test_no_position_sees_what_comes_later():
    torch.manual_seed(0)
    model = CharacterTransformer(128, 16, 8, weight="dense", scale=0.5, tol=1e-6)
    codes = torch.randint(128, (1, 8))
    changed = codes.clone()
    changed[0, 5] = (codes[0, 5] + 1) % 128
    first, second = model(codes), model(changed)
    # Apart from the tolerance of the two solves, which depends on all of the sequence.
    assert torch.allclose(first[0, :5], second[0, :5], atol=1e-4)
    assert not torch.allclose(first[0, 5:], second[0, 5:], atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_steps_learn(text, family):
    config = Config(
        family,
        0.5,
        task="characters",
        activation="gelu",
        features=16,
        epochs=3,
        batch_size=32,
        optimizer="adam",
        learning_rate=1e-2,
    )
    result = train(text, config)
    assert result.test_loss < 0.85 * math.log(128)
    assert result.forward_converged > 0.9
    assert result.structure_drift is None or result.structure_drift < 1e-4


def test_a_character_is_told_by_its_place_as_well():
    model = CharacterTransformer(128, 16, 12, weight="dense", scale=0.5, tol=1e-6)
    logits = model(torch.full((1, 12), 65))[0]
    # Beyond the reach of the convolution only the place differs, and what attention sees of it.
    assert not torch.allclose(logits[6], logits[7], atol=1e-2)


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        CharacterTransformer(128, 30, 8, weight="dense", scale=0.5)
