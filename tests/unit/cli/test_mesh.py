"""`lctrain mesh`: the grid of processes as a person sees it."""

import pytest

from lctrain.commands.mesh import main
from lctrain.errors import UserError


def test_every_dimension_has_its_groups(capsys) -> None:
    overrides = ["model=hybrid_tiny", "engine.name=megatron", "launcher.processes=8"]
    assert main([*overrides, "parallel.tp=2", "parallel.pp=2", "parallel.cp=2", "parallel.ep=2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("8 processes = pp 2 x dp 1 x cp 2 x tp 2; experts edp 2 x ep 2\n")
    lines = {line.split()[0]: line for line in out.splitlines()[4:] if line.strip()}
    assert lines["tp"].endswith("0 1 | 2 3 | 4 5 | 6 7")
    assert lines["cp"].endswith("0 2 | 1 3 | 4 6 | 5 7")
    assert lines["pp"].endswith("0 4 | 1 5 | 2 6 | 3 7")
    assert lines["edp"].endswith("0 2 | 1 3 | 4 6 | 5 7")
    assert "dp" not in lines, "of size 1"


def test_one_process_has_no_groups(capsys) -> None:
    assert main(["model=tiny"]) == 0
    assert capsys.readouterr().out == "1 process = dp 1 x cp 1\n  dp 0: ranks 0\n"


def test_a_grid_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"launcher.processes=4 is not a multiple of parallel.cp=3"):
        main(["launcher.processes=4", "parallel.cp=3"])
