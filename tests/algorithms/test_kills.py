"""A run that is killed again and again, whenever it happens to be, ends bit for bit as one that never was."""

import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import torch

from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.callbacks.checkpoint import RolloutCheckpoint
from lit_rlhf.checkpoints import AtomicCheckpointIO
from lit_rlhf.types import SamplingConfig
from tests.algorithms.resuming import assert_same, fit_of

SIZES = {"group_size": 2, "prompts_per_rollout": 8, "minibatches": 2, "update_epochs": 2, "max_rounds": 3}
ROLLOUTS, KILLS = 60, 20


def train(folder, devices, seed):
    """From the newest checkpoint to the end; leaves the weights behind."""
    torch.set_num_threads(1)
    last = folder / "last.ckpt"
    keeper = RolloutCheckpoint(every_n_train_steps=3, dirpath=folder)
    arguments = {**SIZES, "sampling": SamplingConfig(max_new_tokens=4)}
    path = last if last.exists() else None
    module, _ = fit_of(DAPO, arguments, ROLLOUTS, callbacks=[keeper], devices=devices, seed=seed, ckpt_path=path)
    torch.save(module.state_dict(), folder / "ended.pt")


def start(*arguments):
    process = multiprocessing.get_context("fork").Process(target=train, args=arguments)
    process.start()
    os.setpgid(process.pid, process.pid)  # a group of its own, so that a kill takes its ranks along
    return process


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_twenty_kills_change_nothing(tmp_path, devices):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    began = time.monotonic()
    start(whole, devices, 0).join()
    took = time.monotonic() - began
    moments, kills, read = random.Random(devices), 0, set()
    while kills < KILLS:
        process = start(killed, devices, 0)
        process.join(timeout=moments.uniform(0, took / KILLS))
        if process.exitcode is not None:  # the machine has become faster: the run is over before all kills are
            assert_same(torch.load(killed / "ended.pt"), torch.load(whole / "ended.pt"))
            shutil.rmtree(killed)
            killed.mkdir()
            continue
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        if (killed / "last.ckpt").exists():
            read.add(AtomicCheckpointIO().load_checkpoint(killed / "last.ckpt")["global_step"])
    assert len(read) > 3, "the kills fell too close together to say anything"
    last = start(killed, devices, 0)
    last.join()
    assert last.exitcode == 0
    assert_same(torch.load(killed / "ended.pt"), torch.load(whole / "ended.pt"))
