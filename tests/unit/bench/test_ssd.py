"""`lctrain bench ssd`: contenders compute the same function, rows say what was measured, and settings are checked."""

from __future__ import annotations

import json

import pytest

from lctrain.bench import passes, ssd
from lctrain.bench.ssd_contenders import Contender
from lctrain.commands.bench import main
from lctrain.config.bench_ssd import SsdBenchConfig
from lctrain.errors import UserError

SMALL = {"seq": (70,), "heads": 2, "head_dim": 8, "state": 8, "d_model": 16, "repeats": 1, "threads": 1}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ("lctrain", "recurrence", "transformers")),
        ({"batch": 2, "groups": 2, "chunk": 32}, ("lctrain", "recurrence", "transformers")),
        ({"documents": (20, 50)}, ("lctrain", "recurrence")),
        ({"part": "layer"}, ("lctrain", "transformers")),
        ({"part": "layer", "dtype": "bf16"}, ("lctrain", "transformers")),
    ],
)
def test_contenders_compute_the_same_function(settings, names):
    config = SsdBenchConfig(**{**SMALL, **settings})
    results = [Contender(config, 70, name).results() for name in names]
    for other in results[1:]:
        assert max(passes.differences(results[0], other).values()) < passes.SAME[config.dtype] / 3


def test_report_of_contenders_that_differ(tmp_path, capsys, monkeypatch):
    """All that is printed and stored, and status 1, with a bar that nothing can meet."""
    monkeypatch.setitem(passes.SAME, "fp32", 0.0)
    output = tmp_path / "ssd.json"
    arguments = ["seq=64", "heads=2", "head_dim=8", "state=8", "recurrence=0", "repeats=1", "threads=1"]
    assert main(["ssd", *arguments, f"output={output}"]) == 1
    printed = capsys.readouterr()
    assert "transformers" in printed.out
    assert "do not compute the same function" in printed.err
    results = json.loads(output.read_text())["results"]
    assert [result["seq"] for result in results] == [64]
    assert all(found["forward_s"] > 0 for result in results for found in result["contenders"].values())
    assert set(results[0]["errors"]) == {"y", "dx", "ddt", "dA", "dB", "dC", "dD"}
    assert max(results[0]["errors"].values()) < 1e-5


def test_packed_documents_are_measured_without_transformers():
    assert "no packed documents" in str(ssd._why_no_transformers(SsdBenchConfig(documents=(3,))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["heads=3", "groups=2"], "heads=3 is not a multiple of groups=2"),
        (["part=layer", "heads=3"], "is not a multiple of d_model=256"),
        (["part=both"], "scan, layer"),
    ],
)
def test_settings_that_do_not_fit(arguments, message):
    with pytest.raises(UserError, match=message):
        main(["ssd", *arguments])
