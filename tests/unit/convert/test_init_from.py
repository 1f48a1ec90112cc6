"""A run starts from converted weights, on any grid, with another rotary embedding; `lctrain sample` reads them as well."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lctrain.commands import sample
from lctrain.config.load import load
from lctrain.config.schema import TrainConfig
from lctrain.convert.native import open_native
from lctrain.data.prepare import ensure_corpora
from lctrain.engines.torch_engine import TorchEngine
from lctrain.errors import UserError
from lctrain.initial_weights import check_initial, load_initial
from lctrain.launch.ranks import close_pools, run_ranks
from lctrain.train import train


def overrides(folder: Path, *more: str) -> list[str]:
    return [
        *("--config-dir", str(folder), f"model={folder.name}", f"init_from={folder}", f"run_dir={folder.parent / 'run'}"),
        *("engine.device=cpu", *more),
    ]


def weights(rank: int, world: int, args: list[str]) -> tuple[dict, list[str]]:
    config = load(TrainConfig, "train", args)
    mesh = config.mesh(rank, world)
    engine = TorchEngine(config, mesh, mesh.make_groups(), torch.device("cpu"))
    told = load_initial(config, engine)
    found = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in engine.state()["model"].items()}
    return {name: x.clone() for name, x in found.items()}, told


@pytest.fixture(autouse=True)
def _end_ranks():
    yield
    close_pools()


@pytest.mark.parametrize("data_parallel", ["ddp", "fsdp"])
def test_every_rank_has_the_weights(make_folder, data_parallel):
    ours = make_folder()
    native = open_native(ours)
    args = overrides(ours, f"engine.data_parallel={data_parallel}", "launcher.processes=2", "parallel.cp=2")
    for found, told in run_ranks(weights, 2, args):
        assert told == []
        assert found.keys() == native.source.infos.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, native.source.read(name)), name


def test_what_may_change_is_told(make_folder):
    ours = make_folder()
    rope = ("model.attention.rope.scaling=yarn", "model.attention.rope.factor=4.0")
    told = check_initial(load(TrainConfig, "train", overrides(ours, *rope, "model.pattern=*-W-", "model.attention.window=64")))
    assert "model.pattern=*-W- (was *-*-)" in told
    assert "model.attention.rope.factor=4.0 (was None)" in told


def test_a_larger_vocabulary_gets_zero_rows(make_folder):
    ours = make_folder()
    found, told = weights(0, 1, overrides(ours, "model.vocab_size=384"))
    assert told == ["model.vocab_size=384 (was 320)"]
    assert torch.equal(found["embedding"][:320], open_native(ours).source.read("embedding"))
    assert not found["embedding"][320:].any()
    with pytest.raises(UserError, match="less than the 320 rows"):
        check_initial(load(TrainConfig, "train", overrides(ours, "model.vocab_size=300")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.norm_eps=1e-3", r"model\.norm_eps is 0\.001, but init_from"),
        ("model.pattern=*-", r"model\.pattern is \*-, but init_from"),
        ("model.attention.n_heads=8", r"model\.attention\.n_heads is 8"),
        ("init_from=/nowhere", "init_from=/nowhere does not exist"),
    ],
)
def test_another_model_is_refused_by_name(make_folder, change, message):
    with pytest.raises(UserError, match=message):
        check_initial(load(TrainConfig, "train", overrides(make_folder(), change)))


def test_a_hugging_face_folder_will_do(make_folder, run, tmp_path):
    ours = make_folder()
    run(input=ours, output=tmp_path / "hf", to="hf")
    found, told = weights(0, 1, overrides(ours, f"init_from={tmp_path / 'hf'}"))
    assert told == []
    assert all(torch.equal(x, open_native(ours).source.read(name)) for name, x in found.items())


def test_weights_that_do_not_say_what_they_are_of(make_folder, run, tmp_path):
    ours = make_folder()
    run(input=ours, output=tmp_path / "theirs", to="megatron")
    (tmp_path / "theirs" / "lctrain_model.yaml").unlink()
    with pytest.raises(UserError, match=r"convert it first with lctrain convert to=lctrain input=\S+ config=FILE\.yaml"):
        check_initial(load(TrainConfig, "train", overrides(ours, f"init_from={tmp_path / 'theirs'}")))


def first_losses(rank: int, world: int, args: list[str]):
    """Losses of a whole run."""
    import json

    from lctrain.commands.train import _prepare
    from lctrain.launch.process import Process

    config = load(TrainConfig, "train", args)
    with _prepare(config) if rank == 0 else open("/dev/null") as _:
        if world > 1:
            torch.distributed.barrier()
        train(config, Process(rank, world, rank, world))
    if rank:
        return None
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_the_recipe_runs(make_folder, tmp_path):
    """recipe=extend_context on a tiny model: three stages of growing length over two ranks, from the weights given."""
    ours = make_folder()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("To be, or not to be, that is the question. " * 300)
    args = overrides(
        ours,
        "recipe=extend_context",
        *("trainer.steps=6", "trainer.seq_len=512", "trainer.global_batch=2"),
        "trainer.stages=[{steps: 2, seq_len: 128}, {steps: 2, seq_len: 256}]",
        *("model.attention.rope.original_max_position=128", "model.attention.rope.theta=10000.0"),
        *("parallel.cp=2", "launcher.processes=2", "tracking.plot=false", "checkpoint.every=0", "optim.lr=1e-3"),
        f"data.corpora=[{{prefix: {tmp_path / 'corpus'}, source: [{tmp_path / 'text'}]}}]",
    )
    config = load(TrainConfig, "train", args)
    ensure_corpora(config.data, config.model.vocab_size)  # here, as ranks may not start processes
    losses, _ = run_ranks(first_losses, 2, args)
    assert len(losses) == 6
    random, _ = run_ranks(first_losses, 2, [*args, "init_from=null", f"run_dir={tmp_path / 'other'}"])
    assert losses[0] != pytest.approx(random[0], abs=1e-3)
    assert all(0 < loss < 20 for loss in losses)


def test_sampling_from_a_model_folder(make_folder, run, tmp_path, capsys):
    ours = make_folder()
    run(input=ours, output=tmp_path / "hf", to="hf")
    texts = []
    capsys.readouterr()
    for folder in (ours, tmp_path / "hf"):
        assert sample.main([f"run={folder}", "tokens=5", "temperature=0", "prompt=ab", "device=cpu"]) == 0
        texts.append(capsys.readouterr().out.split("\n", 1)[1])
    assert texts[0] == texts[1]
