"""`M` and `L` on one process: every block case, first values, places, cost, decoding, settings that do not fit."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lctrain.config.mamba import LinearAttentionConfig, MambaConfig, check_layout
from lctrain.config.model import ModelConfig
from lctrain.models.init import initialise
from lctrain.models.linear_attention import LinearAttention
from lctrain.models.model import LanguageModel
from lctrain.models.place import Family, parameter_places
from lctrain.verify.blocks import linear_attention, mamba
from lctrain.verify.blocks.compare import packed
from lctrain.verify.blocks.huggingface import Skipped

MAMBA = {"head_dim": 4, "d_state": 6, "n_groups": 2, "chunk": 16}


def build(pattern: str, dtype: torch.dtype = torch.float32, linear: dict | None = None, **settings: object) -> LanguageModel:
    config = ModelConfig(
        pattern=pattern,
        d_model=32,
        vocab_size=61,
        mamba=MambaConfig(**{**MAMBA, **settings}),
        linear_attention=LinearAttentionConfig(**{"chunk": 16, **(linear or {})}),
    )
    model = LanguageModel(config, dtype)
    initialise(model, 0)
    return model


@pytest.mark.parametrize(("name", "check"), [*mamba.cases(), *linear_attention.cases()])
def test_block(name: str, check) -> None:
    try:
        errors = check()
    except Skipped as reason:
        pytest.skip(str(reason))
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < 1e-5, f"{name}: {worst} is off by {errors[worst]:.1e}"


def test_first_values() -> None:
    model = build("M", head_dim=1)
    values = {name.removeprefix("layers.0.mixer."): p.detach() for name, p in model.named_parameters()}
    rates = values["A_log"].exp()
    assert 1 <= float(rates.min()) < 3
    assert 14 < float(rates.max()) <= 16
    steps = torch.nn.functional.softplus(values["dt_bias"])
    assert 0.99e-3 <= float(steps.min()) < 2e-3
    assert 0.05 < float(steps.max()) <= 0.101
    assert math.isclose(float(steps.log().mean()), math.log(1e-2), abs_tol=0.5)
    assert (values["D"] == 1).all()
    assert (values["norm"] == 1).all()
    assert not values["conv_x.bias"].any()
    assert 0.45 < float(values["conv_x.weight"].abs().max()) <= 0.5
    assert float(values["out.weight"].std()) == pytest.approx(0.02, rel=0.1)


def test_constants_of_the_recurrence_are_fp32_states_without_decay() -> None:
    model = build("ML", torch.bfloat16)
    places = parameter_places(model)
    for name in ("A_log", "D", "dt_bias"):
        place = places[f"layers.0.mixer.{name}"]
        assert place.family is Family.STATE
        assert not place.decays(model.get_parameter(f"layers.0.mixer.{name}"))
    assert places["layers.0.mixer.norm"].family is places["layers.1.mixer.norm"].family is Family.NORM
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("pattern", ["M", "L"])
@pytest.mark.parametrize("length", [50, 5])
def test_cost_is_what_torch_counts(pattern: str, length: int) -> None:
    """Chunks of 16 and a shorter one."""
    mixer = build(pattern).layers[0].mixer
    seq = packed(((0, length), (0, 3, length)), length)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        mixer(torch.randn(2, length, 32), seq)
    # Running sums of steps, in both passes over the panels of both rows: small, and not counted.
    width = mixer.heads if pattern == "M" else 1
    sums = sum(2 * 2 * chunks * 2 * q * q * width for q, chunks in ((16, length // 16), (length % 16, 1)))
    assert mixer.flops(((0, length), (0, 3, length))) == counted.get_total_flops() - sums


@pytest.mark.parametrize("pattern", ["M", "L", "ML*-"])
def test_decoding_after_a_prompt_equals_the_whole(pattern: str) -> None:
    model = build(pattern, linear={"norm": "whole", "slower_with_depth": True})
    tokens = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model.hidden(tokens, packed(((0, 40),) * 2, 40)) @ model.output_weight.T
    state, at = model.new_state(), 0
    for size in (19, 1, 2, *(1,) * 18):
        at += size
        torch.testing.assert_close(model.decode(tokens[:, at - size : at], state), whole[:, at - 1], atol=1e-5, rtol=1e-4)
    assert at == 40


def test_state_of_decoding_does_not_grow() -> None:
    model = build("M", torch.bfloat16)
    state = model.new_state()
    sizes = []
    for _ in range(5):
        model.decode(torch.zeros(1, 3, dtype=torch.int64), state)
        sizes.append((state[0].scan.shape, [tail.shape for tail in state[0].tails]))
    assert state[0].scan.dtype == torch.float32
    assert all(size == sizes[0] for size in sizes)


def test_bf16_stays_near_fp32() -> None:
    tokens = torch.randint(0, 61, (1, 64), generator=torch.Generator().manual_seed(0))
    exact, half = (build("ML-", dtype).hidden(tokens, packed(((0, 64),), 64)) for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() < 2e-2 * exact.norm()


def test_no_bit_leaks_between_documents() -> None:
    """What one document holds changes nothing in another, not even rounding."""
    model, documents = build("ML"), ((0, 13, 37, 60),)
    tokens = torch.randint(0, 61, (1, 60), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[0, 13:37] = (other[0, 13:37] + 7) % 61
    with torch.no_grad():
        one, two = (model.hidden(t, packed(documents, 60)) for t in (tokens, other))
    assert torch.equal(one[:, :13], two[:, :13])
    assert torch.equal(one[:, 37:], two[:, 37:])
    assert not torch.equal(one[:, 13:37], two[:, 13:37])


def test_rates_slow_down_over_the_layers_that_mix_tokens() -> None:
    model = build("L-M-L-*L", linear={"slower_with_depth": True})
    mixers = [layer.mixer for layer in model.layers if isinstance(layer.mixer, LinearAttention)]
    assert [mixer.depth for mixer in mixers] == [(0, 5), (2, 5), (4, 5)]
    first, middle, last = (mixer.rates(torch.device("cpu")) for mixer in mixers)
    torch.testing.assert_close(
        first / -torch.tensor([2.0**-2, 2**-4, 2**-6, 2**-8]).double(), torch.full((4,), 1.00001).double()
    )
    assert (middle / first).allclose(torch.tensor(0.5).double(), atol=1e-4)
    assert (last.abs() < 1e-4).all()


@pytest.mark.parametrize(
    ("symbol", "settings", "message"),
    [
        ("M", {"n_groups": 3}, "model.mamba.n_groups=3 does not divide the 16 heads"),
        ("M", {"head_dim": 5}, r"model.mamba.d_inner=64 \(2 x model.d_model\) is not a multiple of model.mamba.head_dim=5"),
        ("M", {"d_inner": 30}, "model.mamba.d_inner=30 is not a multiple of model.mamba.head_dim=4"),
        ("M", {"conv_kernel": 1}, "model.mamba.conv_kernel=1 sees no earlier token"),
        ("M", {"dt_min": 0.2}, "model.mamba.dt_min=0.2 must not exceed model.mamba.dt_max=0.1"),
        ("M", {"dt_limit_min": 0.2, "dt_limit_max": 0.1}, r"dt_limit_min=0.2 must not exceed model.mamba.dt_limit_max"),
        ("L", {"n_heads": 3}, "multiple of model.linear_attention.n_heads=3; set model.linear_attention.head_dim"),
    ],
)
def test_settings_that_do_not_fit(symbol: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(symbol, linear=settings) if symbol == "L" else build(symbol, **settings)


def test_runs_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"striped .* M layers need: choose zigzag, contiguous or balanced"):
        check_layout({"M", "-"}, "striped", 2)
    check_layout({"*"}, "striped", 2)
    check_layout({"M"}, "striped", 1)
    with pytest.raises(ValueError, match=r"set model.linear_attention.norm=head, or parallel.tp=1 instead of 2"):
        LinearAttentionConfig(norm="whole").check_run(2)
