"""Generating from a model, and finding the model of a run."""

import pytest
import torch

from lctrain.config.model import AttentionConfig, ModelConfig
from lctrain.config.moe import MoeConfig, RouterConfig
from lctrain.errors import UserError
from lctrain.models.init import initialise
from lctrain.models.model import LanguageModel
from lctrain.sample import generate, load_run

EOD = 6


class Counter:
    """Stands for a model: after token t, t + 1 is the likeliest by far; remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []

    def new_state(self) -> list[None]:
        return []

    def decode(self, tokens: torch.Tensor, state: None) -> torch.Tensor:
        self.given.append(tokens[0].tolist())
        logits = torch.zeros(1, 10)
        logits[0, (int(tokens[0, -1]) + 1) % 10] = 50.0
        return logits


def run(model, prompt: list[int], tokens: int, temperature: float = 0.0, seed: int = 0, eod: int = EOD) -> list[int]:
    return list(generate(model, torch.tensor(prompt), tokens, eod, temperature, 0, 1.0, seed))


def test_stops_at_the_end_of_document_which_is_not_given() -> None:
    assert run(Counter(), [1, 2], 100) == [3, 4, 5]
    assert run(Counter(), [5], 100) == []


def test_stops_after_so_many_tokens() -> None:
    assert run(Counter(), [1], 2) == [2, 3]
    assert run(Counter(), [1], 0) == []


def test_every_token_goes_through_the_model_once() -> None:
    model = Counter()
    run(model, [1, 2], 3)
    assert model.given == [[1, 2], [3], [4]]


@pytest.fixture
def model() -> LanguageModel:
    config = ModelConfig(pattern="*-W-", d_model=16, vocab_size=11, attention=AttentionConfig(window=4), init_std=0.5)
    model = LanguageModel(config)
    initialise(model, 0)
    return model.eval()


def test_every_task_has_a_gate_of_its_own() -> None:
    moe = MoeConfig(n_experts=8, top_k=1, d_ff=16, router=RouterConfig(tasks=2, renormalise=False))
    model = LanguageModel(ModelConfig(pattern="*E*E", d_model=16, vocab_size=11, moe=moe, init_std=0.5))
    initialise(model, 0)
    texts = [list(generate(model.eval(), torch.tensor([1, 2]), 20, EOD, 0.0, 0, 1.0, 0, task)) for task in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]


def test_the_cache_changes_nothing(model) -> None:
    """Greedy tokens equal those found by running the whole text anew for each."""
    tokens = [3, 1, 4]
    for _ in range(12):
        logits = model.decode(torch.tensor([tokens]), model.new_state())[0]
        tokens.append(int(logits.argmax()))
    assert run(model, tokens[:3], 12, eod=-1) == tokens[3:]


def test_the_seed_decides(model) -> None:
    one, two, other = (run(model, [1], 20, temperature=1.0, seed=seed, eod=-1) for seed in (1, 1, 2))
    assert one == two
    assert one != other
    assert len(one) == 20


def test_a_folder_that_is_no_run(tmp_path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        load_run(str(tmp_path), None, torch.device("cpu"))
