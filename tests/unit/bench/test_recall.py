"""The recall test asks what it says, of models of one size."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from lctrain.models.size import model_size
from lctrain.parallel.layout import IGNORE

TOOL = Path(__file__).parents[3] / "tools" / "recall.py"


@pytest.fixture(scope="module")
def recall():
    spec = importlib.util.spec_from_file_location("recall_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_query_has_the_value_that_followed_its_key(recall) -> None:
    pairs = 7
    tokens, labels = recall.draw(pairs, 5, torch.Generator().manual_seed(0))
    assert tokens.shape == labels.shape == (5, 3 * pairs)
    assert (labels[:, : 2 * pairs] == IGNORE).all()
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        listed = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(listed) == pairs
        assert wanted[2 * pairs :] == [listed[key] for key in row[2 * pairs :]]
        assert row[2 * pairs :] != row[0 : 2 * pairs : 2]
        assert max(listed) < recall.KEYS <= min(listed.values())


def test_contenders_have_one_size(recall) -> None:
    hybrid, pure = (model_size(contender.config).total for contender in recall.contenders())
    assert hybrid <= pure <= 1.01 * hybrid
    assert [contender.config.pattern.count("*") for contender in recall.contenders()] == [1, 0]


def test_a_run_writes_its_page_and_fails_where_the_effect_does_not_show(recall, tmp_path: Path, capsys) -> None:
    assert recall.main(["--pairs", "4", "--steps", "2", "--out", str(tmp_path / "recall.md")]) == 1
    assert "NOT SHOWN" in capsys.readouterr().out
    assert "python tools/recall.py --pairs 4 --steps 2 --seed 0" in (tmp_path / "recall.md").read_text()
