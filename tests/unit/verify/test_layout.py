"""`lctrain verify layout`: it proves what is right, and names what is wrong."""

import json

import pytest
import torch

from lctrain.commands.verify import main
from lctrain.config.arguments import HelpRequested
from lctrain.config.load import load
from lctrain.config.schema import TrainConfig
from lctrain.config.verify import LayoutVerifyConfig, LayoutVerifyRoot
from lctrain.engines.base import StepResult
from lctrain.errors import UserError
from lctrain.models.place import Family, Place
from lctrain.verify.layout.judge import judge
from lctrain.verify.layout.rank import Findings
from lctrain.verify.layout.samples import MadeSamples
from lctrain.verify.layout.shrink import reference_of, shrink
from lctrain.verify.layout.standard import MATRIX, load_layout

OPTIONS = LayoutVerifyConfig()


def config(*overrides: str) -> TrainConfig:
    return load(TrainConfig, "train", ["model=llama3_8b", "run_dir=unused", *overrides])


def test_pattern_heads_and_flags_survive_shrinking() -> None:
    asked = config("launcher.processes=4", "parallel.cp=4", "parallel.attention=ulysses", "model.tie_embeddings=true")
    small, notes = shrink(asked, OPTIONS)
    assert small.model.pattern == "*-*-"
    assert (small.model.attention.n_heads, small.model.attention.n_kv_heads) == (32, 8)
    assert small.model.attention.rope == asked.model.attention.rope
    assert small.model.tie_embeddings
    assert small.parallel == asked.parallel.model_copy(update={"dp": 1})
    assert notes == []


@pytest.mark.parametrize(
    ("asked", "grid"),
    [
        (["launcher.processes=512", "parallel.cp=8", "trainer.global_batch=64"], (1, 8)),
        (["launcher.processes=64", "parallel.cp=16", "parallel.attention=usp", "parallel.ulysses=8"], (2, 4)),
        (["launcher.processes=24", "parallel.cp=12", "parallel.attention=double_ring", "parallel.node_size=4"], (2, 3)),
    ],
)
def test_large_grids_shrink_and_say_so(asked: list[str], grid: tuple[int, int]) -> None:
    small, notes = shrink(config(*asked), OPTIONS)
    assert small.launcher.processes <= 8
    assert notes
    assert small.launcher.processes % small.parallel.cp == 0


def test_the_reference_is_one_process_with_the_same_training() -> None:
    small, _ = shrink(config("launcher.processes=4", "parallel.cp=2", "engine.data_parallel=fsdp"), OPTIONS)
    one = reference_of(small)
    assert one.launcher.processes == one.parallel.cp == 1
    assert one.trainer == small.trainer
    assert one.model == small.model


def test_made_samples_are_packed_and_pure() -> None:
    samples, same, other = MadeSamples(0, 50, 97), MadeSamples(0, 50, 97), MadeSamples(0, 50, 97, changed=(1, 1))
    assert {len(samples.borders(i)) - 1 for i in range(8)} >= {1, 2, 3}
    for index in range(8):
        mine = samples.sample(index)
        assert (mine.tokens == same.sample(index).tokens).all()
        assert mine.borders[0] == 0
        assert mine.borders[-1] <= 50
        moved = mine.tokens != other.sample(index).tokens
        start, end = mine.borders[1:3] if index == 1 else (0, 0)
        assert moved.any() == (index == 1)
        assert not moved[:start].any()
        assert not moved[end:].any()


def findings(**change: object) -> Findings:
    steps = [StepResult(2.0, 1.0, None), StepResult(1.9, 1.0, None)]
    losses = {1: torch.ones(50)}
    moved = losses[1].clone()
    start, end = MadeSamples(0, 50, 97).borders(1)[1:3]
    moved[start:end] += 1
    content = {
        "steps": steps,
        "gradients": {"w": torch.ones(3), "n": torch.ones(2)},
        "losses": losses,
        "changed": {1: moved},
        "repeated": steps[-1],
        "checkpoint": None,
    }
    return Findings(**{**content, **change})


def verdicts(found: Findings, weights: torch.Tensor | None = None) -> dict[str, bool]:
    loaded = {"weight w": torch.ones(3) if weights is None else weights, "exp_avg w": torch.ones(3)}
    places = {"w": Place(), "n": Place(Family.NORM)}
    last = StepResult(1.9, 1.0, None)
    checks = judge(found, findings(), (loaded, last), (verdict_of(), last), places, (1, 1), MadeSamples(0, 50, 97))
    return {check.name: check.passed for check in checks}


