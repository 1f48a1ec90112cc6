"""Stated cost against what torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lctrain.parallel.layout import count_targets, shift_labels
from lctrain.parallel.mask import AttentionMask

DOCUMENTS = ((0, 9, 10, 31), (0, 40))
LENGTH = 40
TOKENS = 31 + 40


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2"])
def test_matrix_products_forward_and_backward(make_model, make_seq, activation: str) -> None:
    """Without attention every operation is a matrix product, and torch counts those."""
    model = make_model("-{3}", mlp={"activation": activation})
    tokens = torch.randint(0, 61, (2, LENGTH))
    rows = ((0, LENGTH),) * 2
    labels = shift_labels(tokens, rows, [1, 2])
    assert count_targets(labels) == 2 * LENGTH
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(tokens, labels, make_seq(rows))
    assert model.flops(rows) == forward.get_total_flops()
    # The loss adds up the weight's gradient in place, with an operator whose cost torch does not know.
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as both:
        model(tokens, labels, make_seq(rows)).objective.backward()
    assert both.get_total_flops() == 3 * model.flops(rows)


@pytest.mark.parametrize("attention", [{}, {"n_kv_heads": 1, "head_dim": 12}, {"bias": True, "qk_norm": True}])
@pytest.mark.parametrize(("symbol", "window"), [("*", None), ("W", 6)])
def test_attention_counts_live_entries_exactly(make_model, attention: dict, symbol: str, window: int | None) -> None:
    model = make_model(symbol, attention=attention)
    mixer = model.layers[0].mixer
    heads, size = 4, attention.get("head_dim", 8)
    products = sum(p.numel() for p in mixer.parameters() if p.dim() == 2)
    live = int(AttentionMask(DOCUMENTS, window=window).live(LENGTH).sum())
    assert mixer.flops(DOCUMENTS) == 2 * TOKENS * products + 2 * (2 * heads * size) * live
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        x = torch.randn(1, TOKENS, 32)
        mixer.out(mixer.q(x)), mixer.k(x), mixer.v(x)
    assert counted.get_total_flops() == 2 * TOKENS * products


def test_one_dense_document_against_textbook_attention(make_model) -> None:
    """torch counts the full square of scores; the causal half with its diagonal is what is live."""
    model = make_model("*")
    q, k, v = (torch.randn(4, LENGTH, 8) for _ in range(3))
    with FlopCounterMode(display=False) as counted:
        torch.bmm(torch.bmm(q, k.transpose(1, 2)), v)
    square = counted.get_total_flops()
    mixer = model.layers[0].mixer
    products = sum(p.numel() for p in mixer.parameters())
    scores = mixer.flops(((0, LENGTH),)) - 2 * LENGTH * products
    assert scores * 2 * LENGTH == square * (LENGTH + 1)


def test_a_model_is_the_sum_of_its_layers(make_model) -> None:
    model = make_model("(*-)W-", tie_embeddings=True)
    layers = sum(layer.mixer.flops(DOCUMENTS) for layer in model.layers)
    assert model.flops(DOCUMENTS) == layers + 2 * TOKENS * 61 * 32
