"""Checkpoints in the background of a state on a GPU: copied on a stream of its own, and what changes the state comes after."""

import torch

from lctrain.checkpoint.background import Saver
from lctrain.checkpoint.store import CheckpointStore

SIDE = 2048


def test_the_copy_is_of_what_stood_before_and_not_of_what_comes_after(tmp_path):
    factor, weights = torch.randn(SIDE, SIDE, device="cuda"), torch.zeros(SIDE, SIDE, device="cuda")
    counter = torch.zeros(())  # AdamW's, which lies in host memory
    state = {"model": {"w": weights, "t": weights.t()}, "optimizer": {"step": counter}}
    saver = Saver(CheckpointStore(tmp_path, keep_last=5), asynchronous=True)
    for step in (1, 2, 3):
        for _ in range(50):
            factor = (factor @ factor).clamp_(-1, 1)  # the stream is busy when the state changes, and when it is saved
        weights.fill_(step)
        counter.fill_(step)
        saver.save(step, state, {})
        saver.before_change()
        weights.fill_(-1)
        counter.fill_(-1)
    saver.wait()
    for step in (1, 2, 3):
        back = {
            "model": {"w": torch.zeros(SIDE, SIDE, device="cuda"), "t": torch.zeros(SIDE, SIDE)},
            "optimizer": {"step": torch.zeros(())},
        }
        saver.store.load(tmp_path / f"step-{step:08d}", back)
        for tensor in (*back["model"].values(), back["optimizer"]["step"]):
            assert bool((tensor == step).all())
