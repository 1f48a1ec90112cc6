"""`lctrain verify attention` end to end: passes what is right, finds what is broken, and says how to repeat it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from lctrain.cli import main
from lctrain.launch.ranks import close_pools
from lctrain.parallel import executor, group


@pytest.fixture(autouse=True)
def _fresh_ranks() -> Iterator[None]:
    """Ranks are forked with what is patched at that moment."""
    close_pools()
    yield
    close_pools()


def verify(*settings: str) -> int:
    return main(["verify", "attention", *settings])


def test_quick_matrix_passes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert verify("quick=true", f"output={tmp_path}/report.json") == 0
    printed = capsys.readouterr().out
    assert "every case passed; bytes sent were those planned in each of them" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["failures"] == []
    assert {row["cp"] for row in report["results"]} == {1, 2, 3, 4}
    assert all(row["failed"] == 0 and row["cases"] > 0 for row in report["results"])
    assert max(error for row in report["results"] for error in row["fp32"].values() if error is not None) <= 2e-6


FEW = ("cp=2", "masks=causal", "heads=gqa", "lengths=7", "dtypes=fp32", "batch=1", "layouts=zigzag")


def test_wrong_gradients_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    with patch.object(executor._Backward, "fold", lambda self, item, arrived: None):
        assert verify(*FEW, "strategies=ring,token_ring,all_gather") == 1
    printed = capsys.readouterr().out
    assert "dk is off by" in printed
    assert "dq is off by" in printed
    alone = "strategies=token_ring cp=2 layouts=zigzag masks=causal heads=gqa lengths=7 dtypes=fp32 batch=1 seed=0"
    assert f"lctrain verify attention {alone}" in printed


def test_wrong_byte_counts_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    honest = group.RankGroup.exchange

    def twice(self, sends, receives):
        for kind, tensor, _ in sends:
            self.sent[kind] += tensor.nbytes
        return honest(self, sends, receives)

    with patch.object(group.RankGroup, "exchange", twice):
        assert verify(*FEW, "strategies=ring") == 1
    assert "rank 0 sent {'kv': " in capsys.readouterr().out


def test_not_a_number_is_found_and_fits_the_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with patch.object(executor, "merge_", lambda out, lse, new_out, new_lse: out.fill_(torch.nan)):
        assert verify(*FEW, "strategies=ring", f"output={tmp_path}/report.json") == 1
    assert "NaN in out" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "report.json").read_text())["results"]
    assert row["fp32"]["out"] == "nan"


def test_padding_that_is_not_0_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    """Eight places for seven tokens: rank 0 has the eighth."""
    honest = executor._Forward.run

    def run(self):
        out, lse = honest(self)
        out[:, -1] += self.plan.rank == 0
        return out, lse

    with patch.object(executor._Forward, "run", run):
        assert verify(*FEW, "strategies=ring") == 1
    assert "out of padding is not 0" in capsys.readouterr().out


def test_a_rank_that_raises_fails_its_case_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def raises(*args):
        raise RuntimeError("out of luck")

    with patch.object(executor._Backward, "pack", raises):
        assert verify(*FEW, "strategies=ring,ulysses") == 1
    printed = capsys.readouterr().out
    assert "RuntimeError: out of luck" in printed
    assert "strategies=ulysses" not in printed, "a strategy that never packs is not to blame"


def test_mistakes_of_the_user(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert verify("strategies=rnig") == 2
    assert verify("strategies=usp-3-ring-inner", "cp=4") == 2
    assert verify(f"output={tmp_path}/nowhere/report.json") == 2
    assert verify("masks=casual") == 2
    assert main(["verify", "atention"]) == 2
    errors = capsys.readouterr().err
    assert "strategies=rnig: there are ring" in errors
    assert "strategies=usp-3-ring-inner cp=4: no case fits both" in errors
    assert "not a file in an existing folder" in errors
    assert "masks" in errors
    assert "did you mean lctrain verify attention?" in errors
