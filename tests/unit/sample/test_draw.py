"""Drawing a token from logits."""

import pytest
import torch
from torch import Tensor

from lctrain.sample import draw


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shares(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, draws: int = 4000) -> Tensor:
    """How often each id is drawn."""
    rng = generator()
    ids = torch.tensor([draw(logits, temperature, top_k, top_p, rng) for _ in range(draws)])
    return torch.bincount(ids, minlength=len(logits)) / draws


PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
LOGITS = PROBABILITIES.log() + 3


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draw(LOGITS, 0.0, 0, 1.0, generator()) == 1
    assert draw(torch.tensor([0.0, float("-inf"), 7.0, 7.0]), 0.0, 0, 1.0, generator()) == 2, "the first of equals"


def test_draws_follow_the_softmax() -> None:
    torch.testing.assert_close(shares(LOGITS), PROBABILITIES, atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_sharpens_or_flattens(temperature: float) -> None:
    torch.testing.assert_close(shares(LOGITS, temperature), (LOGITS / temperature).softmax(0), atol=0.03, rtol=0)


def test_top_k() -> None:
    wanted = torch.tensor([0.0, 4 / 7, 0.0, 3 / 7, 0.0])
    torch.testing.assert_close(shares(LOGITS, top_k=2), wanted, atol=0.03, rtol=0)
    assert shares(LOGITS, top_k=1, draws=50)[1] == 1
    assert (shares(LOGITS, top_k=99) > 0).all(), "more than there are: all"


def test_top_p_keeps_the_smallest_set_of_that_mass() -> None:
    assert (shares(LOGITS, top_p=0.39, draws=200) > 0).tolist() == [False, True, False, False, False]
    assert (shares(LOGITS, top_p=0.41) > 0).tolist() == [False, True, False, True, False]
    assert (shares(LOGITS, top_p=0.86) > 0).tolist() == [True, True, False, True, True]
    torch.testing.assert_close(shares(LOGITS, top_p=0.6), torch.tensor([0, 4 / 7, 0, 3 / 7, 0]), atol=0.03, rtol=0)
    assert shares(LOGITS, top_p=1e-9, draws=50)[1] == 1, "the likeliest stays"


def test_top_p_counts_within_top_k() -> None:
    """Of the two likeliest, 4/7 and 3/7, the first alone has a mass of 0.5."""
    assert shares(LOGITS, top_k=2, top_p=0.5, draws=200)[1] == 1


def test_the_seed_decides() -> None:
    def ten(seed: int) -> list[int]:
        rng = generator(seed)
        return [draw(LOGITS, 1.0, 0, 0.9, rng) for _ in range(10)]

    assert ten(1) == ten(1)
    assert ten(1) != ten(2)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([1.0, float("-inf"), 1.0])
    assert shares(logits, draws=300)[1] == 0


def test_a_single_token() -> None:
    assert draw(torch.tensor([3.0]), 0.7, 5, 0.9, generator()) == 0
