"""`lctrain bench simulate`: the order of strategies, the machine as a topology, and a tiny run."""

from __future__ import annotations

import json

from lctrain.bench.calibrate import Network, topology
from lctrain.bench.simulate import bench_simulate, order_of
from lctrain.config.load import load
from lctrain.config.simulate import SimulateBenchConfig


def row(seq, measured, simulated):
    return {"seq": seq, "cp": 2, "passes_s": [9.0, measured, measured], "simulated_alike_s": simulated}


def test_order_counts_only_distinct_pairs_of_the_same_size():
    rows = [row(1, 1.0, 1.0), row(1, 1.1, 0.9), row(1, 2.0, 1.5), row(1, 3.0, 1.2), row(2, 9.0, 0.1)]
    # 1.0 and 1.1 are alike; of the five other pairs, 2.0 against 3.0 is simulated the wrong way round.
    assert order_of(rows) == (4, 5)
    assert order_of([]) == (0, 0)


def test_loopback_that_halves_both_ways_is_half_duplex():
    slow, fine = (topology(Network(2e9, both, 1e-4, 1e-10), 1.5) for both in (1.0e9, 1.9e9))
    assert (slow.inside.duplex, fine.inside.duplex) == ("half", "full")
    assert (slow.cores, slow.cpu_s_per_byte, slow.node(63)) == (1.5, 1e-10, 0)


def test_tiny_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lctrain.bench.calibrate.SIZES", (16, 32))
    monkeypatch.setattr("lctrain.bench.calibrate.MESSAGE", 1 << 16)
    path = tmp_path / "out.json"
    config = load(
        SimulateBenchConfig,
        "bench_simulate",
        ["seq=64", "cp=2", "heads=2", "head_dim=8", "repeats=1", "strategies=ring,ulysses", f"output={path}"],
    )
    assert bench_simulate(config) == 0
    results = json.loads(path.read_text())["results"]
    assert [found["strategy"] for found in results] == ["ring", "ulysses"]
    assert all(found["simulated_s"] > 0 and found["measured_s"] > 0 for found in results)
    shown = capsys.readouterr().out
    assert "median error" in shown
    assert "core-seconds per GB" in shown
