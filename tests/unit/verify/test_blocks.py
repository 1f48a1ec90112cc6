"""`lctrain verify blocks`: it passes, and it fails when a block is wrong."""

from __future__ import annotations

import json
from unittest.mock import patch

import pytest

from lctrain.commands.verify import main
from lctrain.errors import UserError
from lctrain.models.attention import Attention
from lctrain.verify import blocks
from lctrain.verify.blocks.huggingface import Skipped


def test_quick_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blocks", "quick=true"]) == 0
    assert "every case that ran passed" in capsys.readouterr().out


def test_every_case_has_a_name_of_its_own() -> None:
    for cases in blocks.blocks().values():
        names = [name for name, _ in cases]
        assert len(set(names)) == len(names) > 0


def test_a_wrong_block_fails_and_is_named_with_its_command(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    honest = Attention.forward
    report = tmp_path / "report.json"
    with patch.object(Attention, "forward", lambda self, x, seq: honest(self, x, seq) * 1.0001):
        assert main(["blocks", "blocks=attention,mlp", "cases=1", f"output={report}"]) == 1
    out = capsys.readouterr().out
    assert "lctrain verify blocks blocks=attention cases=1" in out
    assert "blocks=mlp cases=1" not in out
    results = json.loads(report.read_text())["results"]
    assert [entry["failed"] for entry in results] == [True, False]
    assert results[0]["errors"]["y"] == pytest.approx(1e-4, rel=0.1)


def test_a_leak_between_documents_fails(capsys: pytest.CaptureFixture[str]) -> None:
    honest = Attention.forward

    def leak(self, x, seq):
        return honest(self, x, seq) + 1e-3 * x.cumsum(1)

    packing = next(n for n, (name, _) in enumerate(blocks.blocks()["attention"], 1) if name == "* packing")
    with patch.object(Attention, "forward", leak):
        assert main(["blocks", "blocks=attention", f"cases={packing}"]) == 1
    capsys.readouterr()


def test_what_raises_fails_and_what_cannot_run_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> dict[str, float]:
        raise ZeroDivisionError("oops")

    def skipped() -> dict[str, float]:
        raise Skipped("no such library")

    with patch.object(blocks, "blocks", lambda: {"one": [("a", broken), ("b", skipped), ("c", lambda: {"y": float("nan")})]}):
        assert main(["blocks"]) == 1
    out = capsys.readouterr().out
    assert "a: ZeroDivisionError: oops" in out
    assert "skipped 1: no such library" in out
    assert "c: y is off by nan" in out


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="blocks=atention"):
        main(["blocks", "blocks=atention"])
    with pytest.raises(UserError, match="no such case"):
        main(["blocks", "blocks=mlp", "cases=999"])
