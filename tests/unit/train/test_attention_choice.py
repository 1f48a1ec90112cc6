"""`parallel.attention=auto` in training: the layers get what was chosen, ranks agree, the choice is told."""

from __future__ import annotations

import pytest
import torch

from lctrain import attention_choice
from lctrain.attention_choice import announce_choice, attention_strategies
from lctrain.config.load import load
from lctrain.config.schema import TrainConfig
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.sequence import SequenceMeta
from lctrain.parallel.strategy import Strategy

CPU = torch.device("cpu")


def config_of(*overrides):
    return load(TrainConfig, "train", ["model=masformer_tiny", "trainer.seq_len=512", *overrides])


AUTO = ("parallel.attention=auto", "parallel.cp=4", "launcher.processes=4")


class Listener:
    def __init__(self):
        self.messages, self.events = [], []

    def message(self, text):
        self.messages.append(text)

    def event(self, kind, **fields):
        self.events.append((kind, fields))


def test_a_named_strategy_is_that_of_every_layer():
    config = config_of("parallel.attention=usp", "parallel.cp=4", "parallel.ulysses=2", "launcher.processes=4")
    assert attention_strategies(config, CPU) == {None: Strategy("usp", 2), 256: Strategy("usp", 2)}


def test_auto_chooses_for_each_kind_of_layer_and_always_alike():
    config = config_of(*AUTO, "cluster=a10_pcie")
    chosen = attention_strategies(config, CPU)
    assert set(chosen) == {None, 256}
    assert chosen == attention_strategies(config_of(*AUTO, "cluster=a10_pcie"), CPU)


def test_alone_there_is_nothing_to_choose():
    config = config_of("parallel.attention=auto")
    listener = Listener()
    announce_choice(config, CPU, listener)
    assert set(attention_strategies(config, CPU).values()) == {Strategy()}
    assert not listener.messages + listener.events


def test_the_choice_is_told_with_all_it_was_chosen_from():
    config, listener = config_of(*AUTO), Listener()
    announce_choice(config, CPU, listener)
    chosen = attention_strategies(config, CPU)
    assert len(listener.messages) == 2
    assert all("simulated on cpu_gloo" in message for message in listener.messages)
    for kind, fields in listener.events:
        assert kind == "attention"
        assert fields["candidates"][0]["strategy"].startswith(chosen[fields["window"]].name)
        assert len(fields["candidates"]) > 4


@pytest.mark.parametrize(("name", "expected"), [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100_pcie"), ("X", "h100")])
def test_without_a_cluster_the_device_decides(monkeypatch, name, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert attention_choice.cluster_of(config_of(), torch.device("cuda", 0)).name == expected
    assert attention_choice.cluster_of(config_of(), CPU).name == "cpu_gloo"


def test_layers_find_their_strategy_by_window():
    strategies = {None: Strategy("ulysses"), 256: Strategy("all_gather")}
    seq = SequenceMeta(SequenceLayout("zigzag", 1, 4), RankGroup(), torch.zeros(1, 4), ((0, 4),), strategies)
    assert (seq.strategy(), seq.strategy(256)) == (Strategy("ulysses"), Strategy("all_gather"))
    same = SequenceMeta(SequenceLayout("zigzag", 1, 4), RankGroup(), torch.zeros(1, 4), ((0, 4),), "token_ring")
    assert same.strategy(7) == Strategy("token_ring")


def test_what_travels_for_latent_attention_is_told():
    latent = ("model.pattern=*-+-", "parallel.cp=4", "launcher.processes=4")
    config, listener = config_of(*latent), Listener()
    announce_choice(config, CPU, listener)
    assert attention_strategies(config, CPU) == {None: Strategy("ring"), "+": Strategy("ring")}
    ((kind, fields),) = listener.events
    assert (kind, fields["travel"]) == ("latent_attention", "latent")
    assert 0 < fields["latent"] < fields["heads"]
    assert "latents travel with ring" in listener.messages[0]
    heads = Listener()
    announce_choice(config_of(*latent, "model.latent_attention.travel=heads"), CPU, heads)
    assert heads.events[0][1] == {**fields, "travel": "heads"}


def test_auto_chooses_for_latent_attention_by_what_travels_there():
    config = config_of(*AUTO, "model.pattern=*-+-")
    chosen, listener = attention_strategies(config, CPU), Listener()
    announce_choice(config, CPU, listener)
    assert set(chosen) == {None, "+"}
    assert any("latent-attention layers" in message for message in listener.messages)
