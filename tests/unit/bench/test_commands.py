"""`lctrain bench`: both benchmarks run, print their tables and store them; bad requests end in one line."""

from __future__ import annotations

import json

import pytest

from lctrain import cli

SMALL_MODEL = ["model=tiny", "model.d_model=16", "model.attention.n_heads=2", "model.mlp.d_ff=16", "model.pattern=(*-){1}"]


def run(capfd, *args):
    status = cli.main(["bench", *args])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def test_alone_it_lists_the_benchmarks(capfd):
    status, out, _ = run(capfd)
    assert status == 0
    assert "step" in out
    assert "attention" in out


class TestStep:
    def test_side_by_side(self, capfd, tmp_path):
        where = tmp_path / "step.json"
        status, out, err = run(capfd, "step", *SMALL_MODEL, "seq=17", "steps=2", "threads=1", f"output={where}")
        assert (status, err) == (0, "")
        assert out.count("transformers  ") == 1
        for word in ("tokens/s", "peak MiB", "MFU", "first loss"):
            assert word in out
        (result,) = json.loads(where.read_text())["results"]
        assert result["loss_difference"][0] < 1e-6
        for found in result["contenders"].values():
            assert found["peak_mib"] >= found["after_import_mib"] > 50
            assert found["tokens_per_s"] == pytest.approx(17 / found["step_s"])

    def test_without_a_twin(self, capfd):
        status, out, err = run(capfd, "step", *SMALL_MODEL, "model.mlp.activation=gelu", "seq=9,10", "steps=1", "threads=1")
        assert status == 0
        assert "transformers" not in out
        assert "no Llama of this shape" in err


class TestAttention:
    def test_table_and_file(self, capfd, tmp_path):
        where = tmp_path / "attention.json"
        status, out, err = run(
            capfd, "attention", "cp=1,2", "seq=64", "heads=2", "head_dim=8", "kv_heads=1", "repeats=1", f"output={where}"
        )
        assert (status, err) == (0, "")
        for word in ("SDPA", "all_gather", "published", "imbalance", "CPU bwd"):
            assert word in out
        found = {(row["strategy"], row["cp"]): row for row in json.loads(where.read_text())["results"]}
        for row in found.values():
            assert max(row["error"].values()) < 2e-6
        for strategy in ("ring", "all_gather"):
            row = found[strategy, 2]
            assert row["sent"] == row["scheduled"]
            assert row["imbalance"] == 1.0
        kv = 32 * 8 * 2 * 4  # bytes of half of the keys and values
        assert found["ring", 2]["published"]["forward"] == kv
        assert sum(sum(rank.values()) for rank in found["ring", 2]["sent"]["forward"]) == 0.75 * 2 * kv

    def test_a_contiguous_layout_is_uneven(self, capfd, tmp_path):
        where = tmp_path / "attention.json"
        sizes = ["cp=2", "seq=64", "heads=2", "head_dim=8", "repeats=1", "strategies=ring", "documents=10,54", "window=30"]
        assert run(capfd, "attention", *sizes, "layout=contiguous", "dtype=bf16", f"output={where}")[0] == 0
        _, row = json.loads(where.read_text())["results"]
        assert row["imbalance"] > 1.05
        assert max(row["error"].values()) < 3e-2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["stp"], "did you mean lctrain bench step?"),
        (["attention", "strategies=rong"], "did you mean ring?"),
        (["attention", "heads=8", "kv_heads=3"], "heads=8 is not a multiple of kv_heads=3"),
        (["attention", "cp=0"], "must be a whole number above 0"),
        (["attention", "seq=100", "documents=50,51"], "add up to 101, not to seq=100"),
        (["attention", "seq=4", "documents=5"], "documents=5 do not fit in seq=4"),
        (["step", "output=/no/such/folder/x.json"], "output=/no/such/folder/x.json"),
        (["step", "stepz=3"], "did you mean steps?"),
    ],
)
def test_bad_requests_end_in_one_line(capfd, args, message):
    status, _, err = run(capfd, *args)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
