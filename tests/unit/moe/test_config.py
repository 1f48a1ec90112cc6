"""What the settings of experts refuse, and with which advice."""

import pytest
from pydantic import ValidationError

from lctrain.config.launcher import LauncherConfig
from lctrain.config.model import AttentionConfig, ModelConfig
from lctrain.config.moe import MoeConfig, RoutedHeadsConfig, RouterConfig
from lctrain.config.schema import CorpusConfig, DataConfig, ParallelConfig, TrainConfig


def test_expert_choice_is_refused_with_the_reason() -> None:
    with pytest.raises(ValidationError, match="look at the future; use token"):
        RouterConfig(choice="expert")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_experts": 4, "top_k": 5}, r"top_k=5 exceeds the 4 experts that a token can reach \(model.moe.n_experts\)"),
        ({"n_experts": 8, "router": RouterConfig(groups=3)}, "n_experts=8 is not a multiple of model.moe.router.groups=3"),
        ({"n_experts": 8, "top_k": 3, "router": RouterConfig(groups=4)}, "exceeds the 2 experts"),
        ({"n_experts": 8, "top_k": 1, "router": RouterConfig(groups=8)}, "use max"),
        (
            {"top_k": 3, "router": RouterConfig(groups=2, top_groups=2, group_score="top_k_over_groups")},
            "top_k=3 is not a multiple of",
        ),
        ({"shared_gate": True}, "set model.moe.shared_d_ff"),
    ],
)
def test_shapes(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MoeConfig(**fields)


def test_more_groups_than_there_are() -> None:
    with pytest.raises(ValidationError, match=r"top_groups=3 exceeds model.moe.router.groups=2"):
        RouterConfig(groups=2, top_groups=3)


def test_more_heads_than_there_are() -> None:
    heads = AttentionConfig(n_heads=4, routed_heads=RoutedHeadsConfig(shared=2, top_k=3))
    with pytest.raises(ValidationError, match=r"shared=2 and top_k=3 heads are more than model.attention.n_heads=4"):
        ModelConfig(pattern="*", d_model=32, vocab_size=8, attention=heads)


def run(pattern: str = "*E", corpora: int = 1, parallel: dict | None = None, **moe: object) -> TrainConfig:
    return TrainConfig(
        run_dir="unused",
        model=ModelConfig(pattern=pattern, d_model=32, vocab_size=8, moe=MoeConfig(**moe)),
        data=DataConfig(corpora=(CorpusConfig(prefix="unused"),) * corpora),
        parallel=ParallelConfig(**(parallel or {})),
        launcher=LauncherConfig(processes=4),
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parallel": {"ep": 4}, "n_experts": 6}, "n_experts=6 is not a multiple of parallel.ep=4; ep can be 1, 2, 3, 6"),
        ({"parallel": {"ep": 2}, "pattern": "*-"}, "parallel.ep=2 has no experts to divide: model.pattern has no E"),
        ({"corpora": 3, "router": RouterConfig(tasks=2)}, "tasks=2 gates are too few for 3 corpora: set it to 3, or to 1"),
    ],
)
def test_runs(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        run(**fields)


def test_runs_that_fit() -> None:
    run(parallel={"ep": 4})
    run(parallel={"ep": 2}, corpora=2, router=RouterConfig(tasks=2))
    run(corpora=3)
    MoeConfig(d_ff=12).check_run(1, 3, 1)
    with pytest.raises(ValueError, match=r"d_ff=10 is not a multiple of parallel.etp=4"):
        MoeConfig(d_ff=10).check_run(1, 4, 1)
