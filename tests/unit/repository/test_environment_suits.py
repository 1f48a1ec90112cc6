"""`make` uses an active environment only if everything is there and new enough."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "tools" / "environment_suits.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("environment_suits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("torch", "suits"), [("2.11", True), ("2.11.0+cu130", True), ("2.9.1", False), ("3.0", True), (None, False)]
)
def test_torch_version_decides(script, monkeypatch, capsys, torch, suits):
    def version(name):
        if name != "torch":
            return "99"
        if torch is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return torch

    monkeypatch.setattr(importlib.metadata, "version", version)
    script.main()
    assert capsys.readouterr().out.strip() == (sys.executable if suits else "")
