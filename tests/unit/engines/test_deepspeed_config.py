"""DeepSpeed's own config is held against ours before any process starts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lctrain.config.decode import decode
from lctrain.config.deepspeed import CHECKED, PASSED, REFUSED
from lctrain.config.schema import TrainConfig
from lctrain.engines.deepspeed.settings import check_by_deepspeed, deepspeed_config
from lctrain.errors import UserError


def train_config(given: Any = None, engine: dict[str, Any] | None = None, **sections: Any) -> TrainConfig:
    tree = {
        "run_dir": "unused",
        "model": {"pattern": "*-*-", "d_model": 16, "vocab_size": 32},
        "data": {"corpora": [{"prefix": "unused"}]},
        "engine": {"name": "deepspeed", "deepspeed_config": given, **(engine or {})},
        "trainer": {"global_batch": 8, "micro_batch": 2},
        "parallel": {"cp": 2},
        "launcher": {"processes": 4},
        **sections,
    }
    return decode(TrainConfig, tree)


def offload(what: str, device: str = "cpu") -> dict[str, Any]:
    return {"zero_optimization": {what: {"device": device}}}


def settings(config: TrainConfig) -> dict[str, Any]:
    return deepspeed_config(config, config.mesh(0, config.launcher.processes), 1000)


def test_what_we_say_reaches_deepspeed() -> None:
    found = settings(train_config(engine={"zero": 3}))
    assert found["train_micro_batch_size_per_gpu"] == 2
    assert found["gradient_accumulation_steps"] == 2
    assert found["gradient_clipping"] == 0.0
    assert found["zero_optimization"]["stage"] == 3
    assert found["pipeline"] == {"pipe_partitioned": False, "grad_partitioned": False}


def test_what_they_say_alone_is_passed_on_and_what_both_say_must_agree(tmp_path) -> None:
    path = tmp_path / "ds.json"
    offload = {"device": "cpu", "pin_memory": True}
    given = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "fp16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "torch_adam": True}},
        "zero_optimization": {"stage": 2, "offload_optimizer": offload, "reduce_bucket_size": 77},
        "wall_clock_breakdown": False,
        "steps_per_print": 5,
    }
    path.write_text(json.dumps(given))
    for value in (given, str(path)):
        found = settings(train_config(value))
        assert found["zero_optimization"]["stage"] == 2
        assert found["zero_optimization"]["offload_optimizer"] == offload
        assert found["zero_optimization"]["reduce_bucket_size"] == 77
        assert found["wall_clock_breakdown"] is False
        assert found["steps_per_print"] == 5
        assert not {"train_batch_size", "optimizer", "bf16", "fp16"} & set(found)


def test_yaml_will_do(tmp_path) -> None:
    path = tmp_path / "ds.yaml"
    path.write_text("zero_optimization:\n  stage: 1\n  reduce_bucket_size: 1e3\n")
    assert settings(train_config(str(path)))["zero_optimization"]["reduce_bucket_size"] == 1000


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"train_batch_size": 16}, "train_batch_size=16, but trainer.global_batch=8"),
        ({"train_micro_batch_size_per_gpu": 1}, "train_micro_batch_size_per_gpu=1, but trainer.micro_batch=2"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4, but"),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5, but optim.clip_norm=1.0"),
        ({"gradient_clipping": 0}, "gradient_clipping=null, but optim.clip_norm=1.0"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage=1, but engine.zero=3"),
        ({"bf16": {"enabled": True}}, "bf16=bf16, but engine.dtype=fp32"),
        ({"fp16": {"enabled": True}}, "fp16=fp16, but engine.dtype=fp32"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type=Lamb, but the optimizer=AdamW"),
        ({"optimizer": {"params": {"lr": 0.1}}}, "optimizer.params.lr=0.1, but optim.lr=0.001"),
        ({"optimizer": {"params": {"momentum": 0.1}}}, "optimizer.params.momentum has no counterpart"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type=WarmupLR, but optim.schedule.kind=cosine"),
        ({"zero_optimisation": {}}, "unknown key zero_optimisation; did you mean zero_optimization?"),
        ({"xyz": 1}, "unknown key xyz; known are"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel is not DeepSpeed's to decide here; set parallel.tp"),
        (offload("offload_optimizer", "nvme"), "offload_optimizer.device=nvme"),
        ({"zero_optimization": {"zenflow": {"a": 1}}}, "zero_optimization.zenflow is not supported"),
        ({"zero_optimization": True}, "zero_optimization=True must be a mapping"),
        ("nowhere.json", "engine.deepspeed_config=nowhere.json: No such file"),
    ],
)
def test_contradictions_are_refused_with_both_values(given: Any, says: str) -> None:
    with pytest.raises(UserError, match=r"engine\.deepspeed_config") as refused:
        train_config(given, engine={"zero": 3})
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("engine", "parallel", "says"),
    [
        ({"zero": 2}, {"pp": 2}, "engine.zero=1 with parallel.pp=2, or engine.zero=2 with parallel.pp=1"),
        ({"zero": 3}, {"pp": 2, "cp": 2}, "engine.zero=3 cannot be combined with parallel.pp=2"),
        ({"zero": 1, "name": "torch"}, {}, "engine.zero is for engine.name=deepspeed, but engine.name=torch"),
        ({"deepspeed_config": {}, "name": "torch"}, {}, "engine.deepspeed_config is for engine.name=deepspeed"),
        ({"data_parallel": "fsdp"}, {}, "engine.zero=3 shards"),
        ({"zero": 4}, {}, "engine.zero"),
        (
            {"zero": 1, "deepspeed_config": {"zero_optimization": {"offload_param": {"device": "cpu"}}}},
            {},
            "needs engine.zero=3",
        ),
        ({"zero": 0, "deepspeed_config": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}, {}, "engine.zero=0"),
    ],
)
def test_what_cannot_work_is_refused(engine: dict[str, Any], parallel: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refused:
        train_config(engine=engine, parallel={"cp": 1, **parallel})
    assert says in str(refused.value)


def test_every_key_of_deepspeed_is_known() -> None:
    constants = pytest.importorskip("deepspeed.runtime.constants")
    nested = {"auto_cast", "enabled", "params", "type", "load_universal", "parallel_write", "tag_validation"}
    keys = {value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)}
    top_level = {
        key for key in keys if key.startswith(("train_", "gradient_", "zero_", "steps_", "dump_", "log_", "data_types"))
    }
    unknown = top_level - {*PASSED, *CHECKED, *REFUSED} - nested
    assert not unknown, unknown


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"zero_optimization": {"reduce_buckt_size": 5}}, "reduce_buckt_size=5: .* did you mean reduce_bucket_size"),
        ({"zero_optimization": {"reduce_bucket_size": -5}}, "reduce_bucket_size=-5"),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, "offload_optimizer.devise=cpu"),
    ],
)
def test_what_deepspeed_does_not_accept_is_told_in_one_line(given: Any, says: str) -> None:
    pytest.importorskip("deepspeed")
    with pytest.raises(UserError, match=says) as refused:
        check_by_deepspeed(settings(train_config(given)), None)
    assert "\n" not in str(refused.value)


def test_our_own_settings_are_accepted() -> None:
    pytest.importorskip("deepspeed")
    check_by_deepspeed(settings(train_config(engine={"zero": 3})), None)
