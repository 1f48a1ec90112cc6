"""A proof does not stumble over experts that tie: who is better by rounding is decided as one process decided it."""

import pytest
import torch
import torch.distributed as dist

from lctrain.config.verify import LayoutVerifyConfig
from lctrain.models.head_routing import HeadRouter
from lctrain.models.moe.rankings import Rankings
from lctrain.models.moe.router import Router
from lctrain.verify.layout.prove import Prover
from lctrain.verify.layout.standard import load_layout

LAYOUT = (
    "model.pattern=*E*E model.attention.routed_heads={shared:1,top_k:1} model.attention.n_heads=4"
    " model.attention.n_kv_heads=2 model.moe.n_experts=8 parallel.cp=2 parallel.ep=2"
)


def coarse(logits: torch.Tensor) -> torch.Tensor:
    """In steps of 1/32, with rounding noise that every number of processes has of its own, and the gradient as it was."""
    seed = dist.get_world_size() if dist.is_initialized() else 1
    noise = 1e-7 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    return logits + ((logits.detach() * 32).round() / 32 + noise - logits.detach())


@pytest.mark.parametrize("pinned", [True, False])
def test_ties_are_settled(pinned: bool, monkeypatch) -> None:
    router, heads = Router._logits, HeadRouter._scores
    monkeypatch.setattr(Router, "_logits", lambda self, x, tasks: coarse(router(self, x, tasks)))
    monkeypatch.setattr(HeadRouter, "_scores", lambda self, x, weight: coarse(heads(self, x, weight)))
    if not pinned:
        monkeypatch.setattr(Rankings, "attach", lambda self, model: None)
    with Prover(LayoutVerifyConfig(length=61, steps=2)) as prover:
        report = prover.prove("ties", load_layout(LAYOUT))
    assert report.problem is None, report.problem
    assert report.passed == pinned, [check for check in report.checks if not check.passed]
