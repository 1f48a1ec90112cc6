"""`lctrain verify layout --all`, ten of its layouts; and a proof that fails when it should."""

import importlib.util
from pathlib import Path

import pytest

from lctrain.commands.verify import main
from lctrain.config.verify import LayoutVerifyConfig
from lctrain.verify.layout.prove import Prover
from lctrain.verify.layout.standard import QUICK

FAULTS = Path(__file__).parents[2] / "tools" / "plant_faults.py"


@pytest.mark.parametrize("name", QUICK)
def test_layout_equals_one_process(name: str, capsys) -> None:
    status = main(["layout", "--all", "verify.quick=true", f"verify.only={name}"])
    assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "caught"),
    [("document mask dropped", "leak probe"), ("expert gradient doubled", "gradients (expert)")],
)
def test_a_planted_fault_is_caught(fault: str, caught: str) -> None:
    spec = importlib.util.spec_from_file_location("plant_faults", FAULTS)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    with Prover(LayoutVerifyConfig(length=61, steps=2)) as prover:
        sound, faulty = tool.try_fault(prover, tool.FAULTS[fault], fault)
    assert sound.passed, [check for check in sound.checks if not check.passed]
    assert caught in {check.name for check in faulty.checks if not check.passed}
