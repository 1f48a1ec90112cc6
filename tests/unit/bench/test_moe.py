"""`lctrain bench moe`: runs, compares, stores; bad requests end in one line."""

from __future__ import annotations

import json

import pytest

from lctrain import cli
from lctrain.bench.moe_contenders import Contender
from lctrain.config.bench_moe import MoeBenchConfig


def test_table_and_file(capfd, tmp_path) -> None:
    where = tmp_path / "moe.json"
    small = ["seq=48", "experts=3", "d_model=16", "d_ff=8", "repeats=1", "threads=1", "part=layer"]
    assert cli.main(["bench", "moe", *small, f"output={where}"]) == 0
    out = capfd.readouterr().out
    for word in ("lctrain", "loop", "dense", "ours and the loop differ by at most"):
        assert word in out
    (result,) = json.loads(where.read_text())["results"]
    assert result["errors"].keys() >= {"y", "x"}
    assert max(result["errors"].values()) < 1e-5


@pytest.mark.parametrize("part", ["experts", "layer"])
def test_contenders_compute_the_same(part: str) -> None:
    config = MoeBenchConfig(part=part, d_model=16, d_ff=8, top_k=3)
    ours, loop = (Contender(config, 40, 5, name).results() for name in ("lctrain", "loop"))
    assert ours.keys() == loop.keys()
    assert all(abs(ours[name] - loop[name]).max() < 1e-5 * abs(loop[name]).max() for name in loop)
    if part == "experts":
        split = Contender(config, 40, 5, "split").results()
        assert all(abs(split[name] - loop[name]).max() < 1e-5 * abs(loop[name]).max() for name in loop)
    dense = Contender(config, 40, 5, "dense")
    assert dense.forward(dense.x).shape == ours["y"].shape


def test_more_choices_than_experts(capfd) -> None:
    assert cli.main(["bench", "moe", "experts=4,8", "top_k=5"]) == 2
    assert "top_k=5 exceeds experts=4" in capfd.readouterr().err