def verdict_of() -> dict[str, torch.Tensor]:
    return {"weight w": torch.ones(3), "exp_avg w": torch.ones(3)}


def test_equal_findings_pass() -> None:
    assert all(verdicts(findings()).values())


@pytest.mark.parametrize(
    ("change", "caught"),
    [
        ({"steps": [StepResult(2.00001, 1.0, None), StepResult(1.9, 1.0, None)]}, "loss"),
        ({"steps": [StepResult(2.0, 1.00001, None), StepResult(1.9, 1.0, None)]}, "grad norm"),
        ({"steps": [StepResult(float("nan"), 1.0, None), StepResult(1.9, 1.0, None)]}, "loss"),
        ({"gradients": {"w": torch.ones(3) * 1.0001, "n": torch.ones(2)}}, "gradients (dense)"),
        ({"gradients": {"w": torch.ones(3), "n": torch.ones(2) * 2}}, "gradients (norm)"),
        ({"gradients": {"w": torch.ones(3)}}, "gradients"),
        ({"losses": {1: torch.ones(50) + 1e-4}}, "token losses"),
        ({"changed": {1: torch.ones(50) * 2}}, "leak probe"),
        ({"changed": {1: torch.ones(50)}}, "leak probe"),
        ({"repeated": StepResult(1.8999999, 1.0, None)}, "resumed here"),
    ],
)
def test_every_difference_fails_its_check(change: dict, caught: str) -> None:
    found = verdicts(findings(**change))
    assert not found[caught]


def test_a_difference_in_weights_fails() -> None:
    assert not verdicts(findings(), torch.ones(3) * 1.001)["weights after steps"]


def test_every_layout_of_the_matrix_loads() -> None:
    for overrides in MATRIX.values():
        small, _ = shrink(load_layout(overrides), OPTIONS)
        assert small.launcher.processes <= 8


def test_a_layout_is_proved_and_stored(tmp_path, capsys) -> None:
    arguments = ["model=tiny", "parallel.cp=2", "launcher.processes=2", "parallel.attention=token_ring", f"run_dir={tmp_path}"]
    assert main(["layout", *arguments, "verify.length=61"]) == 0
    assert "proved in" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "verify_layout.json").read_text())["results"]
    assert result["passed"]
    assert {check["name"] for check in result["checks"]} >= {"loss", "grad norm", "gradients (dense)", "leak probe"}


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="model=tiny has no place"):
        main(["layout", "--all", "model=tiny"])
    with pytest.raises(UserError, match=r"verify.only=nonsense.*dense torch cp2 ring"):
        main(["layout", "--all", "verify.only=nonsense"])
    with pytest.raises(UserError, match=r"is not a multiple of parallel.cp=3"):
        main(["layout", "parallel.cp=3", "launcher.processes=4"])
    with pytest.raises(UserError, match=r"^verify.processes=0: must be a whole number at least 1"):
        main(["layout", "parallel.cp=2", "verify.processes=0"])
    with pytest.raises(UserError, match=r"^unknown setting verify.procesess .*did you mean verify.processes\?"):
        main(["layout", "parallel.cp=2", "verify.procesess=2"])


def test_a_report_that_could_not_be_written_is_refused_before_the_proof(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^verify.output=.*/no/such.json: not a file in an existing folder"):
        main(["layout", "parallel.cp=2", f"run_dir={tmp_path}", f"verify.output={tmp_path}/no/such.json"])
    with pytest.raises(UserError, match=r"^verify.output=.*/no/such.json: not a file in an existing folder"):
        main(["layout", "--all", f"verify.output={tmp_path}/no/such.json"])
    with pytest.raises(UserError, match=r"^run_dir=.*/file/run cannot be used: Not a directory; choose another run_dir"):
        main(["layout", "parallel.cp=2", f"run_dir={tmp_path}/file/run"])


def test_help_shows_the_settings_of_the_proof() -> None:
    with pytest.raises(HelpRequested) as request:
        main(["layout", "model=tiny", "--help"])
    assert request.value.schema is LayoutVerifyRoot
